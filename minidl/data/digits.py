"""Digits: real handwritten digits that need no download."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from minidl.data.dataset import Dataset
from minidl.data.errors import DataError, MissingDataError
from minidl.data.files import read_bytes
from minidl.data.image import ImageDataset, Transform, check_labels
from minidl.data.randomness import stream

TRAIN = 1437  # of 1,797; the test images are of other writers
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


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


class DigitStrings(Dataset):
    """Digits side by side and their names, "three seven one": (image, captions).

    The image is float32 (1, 8, 8·digits) in [0, 1], given to `transform`; captions are a list of
    one string. Which digits stand in string number i depends on (seed, train, i) only.

    Args:
        train: strings of the training images of `Digits`, or of its test images.
        length: how many strings; by default 5,000 for training, else 1,000.
        digits: in a string.

    Attributes:
        captions: of every string, a list of lists.

    Raises:
        MissingDataError: scikit-learn is not installed.
        ValueError: length or digits < 1.
    """

    def __init__(
        self,
        train: bool = True,
        length: int | None = None,
        digits: int = 3,
        seed: int = 0,
        transform: Transform | None = None,
    ) -> None:
        length = (5_000 if train else 1_000) if length is None else length
        if length < 1 or digits < 1:
            raise ValueError(f"length and digits are at least 1, got {length} and {digits}")
        self.singles, self.transform = Digits(train), transform
        rng = stream(seed, int(train), 0)
        self.chosen = rng.integers(len(self.singles), size=(length, digits))
        labels = self.singles.targets[self.chosen]
        self.captions = [[" ".join(NAMES[label] for label in row)] for row in labels]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> tuple[Any, list[str]]:
        image: Any = np.concatenate([self.singles[i][0] for i in self.chosen[index]], axis=2)
        return self.transform(image) if self.transform else image, self.captions[index]


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
