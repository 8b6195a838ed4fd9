"""Random transforms: each epoch the network sees another version of every image.

Augmentation says what does not matter: a photograph mirrored is the same thing, a digit mirrored
is not. A transform that is true of the data is worth new images; one that is false costs accuracy.

All take an image (C, H, W) or a batch (N, C, H, W), float in [0, 1], and draw from
`minidl.data.sample_rngs`, the streams of the samples that are being loaded. So what becomes of an
image depends on (seed, epoch, index) only: not on its batch, nor on the number of workers.

Names and defaults are torchvision's. Three differences: arrays in place of PIL images; what turns
or stretches an image is always bilinear (torchvision's default takes the nearest pixel, which
frays small images); and it fills with one number for all channels.

    moving pixels       RandomHorizontalFlip, RandomVerticalFlip, RandomCrop (also pad and crop),
                        RandomResizedCrop, RandomRotation, RandomAffine
    changing values     ColorJitter, GaussianNoise, Cutout
    one of many         RandAugment
    mixing two images   MixUp, CutMix: these change the labels too, and so take whole batches
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minidl.data.collate import default_collate
from minidl.data.randomness import sample_rngs
from minidl.data.transforms import Compose
from minidl.ops.warp import warp_affine
from minidl.tensor import Tensor

__all__ = [
    "ColorJitter",
    "Compose",
    "CutMix",
    "Cutout",
    "GaussianNoise",
    "MixUp",
    "RandAugment",
    "RandomAffine",
    "RandomCrop",
    "RandomHorizontalFlip",
    "RandomResizedCrop",
    "RandomRotation",
    "RandomTransform",
    "RandomVerticalFlip",
]

Array = np.ndarray
Rng = np.random.Generator


class RandomTransform:
    """A transform in two halves: `draw` chooses at random for one image, `apply` does it to many.

    Whatever `draw` returns for each image of a batch, `apply` gets as a list. Since an image's
    numbers come from its own stream, a batch comes out as its images would one by one.

    Raises:
        TypeError: on a call: not an array of floats.
        ValueError: on a call: not (C, H, W) or (N, C, H, W); or the image is too small.
    """

    batched = True

    def __call__(self, image: Array) -> Array:
        if not isinstance(image, np.ndarray) or image.dtype.kind != "f":
            kind = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
            raise TypeError(
                f"{type(self).__name__} takes arrays of floats in [0, 1], got {kind}: "
                "transforms.ToTensor() makes them of bytes and of PIL images"
            )
        if image.ndim == 3:
            return self(image[None])[0]
        if image.ndim != 4:
            raise ValueError(
                f"{type(self).__name__} takes (C, H, W) or (N, C, H, W), got shape {image.shape}"
            )
        drawn = [self.draw(rng, image.shape[1:]) for rng in sample_rngs(len(image))]
        return self.apply(image, drawn) if drawn else image

    def draw(self, rng: Rng, shape: tuple[int, ...]) -> Any:
        """What shall happen to an image of this shape (C, H, W)."""
        raise NotImplementedError

    def apply(self, images: Array, drawn: list[Any]) -> Array:
        """Do what was drawn to each image: (N, C, H, W) -> (N, C, H', W'), a new array."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in vars(self).items())})"


# Moving pixels: flips and crops -----------------------------------------------------------


class RandomHorizontalFlip(RandomTransform):
    """Mirror left and right, with probability `p`. (Not for digits: a mirrored 2 is no digit.)

    Raises:
        ValueError: `p` is not in [0, 1].
    """

    axis = -1

    def __init__(self, p: float = 0.5) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"p is a probability, got {p}")
        self.p = p

    def draw(self, rng: Rng, shape: tuple[int, ...]) -> bool:
        return rng.random() < self.p

    def apply(self, images: Array, drawn: list[bool]) -> Array:
        return np.where(np.reshape(drawn, (-1, 1, 1, 1)), np.flip(images, self.axis), images)


class RandomVerticalFlip(RandomHorizontalFlip):
    """Turn upside down, with probability `p`. (For cells and satellite images.)"""

    axis = -2


class RandomCrop(RandomTransform):
    """Cut out a window at a random place, after padding: a shift by up to `padding` pixels.

    Args:
        size: of the window, (H, W), or an int for a square.
        padding: pixels added on each side.
        pad_if_needed: pad further where the image is smaller than the window.
        fill: the value of what is added, where `padding_mode` is "constant".
        padding_mode: "constant", "edge", "reflect" or "symmetric", as `np.pad` has them.

    Raises:
        ValueError: a mode that is none; on a call: the padded image is smaller than the window.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        padding: int | None = None,
        pad_if_needed: bool = False,
        fill: float = 0.0,
        padding_mode: str = "constant",
    ) -> None:
        modes = ("constant", "edge", "reflect", "symmetric")
        if padding_mode not in modes:
            raise ValueError(f"padding_mode is one of {', '.join(modes)}, got {padding_mode!r}")
        self.size, self.padding, self.pad_if_needed = (
            pair("size", size),
            padding or 0,
            pad_if_needed,
        )
        self.fill, self.padding_mode = fill, padding_mode

    def _padding(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns to add on each side."""
        if not self.pad_if_needed:
            return self.padding, self.padding
        down, across = (
            self.padding + max(0, want - have - 2 * self.padding)
            for want, have in zip(self.size, shape[-2:])
        )
        return down, across

    def draw(self, rng: Rng, shape: tuple[int, ...]) -> tuple[int, int]:
        (height, width), (down, across) = self.size, self._padding(shape)
        rows, columns = shape[-2] + 2 * down - height, shape[-1] + 2 * across - width
        if rows < 0 or columns < 0:
            raise ValueError(
                f"RandomCrop: a window of {height}×{width} from images of {shape[-2]}×{shape[-1]} "
                f"with {self.padding} pixels of padding"
            )
        return int(rng.integers(rows + 1)), int(rng.integers(columns + 1))

    def apply(self, images: Array, drawn: list[tuple[int, int]]) -> Array:
        (height, width), (down, across) = self.size, self._padding(images.shape)
        value: Any = {"constant_values": self.fill} if self.padding_mode == "constant" else {}
        around = ((0, 0), (0, 0), (down, down), (across, across))
        padded = np.pad(images, around, self.padding_mode, **value)  # type: ignore[call-overload]
        out = np.empty((*images.shape[:2], height, width), images.dtype)
        for i, (top, left) in enumerate(drawn):
            out[i] = padded[i, :, top : top + height, left : left + width]
        return out


# Moving pixels: turning and stretching ----------------------------------------------------


class Warp(RandomTransform):
    """What all share that turn, shift or stretch: `draw` gives a matrix, one kernel applies it.

    The matrix (3, 3) maps places of the old image to places of the new one, (x, y, 1) with the
    centre at (0, 0), x to the right and y downwards, in pixels.
    """

    fill: float = 0.0

    def apply(self, images: Array, drawn: list[Array]) -> Array:
        return warp_about_centre(images, np.stack(drawn), self.fill)


class RandomRotation(Warp):
    """Turn about the centre by an angle from `degrees`.

    Args:
        degrees: (lowest, highest), counter-clockwise; or a number for (-degrees, degrees).
        fill: what comes in from outside.
    """

    def __init__(self, degrees: float | Sequence[float], fill: float = 0.0) -> None:
        self.degrees, self.fill = span("degrees", degrees), fill

    def draw(self, rng: Rng, shape: tuple[int, ...]) -> Array:
        return rotation(rng.uniform(*self.degrees))


class RandomAffine(Warp):
    """Shear, scale, turn and shift.

    Args:
        degrees: as `RandomRotation`'s.
        translate: shift by up to these shares of the width and the height.
        scale: (lowest, highest) factor.
        shear: degrees along x, (lowest, highest) or a number; or four of them, the last two
            along y.
        fill: what comes in from outside.

    Raises:
        ValueError: a share outside [0, 1], a factor that is not positive.
    """

    def __init__(
        self,
        degrees: float | Sequence[float],
        translate: Sequence[float] | None = None,
        scale: Sequence[float] | None = None,
        shear: float | Sequence[float] | None = None,
        fill: float = 0.0,
    ) -> None:
        self.degrees, self.fill = span("degrees", degrees), fill
        self.translate = (0.0, 0.0) if translate is None else pair("translate", translate)
        if not all(0 <= share <= 1 for share in self.translate):
            raise ValueError(f"translate is two shares of the image, in [0, 1], got {translate}")
        self.scale = (1.0, 1.0) if scale is None else span("scale", scale)
        if self.scale[0] <= 0:
            raise ValueError(f"scale is two factors above 0, got {scale}")
        four = isinstance(shear, Sequence) and len(shear) == 4
        self.shear_x = span("shear", shear[:2] if four else shear or 0.0)  # type: ignore[index]
        self.shear_y = span("shear", shear[2:] if four else 0.0)  # type: ignore[index]

    def draw(self, rng: Rng, shape: tuple[int, ...]) -> Array:
        angle = rng.uniform(*self.degrees)
        height, width = shape[-2:]
        far_x, far_y = self.translate[0] * width, self.translate[1] * height
        x, y = rng.uniform(-far_x, far_x), rng.uniform(-far_y, far_y)
        scale = rng.uniform(*self.scale)
        shear_x, shear_y = rng.uniform(*self.shear_x), rng.uniform(*self.shear_y)
        return (
            translation(round(x), round(y)) @ rotation(angle) @ scaling(scale)
            @ shearing(shear_x, shear_y)
        )  # fmt: skip


class RandomResizedCrop(RandomTransform):
    """A window of random area and shape, stretched to `size` (Szegedy et al. 2015, section 6).

    Args:
        size: of the result, (H, W), or an int for a square.
        scale: the window's share of the area, (lowest, highest).
        ratio: its width over its height, (lowest, highest); all ratios' logarithms are as likely.

    Raises:
        ValueError: ranges that are none.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
    ) -> None:
        self.size, self.scale, self.ratio = pair("size", size), span("scale", scale), ratio
        if not (self.scale[0] > 0 and self.scale[1] <= 1):
            raise ValueError(f"scale is two shares of the area, in (0, 1], got {scale}")
        if span("ratio", ratio)[0] <= 0:
            raise ValueError(f"ratio is two numbers above 0, got {ratio}")

    def draw(self, rng: Rng, shape: tuple[int, ...]) -> tuple[float, float, float, float]:
        """(top, left, height, width) of the window."""
        rows, columns = shape[-2:]
        for _ in range(10):
            area = rows * columns * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            height, width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < height <= rows and 0 < width <= columns:
                top, left = rng.integers(rows - height + 1), rng.integers(columns - width + 1)
                return float(top), float(left), height, width
        # No window fits (a long narrow image): the largest in the middle whose ratio is allowed.
        width = min(columns, round(rows * self.ratio[1]))
        height = min(rows, round(columns / self.ratio[0]))
        return (rows - height) / 2, (columns - width) / 2, height, width

    def apply(self, images: Array, drawn: list[tuple[float, float, float, float]]) -> Array:
        matrices = np.zeros((len(drawn), 2, 3))
        for matrix, (top, left, height, width) in zip(matrices, drawn):
            # Pixel i is the interval [i, i + 1), so its middle is at i + 1/2.
            sy, sx = height / self.size[0], width / self.size[1]
            matrix[:] = [[sx, 0, left + sx / 2 - 0.5], [0, sy, top + sy / 2 - 0.5]]
        # Beyond the border is what is on it: else the picture would darken at its edges.
        return warp_affine(images, matrices, size=self.size, padding="border")


def warp_about_centre(images: Array, matrices: Array, fill: float = 0.0) -> Array:
    """Apply matrices (N, 3, 3) that have the image's centre at (0, 0) and lead from old to new."""
    rows, columns = images.shape[-2:]
    x, y = (columns - 1) / 2, (rows - 1) / 2
    # The result asks where its pixels come from, hence the inverse.
    fetch = translation(x, y) @ np.linalg.inv(matrices) @ translation(-x, -y)
    return warp_affine(images, fetch[:, :2], size=(rows, columns), fill=fill)


def rotation(degrees: float) -> Array:
    """Counter-clockwise as one sees it: y points downwards."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])


def translation(x: float, y: float) -> Array:
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1.0]])


def scaling(factor: float) -> Array:
    return np.diag([factor, factor, 1.0])


def shearing(x: float, y: float) -> Array:
    """Along x, then along y, by so many degrees."""
    along_x = np.array([[1, math.tan(math.radians(x)), 0], [0, 1, 0], [0, 0, 1]])
    along_y = np.array([[1, 0, 0], [math.tan(math.radians(y)), 1, 0], [0, 0, 1]])
    return along_y @ along_x


# Changing values --------------------------------------------------------------------------


class ColorJitter(RandomTransform):
    """Other light: brightness, contrast, saturation and hue, in an order drawn for each image.

    Args:
        brightness, contrast, saturation: (lowest, highest) factor; or a number d for
            (max(0, 1 - d), 1 + d).
        hue: (lowest, highest) turn of the colour circle, in [-0.5, 0.5]; or a number for
            (-hue, hue).

    Grey images (C = 1) have no saturation and no hue, and keep that.

    Raises:
        ValueError: ranges that are none; on a call: neither 1 nor 3 channels.
    """

    def __init__(
        self,
        brightness: float | Sequence[float] = 0,
        contrast: float | Sequence[float] = 0,
        saturation: float | Sequence[float] = 0,
        hue: float | Sequence[float] = 0,
    ) -> None:
        def factors(name: str, value: float | Sequence[float]) -> tuple[float, float]:
            low, high = (
                span(name, value) if isinstance(value, Sequence) else (max(0, 1 - value), 1 + value)
            )
            if not 0 <= low <= high:
                raise ValueError(f"{name} is a range of factors, not below 0, got {value}")
            return low, high

        self.brightness = factors("brightness", brightness)
        self.contrast = factors("contrast", contrast)
        self.saturation = factors("saturation", saturation)
        self.hue = span("hue", hue)
        if not -0.5 <= self.hue[0] <= self.hue[1] <= 0.5:
            raise ValueError(f"hue is a turn within [-0.5, 0.5], got {hue}")

    def draw(self, rng: Rng, shape: tuple[int, ...]) -> list[tuple[Adjustment, float]]:
        if shape[0] not in (1, 3):
            raise ValueError(f"ColorJitter takes 1 or 3 channels, got {shape[0]} (shape {shape})")
        steps: list[tuple[Adjustment, float]] = [
            (adjust_brightness, rng.uniform(*self.brightness)),
            (adjust_contrast, rng.uniform(*self.contrast)),
            (adjust_saturation, rng.uniform(*self.saturation)),
            (adjust_hue, rng.uniform(*self.hue)),
        ]
        return [steps[i] for i in rng.permutation(len(steps))]

    def apply(self, images: Array, drawn: list[list[tuple[Adjustment, float]]]) -> Array:
        out = images.copy()
        for i, steps in enumerate(drawn):
            for adjust, amount in steps:
                out[i] = adjust(out[i], amount)
        return out


class GaussianNoise(RandomTransform):
    """Add normally distributed noise to every pixel.

    Args:
        mean, sigma: of the noise.
        clip: cut the result to [0, 1].
    """

    def __init__(self, mean: float = 0.0, sigma: float = 0.1, clip: bool = True) -> None:
        if sigma < 0:
            raise ValueError(f"sigma is a standard deviation, not below 0, got {sigma}")
        self.mean, self.sigma, self.clip = mean, sigma, clip

    def draw(self, rng: Rng, shape: tuple[int, ...]) -> Array:
        return rng.standard_normal(shape, np.float32)

    def apply(self, images: Array, drawn: list[Array]) -> Array:
        noisy = images + (np.stack(drawn) * self.sigma + self.mean).astype(images.dtype)
        return noisy.clip(0, 1) if self.clip else noisy


class Cutout(RandomTransform):
    """Blank a square with its middle anywhere, so that it may stick out (DeVries & Taylor 2017).

    Args:
        length: of its sides, in pixels.
        fill: its value.
    """

    def __init__(self, length: int, fill: float = 0.0) -> None:
        if length < 1:
            raise ValueError(f"length is at least 1 pixel, got {length}")
        self.length, self.fill = length, fill

    def draw(self, rng: Rng, shape: tuple[int, ...]) -> tuple[slice, slice]:
        def side(size: int) -> slice:
            start = int(rng.integers(size)) - self.length // 2
            return slice(max(0, start), max(0, start + self.length))

        return side(shape[-2]), side(shape[-1])

    def apply(self, images: Array, drawn: list[tuple[slice, slice]]) -> Array:
        out = images.copy()
        for image, (rows, columns) in zip(out, drawn):
            image[:, rows, columns] = self.fill
        return out


# An image (C, H, W) and an amount; the result is cut to [0, 1]. A factor of 1, a hue of 0 and a
# grey image under saturation and hue come out as they are. Formulas are Pillow's.
Adjustment = Callable[[Array, float], Array]


def blend(image: Array, other: Any, share: float) -> Array:
    """share · image + (1 - share) · other: beyond 1 away from `other`."""
    if share == 1:
        return image
    return (share * image + (1 - share) * other).clip(0, 1).astype(image.dtype)


def grey(image: Array) -> Array:
    """Luma (ITU-R 601-2): (C, H, W) -> (1, H, W)."""
    if len(image) == 1:
        return image
    return 0.299 * image[:1] + 0.587 * image[1:2] + 0.114 * image[2:3]


def adjust_brightness(image: Array, factor: float) -> Array:
    return blend(image, 0, factor)


def adjust_contrast(image: Array, factor: float) -> Array:
    return blend(image, grey(image).mean(), factor)


def adjust_saturation(image: Array, factor: float) -> Array:
    return image if len(image) == 1 else blend(image, grey(image), factor)


def adjust_hue(image: Array, turn: float) -> Array:
    if len(image) == 1 or turn == 0:
        return image
    from matplotlib.colors import hsv_to_rgb, rgb_to_hsv

    hsv = rgb_to_hsv(image.transpose(1, 2, 0).clip(0, 1))
    hsv[..., 0] = (hsv[..., 0] + turn) % 1
    return hsv_to_rgb(hsv).transpose(2, 0, 1).astype(image.dtype)


def adjust_sharpness(image: Array, factor: float) -> Array:
    """Away from (or, below 1, towards) a blurred copy; the border has none and stays."""
    blurred = image.copy()
    rows, columns = image.shape[-2] - 2, image.shape[-1] - 2
    if rows > 0 and columns > 0:
        windows = [image[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)]
        blurred[:, 1:-1, 1:-1] = (sum(windows) + 4 * windows[4]) / 13
    return blend(image, blurred, factor)


def posterize(image: Array, bits: float) -> Array:
    """Keep the highest bits of each byte."""
    kept = np.round(image * 255).astype(np.uint8) & np.uint8(256 - (1 << (8 - int(bits))))
    return (kept / 255).astype(image.dtype)


def solarize(image: Array, threshold: float) -> Array:
    """Invert what is brighter, as film does that was exposed for too long."""
    return np.where(image >= threshold, 1 - image, image)


def autocontrast(image: Array, _: float = 0) -> Array:
    """Stretch each channel to the whole range."""
    low, high = image.min((1, 2), keepdims=True), image.max((1, 2), keepdims=True)
    flat = high == low
    return np.where(flat, image, (image - low) / np.where(flat, 1, high - low)).astype(image.dtype)


def equalize(image: Array, _: float = 0) -> Array:
    """Give each channel as many pixels of every value as of any other."""
    out = image.copy()
    for channel, values in zip(out, np.round(image * 255).astype(np.uint8)):
        counts = np.bincount(values.reshape(-1), minlength=256)
        step = (counts.sum() - counts[counts > 0][-1]) // 255
        if step:
            below = np.cumsum(counts) - counts
            channel[:] = ((below + step // 2) // step).clip(0, 255)[values] / 255
    return out


# One of many ------------------------------------------------------------------------------


class RandAugment(RandomTransform):
    """`num_ops` of 14 transforms, drawn anew for each image (Cubuk et al. 2020).

    Args:
        num_ops: how many, one after the other.
        magnitude: how strong all of them are, from 0 to num_magnitude_bins - 1.
        num_magnitude_bins: the number of strengths.
        fill: what comes in from outside.

    Raises:
        ValueError: a magnitude out of range; on a call: neither 1 nor 3 channels.
    """

    def __init__(
        self,
        num_ops: int = 2,
        magnitude: int = 9,
        num_magnitude_bins: int = 31,
        fill: float = 0.0,
    ) -> None:
        if not 0 <= magnitude < num_magnitude_bins:
            raise ValueError(f"magnitude is in [0, {num_magnitude_bins}), got {magnitude}")
        if num_ops < 0:
            raise ValueError(f"num_ops is at least 0, got {num_ops}")
        self.num_ops, self.magnitude = num_ops, magnitude
        self.num_magnitude_bins, self.fill = num_magnitude_bins, fill

    def operations(self, shape: tuple[int, ...]) -> dict[str, tuple[Adjustment, float, bool]]:
        """name -> (function, amount, whether the sign of the amount is drawn too)."""
        m = self.magnitude / max(self.num_magnitude_bins - 1, 1)  # from 0 to 1
        height, width = shape[-2:]

        def moved(matrix: Callable[[float], Array]) -> Adjustment:
            return lambda image, amount: warp_about_centre(
                image[None], matrix(amount)[None], self.fill
            )[0]

        def factor(adjust: Adjustment) -> Adjustment:
            return lambda image, amount: adjust(image, 1 + amount)

        shear = math.degrees(math.atan(0.3 * m))
        far = 150 / 331  # of the side: the paper's images had 331 pixels
        return {
            "Identity": (lambda image, _: image, 0.0, False),
            "ShearX": (moved(lambda a: shearing(a, 0)), shear, True),
            "ShearY": (moved(lambda a: shearing(0, a)), shear, True),
            "TranslateX": (moved(lambda a: translation(int(a), 0)), far * width * m, True),
            "TranslateY": (moved(lambda a: translation(0, int(a))), far * height * m, True),
            "Rotate": (moved(rotation), 30 * m, True),
            "Brightness": (factor(adjust_brightness), 0.9 * m, True),
            "Color": (factor(adjust_saturation), 0.9 * m, True),
            "Contrast": (factor(adjust_contrast), 0.9 * m, True),
            "Sharpness": (factor(adjust_sharpness), 0.9 * m, True),
            "Posterize": (posterize, 8 - round(4 * m), False),
            "Solarize": (solarize, 1 - m, False),
            "AutoContrast": (autocontrast, 0.0, False),
            "Equalize": (equalize, 0.0, False),
        }

    def draw(self, rng: Rng, shape: tuple[int, ...]) -> list[tuple[Adjustment, float]]:
        if shape[0] not in (1, 3):
            raise ValueError(f"RandAugment takes 1 or 3 channels, got {shape[0]} (shape {shape})")
        operations = list(self.operations(shape).values())
        steps = []
        for _ in range(self.num_ops):
            function, amount, signed = operations[rng.integers(len(operations))]
            steps.append((function, -amount if signed and rng.random() < 0.5 else amount))
        return steps

    apply = ColorJitter.apply  # one function after the other, on each image


# Mixing two images ------------------------------------------------------------------------


class Mix:
    """What MixUp and CutMix share: each image is mixed with its neighbour in the batch.

    Both take a batch and its labels, and give the mixed batch and *soft* labels (N, classes), which
    `cross_entropy` takes::

        mixup = MixUp(num_classes=10)
        loader = DataLoader(dataset, 64, shuffle=True, collate_fn=mixup.collate)

    Each image's share λ comes from its own stream, as everywhere in this file.

    Args:
        alpha: λ is drawn from Beta(alpha, alpha): small: mostly one of the two images; 1: evenly.
        num_classes: of the labels; not needed where they are soft already.

    Raises:
        ValueError: alpha is not above 0; on a call: labels that do not fit.
    """

    def __init__(self, alpha: float = 1.0, num_classes: int | None = None) -> None:
        if not alpha > 0:
            raise ValueError(f"alpha is above 0, got {alpha}")
        self.alpha, self.num_classes = alpha, num_classes

    def __call__(self, images: Any, labels: Any) -> tuple[Tensor, Tensor]:
        x = images.array if isinstance(images, Tensor) else np.asarray(images)
        y = self._soft(labels.array if isinstance(labels, Tensor) else np.asarray(labels))
        if x.ndim != 4 or len(x) != len(y) or x.dtype.kind != "f":
            raise ValueError(
                f"{type(self).__name__} takes float images (N, C, H, W) and N labels, got "
                f"{x.dtype} {x.shape} and {len(y)} labels"
            )
        rngs = sample_rngs(len(x))
        share = np.array([rng.beta(self.alpha, self.alpha) for rng in rngs])
        mixed, share = self.mix(x, np.roll(x, 1, axis=0), share, rngs)
        share = share[:, None].astype(np.float32)
        return Tensor(mixed), Tensor(share * y + (1 - share) * np.roll(y, 1, axis=0))

    def collate(self, samples: list[Any]) -> tuple[Tensor, Tensor]:
        """Make a batch of samples, and mix it: for `DataLoader(..., collate_fn=)`."""
        return self(*default_collate(samples))

    def mix(self, x: Array, other: Array, share: Array, rngs: list[Rng]) -> tuple[Array, Array]:
        """The mixed images, and the share that each image still has."""
        raise NotImplementedError

    def _soft(self, labels: Array) -> Array:
        if labels.ndim == 2 and labels.dtype.kind == "f":
            return labels.astype(np.float32, copy=False)
        if self.num_classes is None:
            raise ValueError(f"{type(self).__name__} needs num_classes=... for labels of integers")
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise ValueError(f"labels are integers (N,), got {labels.dtype} {labels.shape}")
        if labels.size and not (labels.min() >= 0 and labels.max() < self.num_classes):
            raise ValueError(
                f"labels are in [0, {self.num_classes}), got {labels.min()} to {labels.max()}"
            )
        return np.eye(self.num_classes, dtype=np.float32)[labels]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(alpha={self.alpha}, num_classes={self.num_classes})"


class MixUp(Mix):
    """λ xᵢ + (1 - λ) xⱼ, and the labels alike (Zhang et al. 2018)."""

    def mix(self, x: Array, other: Array, share: Array, rngs: list[Rng]) -> tuple[Array, Array]:
        lam = share.reshape(-1, 1, 1, 1).astype(x.dtype)
        return lam * x + (1 - lam) * other, share


class CutMix(Mix):
    """A rectangle of the other image, of 1 - λ of the area; the labels by area (Yun et al. 2019).

    Where the rectangle sticks out, the labels follow what is left of it.
    """

    def mix(self, x: Array, other: Array, share: Array, rngs: list[Rng]) -> tuple[Array, Array]:
        rows, columns = x.shape[-2:]
        out, kept = x.copy(), np.empty(len(x))
        for i, rng in enumerate(rngs):
            half = 0.5 * math.sqrt(1 - share[i])
            y, x_ = rng.integers(rows), rng.integers(columns)
            top, bottom = max(0, int(y - half * rows)), min(rows, int(y + half * rows))
            left, right = max(0, int(x_ - half * columns)), min(columns, int(x_ + half * columns))
            out[i, :, top:bottom, left:right] = other[i, :, top:bottom, left:right]
            kept[i] = 1 - (bottom - top) * (right - left) / (rows * columns)
        return out, kept


# Arguments --------------------------------------------------------------------------------


def pair(name: str, value: Any) -> tuple[Any, Any]:
    """A number for both, or two."""
    values = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(values) != 2 or not all(v >= 0 for v in values):
        raise ValueError(f"{name} is a number or two, not below 0, got {value!r}")
    return values


def span(name: str, value: float | Sequence[float]) -> tuple[float, float]:
    """(lowest, highest), or a number for (-number, number)."""
    values = tuple(value) if isinstance(value, Sequence) else (-value, value)
    if len(values) != 2 or not values[0] <= values[1]:
        raise ValueError(f"{name} is a number (not below 0) or (lowest, highest), got {value!r}")
    return values
