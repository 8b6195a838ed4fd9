"""What the experiments share: few images, a short training run, a table, a plot."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import minidl
import minidl.nn.functional as F
from minidl import nn, optim
from minidl.attack import deployed
from minidl.backend.native import native
from minidl.data import DataLoader, ImageDataset
from minidl.optim.lr_scheduler import OneCycleLR

RESULTS = Path(__file__).parents[1] / "results"


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--root", type=Path, help="folder with the data (default: $MINIDL_DATA)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one seed, few steps: does it run?")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if native:
        native.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    args.seeds = 1 if args.quick else args.seeds
    return args


def some(dataset: Any, per_class: int, seed: int, classes: Sequence[int] = ()) -> ImageDataset:
    """`per_class` images of each class, drawn by the seed; classes are numbered anew from 0.

    Raises:
        ValueError: a class has fewer.
    """
    classes = classes or range(len(dataset.classes))
    rng = np.random.default_rng(seed)
    chosen = []
    for label in classes:
        there = np.flatnonzero(dataset.targets == label)
        if len(there) < per_class:
            raise ValueError(f"class {label} has {len(there)} images, {per_class} are wanted")
        chosen.append(rng.permutation(there)[:per_class])
    labels = np.repeat(np.arange(len(classes)), per_class)
    return ImageDataset(dataset.data[np.concatenate(chosen)], labels)


def network(num_classes: int, channels: int = 1, size: int = 28) -> nn.Sequential:
    """Three convolutions, each halved by max pooling, and a linear head."""
    layers: list[nn.Module] = []
    for width in (16, 32, 64):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        channels = width
    head = nn.Linear(64 * (size // 8) ** 2, num_classes)
    return nn.Sequential({f"layer{i}": layer for i, layer in enumerate(layers)}
                         | {"flatten": nn.Flatten(), "fc": head})  # fmt: skip


def train(
    model: nn.Module,
    dataset: Any,
    steps: int,
    lr: float = 2e-3,
    batch_size: int = 64,
    collate: Callable[[list[Any]], Any] | None = None,
    params: Any = None,
    watch: Callable[[int], None] | None = None,
) -> None:
    """A fixed number of steps (not epochs: all variants get the same work), Adam, one cycle.

    `watch` is called after every step with the number of steps done.
    """
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = optim.Adam(params or learning, lr)
    rates = [group["lr"] for group in optimizer.param_groups]
    scheduler = OneCycleLR(optimizer, rates, total_steps=steps + 1)
    loader = DataLoader(
        dataset, min(batch_size, len(dataset)), shuffle=True, drop_last=True, collate_fn=collate
    )
    model.train()
    done = 0
    while done < steps:
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()
            done += 1
            if watch:
                watch(done)
            if done == steps:
                break


@minidl.no_grad()
def accuracy(model: nn.Module, dataset: Any) -> float:
    """In per cent."""
    right = 0
    with deployed(model):
        for x, y in DataLoader(dataset, 250):
            right += int((model(x).argmax(dim=1) == y).sum().item())
    return 100 * right / len(dataset)


def mean_std(values: Sequence[float]) -> str:
    spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
    return f"{np.mean(values):.1f} ± {spread:.1f}"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def plot_curves(axes: Any, curves: dict[str, dict[int, list[float]]], title: str) -> None:
    """Mean and standard deviation against the number of images, on a logarithmic axis."""
    for name, points in curves.items():
        sizes = list(points)
        means = [np.mean(v) for v in points.values()]
        spread = [np.std(v, ddof=1) if len(v) > 1 else 0 for v in points.values()]
        style = "--" if name in ("nothing", "frozen-random") else "-"
        axes.errorbar(sizes, means, spread, fmt=style + "o", ms=3, capsize=3, label=name)
    axes.set(xscale="log", title=title, ylabel="test accuracy (%)")
    axes.set_xticks(sizes, [f"{n:,}" for n in sizes])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)


def write(out: Path, name: str, text: str, numbers: Any, figure: Any) -> None:
    """NAME.md, NAME.json and NAME.png."""
    (out / f"{name}.md").write_text(text)
    (out / f"{name}.json").write_text(json.dumps(numbers, indent=1) + "\n")
    figure.savefig(out / f"{name}.png", dpi=110)
    print(text)
