"""MNIST and Fashion-MNIST, and the IDX format that they come in."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import ClassVar

import numpy as np

from minidl.data.errors import DataError
from minidl.data.files import data_root, download, find_files, missing, read_bytes
from minidl.data.image import ImageDataset, Transform, check_labels

# The third byte of an IDX file; numbers are big-endian.
IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """Read an IDX file, gzip or not.

    The format (LeCun, Cortes, Burges, "The MNIST database"): two zero bytes, a byte for the type,
    a byte for the number of dimensions, each dimension as a 32-bit integer, then the numbers.

    Raises:
        DataError: it is empty, truncated, too long, or not IDX.
    """
    path = Path(path)
    content = read_bytes(path)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in IDX_TYPES:
        raise DataError(
            f"{path}: not an IDX file: it starts with {content[:4].hex(' ')}, expected 00 00, a "
            "type (08, 09, 0b to 0e) and the number of dimensions"
        )
    dtype, ndim = np.dtype(IDX_TYPES[content[2]]), content[3]
    header = 4 + 4 * ndim
    if len(content) < header:
        raise DataError(f"{path}: truncated in its header ({len(content)} bytes of {header})")
    shape = [int(n) for n in np.frombuffer(content, ">u4", ndim, offset=4)]
    expected = header + math.prod(shape) * dtype.itemsize
    if len(content) != expected:
        raise DataError(
            f"{path}: {'truncated' if len(content) < expected else 'too long'}: its header says "
            f"{'×'.join(map(str, shape))} numbers, so {expected:,} bytes; it has {len(content):,}"
        )
    numbers = np.frombuffer(content, dtype, offset=header).reshape(shape)
    return numbers.astype(dtype.newbyteorder("="))


class MNIST(ImageDataset):
    """Handwritten digits, 60,000 for training and 10,000 for testing, 1×28×28 (LeCun et al. 1998).

    Args:
        root: where the four official files are (gzip or not): this folder, or MNIST/raw, MNIST,
            mnist or raw in it; by default what MINIDL_DATA names.
        train: the training images, or the test images.
        transform, target_transform: applied to each image (float32 (1, 28, 28) in [0, 1]) and
            each label (int).
        download: fetch the files if they are not there.

    Raises:
        MissingDataError: files are not there.
        DataError: a file is damaged or another one; a download failed.
    """

    name = "MNIST"
    folders = ("MNIST/raw", "MNIST", "mnist", "raw", "")
    addresses: tuple[str, ...] = (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    )
    digests: ClassVar[dict[str, str]] = {
        "train-images": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "train-labels": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "t10k-images": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "t10k-labels": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    }
    classes = tuple(str(digit) for digit in range(10))

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        train: bool = True,
        transform: Transform | None = None,
        target_transform: Transform | None = None,
        download: bool = False,
    ) -> None:
        self.root, self.train = data_root(root), train
        images_path, labels_path = self._files("train" if train else "t10k", download)
        images, labels = read_idx(images_path), read_idx(labels_path)
        for path, numbers, ndim, what in (
            (images_path, images, 3, "images"),
            (labels_path, labels, 1, "labels"),
        ):
            if numbers.dtype != np.uint8 or numbers.ndim != ndim:
                raise DataError(
                    f"{path}: not {what}: magic number {magic(numbers)}, expected {0x0800 + ndim}"
                )
        if len(images) == 0:
            raise DataError(f"{images_path}: holds no images")
        check_labels(labels, len(images), len(self.classes), labels_path)
        super().__init__(images[:, None], labels, transform, target_transform)

    def _files(self, split: str, fetch: bool) -> list[Path]:
        names = [f"{split}-images-idx3-ubyte", f"{split}-labels-idx1-ubyte"]
        found = find_files(self.root, self.folders, names, ("", ".gz"))
        if found is None and fetch:
            for part, digest in self.digests.items():
                name = f"{part}-idx{3 if part.endswith('images') else 1}-ubyte.gz"
                path = self.root / self.folders[0] / name
                download([address + name for address in self.addresses], path, digest)
            found = find_files(self.root, self.folders, names, ("", ".gz"))
        if found is None:
            how = f"{self.name}(root, download=True) fetches them from {self.addresses[0]}"
            names = [f"{name}[.gz]" for name in names]
            raise missing(self.name, self.root, self.folders, names, how)
        return found


def magic(numbers: np.ndarray) -> int:
    """The magic number of the IDX file that an array came from."""
    codes = {np.dtype(name).newbyteorder("="): code for code, name in IDX_TYPES.items()}
    return codes[numbers.dtype] << 8 | numbers.ndim


class FashionMNIST(MNIST):
    """Zalando's clothes in MNIST's format (Xiao, Rasul, Vollgraf 2017); arguments as for `MNIST`.

    `root`, or FashionMNIST/raw, FashionMNIST, fashion_mnist or raw in it, holds the files.
    """

    name = "FashionMNIST"
    folders = ("FashionMNIST/raw", "FashionMNIST", "fashion_mnist", "raw", "")
    addresses = ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",)
    digests: ClassVar[dict[str, str]] = {
        "train-images": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "train-labels": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "t10k-images": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "t10k-labels": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    }
    classes = (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
        "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    )  # fmt: skip
