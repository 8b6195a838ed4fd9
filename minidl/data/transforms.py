"""Transforms that are always the same; the random ones are in `minidl.data.augment`.

Names are torchvision's. What flows through them is an image as a NumPy array, float32 (C, H, W)
in [0, 1]; a transform takes one and gives one. (torchvision's flow is a PIL image up to
`ToTensor`. Here `ToTensor` finds its work done already; PIL images are taken as well.)

A transform with the attribute `batched = True` promises that a batch (N, C, H, W) comes out as
its images would one by one. If all are, `DataLoader` transforms whole batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from minidl.data.image import to_float


class Compose:
    """One transform after the other."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = list(transforms)

    @property
    def batched(self) -> bool:
        return all(getattr(transform, "batched", False) for transform in self.transforms)

    def __call__(self, image: Any) -> Any:
        for transform in self.transforms:
            image = transform(image)
        return image

    def __repr__(self) -> str:
        return f"Compose({self.transforms})"


class ToTensor:
    """PIL images and uint8 arrays (H, W, C) or (H, W) become float32 (C, H, W) in [0, 1].

    Float arrays, which all of minidl's datasets give, pass as they are.
    """

    batched = True

    def __call__(self, image: Any) -> np.ndarray:
        if isinstance(image, Image.Image):
            image = np.asarray(image)
        if not isinstance(image, np.ndarray):
            raise TypeError(f"ToTensor takes an array or a PIL image, got {type(image).__name__}")
        if image.dtype.kind == "f":
            return image
        if image.dtype not in (np.uint8, np.uint16, np.bool_) or image.ndim not in (2, 3):
            raise ValueError(
                "ToTensor takes floats, or uint8 (H, W, C) or (H, W), got "
                f"{image.dtype} {image.shape}"
            )
        pixels = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
        return np.ascontiguousarray(to_float(pixels))

    def __repr__(self) -> str:
        return "ToTensor()"


class Normalize:
    """(image - mean) / std, for each channel.

    Raises:
        ValueError: `std` has a zero, or the number of channels differs.
    """

    batched = True

    def __init__(self, mean: Sequence[float] | float, std: Sequence[float] | float) -> None:
        self.mean = np.asarray(mean, dtype=np.float32).reshape(-1, 1, 1)
        self.std = np.asarray(std, dtype=np.float32).reshape(-1, 1, 1)
        if (self.std == 0).any():
            raise ValueError(f"Normalize: std has a zero: {std}")

    def __call__(self, image: np.ndarray) -> np.ndarray:
        channels = image.shape[-3]
        if {len(self.mean), len(self.std)} - {1, channels}:
            raise ValueError(
                f"Normalize has {len(self.mean)} means and {len(self.std)} standard deviations, "
                f"the image has {channels} channels (shape {image.shape})"
            )
        out = image - self.mean
        out /= self.std
        return out

    def __repr__(self) -> str:
        return f"Normalize(mean={self.mean.ravel().tolist()}, std={self.std.ravel().tolist()})"


class Lambda:
    """Any function. `batched=True` promises that it does for a batch what it does for an image."""

    def __init__(self, function: Callable[[Any], Any], batched: bool = False) -> None:
        self.function, self.batched = function, batched

    def __call__(self, image: Any) -> Any:
        return self.function(image)

    def __repr__(self) -> str:
        return f"Lambda({self.function})"


class Resize:
    """Resize with Pillow (bilinear, antialiased).

    Args:
        size: (H, W); or an int for the shorter side, the other in proportion.
    """

    def __init__(self, size: int | Sequence[int]) -> None:
        self.size = size

    def __call__(self, image: Any) -> Any:
        if isinstance(image, Image.Image):
            return image.resize(self._target(*image.size[::-1])[::-1], Image.Resampling.BILINEAR)
        h, w = self._target(*image.shape[-2:])
        channels = [Image.fromarray(np.ascontiguousarray(c, np.float32)) for c in image]
        return np.stack([np.asarray(c.resize((w, h), Image.Resampling.BILINEAR)) for c in channels])

    def _target(self, h: int, w: int) -> tuple[int, int]:
        if not isinstance(self.size, int):
            height, width = self.size
            return height, width
        if h <= w:
            return self.size, int(self.size * w / h)
        return int(self.size * h / w), self.size

    def __repr__(self) -> str:
        return f"Resize({self.size})"


class CenterCrop:
    """Cut out the middle; where the image is smaller, pad with zeros first.

    Args:
        size: (H, W), or an int for a square.
    """

    def __init__(self, size: int | Sequence[int]) -> None:
        self.size = (size, size) if isinstance(size, int) else (size[0], size[1])

    def __call__(self, image: Any) -> Any:
        if isinstance(image, Image.Image):
            (h, w), (width, height) = self.size, image.size
            left, top = round((width - w) / 2), round((height - h) / 2)
            return image.crop((left, top, left + w, top + h))
        h, w = self.size
        padding = [(0, 0)] * (image.ndim - 2)
        for want, have in ((h, image.shape[-2]), (w, image.shape[-1])):
            short = max(0, want - have)
            padding.append((short // 2, (short + 1) // 2))
        if any(p != (0, 0) for p in padding):
            image = np.pad(image, padding)
        top, left = round((image.shape[-2] - h) / 2), round((image.shape[-1] - w) / 2)
        return image[..., top : top + h, left : left + w]

    batched = True

    def __repr__(self) -> str:
        return f"CenterCrop({self.size})"
