"""Convolution, and the two ops that are its derivatives.

    y[n,o,p,q] = sum over c,i,j of  x[n, c, p*s - pad + i*d, q*s - pad + j*d] * w[o,c,i,j]

is linear in the image x and in the weight w. `conv2d_input` carries a y back to an x, and
`conv2d_weight` a pair (y, x) back to a w; each of the three is linear in each of its two inputs,
and the derivative with respect to it is one of the other two. So the set is closed: convolutions
can be differentiated as often as you like.

Its implementations are kept side by side, `minidl.use("conv2d", ...)` picks:

* "loops": the definition, one output pixel at a time;
* "naive": the definition in C++, seven loops;
* "im2col": all patches gathered as the columns of one matrix, then one matrix product
  (Chellapilla et al. 2006). This is the formula: it runs on NumPy and CuPy;
* "native": C++ that reads the patches straight from the image, so the matrix is never built;
* "winograd": C++ for 3x3 kernels in float32, with a quarter of the multiplications (Winograd 1980;
  Lavin & Gray 2016) and a few times the rounding error. Where that is not possible or does not pay
  (`winograd_pays`), it is "native".

What dilation, stride, padding and groups do: Dumoulin & Visin 2016, "A guide to convolution
arithmetic for deep learning".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from minidl import backend
from minidl.backend.native import native, why_missing
from minidl.op import Sample, op, sample
from minidl.ops.elementwise import relu
from minidl.ops.reduce import sum_

Pair = tuple[int, int]


def output_length(
    length: int, kernel: int, stride: int, padding: int, dilation: int, ceil: bool = False
) -> int:
    """How many windows fit along one axis.

    With ``ceil`` a last window may hang over the end, if it starts inside the image or its
    left padding.
    """
    room = length + 2 * padding - dilation * (kernel - 1) - 1
    count = -(-room // stride) + 1 if ceil else room // stride + 1
    return count - 1 if ceil and (count - 1) * stride >= length + padding else count


def output_size(
    size: Pair, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil: bool = False
) -> Pair:
    """Height and width of what a sliding window makes of an image.

    Raises:
        ValueError: the image has no pixels, or the window is larger than the padded image.
    """
    if 0 in size:
        raise ValueError(f"an image of height and width {tuple(size)} has no pixels")
    h, w = (
        output_length(*axis, ceil=ceil)
        for axis in zip(size, kernel, stride, padding, dilation, strict=True)
    )
    if h < 1 or w < 1:
        raise ValueError(
            f"a window of {kernel} with dilation {dilation} does not fit an image of height and "
            f"width {tuple(size)} with padding {padding}: use a smaller kernel or more padding"
        )
    return h, w


def reach(tap: int, length: int, count: int, stride: int, padding: int) -> tuple[slice, slice]:
    """Along one axis: which of ``count`` windows have their pixel at offset ``tap`` inside the
    image, and which pixels these are."""
    first = max(0, -((tap - padding) // stride))
    last = min(count - 1, (length - 1 + padding - tap) // stride)
    start = first * stride + tap - padding
    windows = max(0, last - first + 1)
    return slice(first, first + windows), slice(start, start + windows * stride, stride)


def taps(
    size: Pair, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, out_size: Pair
) -> Iterator[tuple[int, int, Any, Any]]:
    """Slide the windows over the image, all at once, one kernel position (i, j) at a time.

    Yields i, j, an index of the windows whose pixel (i, j) lies in the image, and an index of
    these pixels. Padding is never stored: it is what no tap meets.
    """
    for i in range(kernel[0]):
        windows_h, pixels_h = reach(i * dilation[0], size[0], out_size[0], stride[0], padding[0])
        for j in range(kernel[1]):
            windows_w, pixels_w = reach(
                j * dilation[1], size[1], out_size[1], stride[1], padding[1]
            )
            yield i, j, (..., windows_h, windows_w), (..., pixels_h, pixels_w)


def im2col(
    x: Any, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> tuple[Any, Pair]:
    """(N,C,H,W) -> (groups, C/groups*kH*kW, N*H'*W'), one column a window; and (H', W')."""
    n, c, *size = x.shape
    h, w = out_size = output_size(size, kernel, stride, padding, dilation)
    make = backend.array_module(x).zeros if any(padding) else backend.array_module(x).empty
    columns = make((c, *kernel, n, h, w), dtype=x.dtype)
    channels_first = x.swapaxes(0, 1)
    for i, j, windows, pixels in taps(size, kernel, stride, padding, dilation, out_size):
        columns[:, i, j][windows] = channels_first[pixels]
    return columns.reshape(groups, c // groups * math.prod(kernel), n * h * w), out_size


def col2im(columns: Any, size: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Any:
    """The adjoint of `im2col`: (C,kH,kW,N,H',W') -> (N,C,*size), where each pixel gets the sum
    of its copies."""
    c, kh, kw, n, *out_size = columns.shape
    x = backend.array_module(columns).zeros((n, c, *size), dtype=columns.dtype)
    channels_first = x.swapaxes(0, 1)
    for i, j, windows, pixels in taps(size, (kh, kw), stride, padding, dilation, out_size):
        channels_first[pixels] += columns[:, i, j][windows]
    return x


def by_group(y: Any, groups: int) -> Any:
    """(N,O,H',W') -> (groups, O/groups, N*H'*W')."""
    n, o, h, w = y.shape
    return y.swapaxes(0, 1).reshape(groups, o // groups, n * h * w)


# The three ops ----------------------------------------------------------------------------


@op
def conv2d(
    x: Any,
    w: Any,
    b: Any,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Any:
    """Slide w over x, add b: (N,C,H,W), (O,C/groups,kH,kW), (O,) or None -> (N,O,H',W').

    Raises:
        ValueError: the kernel does not fit the padded image, or the channels do not match.
    """
    check_channels(x.shape, w.shape, groups)
    columns, (height, width) = im2col(x, w.shape[2:], stride, padding, dilation, groups)
    y = w.reshape(groups, w.shape[0] // groups, -1) @ columns
    y = y.reshape(w.shape[0], x.shape[0], height, width).swapaxes(0, 1).copy()
    return add_bias(y, b)


def add_bias(y: Any, b: Any) -> Any:
    if b is not None:
        y += b[:, None, None]
    return y


@conv2d.gradient
def _(g, x, w, b_shape, *, stride, padding, dilation, groups):
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return (
        lambda: conv2d_input(g, w, input_size=x.shape[2:], **how),
        lambda: conv2d_weight(g, x, kernel_size=w.shape[2:], **how),
        lambda: sum_(sum_(g, dim=(2, 3)), dim=0),  # in two steps: each runs along memory
    )


@op
def conv2d_relu(
    x: Any,
    w: Any,
    b: Any,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Any:
    """max(0, `conv2d`), without a second pass over memory where there is a kernel."""
    return relu(conv2d(x, w, b, stride=stride, padding=padding, dilation=dilation, groups=groups))


@conv2d_relu.gradient
def _(g, out, x, w, b_shape, *, stride, padding, dilation, groups):
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return conv2d.op.rule(g * (out > 0), x, w, b_shape, **how)


@op
def conv2d_input(
    y: Any,
    w: Any,
    *,
    input_size: Pair,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Any:
    """Carry y back through w: (N,O,H',W'), (O,C/groups,kH,kW) -> (N,C,*input_size).

    The transpose of the map ``x -> conv2d(x, w)``, hence "transposed convolution".

    Raises:
        ValueError: conv2d does not make a y of this size from an image of `input_size`.
    """
    check_size(y.shape[2:], input_size, w.shape[2:], stride, padding, dilation)
    columns = w.reshape(groups, w.shape[0] // groups, -1).swapaxes(1, 2) @ by_group(y, groups)
    columns = columns.reshape(w.shape[1] * groups, *w.shape[2:], y.shape[0], *y.shape[2:])
    return col2im(columns, input_size, stride, padding, dilation)


@conv2d_input.gradient
def _(g, y, w, *, input_size, stride, padding, dilation, groups):
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return (
        lambda: conv2d(g, w, None, **how),
        lambda: conv2d_weight(y, g, kernel_size=w.shape[2:], **how),
    )


@op
def conv2d_weight(
    y: Any,
    x: Any,
    *,
    kernel_size: Pair,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Any:
    """Correlate y with x: (N,O,H',W'), (N,C,H,W) -> (O,C/groups,*kernel_size).

    Raises:
        ValueError: conv2d does not make a y of this size from x.
    """
    check_size(y.shape[2:], x.shape[2:], kernel_size, stride, padding, dilation)
    columns, _ = im2col(x, kernel_size, stride, padding, dilation, groups)
    w = by_group(y, groups) @ columns.swapaxes(1, 2)
    return w.reshape(y.shape[1], x.shape[1] // groups, *kernel_size)


@conv2d_weight.gradient
def _(g, y, x, *, kernel_size, stride, padding, dilation, groups):
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return (
        lambda: conv2d(x, g, None, **how),
        lambda: conv2d_input(y, g, input_size=x.shape[2:], **how),
    )


def check_channels(x_shape: tuple[int, ...], w_shape: tuple[int, ...], groups: int) -> None:
    if x_shape[1] != w_shape[1] * groups or w_shape[0] % groups:
        raise ValueError(
            f"x has {x_shape[1]} channels and w the shape {w_shape}: with groups={groups}, w is "
            f"(O, {x_shape[1]} / groups, kH, kW), O a multiple of groups"
        )


def check_size(
    y_size: Pair, x_size: Pair, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> None:
    made = output_size(x_size, kernel, stride, padding, dilation)
    if tuple(y_size) != made:
        raise ValueError(
            f"conv2d with kernel {tuple(kernel)}, stride {stride}, padding {padding} and dilation "
            f"{dilation} makes {made} from an image of {tuple(x_size)}, but y has {tuple(y_size)}"
        )


# Their other implementations --------------------------------------------------------------


def patches(
    x: Any, o: int, kernel: Pair, stride: Pair, dilation: Pair, groups: int
) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Every output pixel (n, o, p, q), with a view of the patch of (padded) x that it sees."""
    c = x.shape[1] // groups
    for n, k, p, q in np.ndindex(
        x.shape[0], o, *output_size(x.shape[2:], kernel, stride, (0, 0), dilation)
    ):
        channel, top, left = k // (o // groups) * c, p * stride[0], q * stride[1]
        yield (
            (n, k, p, q),
            x[
                n,
                channel : channel + c,
                top : top + dilation[0] * kernel[0] : dilation[0],
                left : left + dilation[1] * kernel[1] : dilation[1],
            ],
        )


def pad(x: Any, padding: Pair) -> Any:
    return np.pad(x, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))


@conv2d.kernel("loops", default=False)
def _(x, w, b, *, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    check_channels(x.shape, w.shape, groups)
    size = output_size(x.shape[2:], w.shape[2:], stride, padding, dilation)
    y = np.zeros((x.shape[0], w.shape[0], *size), dtype=x.dtype)
    for at, patch in patches(pad(x, padding), w.shape[0], w.shape[2:], stride, dilation, groups):
        y[at] = (patch * w[at[1]]).sum()
    return add_bias(y, b)


@conv2d_input.kernel("loops", default=False)
def _(y, w, *, input_size, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    check_size(y.shape[2:], input_size, w.shape[2:], stride, padding, dilation)
    padded = pad(np.zeros((y.shape[0], w.shape[1] * groups, *input_size), dtype=y.dtype), padding)
    for at, patch in patches(padded, w.shape[0], w.shape[2:], stride, dilation, groups):
        patch += y[at] * w[at[1]]
    top, left = padding
    return padded[:, :, top : top + input_size[0], left : left + input_size[1]].copy()


@conv2d_weight.kernel("loops", default=False)
def _(y, x, *, kernel_size, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    check_size(y.shape[2:], x.shape[2:], kernel_size, stride, padding, dilation)
    w = np.zeros((y.shape[1], x.shape[1] // groups, *kernel_size), dtype=x.dtype)
    for at, patch in patches(pad(x, padding), y.shape[1], kernel_size, stride, dilation, groups):
        w[at[1]] += y[at] * patch
    return w


@conv2d.kernel("naive", dtypes=("float32", "float64"), missing=why_missing, default=False)
def _(x, w, b, **how):
    return add_bias(native.conv2d_naive(x, w, **how), b)


for each in (conv2d, conv2d_input, conv2d_weight):
    each.kernel("im2col", default=False)(each.op.formula)
    each.kernel("native", dtypes=("float32", "float64"), missing=why_missing)(
        getattr(native, each.__name__, each.op.formula)
    )


def winograd_pays(
    x_shape: Any, w_shape: Any, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> bool:
    """Whether Winograd's F(4x4, 3x3) can compute a convolution, and is the faster way.

    It transforms each kernel, and each tile of 4x4 pixels. Measured, that pays once both sides have
    16 channels and there are 16 tiles.
    """
    n, c, h, w = x_shape
    return (
        tuple(w_shape[2:]) == (3, 3)
        and stride == dilation == (1, 1)
        and groups == 1
        and max(padding) <= 2
        and min(c, w_shape[0]) >= 16
        and n * -(-h // 4) * -(-w // 4) >= 16
    )


@conv2d.kernel("winograd", dtypes=("float32",), missing=why_missing)
def _(x, w, b, *, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    """Where `winograd_pays` says no, this is "native"."""
    if winograd_pays(x.shape, w.shape, stride, padding, dilation, groups):
        return native.conv2d_winograd(x, w, b, padding)
    return native.conv2d(x, w, b, stride, padding, dilation, groups)


@conv2d_relu.kernel("native", dtypes=("float32", "float64"), missing=why_missing)
def _(x, w, b, *, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    return native.conv2d(x, w, b, stride, padding, dilation, groups, relu=True)


@conv2d_relu.kernel("winograd", dtypes=("float32",), missing=why_missing)
def _(x, w, b, *, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    """Where `winograd_pays` says no, this is "native"."""
    if winograd_pays(x.shape, w.shape, stride, padding, dilation, groups):
        return native.conv2d_winograd(x, w, b, padding, relu=True)
    return native.conv2d(x, w, b, stride, padding, dilation, groups, relu=True)


@conv2d_input.kernel("winograd", dtypes=("float32",), missing=why_missing)
def _(y, w, *, input_size, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    """Where `winograd_pays` says no, this is "native"."""
    x_shape = (y.shape[0], w.shape[1] * groups, *input_size)
    if winograd_pays(x_shape, w.shape, stride, padding, dilation, groups):
        return native.conv2d_input_winograd(y, w, input_size, padding)
    return native.conv2d_input(y, w, input_size, stride, padding, dilation, groups)


@conv2d_weight.kernel("winograd", dtypes=("float32",), missing=why_missing)
def _(y, x, *, kernel_size, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    """Where `winograd_pays` says no, this is "native"."""
    w_shape = (y.shape[1], x.shape[1], *kernel_size)
    if winograd_pays(x.shape, w_shape, stride, padding, dilation, groups):
        return native.conv2d_weight_winograd(y, x, padding)
    return native.conv2d_weight(y, x, kernel_size, stride, padding, dilation, groups)


# Samples ----------------------------------------------------------------------------------


def geometries(rng: np.random.Generator) -> Iterator[tuple[Any, Any, Any, dict[str, Any]]]:
    """x, w, a y of the shape of conv2d(x, w), and the settings."""
    for n, c, size, o, kernel, stride, padding, dilation, groups in [
        (2, 3, (5, 5), 4, (3, 3), (1, 1), (0, 0), (1, 1), 1),
        (2, 2, (7, 6), 3, (3, 2), (2, 1), (1, 0), (1, 1), 1),
        (1, 4, (6, 7), 6, (2, 3), (1, 2), (2, 1), (2, 1), 2),
        (2, 4, (6, 5), 4, (3, 3), (2, 2), (1, 1), (1, 1), 4),
        (2, 3, (4, 4), 5, (1, 1), (3, 3), (0, 0), (1, 1), 1),
        (0, 2, (4, 5), 3, (3, 3), (1, 1), (1, 1), (1, 1), 1),
        (1, 16, (2, 61), 16, (3, 3), (1, 1), (1, 1), (1, 1), 1),  # "winograd" pays
    ]:
        x, w = rng.normal(size=(n, c, *size)), rng.normal(size=(o, c // groups, *kernel))
        y = rng.normal(size=(n, o, *output_size(size, kernel, stride, padding, dilation)))
        how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        yield x, w, y, how


@conv2d_relu.samples
@conv2d.samples
def _(rng: np.random.Generator) -> Iterator[Sample]:
    for i, (x, w, _, how) in enumerate(geometries(rng)):
        yield sample(x, w, rng.normal(size=w.shape[0]) if i % 2 == 0 else None, **how)


@conv2d_input.samples
def _(rng: np.random.Generator) -> Iterator[Sample]:
    for x, w, y, how in geometries(rng):
        yield sample(y, w, input_size=x.shape[2:], **how)


@conv2d_weight.samples
def _(rng: np.random.Generator) -> Iterator[Sample]:
    for x, w, y, how in geometries(rng):
        yield sample(y, x, kernel_size=w.shape[2:], **how)
