"""CIFAR-10, in each of the forms it comes in."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from minidl.data.errors import DataError
from minidl.data.files import data_root, download, find_files, missing, read_bytes
from minidl.data.image import ImageDataset, JoinedImages, Transform, check_labels
from minidl.data.npz import read_npz
from minidl.data.unpickle import read_pickle
from minidl.serialization import atomic_path

ADDRESS = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
DIGEST = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
PIXELS = 3 * 32 * 32


class CIFAR10(ImageDataset):
    """Photographs of ten things, 50,000 for training and 10,000 for testing, 3×32×32
    (Krizhevsky 2009).

    Read from the first of these that is in `root`:

    - the official python version: cifar-10-batches-py/data_batch_1 to _5, test_batch (pickles,
      read without running code);
    - the official binary version: cifar-10-batches-bin/data_batch_1.bin to _5.bin, test_batch.bin;
    - train.npz and test.npz of JPEG files, with the arrays jpeg, offset and label (also in
      cifar10_jpeg/). They are decoded when they are first asked for.

    Args:
        root: where they are; by default what MINIDL_DATA names.
        train: the training images, or the test images.
        transform, target_transform: applied to each image (float32 (3, 32, 32) in [0, 1]) and
            each label (int).
        download: fetch the official python version if nothing is there.

    Raises:
        MissingDataError: files are not there.
        DataError: a file is damaged or another one; a download failed.
    """

    classes = (
        "airplane", "automobile", "bird", "cat", "deer",
        "dog", "frog", "horse", "ship", "truck",
    )  # fmt: skip
    digest = DIGEST
    address = ADDRESS

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        train: bool = True,
        transform: Transform | None = None,
        target_transform: Transform | None = None,
        download: bool = False,
    ) -> None:
        self.root, self.train = data_root(root), train
        parts = self._read()
        if parts is None and download:
            self._download()
            parts = self._read()
        if parts is None:
            names = self._names()
            folders = ("cifar-10-batches-py", "")
            how = (
                "(The binary version in cifar-10-batches-bin does as well.) "
                f"CIFAR10(root, download=True) fetches them from {self.address} (170 MB)"
            )
            raise missing("CIFAR10", self.root, folders, names, how)
        images, labels = zip(*parts)
        data = images[0] if len(parts) == 1 else np.concatenate(images)
        super().__init__(data, np.concatenate(labels), transform, target_transform)

    def _names(self) -> list[str]:
        return [f"data_batch_{i}" for i in range(1, 6)] if self.train else ["test_batch"]

    def _read(self) -> list[tuple[Any, np.ndarray]] | None:
        """The images and labels of each file; None: there are no files."""
        names, split = self._names(), "train.npz" if self.train else "test.npz"
        for folder, files, read in (
            ("cifar-10-batches-py", names, read_python),
            ("cifar-10-batches-bin", [f"{name}.bin" for name in names], read_binary),
            ("cifar10_jpeg", [split], read_jpegs),
        ):
            if paths := find_files(self.root, (folder, ""), files):
                return [read(path) for path in paths]
        return None

    def _download(self) -> None:
        archive = self.root / "cifar-10-python.tar.gz"
        download([self.address], archive, self.digest)
        (self.root / "cifar-10-batches-py").mkdir(exist_ok=True)
        with tarfile.open(archive) as tar:
            for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]:
                member = tar.extractfile(f"cifar-10-batches-py/{name}")
                if member is None:
                    raise DataError(f"{archive}: {name} is not a file in it")
                with atomic_path(self.root / "cifar-10-batches-py" / name) as part:
                    part.write_bytes(member.read())


def read_python(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A batch of the python version: images (N, 3, 32, 32) uint8, labels (N,).

    Raises:
        DataError: naming the file and what is wrong with it.
    """
    batch: Any = read_pickle(path)
    if not isinstance(batch, dict):
        raise DataError(f"{path}: a pickled {type(batch).__name__}, expected a dict")
    batch = {k.decode("latin1") if isinstance(k, bytes) else k: v for k, v in batch.items()}
    if "data" not in batch or "labels" not in batch:
        raise DataError(f"{path}: has {sorted(map(str, batch))}, expected 'data' and 'labels'")
    pixels = batch["data"]
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
        raise DataError(f"{path}: 'data' is not a uint8 array")
    if pixels.ndim != 2 or pixels.shape[1] != PIXELS or not len(pixels):
        raise DataError(f"{path}: 'data' has shape {pixels.shape}, expected (N, {PIXELS})")
    try:
        labels = np.asarray(batch["labels"])
    except ValueError:
        raise DataError(f"{path}: 'labels' is not a list of numbers") from None
    check_labels(labels, len(pixels), 10, path)
    return pixels.reshape(-1, 3, 32, 32), labels


def read_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A batch of the binary version: records of a label and 3,072 pixels.

    Raises:
        DataError: naming the file and what is wrong with it.
    """
    content = read_bytes(path)
    if len(content) % (1 + PIXELS):
        raise DataError(
            f"{path}: {len(content):,} bytes are not whole records of {1 + PIXELS:,} bytes: it is "
            "truncated, or another file"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, 1 + PIXELS)
    labels = records[:, 0]
    check_labels(labels, len(records), 10, path)
    return records[:, 1:].reshape(-1, 3, 32, 32), labels


def read_jpegs(path: Path) -> tuple[JoinedImages, np.ndarray]:
    """Images as JPEG files in an NPZ: arrays jpeg, offset, label.

    Raises:
        DataError: naming the file and what is wrong with it.
    """
    arrays = read_npz(path, ["jpeg", "offset", "label"])
    images = JoinedImages(arrays["jpeg"], arrays["offset"], path)
    if images.shape[1:] != (3, 32, 32):
        raise DataError(f"{path}: images of shape {images.shape[1:]}, expected (3, 32, 32)")
    check_labels(arrays["label"], len(images), 10, path)
    return images, arrays["label"]
