"""Images with captions: Flickr8k and COCO, as their files come."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minidl.data.dataset import Dataset
from minidl.data.errors import DataError, MissingDataError
from minidl.data.files import data_root
from minidl.data.image import Transform, decode, to_float

Line = tuple[str, str, str]  # where it is (file and line), an image's file name, a caption


class CaptionDataset(Dataset):
    """Image files, each with several captions; a sample is (image, captions).

    The image is float32 (3, H, W) in [0, 1], given to `transform`; the captions are a list of
    strings. Files are decoded with Pillow when a sample is asked for: in the background, with the
    `DataLoader`'s workers or its thread.

    Attributes:
        paths: of the images.
        captions: of every image, a list of lists.

    Raises:
        DataError: on access: an image is damaged.
    """

    def __init__(
        self, paths: Sequence[Path], captions: list[list[str]], transform: Transform | None = None
    ) -> None:
        self.paths, self.captions, self.transform = list(paths), captions, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, list[str]]:
        path = self.paths[index]
        image: Any = to_float(decode(path, path, "RGB"))
        return self.transform(image) if self.transform else image, self.captions[index]

    def __repr__(self) -> str:
        captions = sum(map(len, self.captions))
        return f"{type(self).__name__}({len(self):,} images, {captions:,} captions)"


class Flickr8k(CaptionDataset):
    """Photographs of people and animals, five captions each (Hodosh, Young, Hockenmaier 2013).

    `root`, or Flickr8k, flickr8k or flickr8k_1000 in it, holds one of these layouts:

    =============  =============================================================================
    the official   Flickr8k.token.txt and Flickr_8k.{train,dev,test}Images.txt, also in a folder
                   Flickr8k_text; photographs in Flicker8k_Dataset (spelt so) or Flickr8k_Dataset
    CSV            captions.csv or captions.txt, with a line "image,caption" on top; photographs
                   in images or Images
    =============  =============================================================================

    The CSV layout has no official split: here it is a permutation of the sorted names
    (``numpy.random.RandomState(0)``), a tenth for "val", a tenth for "test", the rest for "train".

    Args:
        split: "train" (official: 6,000), "val" (1,000), "test" (1,000); None: all of them.
        transform: applied to each image. Photographs are not all of one size: to make batches,
            resize and crop here.

    Raises:
        MissingDataError: files are not there.
        DataError: a caption's image is missing, a caption is empty, a line is damaged: says which.
        ValueError: no such split.
    """

    folders = ("Flickr8k", "flickr8k", "flickr8k_1000", "")
    splits = ("train", "val", "test")

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        split: str | None = "train",
        transform: Transform | None = None,
    ) -> None:
        if split not in (*self.splits, None):
            raise ValueError(f"split {split!r}: expected one of {', '.join(self.splits)}, or None")
        self.root, self.split = data_root(root), split
        wanted = self.splits if split is None else (split,)
        for folder in (self.root / name for name in self.folders):
            texts = first_there(folder, ("Flickr8k_text/Flickr8k.token.txt", "Flickr8k.token.txt"))
            table = first_there(folder, ("captions.csv", "captions.txt"))
            if texts:
                names = ("Flicker8k_Dataset", "Flickr8k_Dataset")
                groups = by_image(read_tokens(texts), images_folder(folder, names))
                chosen = [n for part in wanted for n in official_split(texts.parent, part, groups)]
                break
            if table:
                groups = by_image(read_csv(table), images_folder(folder, ("images", "Images")))
                chosen = [n for part in wanted for n in random_parts(groups)[part]]
                break
        else:
            sought = "\n".join(f"  {self.root / name}" for name in self.folders)
            raise MissingDataError(
                f"Flickr8k not found: Flickr8k.token.txt, captions.csv or captions.txt, in one of\n"
                f"{sought}\nThe data are given out for research only, and not fetched by minidl"
            )
        paths = [groups[name][0] for name in chosen]
        for name, path in zip(chosen, paths):
            if not path.is_file():
                raise DataError(f"{groups[name][1]}: there is no image {path}")
        super().__init__(paths, [groups[name][2] for name in chosen], transform)


class CocoCaptions(CaptionDataset):
    """COCO's captions (Chen et al. 2015); torchvision's name and arguments.

    Args:
        root: the folder of the images.
        annFile: captions_train2017.json or one like it.
        transform: applied to each image.

    Raises:
        MissingDataError: there is no such file.
        DataError: not such a file; a caption's image is missing, a caption is empty: says which.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        annFile: str | os.PathLike[str],
        transform: Transform | None = None,
    ) -> None:
        path = Path(annFile)
        if not path.is_file():
            raise MissingDataError(f"{path}: no such file")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            names = {image["id"]: image["file_name"] for image in content["images"]}
            lines = [(a["id"], a["image_id"], a["caption"]) for a in content["annotations"]]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: not COCO captions in JSON ({type(error).__name__}: {error})"
            ) from None
        for number, image, _ in lines:
            if image not in names:
                raise DataError(f"{path}: annotation {number}: there is no image {image}")
        groups = by_image(
            ((f"{path}: annotation {n}", names[image], text) for n, image, text in lines),
            Path(root),
        )
        for image_path, where, _ in groups.values():
            if not image_path.is_file():
                raise DataError(f"{where}: there is no image {image_path}")
        if not groups:
            raise DataError(f"{path}: holds no captions")
        names_in_order = [name for _, name in sorted(names.items()) if name in groups]
        super().__init__(
            [groups[name][0] for name in names_in_order],
            [groups[name][2] for name in names_in_order],
            transform,
        )


# Their files ------------------------------------------------------------------------------


def first_there(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def images_folder(root: Path, names: Sequence[str]) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise MissingDataError(f"{root}: no folder {' or '.join(names)} with the images in it")


def read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error})") from None


def read_tokens(path: Path) -> Iterable[Line]:
    """Lines such as "1000268201_693b08cb0e.jpg#0<tab>A child in a pink dress ..."."""
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        name, tab, caption = line.partition("\t")
        if not tab or "#" not in name:
            raise DataError(f"{path}, line {number}: expected image#number<tab>caption: {line!r}")
        yield f"{path}, line {number}", name.rpartition("#")[0], caption


def read_csv(path: Path) -> Iterable[Line]:
    """Lines such as "1000268201_693b08cb0e.jpg,A child in a pink dress ...", under a header."""
    rows = csv.reader(read_lines(path))
    if (header := next(rows, None)) != ["image", "caption"]:
        raise DataError(f"{path}, line 1: expected image,caption, got {header}")
    for row in filter(None, rows):  # (of a blank line: [])
        if len(row) != 2:
            raise DataError(f"{path}, line {rows.line_num}: expected image,caption, got {row}")
        yield f"{path}, line {rows.line_num}", row[0], row[1]


def by_image(lines: Iterable[Line], folder: Path) -> dict[str, tuple[Path, str, list[str]]]:
    """For every name, in order of appearance: its path, where it is first named, its captions."""
    groups: dict[str, tuple[Path, str, list[str]]] = {}
    for where, name, caption in lines:
        if not any(character.isalnum() for character in caption):
            raise DataError(f"{where}: the caption of {name} is empty: {caption!r}")
        groups.setdefault(name, (folder / name, where, []))[2].append(" ".join(caption.split()))
    return groups


def official_split(folder: Path, split: str, groups: dict[str, Any]) -> list[str]:
    path = folder / f"Flickr_8k.{'dev' if split == 'val' else split}Images.txt"
    if not path.is_file():
        raise MissingDataError(f"{path}: no such file; it lists the images of {split!r}")
    names = []
    for number, name in enumerate(map(str.strip, read_lines(path)), 1):
        if name and name not in groups:
            raise DataError(f"{path}, line {number}: {name} has no captions")
        names += [name] if name else []
    return names


def random_parts(groups: dict[str, Any]) -> dict[str, list[str]]:
    names = sorted(groups)
    order = [names[i] for i in np.random.RandomState(0).permutation(len(names))]
    tenth = len(names) // 10
    start = len(names) - 2 * tenth
    return {
        "train": order[:start], "val": order[start : start + tenth], "test": order[start + tenth :],
    }  # fmt: skip
