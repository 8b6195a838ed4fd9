"""What `minidl attack` measures and draws: how far a network's answers stand a change of pixels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import minidl
from minidl import attack, nn
from minidl.data import DataLoader, Subset
from minidl.nn import functional as F
from minidl.serialization import atomic_path

__all__ = ["ATTACKS", "draw_curves", "draw_sheet", "measure", "write"]

ATTACKS = {"noise": "random signs", "fgsm": "FGSM", "bim": "BIM", "pgd": "PGD"}


def measure(
    model: nn.Module,
    dataset: Any,
    epsilons: Sequence[float],
    images: int,
    steps: int,
    seed: int,
    batch_size: int = 250,
) -> Iterator[dict[str, float]]:
    """Accuracy in [0, 1] under each attack: a row for epsilon 0, then one for each epsilon.

    Args:
        dataset: of (image, label), images in [0, 1]; its first `images` are attacked.
        steps: of BIM and PGD.
        seed: of the noise and of PGD's start.
    """
    batches = list(DataLoader(Subset(dataset, range(min(images, len(dataset)))), batch_size))
    attacks: dict[str, attack.Attack] = {
        "noise": lambda model, x, y, e: attack.random_sign(x, e, seed=seed),
        "fgsm": attack.fgsm,
        "bim": lambda model, x, y, e: attack.bim(model, x, y, e, steps=steps),
        "pgd": lambda model, x, y, e: attack.pgd(model, x, y, e, steps=steps, seed=seed),
    }
    yield {"epsilon": 0.0, **dict.fromkeys(ATTACKS, attack.accuracy(model, batches))}
    for epsilon in epsilons:
        yield {
            "epsilon": epsilon,
            **{k: attack.accuracy(model, batches, a, epsilon) for k, a in attacks.items()},
        }


def write(rows: Sequence[dict[str, float]], settings: dict[str, Any], out: Path) -> None:
    """Write ``attack.json``: the settings, and the rows of `measure`."""
    with atomic_path(out / "attack.json") as part:
        part.write_text(json.dumps({**settings, "accuracy": list(rows)}, indent=1) + "\n")


def draw_curves(rows: Sequence[dict[str, float]], path: Path) -> None:
    """Accuracy against epsilon, a curve for each attack."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, title in ATTACKS.items():
        style = "--" if name == "noise" else "-"
        epsilons, shares = [r["epsilon"] for r in rows], [100 * r[name] for r in rows]
        axes.plot(epsilons, shares, style, marker="o", ms=3, label=title)
    axes.set(xlabel="ε (a pixel is in [0, 1])", ylabel="accuracy (%)", ylim=(-2, 102))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def draw_sheet(model: nn.Module, dataset: Any, epsilon: float, path: Path, count: int = 6) -> None:
    """Images before and after FGSM, the signs between them, and what the network says of both.

    Shown are the first images that it names rightly: one of each class as far as there is room.
    """
    from matplotlib.figure import Figure

    x, y = chosen(model, dataset, count)
    x_adv = attack.fgsm(model, x, y, epsilon)
    signs = np.sign(attack.input_gradient(model, x, y).array)
    figure = Figure(figsize=(1.7 * len(x), 6.4), layout="constrained")
    grid = figure.subplots(3, len(x), squeeze=False)
    for column, axes in enumerate(grid.T):
        for axis, picture in zip(axes, (x.array, (signs + 1) / 2, x_adv.array), strict=True):
            pixels = picture[column].transpose(1, 2, 0)
            axis.imshow(
                pixels.squeeze(-1) if pixels.shape[2] == 1 else pixels, "gray", vmin=0, vmax=1
            )
            axis.set(xticks=[], yticks=[])
    for row, images in ((0, x), (2, x_adv)):
        for column, (label, confidence) in enumerate(zip(*answers(model, images), strict=True)):
            right = label == int(y.array[column])
            grid[row, column].set_title(
                f"{dataset.classes[label]}\n{100 * confidence:.0f} %",
                fontsize=9, color="black" if right else "C3",
            )  # fmt: skip
    grid[0, 0].set_ylabel("image")
    grid[1, 0].set_ylabel("sign(∇ₓ J)")
    grid[2, 0].set_ylabel(f"image + {epsilon:g} · sign")
    figure.savefig(path, dpi=150)


def answers(model: nn.Module, x: minidl.Tensor) -> tuple[Any, Any]:
    """For each image the class that the model names, and its confidence in [0, 1]."""
    with minidl.no_grad(), attack.deployed(model):
        p = F.softmax(model(x), dim=1).numpy()
    return p.argmax(axis=1), p.max(axis=1)


def chosen(model: nn.Module, dataset: Any, count: int) -> tuple[minidl.Tensor, minidl.Tensor]:
    """The first images that the model names rightly, of as many classes as possible."""
    x, y = next(iter(DataLoader(dataset, min(len(dataset), 500))))
    right = np.flatnonzero(answers(model, x)[0] == y.numpy())
    right = right if len(right) else np.arange(len(y))
    _, first = np.unique(y.numpy()[right], return_index=True)
    order = np.concatenate([np.sort(first), np.setdiff1d(np.arange(len(right)), first)])
    index = right[order[:count]]
    return x[index], y[index]
