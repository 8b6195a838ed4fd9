"""How few bits does a network need? Rounding after training, per tensor and per channel, and QAT.

Krishnamoorthi 2018: a scale for each channel is what makes rounding after training work, above all
where batch norms were folded. Jacob et al. 2018: training with the rounding gets back what it cost.
Esser et al. 2020: and more so where the steps are learned (LSQ). On small MNIST and Fashion-MNIST:

    python benchmarks/experiments/quantization_aware.py --root DIR     # 6 minutes on one core

writes benchmarks/results/quantization_aware.md, .json and .png.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import numpy as np
from common import accuracy, arguments, mean_std, some, table, train, write
from matplotlib.figure import Figure

import minidl
from minidl import data, nn
from minidl.cli import kernels_in_words
from minidl.data import DataLoader
from minidl.quantization import fuse, prepare_qat
from minidl.quantization.qat import WeightFakeQuantize

BITS = range(8, 1, -1)
TRAINED = (8, 4, 3, 2)  # bits, where the network is trained with its rounding
STEPS, TUNING = 500, 150
NAMES = {
    "tensor": "weights, per tensor",
    "channel": "weights, per channel",
    "inputs": "weights and inputs",
    "qat": "QAT",
    "lsq": "LSQ",
}
BEFORE, FLOAT = 0, 32  # "bits" of the network that all start from, and of floats trained on


def network() -> nn.Sequential:
    """The small CNN of the other experiments, with batch norm."""
    layers: dict[str, nn.Module] = {}
    channels = 1
    for i, width in enumerate((16, 32, 64)):
        layers |= {
            f"conv{i}": nn.Conv2d(channels, width, 3, padding=1, bias=False),
            f"bn{i}": nn.BatchNorm2d(width), f"relu{i}": nn.ReLU(), f"pool{i}": nn.MaxPool2d(2),
        }  # fmt: skip
        channels = width
    return nn.Sequential(layers | {"flatten": nn.Flatten(), "fc": nn.Linear(576, 10)})


def folded(model: nn.Module) -> nn.Module:
    return fuse(model, [[f"conv{i}", f"bn{i}"] for i in range(3)])


def products(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


@minidl.no_grad()
def rounded(model: nn.Module, bits: int, per_channel: bool) -> nn.Module:
    """A copy with rounded weights; all else in floats."""
    model = copy.deepcopy(model)
    for layer in products(model):
        layer.weight.copy_(WeightFakeQuantize(layer.weight, bits, per_channel, False)(layer.weight))
    return model


@minidl.no_grad()
def calibrated(model: nn.Module, bits: int, images: Any) -> nn.Module:
    """A copy with rounded weights and inputs: prepared for training, and not trained."""
    model = prepare_qat(model, bits, observer="mse", batches=1)
    model(images)
    return model


def tuned(model: nn.Module, few: Any, seed: int, steps: int) -> nn.Module:
    """Trained on, with the same batches for all variants."""
    minidl.manual_seed(1000 + seed)
    train(model, few, steps, lr=1e-3)
    return model


def spread(model: nn.Module) -> list[float]:
    """How much larger the largest weight of a layer is than that of its median channel."""
    largest = [np.abs(p.weight.numpy()).reshape(len(p.weight), -1).max(1) for p in products(model)]
    return [float(channels.max() / np.median(channels)) for channels in largest]


def run(pair: Any, seed: int, quick: bool) -> dict[str, Any]:
    """Accuracy in per cent, for each way and number of bits; and the `spread`s."""
    few, test_set = some(pair[0], 50 if quick else 1000, seed), pair[1]
    tuning = 12 if quick else TUNING
    minidl.manual_seed(seed)
    model = network()
    train(model, few, 10 if quick else STEPS)
    low = folded(model)
    images = next(iter(DataLoader(few, 500, shuffle=True, seed=seed)))[0]
    found: dict[str, Any] = {name: {} for name in NAMES}
    for bits in BITS:
        found["tensor"][bits] = accuracy(rounded(low, bits, False), test_set)
        found["channel"][bits] = accuracy(rounded(low, bits, True), test_set)
        found["inputs"][bits] = accuracy(calibrated(low, bits, images), test_set)
    for bits in TRAINED:
        for name, learned in (("qat", False), ("lsq", True)):
            qat = prepare_qat(model, bits, learned=learned, batches=10)
            found[name][bits] = accuracy(tuned(qat, few, seed, tuning), test_set)
    found["float"] = {
        BEFORE: accuracy(model, test_set),
        FLOAT: accuracy(tuned(copy.deepcopy(model), few, seed, tuning), test_set),
    }
    found["spread"] = {"as trained": spread(model), "folded": spread(low)}
    return found


def main() -> None:
    args = arguments(__doc__)
    start = time.perf_counter()
    kinds = {"MNIST": data.MNIST, "Fashion-MNIST": data.FashionMNIST}
    runs: dict[str, list[dict[str, Any]]] = {}
    for title, kind in kinds.items():
        train_set, test_set = (kind(args.root, train=t) for t in (True, False))
        pair = train_set, some(test_set, 20 if args.quick else 300, 0)
        runs[title] = [run(pair, seed, args.quick) for seed in range(args.seeds)]
        print(f"{title}: {time.perf_counter() - start:.0f} s", flush=True)
    text = [
        "# How few bits does a network need?",
        f"A CNN with three convolutions (16, 32, 64 channels) and batch norms; 10,000 images, "
        f"{STEPS} steps of 64, Adam, one cycle; {args.seeds} seeds (mean ± standard deviation; "
        "each draws other images and weights). Accuracy in per cent on "
        f"{len(pair[1]):,} test images.",
        "*Weights*: batch norms folded, then weights rounded to so many bits, with one scale for a "
        "layer or for each of its output channels; all else in floats. *Weights and inputs*: per "
        "channel, and the inputs of all layers too (range of the smallest squared error, 500 "
        f"images). *QAT*: the same numbers are rounded in {TUNING} more steps of training, steps "
        "from the largest number; *LSQ*: steps learned. *float*: as many more steps without "
        "rounding.",
        *(f"## {title}\n\n{accuracies(found)}" for title, found in runs.items()),
        "![accuracy against bits](quantization_aware.png)",
        "## Why a scale for each channel",
        "The largest weight of a layer against that of its median channel: by so much one scale "
        "for all is too coarse for half of the channels. Mean over the seeds.",
        spreads(runs),
        verdict(runs),
        f"{kernels_in_words()}; {(time.perf_counter() - start) / 60:.1f} minutes in all.",
    ]
    write(args.out, "quantization_aware", "\n\n".join(text) + "\n", runs, draw(runs))


def column(runs: list[dict[str, Any]], name: str, bits: int) -> np.ndarray:
    return np.array([found[name][bits] for found in runs])


def accuracies(runs: list[dict[str, Any]]) -> str:
    rows = [
        [bits, *(mean_std(column(runs, name, bits)) if bits in runs[0][name] else ""
                 for name in NAMES)]
        for bits in BITS
    ]  # fmt: skip
    before, after = (mean_std(column(runs, "float", bits)) for bits in (BEFORE, FLOAT))
    rows.append(["float", before, before, before, after, after])
    return table(["bits", *NAMES.values()], rows)


def spreads(runs: dict[str, Any]) -> str:
    layers = ["conv0", "conv1", "conv2", "fc"]
    rows = [
        [title, kind, *(f"{v:.1f}" for v in np.mean([r["spread"][kind] for r in found], axis=0))]
        for title, found in runs.items()
        for kind in found[0]["spread"]
    ]
    return table(["", "", *layers], rows)


def draw(runs: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, (title, found) in zip(figure.subplots(1, 2, sharey=True), runs.items()):
        for name, label in NAMES.items():
            bits = list(found[0][name])
            values = np.array([column(found, name, b) for b in bits])
            axes.errorbar(bits, values.mean(1), values.std(1), marker="o", ms=3, capsize=3,
                          ls="-" if name in ("qat", "lsq") else "--", label=label)  # fmt: skip
        axes.axhline(column(found, "float", BEFORE).mean(), color="black", lw=0.8, label="float")
        axes.set(title=title, xlabel="bits", ylabel="test accuracy (%)")
        axes.invert_xaxis()
        axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return figure


def verdict(runs: dict[str, Any]) -> str:
    """The claims, each beside what was measured."""
    lines = []

    def claim(what: str, difference: np.ndarray, holds: bool) -> None:
        by_seed = ", ".join(f"{d:+.1f}" for d in difference)
        said = "holds" if holds else "DOES NOT HOLD"
        lines.append(f"- {what}: {difference.mean():+.1f} points, by seed {by_seed} ({said})")

    for title, found in runs.items():

        def of(name: str, bits: int, found: Any = found) -> np.ndarray:
            return column(found, name, bits)

        gain = of("channel", 3) - of("tensor", 3)
        claim(f"{title}: 3-bit weights, per channel is better by 0.5", gain, gain.mean() >= 0.5)
        lost = of("tensor", 2) - of("float", BEFORE)
        claim(f"{title}: 2 bits per tensor collapse (lose 30)", lost, lost.mean() < -30)
        lost = of("channel", 8) - of("float", BEFORE)
        claim(f"{title}: 8-bit weights lose at most 0.3", lost, lost.mean() >= -0.3)
        for name in ("qat", "lsq"):
            lost = of(name, 4) - of("float", FLOAT)
            claim(f"{title}: 4 bits, {NAMES[name]} loses at most 2", lost, lost.mean() >= -2)
        for bits in (3, 2):
            gain = of("qat", bits) - of("inputs", bits)
            claim(f"{title}: {bits} bits, QAT beats rounding", gain, bool((gain > 0).all()))
        gain = of("lsq", 2) - of("qat", 2)
        claim(f"{title}: 2 bits, learned steps are better", gain, bool((gain > 0).all()))
    return "## What was claimed\n\n" + "\n".join(lines)


if __name__ == "__main__":
    main()
