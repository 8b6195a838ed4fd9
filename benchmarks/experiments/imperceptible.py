"""Without perceptible changes: how little a photograph must change to be called something else.

    python benchmarks/experiments/imperceptible.py --root FOLDER

CIFAR-10, a network with batch norm, FGSM and PGD at ε = 1/255 to 8/255 (a byte changes by 1 to 8),
random signs as the control. Beside the accuracy stands the structural similarity of the images
before and after (SSIM, Wang et al. 2004, by scikit-image; 1: the same). Writes
results/imperceptible.md, .json and .png.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from common import accuracy, arguments, mean_std, some, table, train, write
from matplotlib.figure import Figure
from skimage.metrics import structural_similarity

import minidl
from minidl import attack, data, models, nn
from minidl.cli import kernels_in_words
from minidl.data import DataLoader
from minidl.data.augment import Compose, RandomCrop, RandomHorizontalFlip
from minidl.robustness import answers

BYTES = (1, 2, 4, 8)
ATTACKS = ("noise", "FGSM", "PGD")


def attacked(model: nn.Module, x: Any, y: Any, name: str, epsilon: float, seed: int) -> Any:
    if name == "noise":
        return attack.random_sign(x, epsilon, seed=seed)
    if name == "FGSM":
        return attack.fgsm(model, x, y, epsilon)
    return attack.pgd(model, x, y, epsilon, steps=10, seed=seed)


def similarity(before: Any, after: Any) -> float:
    """Mean SSIM of images (N, 3, H, W) in [0, 1]."""
    pairs = zip(before.numpy(), after.numpy(), strict=True)
    return float(np.mean([
        structural_similarity(a, b, channel_axis=0, data_range=1.0) for a, b in pairs
    ]))  # fmt: skip


def main() -> None:
    args = arguments(__doc__)
    start = time.perf_counter()
    train_all, test_all = data.CIFAR10(args.root), data.CIFAR10(args.root, train=False)
    found: dict[str, dict[str, dict[str, list[float]]]] = {
        name: {str(n): {"accuracy": [], "SSIM": []} for n in BYTES} for name in ATTACKS
    }
    clean = []
    for seed in range(args.seeds):
        train_set = some(train_all, 50 if args.quick else 2000, seed)
        train_set.transform = Compose([RandomHorizontalFlip(), RandomCrop(32, padding=4)])
        test_set = some(test_all, 5 if args.quick else 50, seed)
        minidl.manual_seed(seed)
        model = models.resnet8()
        train(model, train_set, 10 if args.quick else 3000, lr=5e-3)
        model.eval()
        clean.append(accuracy(model, test_set))
        for x, y in DataLoader(test_set, len(test_set)):
            for name in ATTACKS:
                for n in BYTES:
                    x_adv = attacked(model, x, y, name, n / 255, seed)
                    cell = found[name][str(n)]
                    cell["accuracy"].append(100 * attack.accuracy(model, [(x_adv, y)]))
                    cell["SSIM"].append(similarity(x, x_adv))
        print(f"seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    rows = [
        [name, *(f"{mean_std(c['accuracy'])} ({np.mean(c['SSIM']):.3f})" for c in cells.values())]
        for name, cells in found.items()
    ]
    text = [
        "# Without perceptible changes",
        f"ResNet-8 on CIFAR-10, {len(train_set):,} training images, {args.seeds} seeds; "
        f"{len(test_set)} test images, of which it names {mean_std(clean)} % rightly. Accuracy in "
        "per cent after the attack, and in brackets the structural similarity to the image before "
        "(1: the same). Images are clipped to [0, 1]; PGD takes 10 steps.",
        table(["attack", *(f"ε = {n}/255" for n in BYTES)], rows),
        "![before and after](imperceptible.png)",
        verdict(clean, found),
        f"{kernels_in_words()}; {(time.perf_counter() - start) / 60:.1f} minutes in all.",
    ]
    numbers = {"clean": clean, "attacks": found}
    figure = pictures(model, test_all, x, y, args.seeds - 1)
    write(args.out, "imperceptible", "\n\n".join(text) + "\n", numbers, figure)


def verdict(clean: list[float], found: Any) -> str:
    """The smallest PGD that halves the accuracy, what is seen of it, and its control."""
    halved = [
        n for n in BYTES if np.mean(found["PGD"][str(n)]["accuracy"]) < np.mean(clean) / 2
    ]  # fmt: skip
    if not halved:
        return "No ε tried here halves the accuracy: DOES NOT HOLD."
    n = str(halved[0])
    of = {name: {k: np.mean(v) for k, v in found[name][n].items()} for name in ATTACKS}
    holds = of["PGD"]["SSIM"] > 0.95 and of["noise"]["accuracy"] > np.mean(clean) - 5
    return (
        f"At ε = {n}/255 PGD leaves {of['PGD']['accuracy']:.1f} % of {np.mean(clean):.1f} %, at a "
        f"structural similarity of {of['PGD']['SSIM']:.3f}; noise of that size leaves "
        f"{of['noise']['accuracy']:.1f} %. Claim: half of the answers are changed at a similarity "
        f"above 0.95, and noise costs less than 5 points: {'holds' if holds else 'DOES NOT HOLD'}."
    )


def pictures(model: nn.Module, dataset: Any, x: Any, y: Any, seed: int) -> Figure:
    """Four photographs: as they are, the change times 30, and after PGD at 2/255."""
    right = np.flatnonzero(answers(model, x)[0] == y.numpy())
    chosen = right[:: max(len(right) // 4, 1)][:4]
    x, y = x[chosen], y[chosen]
    x_adv = attacked(model, x, y, "PGD", 2 / 255, seed)
    change = np.clip(0.5 + 30 * (x_adv - x).numpy(), 0, 1)
    figure = Figure(figsize=(1.8 * len(chosen), 6), layout="constrained")
    grid = figure.subplots(3, len(chosen), squeeze=False)
    for row, images in zip(grid, (x.numpy(), change, x_adv.numpy()), strict=True):
        for axis, image in zip(row, images, strict=True):
            axis.imshow(image.transpose(1, 2, 0))
            axis.set(xticks=[], yticks=[])
    for row, images in ((grid[0], x), (grid[2], x_adv)):
        for axis, label, p in zip(row, *answers(model, images), strict=True):
            axis.set_title(f"{dataset.classes[label]}, {100 * p:.0f} %", fontsize=9)
    grid[0, 0].set_ylabel("photograph")
    grid[1, 0].set_ylabel("change × 30")
    grid[2, 0].set_ylabel("after PGD, ε = 2/255")
    return figure


if __name__ == "__main__":
    main()
