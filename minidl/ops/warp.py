"""Affine warps: an image turned, scaled, sheared and shifted, as augmentation does it.

Every pixel of the result asks where it comes from, and gets a mean of the four pixels around that
place, or the nearest one. Both are linear in the image, so `warp_affine_input`, which adds every
pixel to where it came from, is the transpose of `warp_affine` and its derivative; and vice versa.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from minidl import backend
from minidl.backend.native import native, why_missing
from minidl.op import Sample, op, sample
from minidl.ops.conv import Pair

MODES = "bilinear", "nearest"
PADDINGS = "zeros", "border", "reflection"


@op
def warp_affine(
    x: Any,
    m: Any,
    *,
    size: Pair | None = None,
    mode: str = "bilinear",
    padding: str = "zeros",
    fill: float = 0.0,
) -> Any:
    """Fetch each pixel of the result through a matrix: (N,C,H,W), (N,2,3) -> (N,C,*size).

    Args:
        x: images.
        m: matrices from places in the result to places in x, in pixels whose centres are whole
            numbers: column j and row i come from column m[0]·(j, i, 1), row m[1]·(j, i, 1). They
            get no gradient. A place that is not finite is `fill`, whatever the padding.
        size: (height, width) of the result; None: that of x.
        mode: "bilinear" or "nearest" (half-way between two: the even one).
        padding: what is outside of x. "zeros": each neighbour there counts as `fill`; "border":
            the nearest pixel of x; "reflection": x mirrored at its pixels' outer edges
            (PyTorch's ``grid_sample(align_corners=False)``).
        fill: a number.

    Raises:
        ValueError: shapes that do not fit, images without pixels, unknown mode or padding.
        TypeError: bilinear means of images that are not floating point.
    """
    n, c, h, w = x.shape
    out_h, out_w = size = size or (h, w)
    if mode == "bilinear" and x.dtype.kind != "f":
        raise TypeError(f"warp_affine: 'bilinear' takes floating-point images, got {x.dtype}")
    pixels = x.reshape(n, c, h * w)
    out = backend.array_module(x).zeros((n, c, out_h * out_w), x.dtype)
    for at, inside, share in neighbours(x, m, (h, w), size, mode, padding):
        found = np.take_along_axis(pixels, at, axis=2)
        found = np.where(inside, found, x.dtype.type(fill))
        out += found if share is None else share * found
    return out.reshape(n, c, out_h, out_w)


@warp_affine.gradient
def _(g, x_shape, m, *, size, mode, padding, fill):
    return warp_affine_input(g, m, input_size=x_shape[2:], mode=mode, padding=padding), None


@op
def warp_affine_input(
    y: Any, m: Any, *, input_size: Pair, mode: str = "bilinear", padding: str = "zeros"
) -> Any:
    """Add each y to where `warp_affine` fetches it from: (N,C,H',W') -> (N,C,*input_size)."""
    n, c, out_h, out_w = y.shape
    pixels = input_size[0] * input_size[1]
    plane = backend.array_module(y).arange(n * c).reshape(n, c, 1)
    y = y.reshape(n, c, out_h * out_w)
    out: Any = 0.0
    for at, inside, share in neighbours(y, m, input_size, (out_h, out_w), mode, padding):
        part = np.where(inside, y if share is None else share * y, y.dtype.type(0))
        out = out + np.bincount((plane * pixels + at).reshape(-1), part.reshape(-1), n * c * pixels)
    return out.astype(y.dtype).reshape(n, c, *input_size)


@warp_affine_input.gradient
def _(g, y_shape, m, *, input_size, mode, padding):
    return warp_affine(g, m, size=y_shape[2:], mode=mode, padding=padding), None


def neighbours(
    x: Any, m: Any, size: Pair, out_size: Pair, mode: str, padding: str
) -> Iterator[tuple[Any, Any, Any]]:
    """The one or four pixels that each pixel of a result comes from.

    Yields:
        Arrays (N,1,H'W'): their position h * W + w in an image of `size`; whether they are inside
        (else their position is a valid one); their share of the result, None: all of it.
    """
    if mode not in MODES or padding not in PADDINGS:
        raise ValueError(
            f"mode is one of {MODES}, padding of {PADDINGS}, got {mode!r}, {padding!r}"
        )
    if 0 in size:
        raise ValueError(f"an image without pixels cannot be warped, got height, width = {size}")
    xp = backend.array_module(x)
    m = xp.asarray(m, np.float64)  # of float32, places in a large image would be coarse
    if m.shape != (x.shape[0], 2, 3):
        raise ValueError(f"a matrix (2, 3) for each of {x.shape[0]} images, got shape {m.shape}")
    i, j = xp.arange(out_size[0])[:, None], xp.arange(out_size[1])
    m = m[..., None, None]
    with np.errstate(invalid="ignore", over="ignore"):  # places that are not finite
        places = [m[:, k, 1] * i + m[:, k, 0] * j + m[:, k, 2] for k in (1, 0)]  # row, column
    finite = np.isfinite(places[0]) & np.isfinite(places[1])
    down, across = (
        np.where(finite, folded(np.where(finite, place, 0), length, padding), -2).reshape(
            x.shape[0], 1, out_size[0] * out_size[1]
        )
        for place, length in zip(places, size, strict=True)
    )
    if mode == "nearest":
        corners = [(np.rint(down), np.rint(across), None)]
    else:
        top, left = np.floor(down), np.floor(across)
        low, right = down - top, across - left
        corners = [
            (top, left, (1 - low) * (1 - right)),
            (top, left + 1, (1 - low) * right),
            (top + 1, left, low * (1 - right)),
            (top + 1, left + 1, low * right),
        ]
    for row, column, share in corners:
        inside = (row >= 0) & (row < size[0]) & (column >= 0) & (column < size[1])
        row, column = (np.where(inside, where, 0).astype(np.int64) for where in (row, column))
        yield row * size[1] + column, inside, None if share is None else share.astype(x.dtype)


def folded(place: Any, length: int, padding: str) -> Any:
    """The place along an axis where the padding finds what is outside, -1/2 to length - 1/2."""
    if padding == "zeros":
        return place
    if padding == "reflection":  # there and back again: a period of two lengths
        place = np.fmod(np.abs(place + 0.5), 2 * length)
        place = np.minimum(place, 2 * length - place) - 0.5
    return np.clip(place, 0, length - 1)


# Kernels ----------------------------------------------------------------------------------


@warp_affine.kernel("native", dtypes=("float32", "float64"), missing=why_missing)
def _(x, m, *, size=None, mode="bilinear", padding="zeros", fill=0.0):
    m = np.asarray(m, np.float64)
    return native.warp_affine(x, m, size or x.shape[2:], mode, padding, fill)


@warp_affine_input.kernel("native", dtypes=("float32", "float64"), missing=why_missing)
def _(y, m, *, input_size, mode="bilinear", padding="zeros"):
    return native.warp_affine_input(y, np.asarray(m, np.float64), input_size, mode, padding)


# Samples ----------------------------------------------------------------------------------

# Lists, since the tests would take a float array for an input that has a gradient.
TURN = [[0.8, -0.5, 0.63], [0.45, 0.9, -0.37]]
SHRINK = [[2.3, 0.2, -3.13], [-0.3, 1.9, -2.23]]  # also reaches far outside
HOLES = [[1.1, 0.0, np.inf], [0.0, 0.9, 0.2]]


@warp_affine.samples
def _(rng: np.random.Generator) -> Iterator[Sample]:
    x = rng.normal(size=(2, 3, 4, 5))
    yield sample(x, [TURN, SHRINK])
    yield sample(x, [SHRINK, TURN], size=(3, 6), fill=0.5)
    yield sample(x, [TURN, SHRINK], size=(5, 70), padding="border")
    yield sample(x, [TURN, SHRINK], size=(9, 8), padding="reflection")
    for padding in PADDINGS:
        yield sample(x, [SHRINK, TURN], size=(7, 6), mode="nearest", padding=padding, fill=-1.0)
    yield sample(x[:1], [HOLES], padding="border", fill=0.25)
    yield sample(x, np.array([[[-1, 0, 4], [0, 1, 0]], [[0, 1, 0], [1, 0, -1]]]))  # flips


@warp_affine_input.samples
def _(rng: np.random.Generator) -> Iterator[Sample]:
    y = rng.normal(size=(2, 5, 4, 6))
    for mode in MODES:
        for padding in PADDINGS:
            yield sample(y, [TURN, SHRINK], input_size=(3, 5), mode=mode, padding=padding)
    yield sample(y, np.array([[[-1, 0, 4], [0, 1, 0]], [[0, 1, 0], [1, 0, -1]]]), input_size=(3, 5))
