"""When does transfer learning pay? Few images, four ways to use what was learned elsewhere.

    python benchmarks/experiments/transfer.py --root FOLDER

    scratch         random weights, everything learns
    frozen          pretrained layers stay, a new head learns on their cached features
    fine-tuned      pretrained, a new head, everything learns, earlier layers more slowly
    frozen-random   the control: layers stay as random as they were initialised

All get the same images and the same number of steps. Writes results/transfer.md, .json and .png.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
from common import accuracy, arguments, mean_std, network, plot_curves, some, table, train, write
from matplotlib.figure import Figure

import minidl
import minidl.nn.functional as F
from minidl import data, models, nn, optim, transfer
from minidl.cli import kernels_in_words
from minidl.data import DataLoader, ImageDataset
from minidl.data.transforms import Resize

WAYS = ("scratch", "frozen", "fine-tuned", "frozen-random")
Make = Callable[[int], nn.Module]  # number of classes -> a network with random weights


def learn(way: str, make: Make, source: dict[str, Any], train_set: Any, steps: int) -> nn.Module:
    """A network for `train_set`, made in one of the ways; `source`: the pretrained state_dict."""
    model = make(len(set(train_set.targets)))
    if way in ("frozen", "fine-tuned"):
        body = {name: value for name, value in source.items() if not name.startswith("fc.")}
        model.load_state_dict({**model.state_dict(), **body})
    if way.startswith("frozen"):
        transfer.freeze(model, depth=-1)
        features, head_layers = transfer.cache_features(model, train_set)
        train(head_layers, features, steps, lr=5e-3)
    elif way == "fine-tuned":
        train(model, train_set, steps, params=transfer.discriminative_lr(model, 2e-3))
    else:
        train(model, train_set, steps)
    return model


def compare(
    make: Make, source: list[dict[str, Any]], train_all: Any, test_set: Any, sizes: Any,
    steps: int, classes: Any = (),
) -> dict[str, dict[int, list[float]]]:  # fmt: skip
    """Accuracy of every way at every number of images a class, for each seed."""
    found: dict[str, dict[int, list[float]]] = {way: {n: [] for n in sizes} for way in WAYS}
    for seed, state in enumerate(source):
        for n in sizes:
            few = some(train_all, n, seed, classes)
            for way in WAYS:
                minidl.manual_seed(100 + seed)
                found[way][n].append(accuracy(learn(way, make, state, few, steps), test_set))
    return found


def pretrain(make: Make, dataset: Any, classes: int, steps: int, seed: int) -> dict[str, Any]:
    minidl.manual_seed(seed)
    model = make(classes)
    train(model, dataset, steps)
    return model.state_dict()


def resized(dataset: Any, size: int = 32) -> ImageDataset:
    """All images as (3, size, size), once."""
    resize = Resize((size, size))
    images = np.stack([resize(dataset[i][0]).clip(0, 1) for i in range(len(dataset))])
    images = np.broadcast_to(images, (len(images), 3, size, size)).astype(np.float32)
    small = ImageDataset(images, dataset.targets)
    small.classes = dataset.classes
    return small


def efficiency(steps: int) -> list[list[str]]:
    """Time and memory of an epoch over 1,000 images of 3×32×32: ResNet-8, batches of 50."""
    minidl.manual_seed(0)
    images, labels = minidl.rand(1000, 3, 32, 32), np.arange(1000) % 10
    plain = ImageDataset(images.numpy(), labels)

    def epoch(model: nn.Module, dataset: Any, batches: int = 20) -> None:
        optimizer = optim.Adam([p for p in model.parameters() if p.requires_grad])
        model.train()
        for _, (x, y) in zip(range(batches), DataLoader(dataset, 50)):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    model = models.resnet8(10)
    cases = [("everything learns", model, plain)]
    frozen = models.resnet8(10)
    transfer.freeze(frozen, depth=-1)
    cases.append(("frozen", frozen, plain))
    began = time.perf_counter()
    features, head = transfer.cache_features(frozen, plain)
    caching = time.perf_counter() - began
    cases.append(("frozen, features cached", head, features))
    times: dict[str, list[float]] = {name: [] for name, _, _ in cases}
    for _ in range(max(1, steps)):  # interleaved, so that all see the same machine
        for name, part, dataset in cases:
            began = time.perf_counter()
            epoch(part, dataset)
            times[name].append(time.perf_counter() - began)
    rows = []
    for name, part, dataset in cases:
        tracemalloc.start()
        epoch(part, dataset, 2)
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        seconds = min(times[name])
        ratio = min(times["everything learns"]) / seconds
        rows.append(
            [name, f"{1000 * seconds:.0f} ms", f"{ratio:.1f}×", f"{memory / 2**20:.1f} MiB"]
        )
    rows.append(["(to cache the features, once)", f"{1000 * caching:.0f} ms", "", ""])
    return rows


def main() -> None:
    args = arguments(__doc__)
    start = time.perf_counter()
    seeds, q = range(args.seeds), args.quick
    steps, before = (5, 10) if q else (150, 500)
    grey: Make = lambda n: network(n, 1, 28)  # noqa: E731
    colour: Make = lambda n: network(n, 3, 32)  # noqa: E731
    half, other = range(5), range(5, 10)
    found: dict[str, Any] = {}

    def note(title: str, curves: Any) -> None:
        found[title] = curves
        print(f"{title}: {time.perf_counter() - start:.0f} s", flush=True)
        print(results(curves), flush=True)

    train_all, test_all = data.MNIST(args.root), data.MNIST(args.root, train=False)
    source = [pretrain(grey, some(train_all, 2000, s, half), 5, before, s) for s in seeds]
    test_set = some(test_all, 200, 0, other)
    note(
        "digits 0-4 → 5-9",
        compare(grey, source, train_all, test_set, (1, 5, 50, 200), steps, other),
    )

    cifar = data.CIFAR10(args.root)
    few = some(cifar, 20 if q else 2000, 0)
    source = [pretrain(colour, few, 10, before * 2, 0)] * args.seeds
    path = "hymenoptera_96/hymenoptera_96.npz"
    root = data.files.data_root(args.root)
    bees = resized(data.NPZ(root / path))
    note(
        "CIFAR-10 → ants and bees",
        compare(colour, source, bees, resized(data.NPZ(root / path, "val")), (1, 5, 20), steps),
    )
    medical = resized(some_first(data.NPZ(root / "mednist_6x1000/mednist_6x1000_jpeg.npz"), 150))
    learn_from, test_set = apart(medical, 50)
    note("CIFAR-10 → MedNIST", compare(colour, source, learn_from, test_set, (1, 5, 20), steps))

    clothes = some(data.FashionMNIST(args.root), 20 if q else 2000, 0)
    source = [pretrain(grey, clothes, 10, before, 0)] * args.seeds
    lungs = root / "pneumoniamnist/pneumoniamnist_rebuilt.npz"
    note(
        "Fashion-MNIST → PneumoniaMNIST",
        compare(grey, source, data.NPZ(lungs), data.NPZ(lungs, "test"), (5, 20, 100), steps),
    )

    text = [
        "# When does transfer learning pay?",
        f"Three convolutions and a linear head; {steps} steps of Adam for every way, on the same "
        f"images; {args.seeds} seeds (mean ± standard deviation: other images, another "
        "initialisation). Test accuracy in per cent against images a class. *frozen-random* is the "
        "control: the same head, on features that nobody learned.",
    ]
    figure = Figure(figsize=(15, 3.6), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, len(found)), found.items()):
        plot_curves(axes, curves, title)
        axes.set(xlabel="images a class")
        text += [f"## {title}", results(curves)]
    text += ["![curves](transfer.png)"]
    costs = efficiency(1 if q else 3)
    text += [
        "## What an epoch costs",
        "ResNet-8, 1,000 images of 3×32×32 (the shortest of three epochs; the peak of what NumPy "
        "held in two steps).",
        table(["", "an epoch", "faster", "memory"], costs),
        verdict(found, costs),
        f"{kernels_in_words()}; {(time.perf_counter() - start) / 60:.1f} minutes in all.",
    ]
    write(
        args.out, "transfer", "\n\n".join(text) + "\n", {"accuracy": found, "epoch": costs}, figure
    )


def results(curves: dict[str, dict[int, list[float]]]) -> str:
    rows = [[way, *map(mean_std, points.values())] for way, points in curves.items()]
    return table(["images a class", *map(str, curves["scratch"])], rows)


def some_first(dataset: Any, per_class: int) -> ImageDataset:
    """The first images of each class, so that not all need to be decoded."""
    labels = dataset.targets
    index = np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in np.unique(labels)])
    part = ImageDataset(dataset.data[index], labels[index])
    part.classes = dataset.classes
    return part


def apart(dataset: Any, per_class: int) -> tuple[ImageDataset, ImageDataset]:
    """(`per_class` images of each class, the others)."""
    labels = dataset.targets
    index = np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in np.unique(labels)])
    rest = np.setdiff1d(np.arange(len(labels)), index)
    parts = [ImageDataset(dataset.data[i], labels[i]) for i in (index, rest)]
    for part in parts:
        part.classes = dataset.classes
    return parts[0], parts[1]


def verdict(found: dict[str, Any], costs: list[list[str]]) -> str:
    """The claims, each beside what was measured."""

    def mean(title: str, way: str, n: int) -> float:
        return float(np.mean(found[title][way][n]))

    digits = "digits 0-4 → 5-9"
    lines = []
    for control in ("scratch", "frozen-random"):
        gain = mean(digits, "frozen", 5) - mean(digits, control, 5)
        holds = "holds" if gain >= 5 else "DOES NOT HOLD"
        lines.append(f"- digits, 5 a class: frozen beats {control} by at least 5 points: "
                     f"{gain:+.1f} ({holds})")  # fmt: skip
    faster = float(costs[2][2].rstrip("×"))
    holds = "holds" if faster >= 5 else "DOES NOT HOLD"
    lines.append(f"- an epoch on cached features is at least 5× faster: {faster:.1f}× ({holds})")
    for title, n in (
        ("CIFAR-10 → ants and bees", 20),
        ("CIFAR-10 → MedNIST", 5),
        ("Fashion-MNIST → PneumoniaMNIST", 20),
    ):
        best = max(mean(title, way, n) for way in ("frozen", "fine-tuned"))
        controls = max(mean(title, way, n) for way in ("scratch", "frozen-random"))
        lines.append(f"- {title}, {n} a class: the better of frozen and fine-tuned over the better "
                     f"of scratch and frozen-random: {best - controls:+.1f} points")  # fmt: skip
    return "## What was claimed\n\n" + "\n".join(lines)


if __name__ == "__main__":
    main()
