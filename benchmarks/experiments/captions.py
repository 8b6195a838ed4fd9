"""Captions: does the model look, does it compose, and what does freezing the CNN cost or save?

    python benchmarks/experiments/captions.py --root FOLDER --only scenes words digits flickr8k

    scenes      held-out combinations of colour and shape, with attention and without
    words       compounds that never occurred in training ("redtriangle"), by kind of token
    digits      "three seven one": a CNN that learned single digits, frozen; a random one, frozen
    flickr8k    1,000 photographs: overfitting, frozen against fine-tuned, and the traps of BLEU

Every score stands beside the same score with permuted images: what remains without looking. A part
that is not named keeps its last result. Writes results/captions.md and .json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import tracemalloc
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import RESULTS, accuracy, mean_std, table
from common import train as train_classifier

import minidl
import minidl.nn.functional as F
from minidl import data, nn, optim, transfer
from minidl.attack import deployed
from minidl.captioning import (
    Captioner,
    Encoder,
    ShowAndTell,
    ShowAttend,
    Vocabulary,
    caption_loader,
    convolutions,
    metrics,
    trunk,
)  # fmt: skip
from minidl.captioning.train import Annotated
from minidl.cli import kernels_in_words
from minidl.data import DigitStrings, ShapeScenes
from minidl.data.augment import RandomAffine, RandomCrop, RandomHorizontalFlip
from minidl.data.transforms import Compose
from minidl.optim.lr_scheduler import OneCycleLR

PARTS = ("scenes", "words", "digits", "flickr8k")


class Fit(NamedTuple):
    """A training run.

    Attributes:
        seconds: of each epoch.
        val: perplexity after each epoch, if there was a validation set.
        memory: peak of what NumPy held in two steps, in MiB.
    """

    seconds: list[float]
    val: list[float]
    memory: float


def perplexity(model: Captioner, loader: Any) -> float:
    total, words = 0.0, 0
    with minidl.no_grad(), deployed(model):
        for batch, targets in loader:
            total += F.cross_entropy(model(batch), targets, reduction="sum").item()
            words += len(targets)
    return float(np.exp(total / words))


def fit(
    model: Captioner, train_set: Any, epochs: int, lr: float, val: Any = None, batch_size: int = 64,
    weight_decay: float = 0.0, together: bool = False,
) -> Fit:  # fmt: skip
    """Adam, one cycle. With a validation set, the best epoch's weights are what remains.

    `together`: each image comes once an epoch, with all its captions; `batch_size` counts images.
    """
    words = model.vocabulary
    loader = caption_loader(
        train_set, words, batch_size, shuffle=True, together=together, prefetch_thread=True
    )
    optimizer = optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr, weight_decay=weight_decay
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    scheduler = OneCycleLR(optimizer, rates, total_steps=epochs * len(loader) + 1)

    def step(batch: Any, targets: Any) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(batch), targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    seconds, found = [], []
    best: Any = (np.inf, None)
    for epoch in range(epochs):
        began = time.perf_counter()
        model.train()
        for batch, targets in loader:
            step(batch, targets)
            scheduler.step()
        seconds.append(time.perf_counter() - began)
        if val is not None:
            found.append(perplexity(model, caption_loader(val, words, 200)))
            if found[-1] < best[0]:
                best = found[-1], {k: v.numpy().copy() for k, v in model.state_dict().items()}
        print(f"  epoch {epoch + 1}: {seconds[-1]:.0f} s {found[-1:]}", flush=True)
    model.train()
    tracemalloc.start()
    for batch, targets in itertools.islice(loader, 2):
        F.cross_entropy(model(batch), targets).backward()
    optimizer.zero_grad()
    memory = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    if val is not None:
        model.load_state_dict(best[1])
    model.eval()
    return Fit(seconds, found, memory)


def vocabulary_of(dataset: Any, kind: str = "word", min_count: int = 1) -> Vocabulary:
    return Vocabulary.build(itertools.chain(*dataset.captions), kind, min_count, 300)


# Scenes -----------------------------------------------------------------------------------


def scenes(args: argparse.Namespace) -> dict[str, Any]:
    """With attention and without, the same encoder and number of steps."""
    found: dict[str, Any] = {}
    train_set = ShapeScenes("train", args.few or SCENES)
    tests = {split: ShapeScenes(split, 20 if args.quick else 1000) for split in ("val", "test")}
    for name, decoder in (("attention", ShowAttend), ("no attention", ShowAndTell)):
        minidl.manual_seed(0)
        words = vocabulary_of(train_set)
        model = Captioner(Encoder(convolutions(WIDTHS, more=2)), decoder(words, WIDTHS[-1] + 2))
        began = time.perf_counter()
        fit(model, train_set, args.epochs or EPOCHS, 0.003, weight_decay=0.05)
        row: dict[str, Any] = {"seconds": time.perf_counter() - began}
        for split, dataset in tests.items():
            report = metrics.evaluate(model, dataset, beam=3)
            row[split] = {k: v for k, v in report._asdict().items() if k != "hypotheses"}
        found[name] = row
        print(name, row, flush=True)
    return found


SCENES, EPOCHS, WIDTHS = 20_000, 5, (16, 32, 64, 128)


def scenes_text(found: dict[str, Any]) -> list[str]:
    header = ["", "", "exact", "images permuted", "BLEU-4", "permuted", "rank of 10", "minutes"]
    names = {"val": "known pairs", "test": "held-out pairs"}
    rows = [
        [
            name if split == "val" else "",
            names[split],
            f"{100 * row[split]['exact']:.1f} %",
            f"{100 * row[split]['shuffled_exact']:.1f} %",
            f"{row[split]['bleu'][3]:.3f}",
            f"{row[split]['shuffled_bleu'][3]:.3f}",
            f"{row[split]['rank']:.2f}",
            f"{row['seconds'] / 60:.1f}" if split == "val" else "",
        ]
        for name, row in found.items()
        for split in names
    ]
    test = found["attention"]["test"]
    return [
        "## Scenes: does it compose?",
        f"{SCENES:,} scenes of 3×64×64 with all their captions, {EPOCHS} epochs from scratch; "
        "1,000 others of pairs of colour and shape that occur in training, and 1,000 that each "
        "have a pair that does not. Beam 3. *Permuted*: each caption is compared with another "
        "image's. *Rank*: of a caption's own image among ten by its likelihood (blind: 5.5).",
        table(header, rows),
        claims([
            ("held-out pairs, exact: at least 90 %", 100 * test["exact"], test["exact"] >= 0.9),
            ("BLEU-4 at least 0.85", test["bleu"][3], test["bleu"][3] >= 0.85),
            ("images permuted: under 10 %", 100 * test["shuffled_exact"],
             test["shuffled_exact"] < 0.1),
            ("minutes of training: under 10", found["attention"]["seconds"] / 60,
             found["attention"]["seconds"] < 600),
        ]),
    ]  # fmt: skip


# Words that never occurred ----------------------------------------------------------------


def words(args: argparse.Namespace) -> dict[str, Any]:
    """Scenes with compounds, by kind of token."""
    train_set = ShapeScenes("train", args.few or 12_000, compounds=True)
    test_set = ShapeScenes("test", 20 if args.quick else 500, compounds=True)
    for dataset in (train_set, test_set):  # without "there is": shorter to spell
        dataset.captions = [captions[: len(captions) // 2] for captions in dataset.captions]
    known = set(itertools.chain(*(c.split() for cs in train_set.captions for c in cs)))
    found = {}
    for kind in ("word", "character", "bpe"):
        minidl.manual_seed(0)
        tokens = vocabulary_of(train_set, kind)
        model = Captioner(Encoder(convolutions(WIDTHS, more=2)), ShowAttend(tokens, WIDTHS[-1] + 2))
        fit(model, train_set, args.epochs or 4, 0.003, weight_decay=0.05)
        report = metrics.evaluate(model, test_set, beam=3)
        new = said = invented = 0
        for sentence, truth in zip(report.hypotheses, test_set.captions):
            unknown = {w for w in truth[0].split() if w not in known}
            new += len(unknown)
            said += len(unknown & set(sentence.split()))
            there = set(itertools.chain(*map(str.split, truth)))
            invented += sum(w not in known and w not in there for w in sentence.split())
        found[kind] = {
            "tokens": len(tokens), "exact": report.exact, "shuffled": report.shuffled_exact,
            "new": new, "said": said, "invented": invented,
        }  # fmt: skip
        print(kind, found[kind], flush=True)
    return found


def words_text(found: dict[str, Any]) -> list[str]:
    header = ["tokens", "how many", "new words said", "invented", "exact", "images permuted"]
    rows = [
        [
            kind,
            row["tokens"],
            f"{row['said']} of {row['new']} ({100 * row['said'] / row['new']:.0f} %)",
            row["invented"],
            f"{100 * row['exact']:.1f} %",
            f"{100 * row['shuffled']:.1f} %",
        ]
        for kind, row in found.items()
    ]
    return [
        "## Words that never occurred in training",
        "The same scenes, colour and shape in one word: “two small redsquares”. In each of the "
        "500 test scenes stands a word that training never had, made of parts that it had. "
        "*Invented*: words that are neither in the training captions nor true of the scene.",
        table(header, rows),
        claims([
            (f"{kind}: new words are said", found[kind]["said"], found[kind]["said"] > 0)
            for kind in ("character", "bpe")
        ] + [("whole words: none can be", found["word"]["said"], found["word"]["said"] == 0)]),
    ]  # fmt: skip


# Digits -----------------------------------------------------------------------------------


def digits(args: argparse.Namespace) -> dict[str, Any]:
    """The CNN learns one-word labels and is frozen; an RNN learns to tell."""
    found: dict[str, Any] = {}
    train_set = DigitStrings(length=args.few)
    test_set = DigitStrings(train=False, length=50 if args.quick else None)
    for seed in range(args.seeds):
        for way in ("pretrained, frozen", "random, frozen", "everything learns, from scratch"):
            minidl.manual_seed(seed)
            cnn = convolutions((32, 64, 128), in_channels=1)
            classifier = nn.Sequential(*cnn, nn.Dropout(0.5), nn.Flatten(), nn.Linear(128 * 4, 10))
            if way.startswith("pretrained"):
                shifted = data.Digits(transform=RandomAffine(10, (0.1, 0.1)))
                train_classifier(classifier, shifted, 50 if args.quick else 1500)
                found.setdefault("single digits", []).append(
                    accuracy(classifier, data.Digits(train=False))
                )
            words_ = vocabulary_of(train_set)
            model = Captioner(Encoder(cnn), ShowAttend(words_, 130, 128, 64, dropout=0.5))
            learn_from: Any = train_set
            if way.endswith("frozen"):
                transfer.freeze(model, "encoder")
                learn_from = Annotated(model, train_set)
            run = fit(model, learn_from, args.epochs or 8, 0.003)
            report = metrics.evaluate(model, test_set)
            row = {"exact": 100 * report.exact, "permuted": 100 * report.shuffled_exact,
                   "seconds": float(np.median(run.seconds)), "memory": run.memory}  # fmt: skip
            found.setdefault(way, []).append(row)
            print(way, row, flush=True)
    return found


def digits_text(found: dict[str, Any]) -> list[str]:
    ways = [way for way in found if way != "single digits"]

    def column(way: str, what: str) -> list[float]:
        return [row[what] for row in found[way]]

    rows = [
        [
            way,
            mean_std(column(way, "exact")),
            mean_std(column(way, "permuted")),
            f"{np.median(column(way, 'seconds')):.1f} s",
            f"{np.median(column(way, 'memory')):.0f} MiB",
        ]
        for way in ways
    ]
    exact, random = (np.mean(column(way, "exact")) for way in ways[:2])
    permuted = max(column(ways[0], "permuted"))
    return [
        "## Digits: the lecture's recipe, and why it works",
        "Three handwritten digits side by side, “three seven one”. A CNN learns single digits "
        f"({mean_std(found['single digits'])} % right on other writers' digits), is frozen, and "
        "its annotation vectors of 5,000 strings are computed once; only the decoder learns. The "
        f"control: the same with a CNN that nobody trained. {len(found[ways[0]])} seeds; strings "
        "of 360 digits by other writers. If the three words failed as often as the one: "
        f"{np.mean([100 * (right / 100) ** 3 for right in found['single digits']]):.1f} %.",
        table(["", "exact, %", "images permuted, %", "an epoch", "memory of a step"], rows),
        claims([
            ("pretrained and frozen: at least 85 %", exact, exact >= 85),
            ("random and frozen: far less (by 20 points)", random, random <= exact - 20),
            ("images permuted: at most 1 %", permuted, permuted <= 1),
        ]),
    ]  # fmt: skip


# Photographs ------------------------------------------------------------------------------

FIXED = "a man in a blue shirt is standing on the street"


class Blind(nn.Module):
    """An encoder that does not look: what a decoder knows about captions without images."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    def forward(self, images: Any) -> Any:
        return minidl.zeros(len(images), 1, self.features)


def of_cifar(args: argparse.Namespace) -> tuple[nn.Sequential, float]:
    """A CNN that has learned CIFAR-10's ten labels, and its test accuracy."""
    minidl.manual_seed(0)
    cnn = convolutions((32, 64, 128, 128))
    classifier = nn.Sequential(*cnn, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    augment = Compose([RandomCrop(32, padding=4), RandomHorizontalFlip()])
    train_classifier(
        classifier, data.CIFAR10(args.root, transform=augment), 20 if args.quick else 4000,
        batch_size=128,
    )  # fmt: skip
    found = accuracy(classifier, data.CIFAR10(args.root, train=False))
    print(f"CIFAR-10: {found:.1f} %", flush=True)
    return trunk(classifier), found


def flickr8k(args: argparse.Namespace) -> dict[str, Any]:
    from minidl.captioning.train import open_data

    cnn, right = of_cifar(args)
    found: dict[str, Any] = {"cifar10": right}
    state = {k: v.numpy().copy() for k, v in cnn.state_dict().items()}
    splits = open_data("flickr8k", args.root, 64)

    # Can it learn at all? Fifty images by heart, one caption each.
    few = open_data("flickr8k", args.root, 64, limit=50).train
    few.captions = [captions[:1] for captions in few.captions]
    minidl.manual_seed(0)
    model = Captioner(Encoder(cnn), ShowAttend(vocabulary_of(few), 130, dropout=0.0))
    transfer.freeze(model, "encoder")
    few = Annotated(model, few)
    fit(model, few, 3 if args.quick else 60, 0.005, batch_size=10)
    report = metrics.evaluate(model, few)
    found["overfit"] = round(50 * report.exact)
    print("by heart:", found["overfit"], flush=True)

    tokens = vocabulary_of(splits.train, min_count=5)
    unknown = [n for cs in splits.test.captions for c in cs for n in tokens.encode(c)]
    found["words"] = len(tokens), float(np.mean(np.array(unknown) == 3))
    epochs, model = args.epochs or 12, None
    for way in ("no image", "frozen", "fine-tuned", "from scratch"):
        if way == "fine-tuned":  # the frozen one learns on, all of it, at a tenth of the rate
            assert model is not None
            transfer.unfreeze(model, "encoder")
            run = fit(model, splits.train, -(-epochs // 3), 0.0003, splits.val, 12, 0.01, True)
            parts: Any = splits
        else:
            minidl.manual_seed(0)
            encoder: nn.Module = Encoder(convolutions((32, 64, 128, 128)))
            if way == "frozen":
                encoder.cnn.load_state_dict(state)
            elif way == "no image":
                encoder = Blind(130)
            model = Captioner(encoder, ShowAttend(tokens, 130, 128, 128, dropout=0.5))
            parts = splits
            if way != "from scratch":
                transfer.freeze(model, "encoder")
                parts = type(splits)(*(Annotated(model, part) for part in splits))
            how = (12, 0.01, True) if way == "from scratch" else (64, 0.01)
            run = fit(model, parts.train, epochs, 0.003, parts.val, *how)
        report = metrics.evaluate(model, parts.test, beam=3)
        found[way] = {**report._asdict(), **run._asdict()}
        found[way]["hypotheses"] = report.hypotheses[:8]
        print(way, {k: v for k, v in found[way].items() if k != "hypotheses"}, flush=True)
    references = splits.test.captions
    found["fixed"] = [metrics.corpus_bleu([FIXED] * len(references), references, n)
                      for n in (1, 2, 3, 4)]  # fmt: skip
    return found


def flickr8k_text(found: dict[str, Any]) -> list[str]:
    header = ["", "perplexity", "images permuted", "ratio", "rank of 10", "BLEU-1", "BLEU-4",
              "CIDEr-D", "different captions", "an epoch", "memory of a step"]  # fmt: skip
    rows = []
    for way in ("no image", "frozen", "fine-tuned", "from scratch"):
        row = found[way]
        rows.append([
            way, f"{row['perplexity']:.2f}", f"{row['shuffled_perplexity']:.2f}",
            f"{row['shuffled_perplexity'] / row['perplexity']:.3f}", f"{row['rank']:.2f}",
            f"{100 * row['bleu'][0]:.1f}", f"{100 * row['bleu'][3]:.1f}", f"{row['cider_d']:.3f}",
            row["distinct"], f"{np.median(row['seconds']):.1f} s", f"{row['memory']:.0f} MiB",
        ])  # fmt: skip
    fixed = found["fixed"]
    rows.append([f"“{FIXED}”, always", "", "", "", "", f"{100 * fixed[0]:.1f}",
                 f"{100 * fixed[3]:.1f}", "", 1, "", ""])  # fmt: skip
    best = max(
        found[way]["shuffled_perplexity"] / found[way]["perplexity"]
        for way in ("frozen", "fine-tuned")
    )
    return [
        "## Flickr8k, 1,000 photographs: what is too little data",
        f"800 photographs of 3×64×64 with five captions each, 100 to stop early, 100 to test; "
        f"{found['words'][0]} words that occur five times ({100 * found['words'][1]:.1f} % of the "
        "test's are others). The CNN has learned CIFAR-10 "
        f"({found['cifar10']:.1f} % of the test images); then it is frozen and its vectors are "
        "computed once; then everything learns on (*fine-tuned*). *No image*: the same decoder, "
        "blind.",
        table(header, rows),
        "BLEU cannot tell looking from not looking at this size: one sentence, said of every "
        "photograph, scores as models that look do. The ratio of perplexities and the rank can.",
        claims([
            ("50 photographs by heart: at least 48 captions", found["overfit"],
             found["overfit"] >= 48),
            ("perplexity with permuted images over that with the true ones: at least 1.05", best,
             best >= 1.05),
        ]),
        "The full data set (8,000 photographs) and a published encoder, once their files are "
        "there:\n\n    minidl caption train --data flickr8k --root FOLDER --encoder resnet18 "
        "--weights resnet18.pth \\\n        --image-size 224 --min-count 5 --freeze --epochs 20",
    ]  # fmt: skip


# All ----------------------------------------------------------------------------------------


def claims(rows: list[tuple[str, float, bool]]) -> str:
    return "\n".join(
        f"- {what}: {value:.4g} ({'holds' if holds else 'DOES NOT HOLD'})"
        for what, value, holds in rows
    )


def write(out: Path, record: dict[str, Any]) -> None:
    text = ["# Captions", "Written by `benchmarks/experiments/captions.py`."]
    for part in PARTS:
        if part in record:
            text += TEXTS[part](record[part])
    text.append(f"{kernels_in_words()}.")
    (out / "captions.md").write_text("\n\n".join(text) + "\n")
    (out / "captions.json").write_text(json.dumps(record, indent=1) + "\n")


RUNS = {"scenes": scenes, "words": words, "digits": digits, "flickr8k": flickr8k}
TEXTS = {
    "scenes": scenes_text, "words": words_text, "digits": digits_text, "flickr8k": flickr8k_text,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, help="folder with the data (default: $MINIDL_DATA)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--seeds", type=int, default=3, help="of the digits")
    parser.add_argument("--quick", action="store_true", help="few steps: does it run?")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.few, args.epochs = (200, 1) if args.quick else (None, None)
    args.seeds = 1 if args.quick else args.seeds
    args.out.mkdir(parents=True, exist_ok=True)
    known = args.out / "captions.json"
    record = json.loads(known.read_text()) if known.exists() else {}
    for part in args.only:
        record[part] = RUNS[part](args)
        write(args.out, record)
    print((args.out / "captions.md").read_text())


if __name__ == "__main__":
    main()
