"""A contact sheet: what each random transform makes of one image (`minidl augment`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from minidl.data import augment
from minidl.data.image import decode, to_float
from minidl.data.transforms import CenterCrop, Resize


def read_images(paths: Sequence[Path], size: int) -> np.ndarray:
    """Image files as squares: (N, 3, size, size) float32 in [0, 1].

    Raises:
        MissingDataError, DataError: a file is not there, or no image.
    """
    prepare = augment.Compose([Resize(size), CenterCrop(size)])
    return np.stack([prepare(to_float(decode(path, path, "RGB"))) for path in paths])


def transforms_for(size: int) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """One of each kind, at a strength that is usual for photographs."""
    eighth = max(size // 8, 1)
    chosen: list[augment.RandomTransform] = [
        augment.RandomHorizontalFlip(),
        augment.RandomVerticalFlip(),
        augment.RandomCrop(size, padding=eighth),
        augment.RandomResizedCrop(size),
        augment.RandomRotation(20),
        augment.RandomAffine(10, translate=(0.1, 0.1), scale=(0.8, 1.2), shear=15),
        augment.ColorJitter(0.4, 0.4, 0.4, 0.1),
        augment.GaussianNoise(),
        augment.Cutout(3 * eighth),
        augment.RandAugment(),
    ]
    return {type(transform).__name__: transform for transform in chosen}


def draw_contact_sheet(images: np.ndarray, path: Path, columns: int = 8) -> int:
    """A row for each transform, `columns` versions of the first image in it.

    Args:
        images: (N, C, H, W) float in [0, 1]; with two or more, the mixtures are shown too.
        path: the picture to write.

    Returns:
        The number of rows.
    """
    from matplotlib.figure import Figure

    rows = {
        name: transform(np.repeat(images[:1], columns, axis=0))
        for name, transform in transforms_for(images.shape[-1]).items()
    }
    if len(images) > 1:
        pairs = np.concatenate([images[[1, 0]]] * columns)  # each one's neighbour is the other
        for mix in (augment.MixUp(num_classes=2), augment.CutMix(num_classes=2)):
            mixed, _ = mix(pairs, np.arange(2 * columns) % 2)
            rows[type(mix).__name__] = mixed.numpy()[1::2]
    figure = Figure(figsize=(1.0 * columns + 2.2, 1.05 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes, (name, versions) in zip(grid, rows.items()):
        for axis, version in zip(axes, versions):
            picture = version.transpose(1, 2, 0).clip(0, 1)
            axis.imshow(
                picture.squeeze(-1) if picture.shape[2] == 1 else picture, "gray", vmin=0, vmax=1
            )
            axis.set(xticks=[], yticks=[])
        axes[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    figure.savefig(path, dpi=100)
    return len(rows)
