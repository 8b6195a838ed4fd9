"""Digits: real handwritten digits that need no download."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from minidl.data.errors import DataError, MissingDataError
from minidl.data.files import read_bytes
from minidl.data.image import ImageDataset, Transform, check_labels

TRAIN = 1437  # of 1,797; the test images are of other writers


class Digits(ImageDataset):
    """The 1,797 handwritten digits, 1×8×8, that scikit-learn carries (Alpaydin and Kaynak 1998).

    Args:
        train: the first 1,437, or the other 360, which other people wrote.
        transform, target_transform: applied to each image (float32 (1, 8, 8) in [0, 1], in steps
            of 1/16) and each label (int).

    Raises:
        MissingDataError: scikit-learn is not installed.
    """

    classes = tuple(str(digit) for digit in range(10))

    def __init__(
        self,
        train: bool = True,
        transform: Transform | None = None,
        target_transform: Transform | None = None,
    ) -> None:
        self.train = train
        path = digits_file()
        try:
            numbers = np.array(read_bytes(path).replace(b"\n", b",").strip(b",").split(b","), int)
        except ValueError as error:
            raise DataError(f"{path}: not a table of numbers ({error})") from None
        if numbers.size != 1797 * 65:
            raise DataError(f"{path}: {numbers.size:,} numbers, expected 1,797 rows of 65")
        rows = numbers.reshape(1797, 65)[:TRAIN] if train else numbers.reshape(1797, 65)[TRAIN:]
        images = (rows[:, :64].reshape(-1, 1, 8, 8) / 16).astype(np.float32)
        check_labels(rows[:, 64], len(rows), 10, path)
        super().__init__(images, rows[:, 64], transform, target_transform)


def digits_file() -> Path:
    """Where scikit-learn has the digits. (Importing it to ask would take a second.)

    Raises:
        MissingDataError: there is none.
    """
    spec = importlib.util.find_spec("sklearn")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if path.is_file():
            return path
    raise MissingDataError("Digits come with scikit-learn: pip install scikit-learn")
