"""Images and labels from an NPZ file (`numpy.savez`), whoever wrote it."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minidl.data.errors import DataError, MissingDataError
from minidl.data.files import data_root
from minidl.data.image import ImageDataset, JoinedImages, Transform, check_labels


def npz_names(path: Path) -> list[str]:
    """The names of the arrays in an NPZ file.

    Raises:
        MissingDataError, DataError: naming the file and what is wrong with it.
    """
    try:
        with zipfile.ZipFile(path) as file:
            return [name.removesuffix(".npy") for name in file.namelist()]
    except FileNotFoundError:
        raise MissingDataError(f"{path}: no such file") from None
    except Exception as error:  # damaged ones raise nearly anything
        raise DataError(f"{path}: not an NPZ file, or truncated ({error})") from None


def read_npz(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Some arrays of an NPZ file. Runs no code: arrays of Python objects are refused.

    Raises:
        MissingDataError, DataError: naming the file and what is wrong with it.
    """
    there = npz_names(path)
    if absent := [name for name in names if name not in there]:
        raise DataError(f"{path}: has the arrays {there}, but not {absent}")
    arrays = {}
    for name in names:
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays[name] = np.asarray(file[name])
        except Exception as error:  # damaged ones raise nearly anything
            raise DataError(f"{path}: array {name!r} cannot be read ({error})") from None
        if arrays[name].ndim == 0:  # what is no .npy inside comes as bytes
            raise DataError(f"{path}: {name!r} is not an array")
    return arrays


class NPZ(ImageDataset):
    """Images and labels from an NPZ file.

    Found by themselves: MedMNIST's names (train_images and train_labels, and so on for val and
    test), Keras's (x_train, y_train), plain ones (images and labels, x and y), and JPEG files
    joined in one array (jpeg, offset, label). `classes`, an array of names, is read if it is
    there.

    Args:
        path: the file (relative: to here, or to the folder that MINIDL_DATA names).
        split: "train", "val" or "test", where the file holds several.
        images, labels: the names of the arrays, if they are none of those above.
        transform, target_transform: applied to each image (float32 (C, H, W) in [0, 1]) and each
            label (int).
        layout: "HWC" or "CHW" for arrays of four dimensions; by default HWC if the last one is
            1 or 3, else CHW.

    Raises:
        MissingDataError: there is no such file.
        DataError: it is damaged, or its arrays are not images and labels.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        split: str = "train",
        images: str | None = None,
        labels: str | None = None,
        transform: Transform | None = None,
        target_transform: Transform | None = None,
        layout: str | None = None,
    ) -> None:
        path = Path(path).expanduser()
        if not path.exists() and not path.is_absolute():
            path = data_root(None) / path
        names = npz_names(path)
        if images is None or labels is None:
            usual = [
                (f"{split}_images", f"{split}_labels"),
                (f"x_{split}", f"y_{split}"),
                ("images", "labels"),
                ("x", "y"),
                ("jpeg", "label"),
            ]
            pair = next((pair for pair in usual if set(pair) <= set(names)), None)
            if pair is None:
                raise DataError(
                    f"{path}: has the arrays {names}, among which no images and labels of split "
                    f"{split!r} are known; name them: NPZ(path, images=..., labels=...)"
                )
            images, labels = images or pair[0], labels or pair[1]
        wanted = [images, labels] + (["offset"] if images == "jpeg" else [])
        arrays = read_npz(path, wanted + (["classes"] if "classes" in names else []))
        where = f"{path} ({images})"
        pixels: np.ndarray | JoinedImages
        if images == "jpeg":
            pixels = JoinedImages(arrays["jpeg"], arrays["offset"], path)
        else:
            pixels = as_images(arrays[images], where, layout)
        targets = arrays[labels]
        if targets.shape == (len(pixels), 1):  # MedMNIST's way
            targets = targets[:, 0]
        self.classes = [str(name) for name in arrays.get("classes", ())]
        check_labels(targets, len(pixels), len(self.classes) or None, f"{path} ({labels})")
        super().__init__(pixels, targets, transform, target_transform)
        if not self.classes:
            self.classes = [str(label) for label in range(int(self.targets.max()) + 1)]


def as_images(array: np.ndarray, where: str, layout: str | None = None) -> np.ndarray:
    """(N, H, W), (N, H, W, C) or (N, C, H, W) -> (N, C, H, W), unsigned, or float32 in [0, 1].

    Raises:
        DataError: other dimensions, dtypes or values.
    """
    if layout not in (None, "HWC", "CHW"):
        raise ValueError(f"layout is 'HWC', 'CHW' or None, got {layout!r}")
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim != 4:
        raise DataError(f"{where}: shape {array.shape}, expected (N, H, W[, C]) or (N, C, H, W)")
    elif layout == "HWC" or (layout is None and array.shape[-1] in (1, 3)):
        array = np.ascontiguousarray(array.transpose(0, 3, 1, 2))
    if not array.size:
        raise DataError(f"{where}: shape {array.shape}: there are no images in it")
    if array.dtype in (np.uint8, np.uint16):
        return array
    if array.dtype == np.bool_:
        return array.astype(np.float32)
    low, high = array.min(), array.max()
    if array.dtype.kind != "f" or not (low >= 0 and high <= 1):
        raise DataError(
            f"{where}: {array.dtype} from {low} to {high}; expected uint8, uint16, or floats in "
            "[0, 1]"
        )
    return array.astype(np.float32)
