"""Random transforms: each epoch the network sees another version of every image.

Each draws from `minidl.data.sample_rngs`, the streams of the samples that are being loaded, so
what becomes of an image depends on (seed, epoch, index) only. All take one image (C, H, W) or a
batch (N, C, H, W), and treat every image of a batch as they would treat it alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minidl.data.randomness import sample_rngs
from minidl.data.transforms import Compose

__all__ = ["Compose", "RandomCrop", "RandomHorizontalFlip"]


class RandomHorizontalFlip:
    """Mirror left and right, with probability `p`. (Not for digits: a mirrored 2 is no digit.)

    Raises:
        ValueError: `p` is not in [0, 1].
    """

    batched = True

    def __init__(self, p: float = 0.5) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"p is a probability, got {p}")
        self.p = p

    def __call__(self, image: np.ndarray) -> np.ndarray:
        if image.ndim == 3:
            return self(image[None])[0]
        flip = np.array([rng.random() < self.p for rng in sample_rngs(len(image))], dtype=bool)
        return np.where(flip[:, None, None, None], image[..., ::-1], image)

    def __repr__(self) -> str:
        return f"RandomHorizontalFlip(p={self.p})"


class RandomCrop:
    """Cut out a window at a random place, after padding: a shift by up to `padding` pixels.

    Args:
        size: of the window, (H, W), or an int for a square.
        padding: pixels added on each side.
        fill: their value.

    Raises:
        ValueError: on a call: the padded image is smaller than the window.
    """

    batched = True

    def __init__(self, size: int | Sequence[int], padding: int = 0, fill: float = 0.0) -> None:
        self.size = (size, size) if isinstance(size, int) else (size[0], size[1])
        self.padding, self.fill = padding, fill

    def __call__(self, image: np.ndarray) -> np.ndarray:
        if image.ndim == 3:
            return self(image[None])[0]
        (height, width), p = self.size, self.padding
        padded = np.pad(image, ((0, 0), (0, 0), (p, p), (p, p)), constant_values=self.fill)
        down, across = padded.shape[2] - height, padded.shape[3] - width
        if down < 0 or across < 0:
            raise ValueError(
                f"RandomCrop: a window of {height}×{width} from images of {image.shape[2]}×"
                f"{image.shape[3]} with {p} pixels of padding"
            )
        out = np.empty((*image.shape[:2], height, width), image.dtype)
        for i, rng in enumerate(sample_rngs(len(image))):
            top, left = rng.integers(down + 1), rng.integers(across + 1)
            out[i] = padded[i, :, top : top + height, left : left + width]
        return out

    def __repr__(self) -> str:
        return f"RandomCrop({self.size}, padding={self.padding})"
