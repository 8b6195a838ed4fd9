"""Pooling: each window of an image becomes one number, its maximum or its mean.

Max pooling passes the gradient of a window on to the pixel that won. Which one that was is not
kept from the forward pass but found again (`max_pool2d_index`): so the op is a pure function of
x, and a pass without gradients never asks. Mean pooling is linear, and `avg_pool2d_input` its
transpose, so these two are each other's derivative; and so on for the adaptive ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from minidl import backend
from minidl.backend.native import native, why_missing
from minidl.op import Sample, op, sample
from minidl.ops.conv import Pair, output_size, taps
from minidl.ops.shape import gather

# The maximum ------------------------------------------------------------------------------


@op
def max_pool2d(
    x: Any,
    *,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    ceil_mode: bool = False,
) -> Any:
    """The largest pixel of each window, or NaN if it has one: (N,C,H,W) -> (N,C,H',W').

    Raises:
        ValueError: the window does not fit the padded image.
    """
    how = (x.shape[2:], kernel_size, stride, padding, dilation)
    out_size = output_size(*how, ceil_mode)
    out = backend.array_module(x).full((*x.shape[:2], *out_size), lowest(x), dtype=x.dtype)
    for _, _, windows, pixels in taps(*how, out_size):
        np.maximum(out[windows], x[pixels], out=out[windows])
    return out


@max_pool2d.gradient
def _(g, x, *, kernel_size, stride, padding, dilation, ceil_mode):
    index = max_pool2d_index(
        x,
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        ceil_mode=ceil_mode,
    )
    return (max_pool2d_input(g, index, input_size=x.shape[2:]),)


@op(constant=True)
def max_pool2d_index(
    x: Any,
    *,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    ceil_mode: bool = False,
) -> Any:
    """Which pixel, h * W + w, is the largest of each window: int32 (N,C,H',W').

    Of equal pixels the first (row by row), of NaNs the last, as in PyTorch.
    """
    xp = backend.array_module(x)
    size = height, width = x.shape[2:]
    how = (size, kernel_size, stride, padding, dilation)
    out_size = output_size(*how, ceil_mode)
    best = xp.full((*x.shape[:2], *out_size), lowest(x), dtype=x.dtype)
    index = xp.empty(best.shape, dtype=np.int32)
    index[...] = first_pixels(size, stride, padding, dilation, out_size)  # if nothing beats -inf
    position = xp.arange(height * width, dtype=np.int32).reshape(size)
    for _, _, windows, pixels in taps(*how, out_size):
        candidate = x[pixels]
        wins = (candidate > best[windows]) | (candidate != candidate)
        np.copyto(best[windows], candidate, where=wins)
        np.copyto(index[windows], position[pixels], where=wins)
    return index


@op
def max_pool2d_input(y: Any, index: Any, *, input_size: Pair) -> Any:
    """Add each y[n,c,p,q] to pixel index[n,c,p,q] of zeros: (N,C,H',W') -> (N,C,*input_size)."""
    n, c, _, _ = y.shape
    pixels = input_size[0] * input_size[1]
    plane = backend.array_module(y).arange(n * c).reshape(n, c, 1, 1)
    out = np.bincount((plane * pixels + index).reshape(-1), y.reshape(-1), n * c * pixels)
    return out.astype(y.dtype).reshape(n, c, *input_size)


@max_pool2d_input.gradient
def _(g, index, *, input_size):
    n, c, h, w = index.shape
    pixels = g.reshape((n, c, input_size[0] * input_size[1]))
    return gather(pixels, index.reshape((n, c, h * w)), dim=2).reshape(index.shape), None


def lowest(x: Any) -> float:
    return -np.inf if x.dtype.kind == "f" else int(np.iinfo(x.dtype).min)


def first_pixels(
    size: Pair, stride: Pair, padding: Pair, dilation: Pair, out_size: Pair
) -> list[list[int]]:
    """h * W + w of the first pixel of each window that is in the image."""
    rows, columns = (
        [min(max(s := i * t - p, s % d), n - 1) for i in range(count)]
        for n, t, p, d, count in zip(size, stride, padding, dilation, out_size, strict=True)
    )
    return [[row * size[1] + column for column in columns] for row in rows]


# The mean ---------------------------------------------------------------------------------


@op
def avg_pool2d(
    x: Any,
    *,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair = (0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    """The mean of each window: (N,C,H,W) -> (N,C,H',W').

    Raises:
        ValueError: the window does not fit the padded image.
    """
    how = (x.shape[2:], kernel_size, stride, padding, (1, 1))
    out_size = output_size(*how, ceil_mode)
    out = backend.array_module(x).zeros((*x.shape[:2], *out_size), dtype=x.dtype)
    for _, _, windows, pixels in taps(*how, out_size):
        out[windows] += x[pixels]
    out /= divisors(out, *how[:4], count_include_pad, divisor_override)
    return out


@avg_pool2d.gradient
def _(g, x_shape, *, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override):
    spread = avg_pool2d_input(
        g,
        input_size=x_shape[2:],
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
        ceil_mode=ceil_mode,
        count_include_pad=count_include_pad,
        divisor_override=divisor_override,
    )
    return (spread,)


@op
def avg_pool2d_input(
    y: Any,
    *,
    input_size: Pair,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair = (0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    """Give every pixel of a window an equal share of its y: (N,C,H',W') -> (N,C,*input_size)."""
    how = (input_size, kernel_size, stride, padding, (1, 1))
    x = backend.array_module(y).zeros((*y.shape[:2], *input_size), dtype=y.dtype)
    share = y / divisors(y, *how[:4], count_include_pad, divisor_override)
    for _, _, windows, pixels in taps(*how, y.shape[2:]):
        x[pixels] += share[windows]
    return x


@avg_pool2d_input.gradient
def _(
    g,
    *,
    input_size,
    kernel_size,
    stride,
    padding,
    ceil_mode,
    count_include_pad,
    divisor_override,
):
    mean = avg_pool2d(
        g,
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
        ceil_mode=ceil_mode,
        count_include_pad=count_include_pad,
        divisor_override=divisor_override,
    )
    return (mean,)


def divisors(
    y: Any,
    size: Pair,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Any:
    """What each window's sum is divided by: an array (H',W') like y."""
    if divisor_override:
        return divisor_override
    counts = []
    for n, k, s, p, count in zip(size, kernel, stride, padding, y.shape[2:], strict=True):
        start = np.arange(count) * s - p
        end = np.minimum(start + k, n + p)  # what hangs over the padding does not count
        if not count_include_pad:
            start, end = np.maximum(start, 0), np.minimum(end, n)
        counts.append(end - start)
    return backend.array_module(y).asarray(np.outer(*counts), dtype=y.dtype)


# Adaptive: the size of the result is given, the windows follow ----------------------------


def adaptive_windows(size: Pair, out_size: Pair) -> Iterator[tuple[Any, Any]]:
    """Each (p, q) of the result with its window: rows from ⌊pH/H'⌋ to ⌈(p+1)H/H'⌉, and so on."""
    rows, columns = (
        [slice(i * n // m, -(-(i + 1) * n // m)) for i in range(m)]
        for n, m in zip(size, out_size, strict=True)
    )
    for p, q in np.ndindex(*out_size):
        yield (..., p, q), (..., rows[p], columns[q])


@op
def adaptive_avg_pool2d(x: Any, *, output_size: Pair) -> Any:
    """The mean of each of H' x W' windows of about one size: (N,C,H,W) -> (N,C,*output_size)."""
    out = backend.array_module(x).empty((*x.shape[:2], *output_size), dtype=x.dtype)
    for at, window in adaptive_windows(x.shape[2:], output_size):
        out[at] = x[window].mean(axis=(2, 3))
    return out


@adaptive_avg_pool2d.gradient
def _(g, x_shape, *, output_size):
    return (adaptive_avg_pool2d_input(g, input_size=x_shape[2:]),)


@op
def adaptive_avg_pool2d_input(y: Any, *, input_size: Pair) -> Any:
    """Give every pixel of a window an equal share of its y: (N,C,H',W') -> (N,C,*input_size)."""
    x = backend.array_module(y).zeros((*y.shape[:2], *input_size), dtype=y.dtype)
    for at, window in adaptive_windows(input_size, y.shape[2:]):
        height, width = x[window].shape[2:]
        x[window] += (y[at] / (height * width))[..., None, None]
    return x


@adaptive_avg_pool2d_input.gradient
def _(g, y_shape, *, input_size):
    return (adaptive_avg_pool2d(g, output_size=y_shape[2:]),)


@op(constant=True)
def adaptive_max_pool2d_index(x: Any, *, output_size: Pair) -> Any:
    """Which pixel, h * W + w, is the largest of each of H' x W' windows: (N,C,*output_size).

    Of equal pixels it is the first; `gather` gets their values.
    """
    n, c, *size = x.shape
    out = backend.array_module(x).empty((n, c, *output_size), dtype=np.int64)
    position = backend.array_module(x).arange(size[0] * size[1]).reshape(size)
    for at, window in adaptive_windows(size, output_size):
        pixels = x[window]
        winner = pixels.reshape(n, c, pixels.shape[2] * pixels.shape[3]).argmax(axis=2)
        out[at] = position[window].reshape(-1)[winner]
    return out


# Kernels ----------------------------------------------------------------------------------


@max_pool2d.kernel("native", dtypes=("float32", "float64", "int8", "uint8"), missing=why_missing)
def _(x, *, kernel_size, ceil_mode=False, **how):
    if ceil_mode:  # C++ has none
        return max_pool2d.op.formula(x, kernel_size=kernel_size, ceil_mode=True, **how)
    if x.dtype.kind != "f":
        return native.max_pool2d_bytes(x, kernel_size, **how)
    return native.max_pool2d(x, kernel_size, **how, return_index=False)


@max_pool2d.gradient_kernel("native", dtypes=("float32", "float64"), missing=why_missing)
def _(g, x, *, kernel_size, ceil_mode, **how):
    if ceil_mode:  # C++ has none
        return max_pool2d.op.rule(g, x, kernel_size=kernel_size, ceil_mode=True, **how)
    return (native.max_pool2d_gradient(g, x, kernel_size, **how),)


@max_pool2d_index.kernel("native", dtypes=("float32", "float64"), missing=why_missing)
def _(x, *, kernel_size, ceil_mode=False, **how):
    if ceil_mode:  # C++ has none
        return max_pool2d_index.op.formula(x, kernel_size=kernel_size, ceil_mode=True, **how)
    return native.max_pool2d(x, kernel_size, **how)[1]


def means(
    size: Pair, out_size: Pair, kernel_size: Pair, stride: Pair, padding: Pair, *how: Any
) -> tuple[list[int], list[int], Any]:
    """Where the windows of an average pool begin and end, and what their sums are divided by."""
    edges: list[list[int]] = []
    for n, count, k, s, p in zip(size, out_size, kernel_size, stride, padding, strict=True):
        starts = [i * s - p for i in range(count)]
        edges.append([e for a in starts for e in (min(max(a, 0), n), max(min(a + k, n), 0))])
    y = np.empty((1, 1, *out_size))
    divisor = divisors(y, size, kernel_size, stride, padding, *how)
    return edges[0], edges[1], np.broadcast_to(np.asarray(divisor, np.float64), out_size)


@avg_pool2d.kernel("native", dtypes=("float32", "float64"), missing=why_missing)
def _(
    x,
    *,
    kernel_size,
    stride,
    padding=(0, 0),
    ceil_mode=False,
    count_include_pad=True,
    divisor_override=None,
):
    how = (x.shape[2:], kernel_size, stride, padding)
    out_size = output_size(*how, (1, 1), ceil_mode)
    windows = means(how[0], out_size, *how[1:], count_include_pad, divisor_override)
    return native.avg_pool2d(x, *windows)


@avg_pool2d_input.kernel("native", dtypes=("float32", "float64"), missing=why_missing)
def _(
    y,
    *,
    input_size,
    kernel_size,
    stride,
    padding=(0, 0),
    ceil_mode=False,
    count_include_pad=True,
    divisor_override=None,
):
    how = (kernel_size, stride, padding, count_include_pad, divisor_override)
    return native.avg_pool2d_input(y, input_size, *means(input_size, y.shape[2:], *how))


def adaptive_means(size: Pair, out_size: Pair) -> tuple[list[int], list[int], Any]:
    """The same for an adaptive pool."""
    edges = [
        [e for i in range(m) for e in (i * n // m, -(-(i + 1) * n // m))]
        for n, m in zip(size, out_size, strict=True)
    ]
    lengths = [np.diff(np.reshape(e, (-1, 2)), axis=1)[:, 0] for e in edges]
    return edges[0], edges[1], np.outer(*lengths).astype(np.float64)


@adaptive_avg_pool2d.kernel("native", dtypes=("float32", "float64"), missing=why_missing)
def _(x, *, output_size):
    return native.avg_pool2d(x, *adaptive_means(x.shape[2:], output_size))


@adaptive_avg_pool2d_input.kernel("native", dtypes=("float32", "float64"), missing=why_missing)
def _(y, *, input_size):
    return native.avg_pool2d_input(y, input_size, *adaptive_means(input_size, y.shape[2:]))


@max_pool2d_input.kernel("native", dtypes=("float32", "float64"), missing=why_missing)
def _(y, index, *, input_size):
    return native.max_pool2d_input(y, index, input_size)


# Samples ----------------------------------------------------------------------------------

WINDOWS: list[dict[str, Any]] = [
    {"kernel_size": (2, 2), "stride": (2, 2)},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 1)},
    {"kernel_size": (3, 3), "stride": (2, 2), "padding": (1, 0), "ceil_mode": True},
    {"kernel_size": (2, 3), "stride": (3, 2), "padding": (1, 1), "ceil_mode": True},
]
DILATED = {"kernel_size": (2, 2), "stride": (1, 2), "padding": (0, 1), "dilation": (3, 2)}


def images(rng: np.random.Generator, windows: list[dict[str, Any]]) -> Iterator[Any]:
    """Images without near ties, each with one of some settings, and an empty batch."""
    for shape, how in [*(((2, 3, 6, 7), how) for how in windows), ((0, 2, 4, 4), windows[0])]:
        n = int(np.prod(shape))
        yield (rng.permutation(n).reshape(shape) - n / 2) * 0.1, how


@max_pool2d.samples
@max_pool2d_index.samples
def _(rng: np.random.Generator) -> Iterator[Sample]:
    for x, how in images(rng, [*WINDOWS, DILATED]):
        yield sample(x, **how)


@max_pool2d_input.samples
def _(rng: np.random.Generator) -> Iterator[Sample]:
    for x, how in images(rng, WINDOWS):
        index = max_pool2d_index(x, **how)
        yield sample(rng.normal(size=index.shape), index, input_size=x.shape[2:])


AVERAGES = [
    *WINDOWS,
    WINDOWS[2] | {"count_include_pad": False},
    WINDOWS[1] | {"divisor_override": 5},
]


@avg_pool2d.samples
def _(rng: np.random.Generator) -> Iterator[Sample]:
    for x, how in images(rng, AVERAGES):
        yield sample(x, **how)


@avg_pool2d_input.samples
def _(rng: np.random.Generator) -> Iterator[Sample]:
    for x, how in images(rng, AVERAGES):
        yield sample(rng.normal(size=avg_pool2d(x, **how).shape), input_size=x.shape[2:], **how)


TARGETS: list[dict[str, Any]] = [{"output_size": s} for s in ((3, 2), (1, 1), (4, 5), (8, 7))]


@adaptive_avg_pool2d.samples
@adaptive_max_pool2d_index.samples
def _(rng: np.random.Generator) -> Iterator[Sample]:
    for x, how in images(rng, TARGETS):
        yield sample(x, **how)


@adaptive_avg_pool2d_input.samples
def _(rng: np.random.Generator) -> Iterator[Sample]:
    for x, how in images(rng, TARGETS):
        yield sample(rng.normal(size=(*x.shape[:2], *how["output_size"])), input_size=x.shape[2:])
