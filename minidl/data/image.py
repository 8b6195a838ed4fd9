"""What all image datasets share: arrays in memory, and the conversion to floats in [0, 1]."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from minidl.data.dataset import Dataset
from minidl.data.errors import DataError

Transform = Callable[[Any], Any]


def to_float(pixels: np.ndarray) -> np.ndarray:
    """uint8 0..255 or uint16 0..65535 -> float32 in [0, 1]; float32 as it is."""
    if pixels.dtype.kind == "u":
        scaled = pixels.astype(np.float32)
        scaled /= np.float32(np.iinfo(pixels.dtype).max)
        return scaled
    return pixels.astype(np.float32, copy=False)


class ImageDataset(Dataset):
    """Images and labels held in memory.

    A sample is (image, label): the image float32 (C, H, W) in [0, 1], given to `transform`; the
    label an int, given to `target_transform`.

    Attributes:
        data: (N, C, H, W), uint8, or float32 in [0, 1]: an array, or what is indexed like one.
        targets: (N,) int64.
        classes: the names of the classes, where they are known.
    """

    classes: Sequence[str] = ()

    def __init__(
        self,
        data: np.ndarray | JoinedImages,
        targets: np.ndarray,
        transform: Transform | None = None,
        target_transform: Transform | None = None,
    ) -> None:
        self.data, self.targets = data, np.asarray(targets).astype(np.int64)
        self.transform, self.target_transform = transform, target_transform

    @property
    def class_to_idx(self) -> dict[str, int]:
        return {name: label for label, name in enumerate(self.classes)}

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image: Any = to_float(self.data[index])
        label: Any = int(self.targets[index])
        if self.transform:
            image = self.transform(image)
        if self.target_transform:
            label = self.target_transform(label)
        return image, label

    def get_batch(self, indices: Sequence[int]) -> list[Any] | None:
        """All at once, if the transform can (see `minidl.data.transforms`)."""
        if self.target_transform or not getattr(self.transform, "batched", self.transform is None):
            return None
        images: Any = to_float(self.data[indices])
        return [self.transform(images) if self.transform else images, self.targets[indices]]

    def __repr__(self) -> str:
        n, *shape = self.data.shape
        return f"{type(self).__name__}({n:,} images of {'×'.join(map(str, shape))})"


def check_labels(labels: np.ndarray, count: int, classes: int | None, where: Any) -> None:
    """One label for each image, all of them in range.

    Raises:
        DataError: naming `where` they come from.
    """
    if labels.shape != (count,):
        raise DataError(f"{where}: labels of shape {labels.shape} for {count:,} images")
    if labels.dtype.kind not in "iu":
        raise DataError(f"{where}: labels are {labels.dtype}, expected integers")
    wrong = (labels < 0) | (labels >= classes) if classes else labels < 0
    if wrong.any():
        i = int(wrong.argmax())
        limit = f"0 to {classes - 1}" if classes else "at least 0"
        raise DataError(f"{where}: label {i} is {labels[i]}, expected {limit}")


def decode(source: bytes | Path, where: Any, mode: str | None = None) -> np.ndarray:
    """Decode an image file with Pillow: (C, H, W) uint8.

    Args:
        source: its content, or its path.
        where: what to call it in an error.
        mode: "RGB" or "L" to convert to; None: as it is (grey (1, H, W), else RGB (3, H, W)).

    Raises:
        DataError: it is no image, or a damaged one.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            mode = mode or ("L" if image.mode in ("1", "L", "I", "I;16", "F") else "RGB")
            pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: not an image that can be decoded ({error})") from None
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


class JoinedImages:
    """Image files joined in one array of bytes, decoded when first asked for, and kept.

    It is indexed like the array (N, C, H, W) uint8 that it becomes: by an int or a list of ints.

    Args:
        joined: (bytes,) uint8, the files one after the other.
        offset: (N + 1,), where each starts, and where the last ends.
        where: what to call them in an error.

    Raises:
        DataError: the offsets do not fit; on access, an image is damaged or of another size than
            the first.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, joined: np.ndarray, offset: np.ndarray, where: Any) -> None:
        if joined.dtype != np.uint8 or joined.ndim != 1:
            raise DataError(f"{where}: 'jpeg' must be bytes, it is {joined.dtype} {joined.shape}")
        if offset.dtype.kind not in "iu" or offset.ndim != 1 or len(offset) < 2:
            raise DataError(f"{where}: 'offset' must be integers (N + 1,), it is {offset.shape}")
        ends = [int(end) for end in offset]
        if (
            ends[0] < 0
            or any(a >= b for a, b in itertools.pairwise(ends))
            or ends[-1] > len(joined)
        ):
            raise DataError(
                f"{where}: 'offset' must ascend, from 0 on, to the {len(joined):,} bytes of 'jpeg'"
            )
        self.joined, self.ends, self.where = joined, ends, where
        first = self._decode(0)
        self.pixels = np.empty((len(ends) - 1, *first.shape), np.uint8)
        self.decoded = np.zeros(len(ends) - 1, dtype=bool)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.pixels.shape

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: Any) -> np.ndarray:
        for i in np.atleast_1d(np.arange(len(self))[index]):
            if not self.decoded[i]:
                image = self._decode(i)
                if image.shape != self.shape[1:]:
                    raise DataError(
                        f"{self.where}: image {i} has shape {image.shape}, the first one "
                        f"{self.shape[1:]}"
                    )
                self.pixels[i], self.decoded[i] = image, True
        return self.pixels[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self[:], dtype=dtype, copy=copy)

    def _decode(self, i: int) -> np.ndarray:
        content = self.joined[self.ends[i] : self.ends[i + 1]].tobytes()
        return decode(content, f"{self.where}: image {i}")
