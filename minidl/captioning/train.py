"""What `minidl caption` does: data and models by name, a run, and pictures of what it learned.

The training loop is `minidl.train.train`: a captioner is a classifier of words, so a run has the
same files, checkpoints and resumption as any other. Beside them are vocabulary.json, and
gallery.html: held-out images with what the model says of them.
"""

from __future__ import annotations

import base64
import io
import itertools
import math
import os
import zlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

import minidl
from minidl import models, transfer
from minidl.attack import deployed
from minidl.captioning.metrics import Report, clean, only_images
from minidl.captioning.model import (
    Captioner,
    Encoder,
    ShowAndTell,
    ShowAttend,
    convolutions,
    trunk,
)
from minidl.captioning.vocabulary import Vocabulary
from minidl.data import CocoCaptions, DataLoader, Dataset, Flickr8k, MissingDataError, ShapeScenes
from minidl.data.files import data_root
from minidl.data.image import decode, to_float
from minidl.data.transforms import CenterCrop, Compose, Resize
from minidl.serialization import atomic_path

__all__ = [
    "DATASETS",
    "DECODERS",
    "ENCODERS",
    "Annotated",
    "build",
    "draw_attention",
    "gallery",
    "open_captioner",
    "open_data",
    "read_image",
]  # fmt: skip

DATASETS = ("scenes", "flickr8k", "coco")
DECODERS = {"attend": ShowAttend, "tell": ShowAndTell}
ENCODERS = ("cnn", "resnet8", "resnet20", "resnet18", "resnet34")
WIDTHS = (16, 32, 64, 128)  # of the encoder "cnn"


class Splits(NamedTuple):
    """Each a dataset of (image, captions)."""

    train: Any
    val: Any
    test: Any


def open_data(name: str, root: Path | None, image_size: int, limit: int | None = None) -> Splits:
    """The images with their captions.

    Args:
        name: of `DATASETS`. "scenes": the pairs of colour and shape in "test" are new.
        root: the folder with the files; by default what MINIDL_DATA names.
        image_size: photographs are scaled and cut to this square.
        limit: at most so many training images.

    Raises:
        MissingDataError, DataError: the files are not there, or damaged.
    """
    if name == "scenes":
        return Splits(
            *(
                ShapeScenes(split, limit if split == "train" else None, image_size=image_size)
                for split in ShapeScenes.splits
            )
        )
    square = Compose([Resize(image_size), CenterCrop(image_size)])
    if name == "flickr8k":
        splits = Splits(*(Flickr8k(root, split, square) for split in Flickr8k.splits))
    else:
        folder = data_root(root)
        parts = [
            CocoCaptions(folder / f"{part}2017", folder / f"annotations/captions_{part}2017.json",
                         square)
            for part in ("train", "val")
        ]  # fmt: skip
        splits = Splits(parts[0], parts[1], parts[1])
    for attribute in ("paths", "captions"):
        setattr(splits.train, attribute, getattr(splits.train, attribute)[:limit])
    return splits


def build(config: dict[str, Any], vocabulary: Vocabulary) -> Captioner:
    """A captioner with random weights.

    Args:
        config: "encoder", "decoder", "cell", "hidden", "image_size"; other entries are ignored.
            Of "encoder_weights", a checkpoint of a classifier, its trunk is loaded.
    """
    if config["encoder"] == "cnn":
        cnn = convolutions(WIDTHS, more=2)
    else:
        classifier = models.get(config["encoder"], num_classes=1000, in_channels=3)
        if config.get("encoder_weights"):
            transfer.load_weights(classifier, config["encoder_weights"], skip="fc.*")
        cnn = trunk(classifier)
    encoder = Encoder(cnn)
    size = config["image_size"]
    with minidl.no_grad(), deployed(encoder):
        features = encoder(minidl.zeros(1, 3, size, size)).shape[2]
    decoder = DECODERS[config["decoder"]](
        vocabulary, features, config["hidden"], cell=config["cell"], dropout=config["dropout"],
        word_dropout=config.get("word_dropout", 0.0),
    )  # fmt: skip
    return Captioner(encoder, decoder)


def describe(vocabulary: Vocabulary) -> str:
    """A line that tells vocabularies apart: what a checkpoint keeps of its own."""
    digest = zlib.crc32(repr(vocabulary.to_dict()).encode())
    return f"{vocabulary.kind}, {len(vocabulary)} tokens, {digest:08x}"


def open_captioner(path: Path) -> tuple[Captioner, dict[str, Any]]:
    """What a run of `minidl caption train` learned, and its settings.

    Args:
        path: a run's folder, or a checkpoint in it.

    Raises:
        ValueError: no such file, not a checkpoint of a captioner, or the vocabulary beside it is
            another one's.
    """
    if path.is_dir():
        path = path / "best.safetensors"
    words = path.parent / "vocabulary.json"
    for file in (path, words):
        if not file.is_file():
            raise ValueError(f"{file} is not there: give a run's folder, or a checkpoint in it")
    state = minidl.load(path)
    config = state.get("config") if isinstance(state, dict) else None
    if not isinstance(config, dict) or not {"encoder", "decoder", "vocabulary"} <= config.keys():
        raise ValueError(f"{path} is not a checkpoint of `minidl caption train`")
    vocabulary = Vocabulary.load(words)
    if describe(vocabulary) != config["vocabulary"]:
        raise ValueError(
            f"{words} ({describe(vocabulary)}) is not the vocabulary that {path} was trained with "
            f"({config['vocabulary']})"
        )
    model = build({**config, "encoder_weights": None}, vocabulary)
    model.load_state_dict(state["model"])
    return model.eval(), config


class Annotated(Dataset):
    """A dataset with annotation vectors (L, D) in place of images, computed once by a frozen
    encoder: an epoch then costs the decoder only.

    Args:
        model: whose encoder is frozen (`transfer.freeze(model, "encoder")`).
        dataset: of (image, captions), without augmentation.
        batch_size: images at a time.

    Raises:
        ValueError: the encoder learns, or the dataset is augmented: vectors would change.
    """

    def __init__(self, model: Captioner, dataset: Any, batch_size: int = 100) -> None:
        for name, module in model.encoder.named_modules():
            if reason := transfer.why_it_changes(module):
                raise ValueError(
                    f"encoder{'.' * bool(name)}{name} {reason}: freeze it first, "
                    "transfer.freeze(model, 'encoder')"
                )
        if (culprit := transfer.augmentation(dataset)) is not None:
            raise ValueError(f"the dataset is augmented ({culprit!r}): its vectors would change")
        self.captions = dataset.captions
        device = next(iter(model.parameters())).device
        loader = DataLoader(dataset, batch_size, collate_fn=only_images, seed=0)
        with minidl.no_grad():
            parts = [model.annotations(images.to(device)).cpu().numpy() for images in loader]
        self.vectors = np.concatenate(parts)

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, index: int) -> tuple[Any, list[str]]:
        return self.vectors[index], self.captions[index]


def vocabulary_of(dataset: Any, kind: str, min_count: int, size: int) -> Vocabulary:
    return Vocabulary.build(itertools.chain(*dataset.captions), kind, min_count, size)


# Pictures ---------------------------------------------------------------------------------


def read_image(path: Path, size: int) -> np.ndarray:
    """An image file as the model takes it: (3, size, size) float32 in [0, 1].

    Raises:
        MissingDataError: there is no such file.
        DataError: it is no image.
    """
    if not path.is_file():
        raise MissingDataError(f"{path}: no such image file")
    image: np.ndarray = Compose([Resize(size), CenterCrop(size)])(
        to_float(decode(path, path, "RGB"))
    )
    return image


def draw_attention(
    image: np.ndarray, words: Sequence[str], maps: np.ndarray, path: str | os.PathLike[str]
) -> None:
    """The image, and for each word where the model looked before it said it.

    Args:
        image: (3, H, W) or (1, H, W) in [0, 1].
        words: T of them.
        maps: (T, L) attention, the places row by row; the grid is as high and wide as the image is.
        path: the picture to write.
    """
    from matplotlib.figure import Figure

    height, width = image.shape[1:]
    grid_rows = max(1, round(math.sqrt(maps.shape[1] * height / width)))
    columns = min(len(words) + 1, 7)
    rows = -(-(len(words) + 1) // columns)
    figure = Figure(
        figsize=(1.7 * columns, (1.7 * height / width + 0.25) * rows), layout="constrained"
    )
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    picture = np.broadcast_to(image, (3, height, width)).transpose(1, 2, 0).clip(0, 1)
    box = (0, width, height, 0)
    for axis in grid:
        axis.axis("off")
    grid[0].imshow(picture, extent=box)
    grid[0].set_title("image", fontsize=9)
    for axis, word, alpha in zip(grid[1:], words, maps):
        axis.imshow(picture.mean(axis=2), "gray", vmin=0, vmax=1.6, extent=box)
        axis.imshow(
            alpha.reshape(grid_rows, -1), "inferno", alpha=0.6, extent=box, interpolation="bilinear"
        )
        axis.set_title(word, fontsize=9)
    figure.savefig(path, dpi=130)


def gallery(dataset: Any, report: Report, path: Path, title: str, count: int = 60) -> None:
    """A page of held-out images, each with its caption and its references; one file, no requests.

    Args:
        dataset: of (image, captions), which `report` is about.
        report: by `metrics.evaluate`.
        path: the page to write.
        title: its headline.
        count: how many images (the first).
    """
    from jinja2 import Environment, StrictUndefined

    cards = []
    for i in range(min(count, len(dataset))):
        image, references = dataset[i]
        said = report.hypotheses[i]
        right = clean(said) in map(clean, references)
        cards.append({"png": png(image), "said": said, "references": references, "right": right})
    source = resources.files("minidl").joinpath("templates/captions.html").read_text("utf-8")
    template = Environment(undefined=StrictUndefined, autoescape=True).from_string(source)
    with atomic_path(path) as part:
        part.write_text(template.render(title=title, cards=cards, report=report), encoding="utf-8")


def png(image: np.ndarray) -> str:
    """(3, H, W) in [0, 1] as the address of itself."""
    file = io.BytesIO()
    pixels = (np.asarray(image).transpose(1, 2, 0) * 255).round().clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def tokens_in_words(model: Captioner, tokens: Sequence[int]) -> list[str]:
    """Each token as it is shown under its attention map."""
    v = model.vocabulary
    return [v.decode([t]).strip() or v.tokens[t] for t in tokens]
