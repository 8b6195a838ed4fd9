"""ShapeScenes: drawn scenes with captions from a grammar, to see whether a model *composes*.

A scene is one group of like objects, or two groups side by side:

    caption   = [there is|are] group [relation group]
    group     = (a | two | three | four) size colour shape
    relation  = left of | right of | above | below

Some pairs of colour and shape (`HELD_OUT`) never occur in training. A network that has learned
what is purple and what is a star can still say "a purple star", which it has never seen or read;
one that has learned its captions by heart cannot.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from minidl.data.dataset import Dataset
from minidl.data.image import Transform, to_float
from minidl.data.randomness import stream

COLOURS = {
    "red": (220, 50, 45), "green": (50, 170, 60), "blue": (60, 90, 230), "yellow": (235, 220, 60),
    "purple": (150, 60, 190), "orange": (240, 140, 40), "cyan": (70, 215, 220),
    "white": (240, 240, 240),
}  # fmt: skip
SIZES = {"small": 0.065, "medium": 0.095, "large": 0.135}  # radius as a share of the image
RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
COUNTS = ("a", "two", "three", "four")


def star(points: int, inner: float, turn: float = -math.pi / 2) -> list[tuple[float, float]]:
    """Corners on the unit circle and on one of radius `inner`, in turn."""
    angles = [turn + math.pi * i / points for i in range(2 * points)]
    radii = itertools.cycle((1.0, inner))
    return [(r * math.cos(angle), r * math.sin(angle)) for angle, r in zip(angles, radii)]


# Corners of each shape, in units of its radius; no corners: a circle.
arm, tip = 0.32, 0.95  # of the cross
SHAPES: dict[str, list[tuple[float, float]]] = {
    "circle": [],
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -1), (0.95, 0.75), (-0.95, 0.75)],
    "diamond": [(0, -1.1), (0.8, 0), (0, 1.1), (-0.8, 0)],
    "star": star(5, 0.42),
    "cross": [(-arm, -tip), (arm, -tip), (arm, -arm), (tip, -arm), (tip, arm), (arm, arm),
              (arm, tip), (-arm, tip), (-arm, arm), (-tip, arm), (-tip, -arm), (-arm, -arm)],
}  # fmt: skip

HELD_OUT = frozenset({
    ("red", "triangle"), ("green", "star"), ("blue", "square"), ("yellow", "cross"),
    ("purple", "circle"), ("orange", "diamond"), ("cyan", "triangle"), ("white", "star"),
})  # fmt: skip
PAIRS = [pair for pair in itertools.product(COLOURS, SHAPES) if pair not in HELD_OUT]


class Group(NamedTuple):
    """Objects that are alike."""

    number: int
    size: str
    colour: str
    shape: str

    def words(self, between: str = " ") -> str:
        """In words; `between` stands between colour and shape."""
        plural = "" if self.number == 1 else "es" if self.shape == "cross" else "s"
        return f"{COUNTS[self.number - 1]} {self.size} {self.colour}{between}{self.shape}{plural}"


class Scene(NamedTuple):
    """One group; or two, the first of which is `relation` the second."""

    groups: tuple[Group, ...]
    relation: str | None = None

    def captions(self, between: str = " ") -> list[str]:
        """All sentences of the grammar that are true of it; `between`: see `Group.words`."""
        one, *others = (group.words(between) for group in self.groups)
        sentences = [one]
        if self.relation:
            (other,) = others
            sentences = [
                f"{one} {self.relation} {other}",
                f"{other} {RELATIONS[self.relation]} {one}",
            ]
        there_is = ["there is " if s.startswith("a ") else "there are " for s in sentences]
        return sentences + [start + s for start, s in zip(there_is, sentences)]


class ShapeScenes(Dataset):
    """Scenes of 1 to 4 objects; a sample is (image, captions).

    The image is float32 (3, image_size, image_size) in [0, 1], given to `transform`; the captions
    are a list of strings: all that the grammar can truly say of the scene. Scene number i depends
    on (seed, split, i) only; it is drawn when it is first asked for, and kept.

    Args:
        split: "train" and "val": scenes without a pair of `HELD_OUT`; "test": each has one.
        length: how many scenes; by default 20,000 for training, else 1,000.
        image_size: at least 64.
        compounds: write colour and shape as one word, "two small redsquares". The words of pairs in
            `HELD_OUT` then never occur in training: no vocabulary of whole words can say them, one
            of characters or byte pairs may.

    Attributes:
        captions: of every scene, a list of lists.
        scenes: what is in them.

    Raises:
        ValueError: no such split; length < 1; images too small to tell the shapes.
    """

    splits = ("train", "val", "test")

    def __init__(
        self,
        split: str = "train",
        length: int | None = None,
        seed: int = 0,
        image_size: int = 64,
        transform: Transform | None = None,
        compounds: bool = False,
    ) -> None:
        if split not in self.splits:
            raise ValueError(f"split {split!r}: expected one of {', '.join(self.splits)}")
        length = (20_000 if split == "train" else 1_000) if length is None else length
        if length < 1 or image_size < 64:
            raise ValueError(
                "length is at least 1 and image_size at least 64 (a small star is a blot below "
                f"it), got {length} and {image_size}"
            )
        self.split, self.seed, self.image_size, self.transform = split, seed, image_size, transform
        self.scenes = [imagine(self._random(i, 0), split == "test") for i in range(length)]
        self.captions = [scene.captions("" if compounds else " ") for scene in self.scenes]
        self._drawn: dict[int, np.ndarray] = {}

    def _random(self, index: int, what: int) -> np.random.Generator:
        """Of a scene's content (0) and of its picture (1)."""
        return stream(self.seed, self.splits.index(self.split), what, index)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Any, list[str]]:
        index = range(len(self))[index]
        if index not in self._drawn:
            self._drawn[index] = draw(self.scenes[index], self.image_size, self._random(index, 1))
        image: Any = to_float(self._drawn[index])
        return self.transform(image) if self.transform else image, self.captions[index]

    def __repr__(self) -> str:
        side = self.image_size
        return f"ShapeScenes({self.split}: {len(self):,} scenes of 3×{side}×{side})"


def imagine(rng: np.random.Generator, held_out: bool) -> Scene:
    """A scene at random, with a pair of `HELD_OUT` or without."""

    def choose(options: Sequence[Any]) -> Any:
        return options[int(rng.integers(len(options)))]

    def group(count: int, pairs: Sequence[tuple[str, str]]) -> Group:
        return Group(count, choose(list(SIZES)), *choose(pairs))

    new = sorted(HELD_OUT)
    counts = choose([(1,), (2,), (3,), (4,), (1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1)])
    first = group(counts[0], new if held_out else PAIRS)
    if len(counts) == 1:
        return Scene((first,))
    second = first
    while second[2:] == first[2:]:  # else it would be one group
        second = group(counts[1], PAIRS + new if held_out else PAIRS)
    return Scene((first, second), choose(list(RELATIONS)))


def place(scene: Scene, rng: np.random.Generator) -> list[tuple[Group, float, float]]:
    """Where the objects are, in [0, 1]: x to the right, y downwards. None touches another.

    Of two groups, one is wholly on one side of a line, and their centres lie mostly across it: only
    one relation is true.
    """
    gap = 0.02
    while True:
        placed: list[tuple[Group, float, float]] = []
        line = rng.uniform(0.42, 0.58)
        for which, group in enumerate(scene.groups):
            r = SIZES[group.size]
            low, high = [r + gap, r + gap], [1 - r - gap, 1 - r - gap]
            if scene.relation:
                axis = 0 if scene.relation in ("left of", "right of") else 1
                first_is_low = scene.relation in ("left of", "above")
                if (which == 0) == first_is_low:
                    high[axis] = line - r - gap
                else:
                    low[axis] = line + r + gap
            for _ in range(group.number):
                for _ in range(30):
                    x, y = (a + (b - a) * t for a, b, t in zip(low, high, rng.random(2).tolist()))
                    if all(
                        math.hypot(x - u, y - v) > 1.1 * (r + SIZES[g.size]) + gap
                        for g, u, v in placed
                    ):
                        placed.append((group, x, y))
                        break
        if len(placed) == sum(group.number for group in scene.groups) and clear(scene, placed):
            return placed


def clear(scene: Scene, placed: Sequence[tuple[Group, float, float]]) -> bool:
    """Whether the groups' centres differ across the line more than along it."""
    if not scene.relation:
        return True
    one, other = (
        np.mean([(x, y) for g, x, y in placed if g is group], axis=0) for group in scene.groups
    )
    across, along = abs(one - other) if "of" in scene.relation else abs(one - other)[::-1]
    return bool(along < 0.6 * across)


def draw(scene: Scene, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw it: (3, size, size) uint8, on a dark ground, with noise, in colours that vary."""
    scale = 4 * size  # four times as large, then reduced: smooth edges
    canvas = Image.new("RGB", (scale, scale), tuple(rng.integers(15, 60, 3).tolist()))
    pen = ImageDraw.Draw(canvas)
    for group, x, y in place(scene, rng):
        r = SIZES[group.size] * rng.uniform(0.94, 1.06)
        colour = np.array(COLOURS[group.colour]) + rng.integers(-15, 16, 3)
        fill = tuple(colour.clip(0, 255).tolist())
        if corners := SHAPES[group.shape]:
            pen.polygon([((x + r * u) * scale, (y + r * v) * scale) for u, v in corners], fill)
        else:
            box = (x - r) * scale, (y - r) * scale, (x + r) * scale, (y + r) * scale
            pen.ellipse(box, fill)
    pixels = np.asarray(canvas.reduce(4))
    noisy = pixels + rng.normal(0, 4, pixels.shape)
    return noisy.clip(0, 255).astype(np.uint8).transpose(2, 0, 1)
