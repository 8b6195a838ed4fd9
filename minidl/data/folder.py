"""ImageFolder: a folder for each class, image files in it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from minidl.data.dataset import Dataset
from minidl.data.errors import DataError, MissingDataError
from minidl.data.files import data_root
from minidl.data.image import Transform, decode, to_float

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".gif", ".tif", ".tiff", ".webp")


class ImageFolder(Dataset):
    """Images in `root`/class name/…; the classes are the folders in sorted order.

    Files are found when the dataset is made (sorted, folders inside a class too) and decoded with
    Pillow when a sample is asked for.

    Args:
        root: the folder of the classes; by default what MINIDL_DATA names.
        transform, target_transform: applied to each image (float32 (C, H, W) in [0, 1]) and each
            label (int).
        mode: "RGB" (C = 3) or "L" (grey, C = 1), what images are converted to.

    Attributes:
        classes: the names; class_to_idx: their numbers.
        samples: a list of (path, label); targets: the labels.

    Raises:
        MissingDataError: there is no such folder, or no folder in it.
        DataError: a class has no images; on access, an image is damaged.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        transform: Transform | None = None,
        target_transform: Transform | None = None,
        mode: str = "RGB",
    ) -> None:
        self.root = data_root(root)
        self.transform, self.target_transform, self.mode = transform, target_transform, mode
        if not self.root.is_dir():
            raise MissingDataError(f"{self.root}: no such folder; ImageFolder reads root/class/*")
        self.classes = sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir())
        if not self.classes:
            raise MissingDataError(f"{self.root}: no folders in it; ImageFolder reads root/class/*")
        self.class_to_idx = {name: label for label, name in enumerate(self.classes)}
        self.samples: list[tuple[str, int]] = []
        for label, name in enumerate(self.classes):
            files = sorted(p for p in Path(self.root / name).rglob("*") if is_image(p))
            if not files:
                raise DataError(f"{self.root / name}: no images ({' '.join(EXTENSIONS)}) in it")
            self.samples += [(str(path), label) for path in files]
        self.targets = [label for _, label in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        path, label = self.samples[index]
        image: Any = to_float(decode(Path(path), path, self.mode))
        if self.transform:
            image = self.transform(image)
        return image, self.target_transform(label) if self.target_transform else label

    def __repr__(self) -> str:
        return f"ImageFolder({self.root}: {len(self):,} images, {len(self.classes)} classes)"


def is_image(path: Path) -> bool:
    """Whether a path looks like an image file (by its name; not hidden)."""
    return path.suffix.lower() in EXTENSIONS and path.name[0] != "." and path.is_file()
