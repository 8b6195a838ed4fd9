"""Which augmentation fits which data: right ones, wrong ones, and where there is nothing to gain.

    python benchmarks/experiments/augmentation.py --root FOLDER

A small CNN, the same number of training steps for every variant, and the same images for all
variants of a seed. "Nothing" (the plain images) is the control of every row. Writes
results/augmentation.md, .json and .png.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from common import accuracy, arguments, mean_std, network, plot_curves, some, table, train, write
from matplotlib.figure import Figure

import minidl
from minidl import data
from minidl.cli import kernels_in_words
from minidl.data.augment import (
    Compose,
    CutMix,
    RandomCrop,
    RandomHorizontalFlip,
    RandomRotation,
    RandomVerticalFlip,
)

# What each data set is tried with. The first is the control.
SHIFT, TURN, FLIP = RandomCrop(28, padding=2), RandomRotation(15), RandomHorizontalFlip()
CIFAR: dict[str, Any] = {
    "nothing": None,
    "flip": FLIP,
    "flip + crop": Compose([FLIP, RandomCrop(32, padding=4)]),
    "upside down": RandomVerticalFlip(),
    "flip + crop, CutMix": Compose([FLIP, RandomCrop(32, padding=4)]),
}
DIGITS: dict[str, Any] = {
    "nothing": None,
    "crop + rotation": Compose([SHIFT, TURN]),
    "flip": FLIP,
    "flip both ways": Compose([FLIP, RandomVerticalFlip()]),
}
CLOTHES: dict[str, Any] = {"nothing": None, "flip": FLIP, "flip + crop": Compose([FLIP, SHIFT])}
CURVES = {
    "CIFAR-10": ("nothing", "flip + crop"),
    "MNIST": ("nothing", "crop + rotation", "flip"),
    "Fashion-MNIST": ("nothing", "flip + crop"),
}


def run(train_set: Any, test_set: Any, name: str, transform: Any, steps: int, seed: int) -> float:
    train_set.transform = transform
    channels, size, _ = train_set[0][0].shape
    minidl.manual_seed(seed)
    model = network(10, channels, size)
    collate = CutMix(num_classes=10).collate if name.endswith("CutMix") else None
    train(model, train_set, steps, collate=collate)
    return accuracy(model, test_set)


def main() -> None:
    args = arguments(__doc__)
    start = time.perf_counter()
    sizes = (100, 300, 1000, 5000)
    # (data set, variants, images for the table, steps, test images)
    plan = [
        (data.CIFAR10, "CIFAR-10", CIFAR, 2000, 2000),
        (data.MNIST, "MNIST", DIGITS, 500, 600),
        (data.FashionMNIST, "Fashion-MNIST", CLOTHES, 500, 600),
    ]
    numbers: dict[str, Any] = {}
    text = [
        "# Which augmentation fits which data",
        f"Three convolutions, Adam and one cycle over a fixed number of steps of 64 images, "
        f"{args.seeds} seeds (mean ± standard deviation; each draws other images and other "
        "weights, the same for all variants). Test accuracy in per cent.",
    ]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (kind, title, variants, count, steps) in zip(figure.subplots(1, 3), plan):
        steps = 10 if args.quick else steps
        train_all, test_all = kind(args.root, train=True), kind(args.root, train=False)
        test_set = some(test_all, 20 if args.quick else 300, seed=0)
        found: dict[str, list[float]] = {name: [] for name in variants}
        curves = {name: {n: [] for n in sizes} for name in CURVES[title]}
        for seed in range(args.seeds):
            few = some(train_all, count // 10, seed)
            for name, transform in variants.items():
                found[name].append(run(few, test_set, name, transform, steps, seed))
            for size in sizes:
                few = some(train_all, size // 10, seed)
                for name in CURVES[title]:
                    curves[name][size].append(run(few, test_set, name, variants[name], steps, seed))
            print(f"{title}, seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
        numbers[title] = {"images": count, "steps": steps, "variants": found, "curves": curves}
        plot_curves(axes, curves, title)
        control = found["nothing"]
        rows = []
        for name, values in found.items():
            gain = np.subtract(values, control)
            rows.append([name, mean_std(values), "" if name == "nothing" else mean_std(gain)])
        text += [
            f"## {title}, {count:,} images, {steps} steps",
            table(["augmentation", "accuracy", "gain"], rows),
            table(
                ["images", *(f"{n:,}" for n in sizes)],
                [[name, *map(mean_std, points.values())] for name, points in curves.items()],
            ),
        ]
    text += ["![curves](augmentation.png)", verdict(numbers)]
    text += [f"{kernels_in_words()}; {(time.perf_counter() - start) / 60:.1f} minutes in all."]
    write(args.out, "augmentation", "\n\n".join(text) + "\n", numbers, figure)


def verdict(numbers: dict[str, Any]) -> str:
    """The claims, each beside what was measured."""

    def gain(title: str, name: str) -> float:
        variants = numbers[title]["variants"]
        return float(np.mean(np.subtract(variants[name], variants["nothing"])))

    claims = [
        ("flip + crop on 2,000 photographs: at least +4", gain("CIFAR-10", "flip + crop"), 4.0),
        ("flipped digits cost: at least 3", -gain("MNIST", "flip"), 3.0),
    ]
    lines = [
        f"- {claim} points: {value:+.1f} ({'holds' if value >= bound else 'DOES NOT HOLD'})"
        for claim, value, bound in claims
    ]
    clothes = gain("Fashion-MNIST", "flip + crop")
    lines.append(f"- 500 clothes, flip + crop: {clothes:+.1f} points, hence little or nothing.")
    return "## What was claimed\n\n" + "\n".join(lines)


if __name__ == "__main__":
    main()
