"""Narrow numbers: 8-bit integers that stand for real ones.

A quantized q stands for the real number  scale * (q - zero_point)  (Jacob et al. 2018). So

    sum of x w  =  x_scale w_scale * sum of (q_x - zero_x)(q_w - zero_w),

and the sum on the right is one of small integers: exact, in 32 bits. `matmul_integer` and
`conv_integer` give it as it is (ONNX: MatMulInteger, ConvInteger), as the real number (with
``scale`` = x_scale * w_scale), or as a quantized number again (ONNX: QLinearMatMul, QLinearConv;
``scale`` = x_scale * w_scale / y_scale, and the output's ``zero_point``).

`linear_dynamic` and `conv2d_dynamic` take floats, and find the scale of x by looking at x.

The kernels take weights packed beforehand in place of an array (`pack_conv_integer` and its like).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from minidl.backend import array_module
from minidl.backend.native import native, why_missing
from minidl.op import Sample, op, sample
from minidl.ops.conv import Pair, conv2d
from minidl.ops.pool import adaptive_windows

INT32_MAX = 2**31 - 1
Values = Callable[..., Any]  # an op whose other inputs are settled
cpp: Any = native  # where `why_missing` has seen to it that there is one


def along(v: Any, axis: int, ndim: int) -> Any:
    """A vector as an array that broadcasts along one axis; one number, or what has all axes
    already, as it is."""
    if np.ndim(v) == 0 or np.size(v) == 1:
        return v.reshape(()) if np.ndim(v) else v
    if np.ndim(v) == ndim > 1:
        return v
    return v.reshape([-1 if i == axis % ndim else 1 for i in range(ndim)])


def scaled(total: Any, scale: Any, axis: int) -> Any:
    """Integers times scale, in scale's dtype (of 16 bits: computed in 32)."""
    wide = np.result_type(scale.dtype, np.float32)
    return (total.astype(wide) * along(scale, axis, total.ndim)).astype(scale.dtype)


@op(constant=True)
def quantize_linear(x, scale, zero_point, *, axis=1):
    """round(x / scale) + zero_point, half to even, saturated (ONNX: QuantizeLinear).

    Args:
        scale: one, or one for each index along ``axis``; positive.
        zero_point: as many, int8 or uint8: the dtype of the result.
    """
    limits = np.iinfo(zero_point.dtype)
    q = np.rint(x / along(scale, axis, x.ndim)) + along(zero_point, axis, x.ndim)
    return np.clip(q, limits.min, limits.max).astype(zero_point.dtype)


@op(constant=True)
def dequantize_linear(q, scale, zero_point, *, axis=1):
    """(q - zero_point) * scale (ONNX: DequantizeLinear); ``zero_point`` may be None."""
    zero = 0 if zero_point is None else along(zero_point.astype(np.int32), axis, q.ndim)
    return scaled(q.astype(np.int32) - zero, scale, axis)


# Integer products -------------------------------------------------------------------------


def is_bytes(x: Any) -> bool:
    return x.dtype.itemsize == 1 and x.dtype.kind in "iu"


def expect_bytes(name: str, x: Any) -> None:
    if not is_bytes(x):
        raise TypeError(f"{name} must be int8 or uint8, got {x.dtype}")


def farthest(x: Any, zero_point: Any) -> int:
    """How far a number of this dtype can be from its zero point."""
    limits = np.iinfo(x.dtype)
    given = zero_point is not None and np.size(zero_point)
    low, high = (int(np.min(zero_point)), int(np.max(zero_point))) if given else (0, 0)
    return max(limits.max - low, high - limits.min)


def expect_sum_fits(k: int, x: Any, x_zero: Any, w: Any, w_zero: Any) -> None:
    """So that no sum overflows.

    Raises:
        ValueError: a sum of k such products may need more than 32 bits.
    """
    most = INT32_MAX // (farthest(x, x_zero) * farthest(w, w_zero))
    if k > most:
        raise ValueError(
            f"a sum of {k} products may not fit in 32 bits; with these types and zero points at "
            f"most {most} can be added up: split the sum, or centre the zero points"
        )


def finish(total: Any, scale: Any, bias: Any, zero_point: Any, relu: bool, axis: int) -> Any:
    """From integer sums to the result that the optional arguments ask for."""
    if bias is not None and bias.dtype.kind == "i":
        total = total + along(bias, axis, total.ndim)
    elif bias is not None and (scale is None or zero_point is not None):
        raise TypeError(f"bias is added to the integer sum: int32, not {bias.dtype}")
    if scale is None:
        if zero_point is not None:
            raise ValueError("zero_point is that of a requantized result, which needs a scale")
        y = total.astype(np.int32)
        return np.maximum(y, 0) if relu else y
    y = scaled(total, scale, axis)
    if zero_point is None:
        if bias is not None and bias.dtype.kind != "i":
            y = y + along(bias, axis, total.ndim)
        return np.maximum(y, 0) if relu else y
    return requantized(y, zero_point, relu)


def expect_array(w: Any) -> None:
    if not hasattr(w, "ndim"):
        raise TypeError(f"{w!r} is for the kernel 'native' and its dtypes: pass the array itself")


@op(constant=True)
def matmul_integer(a, b, a_zero_point, b_zero_point, scale, bias, zero_point, *, relu=False):
    """sum over k of (a[m,k] - a_zero)(b[k,n] - b_zero), exact; then as the arguments ask.

    Args:
        a: (..., M, K), int8 or uint8.
        b: (..., K, N), int8 or uint8; or what `pack_matmul_integer` made of its transpose (N, K).
        a_zero_point: one, one for each of M (of a batch of b: or (..., M, 1)), or None: 0.
        b_zero_point: one, one for each of N (of a batch of b: or (..., 1, N)), or None: 0.
        scale: None for int32 sums; else one, or one for each of N.
        bias: None; one int32 for each of N, added to the sum; or, for a real result, one float.
        zero_point: None for a real result of scale's dtype; else int8 or uint8, the output's.
        relu: negative results become 0 (or what stands for it).

    Raises:
        ValueError: the shapes do not fit, or a sum might overflow.
        TypeError: not int8 or uint8.
    """
    expect_array(b)
    expect_bytes("a", a)
    expect_bytes("b", b)
    expect_sum_fits(a.shape[-1], a, a_zero_point, b, b_zero_point)
    x, y = a.astype(np.float64), b.astype(np.float64)  # integers below 2^53 are exact
    if a_zero_point is not None:
        x -= along(a_zero_point, -2, x.ndim)
    if b_zero_point is not None:
        y -= along(b_zero_point, -1, y.ndim)
    return finish((x @ y).astype(np.int64), scale, bias, zero_point, relu, -1)


@op(constant=True)
def conv_integer(
    x: Any,
    w: Any,
    x_zero_point: Any,
    w_zero_point: Any,
    scale: Any,
    bias: Any,
    zero_point: Any,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    relu: bool = False,
) -> Any:
    """`conv2d` of (x - x_zero) and (w - w_zero), exact; then as in `matmul_integer`.

    Args:
        x: (N, C, H, W), int8 or uint8. What lies beyond its edges is 0: x_zero_point.
        w: (O, C/groups, kH, kW), int8 or uint8; or what `pack_conv_integer` made of it.
        x_zero_point: one, or None: 0.
        w_zero_point: one, one for each of O, or None: 0.
        scale, bias, zero_point, relu: as in `matmul_integer`, for each of O.

    Raises:
        ValueError: the shapes do not fit, or a sum might overflow.
        TypeError: not int8 or uint8.
    """
    expect_array(w)
    expect_bytes("x", x)
    expect_bytes("w", w)
    expect_sum_fits(math.prod(w.shape[1:]), x, x_zero_point, w, w_zero_point)
    x, w = x.astype(np.float64), w.astype(np.float64)
    if x_zero_point is not None:
        x -= along(x_zero_point, 0, 0)
    if w_zero_point is not None:
        w -= along(w_zero_point, 0, 4)
    y = conv2d(x, w, None, stride=stride, padding=padding, dilation=dilation, groups=groups)
    return finish(np.rint(y).astype(np.int64), scale, bias, zero_point, relu, 1)


# Products of floats that become bytes on the way --------------------------------------------


def dynamic_quantize_linear(x: Any) -> tuple[Any, Any, Any]:
    """Bytes of an array, and what they stand for (ONNX: DynamicQuantizeLinear).

    scale = (max(x, 0) - min(x, 0)) / 255,  zero = round(-min(x, 0) / scale): all of x is covered,
    and 0 is exact. Where there is nothing but 0, any scale would do: it is 1.

    Args:
        x: floats, of any shape; one scale is found for all of it.

    Returns:
        q uint8, of x's shape; scale (), of x's dtype; zero_point (), uint8.

    Raises:
        ValueError: x is not finite, so that no scale fits it.
    """
    xp, number = array_module(x), x.dtype.type
    low, high = (float(x.min()), float(x.max())) if x.size else (0.0, 0.0)
    with np.errstate(over="ignore", invalid="ignore"):  # in x's precision, as ONNX defines it
        low, high = number(min(low, 0.0)), number(max(high, 0.0))
        scale = (high - low) / number(255)
    if not np.isfinite(scale):
        raise ValueError(
            f"activations from {low:g} to {high:g}: no scale in {x.dtype} fits them; look for what "
            "made them so large, or not a number"
        )
    scale = max(scale, np.finfo(x.dtype).tiny) if high > low else number(1)
    zero = xp.asarray(np.clip(np.rint(-low / scale), 0, 255), np.uint8)
    scale = xp.asarray(scale, x.dtype)
    return quantize_linear(x, scale, zero), scale, zero


@op(constant=True)
def linear_dynamic(x, w, w_scale, b):
    """x wᵀ + b, as a product of integers whose scale is found by looking at x.

    Args:
        x: (..., in), floats; so is the result. `dynamic_quantize_linear` makes bytes of it.
        w: (out, in), int8; or what `pack_matmul_integer` made of it.
        w_scale: (out,), what one unit of w is worth.
        b: None, or (out,).

    Raises:
        ValueError: x is not finite; the shapes do not fit; a sum might overflow.
    """
    q, scale, zero = dynamic_quantize_linear(x.reshape(-1, x.shape[-1]))
    given = w if is_packed(w) else w.T
    y = matmul_integer(q, given, zero, None, (scale * w_scale).astype(x.dtype), b, None)
    return y.reshape(*x.shape[:-1], w.shape[0])


@op(constant=True)
def conv2d_dynamic(
    x: Any,
    w: Any,
    w_scale: Any,
    b: Any,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    relu: bool = False,
) -> Any:
    """`conv2d` as one of integers whose scale is found by looking at x; perhaps ReLU.

    Args:
        x: (N, C, H, W), floats; so is the result.
        w: (O, C/groups, kH, kW), int8; or what `pack_conv_integer` made of it.
        w_scale: (O,), what one unit of w is worth.
        b: None, or (O,).

    Raises:
        ValueError: as `linear_dynamic`.
    """
    q, scale, zero = dynamic_quantize_linear(x)
    scale = (scale * w_scale).astype(x.dtype)
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return conv_integer(q, w, zero, None, scale, b, None, **how, relu=relu)


# Kernels. They take what the native module takes: float32 scales, and no empty arrays.


def is_packed(w: Any) -> bool:
    return native is not None and isinstance(w, native.PackedWeight)


def name_of(q: Any) -> str:
    return "int8" if q.dtype.kind == "i" else "uint8"  # dtype.name is slow


def int32(v: Any) -> Any:
    return np.asarray(0 if v is None else v, np.int32)


def finishing(channels: int, scale: Any, bias: Any, zero_point: Any, relu: bool) -> dict[str, Any]:
    """The keyword arguments of the native functions that `finish` takes in one piece."""
    how: dict[str, Any] = {"relu": relu}
    if bias is not None:
        whole = bias.dtype.kind == "i"
        how["bias" if whole else "offset"] = bias.astype(
            np.int32 if whole else np.float32, copy=False
        )
    if scale is not None:
        scale = scale.reshape(-1)
        how["scale"] = scale if len(scale) == channels else scale.repeat(channels)
    if zero_point is not None:
        how["dtype"] = name_of(zero_point)
        how["zero_point"] = int(zero_point)
    return how


def is_native(scale: Any, bias: Any, zero_point: Any, *arrays: Any) -> bool:
    """Whether the native kernel takes this call; the formula has the words if it is wrong."""
    for x in arrays:
        if not (is_packed(x) or (is_bytes(x) and x.size)):
            return False
    return (
        (scale is None or scale.dtype == np.float32)
        and (zero_point is None or scale is not None)
        and (bias is None or bias.dtype.kind == "i" or (scale is not None and zero_point is None))
    )


def packed_zero(w: Any, zero_point: Any) -> None:
    if zero_point is not None:
        raise ValueError(f"{w!r} has its zero point already: pass None for it")


# `bind_...` sees to all that does not depend on the values, once: the kernel is what it returns.


def bind_matmul_integer(
    b: Any, a_zero_point: Any, b_zero_point: Any, scale: Any, bias: Any, zero_point: Any,
    *, relu: bool = False,
) -> Values:  # fmt: skip
    """Four products at a time where the processor can; weights given as an array are packed now."""
    formula = matmul_integer.op.formula
    others = b, a_zero_point, b_zero_point, scale, bias, zero_point
    if not is_native(scale, bias, zero_point, b) or (not is_packed(b) and b.ndim != 2):
        return lambda a: formula(a, *others, relu=relu)
    if is_packed(b):
        packed_zero(b, b_zero_point)
        weights = b
    else:
        weights = cpp.pack_matmul_integer(b.T, int32(b_zero_point))
    zero, n = int32(a_zero_point).reshape(-1), weights.shape[0]
    how = finishing(n, scale, bias, zero_point, relu)

    def call(a: Any) -> Any:
        if not (is_bytes(a) and a.size and a.ndim > 1):
            return formula(a, *others, relu=relu)
        if a.ndim == 2:
            return cpp.matmul_integer(a, weights, zero, **how)
        zeros = np.tile(zero, math.prod(a.shape[:-2])) if len(zero) > 1 else zero
        y = cpp.matmul_integer(a.reshape(-1, a.shape[-1]), weights, zeros, **how)
        return y.reshape(*a.shape[:-1], n)

    return call


@matmul_integer.kernel("native", missing=why_missing)
def _(a, *others, **how):
    return bind_matmul_integer(*others, **how)(a)


def bind_conv_integer(
    w: Any, x_zero_point: Any, w_zero_point: Any, scale: Any, bias: Any, zero_point: Any,
    *, groups: int = 1, relu: bool = False, **geometry: Pair,
) -> Values:  # fmt: skip
    """Four channels are a word, and an image of words is convolved as one of floats is."""
    others = w, x_zero_point, w_zero_point, scale, bias, zero_point
    formula = functools.partial(conv_integer.op.formula, groups=groups, relu=relu, **geometry)
    if not is_native(scale, bias, zero_point, w):
        return lambda x: formula(x, *others)
    if is_packed(w):
        packed_zero(w, w_zero_point)
        if w.groups != groups:
            raise ValueError(f"{w!r} was packed for groups={w.groups}, not {groups}")
        weights = w
    else:
        weights = cpp.pack_conv_integer(w, int32(w_zero_point), groups)
    zero = int(int32(x_zero_point).reshape(()))
    how = {**geometry, **finishing(weights.shape[0], scale, bias, zero_point, relu)}

    def call(x: Any) -> Any:
        if is_bytes(x) and x.size:
            return cpp.conv_integer(x, weights, zero, **how)
        return formula(x, *others)

    return call


@conv_integer.kernel("native", missing=why_missing)
def _(x, *others, **how):
    return bind_conv_integer(*others, **how)(x)


# Between the products ---------------------------------------------------------------------


def requantized(y: Any, zero_point: Any, relu: bool) -> Any:
    """round(y) + zero_point, half to even, saturated; with relu at least what stands for 0."""
    limits, zero = np.iinfo(zero_point.dtype), int(zero_point)
    return np.clip(np.rint(y) + zero, zero if relu else limits.min, limits.max).astype(
        zero_point.dtype
    )


@op(constant=True)
def add_integer(a, b, a_scale, b_scale, a_zero_point, b_zero_point, zero_point, *, relu=False):
    """(a - a_zero) a_scale + (b - b_zero) b_scale, rounded, plus zero_point: a residual addition.

    Args:
        a, b: int8 or uint8, of one shape.
        a_scale, b_scale: float32, each over the scale of the result.
        zero_point: of the result, int8 or uint8: its dtype.
        relu: negative results become 0.

    Raises:
        TypeError: not int8 or uint8.
        ValueError: other shapes.
    """
    expect_bytes("a", a)
    expect_bytes("b", b)
    if a.shape != b.shape:
        raise ValueError(f"add_integer needs one shape, got {a.shape} and {b.shape}")
    x = (a.astype(np.float32) - int(a_zero_point)) * a_scale
    y = (b.astype(np.float32) - int(b_zero_point)) * b_scale
    return requantized(x + y, zero_point, relu)


@op(constant=True)
def adaptive_avg_pool2d_integer(x, scale, x_zero_point, zero_point, *, output_size):
    """`adaptive_avg_pool2d` of (x - x_zero), times scale, rounded, plus zero_point.

    Args:
        x: (N, C, H, W), int8 or uint8. Sums are exact.
        scale: float32, over the scale of the result.
        zero_point: of the result, int8 or uint8: its dtype.
    """
    expect_bytes("x", x)
    out = array_module(x).empty((*x.shape[:2], *output_size), zero_point.dtype)
    for at, window in adaptive_windows(x.shape[2:], output_size):
        pixels = x[window]
        count = math.prod(pixels.shape[2:])
        total = pixels.sum(axis=(2, 3), dtype=np.int32) - count * int(x_zero_point)
        out[at] = requantized(total * (scale / np.float32(count)), zero_point, False)
    return out


def bind_quantize_linear(scale: Any, zero_point: Any, *, axis: int = 1) -> Values:
    """One scale for all, to bytes; the formula has the others."""
    formula = quantize_linear.op.formula
    one_of_each = scale.size == zero_point.size == zero_point.dtype.itemsize == 1
    if not one_of_each or scale.dtype != np.float32:
        return lambda x: formula(x, scale, zero_point, axis=axis)
    number, zero, name = scale.item(), zero_point.item(), name_of(zero_point)

    def call(x: Any) -> Any:
        if x.dtype == np.float32:
            return cpp.quantize_linear(x, number, zero, name)
        return formula(x, scale, zero_point, axis=axis)

    return call


@quantize_linear.kernel("native", dtypes=("float32",), missing=why_missing)
def _(x, *others, **how):
    return bind_quantize_linear(*others, **how)(x)


def bind_add_integer(
    a_scale: Any, b_scale: Any, a_zero_point: Any, b_zero_point: Any, zero_point: Any,
    *, relu: bool = False,
) -> Values:  # fmt: skip
    others = a_scale, b_scale, a_zero_point, b_zero_point, zero_point
    dtype = zero_point.dtype
    if not (a_scale.dtype == b_scale.dtype == np.float32 and dtype.itemsize == 1):
        return lambda a, b: add_integer.op.formula(a, b, *others, relu=relu)
    numbers = [v.item() for v in others]

    def call(a: Any, b: Any) -> Any:
        if a.dtype == b.dtype == dtype:
            return cpp.add_integer(a, b, *numbers, relu=relu)
        return add_integer.op.formula(a, b, *others, relu=relu)

    return call


@add_integer.kernel("native", missing=why_missing)
def _(a, b, *others, **how):
    return bind_add_integer(*others, **how)(a, b)


def bind_adaptive_avg_pool2d_integer(
    scale: Any, x_zero_point: Any, zero_point: Any, *, output_size: Pair
) -> Values:
    """Of whole images; the formula has the other sizes."""
    others = scale, x_zero_point, zero_point
    formula = functools.partial(adaptive_avg_pool2d_integer.op.formula, output_size=output_size)
    dtype = zero_point.dtype
    if output_size != (1, 1) or x_zero_point.dtype != dtype or scale.dtype != np.float32:
        return lambda x: formula(x, *others)
    numbers = [v.item() for v in others]

    def call(x: Any) -> Any:
        if x.dtype == dtype and is_bytes(x) and x.size:
            return cpp.mean_integer(x, *numbers)
        return formula(x, *others)

    return call


@adaptive_avg_pool2d_integer.kernel("native", missing=why_missing)
def _(x, *others, **how):
    return bind_adaptive_avg_pool2d_integer(*others, **how)(x)


# By op: from all inputs but the values, a function of the values.
BOUND: dict[str, Callable[..., Values]] = {
    "quantize_linear": bind_quantize_linear,
    "matmul_integer": bind_matmul_integer,
    "conv_integer": bind_conv_integer,
    "add_integer": bind_add_integer,
    "adaptive_avg_pool2d_integer": bind_adaptive_avg_pool2d_integer,
}


def packer(name: str) -> Any:
    """A function of the native module that packs weights, or one that says what is missing."""

    def absent(*_: Any, **__: Any) -> Any:
        raise RuntimeError(f"{name}: {why_missing}")

    return getattr(native, name, absent)


pack_matmul_integer = packer("pack_matmul_integer")
pack_conv_integer = packer("pack_conv_integer")


# Samples ----------------------------------------------------------------------------------


def some_bytes(rng: np.random.Generator, dtype: Any, *shape: int) -> Any:
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max + 1, shape).astype(dtype)


@quantize_linear.samples
def _(rng: np.random.Generator) -> Iterator[Sample]:
    x = rng.normal(size=(2, 3, 4))
    yield sample(x, np.array(0.05), np.array(3, np.int8))
    yield sample(x, np.array([0.05, 0.01, 0.1]), np.array([128, 0, 255], np.uint8))
    yield sample(x, np.array([0.05, 0.01]), np.array([0, -128], np.int8), axis=0)
    yield sample(np.arange(-2, 3, 0.5), np.array(1.0), np.array(0, np.int8), axis=0)


@dequantize_linear.samples
def _(rng: np.random.Generator) -> Iterator[Sample]:
    yield sample(some_bytes(rng, np.int8, 2, 3), np.array(0.05), np.array(3, np.int8))
    scale, zero = np.array([0.05, 0.01, 0.1]), np.array([128, 0, 255], np.uint8)
    yield sample(some_bytes(rng, np.uint8, 2, 3), scale, zero)
    yield sample(rng.integers(-(2**20), 2**20, (2, 3)).astype(np.int32), np.array(0.05), None)


def endings(rng: np.random.Generator, n: int) -> Iterator[tuple[tuple[Any, Any, Any], bool]]:
    """(scale, bias, zero_point) and relu, for n output channels."""
    bias = rng.integers(-500, 500, n).astype(np.int32)
    yield (None, None, None), False
    yield (None, bias, None), True
    yield (np.array(0.01), bias, None), False
    yield (rng.uniform(0.001, 0.01, n), rng.normal(size=n), None), True
    yield (np.array(0.003), bias, np.array(-7, np.int8)), False
    yield (rng.uniform(0.001, 0.01, n), None, np.array(90, np.uint8)), True


@matmul_integer.samples
def _(rng: np.random.Generator) -> Iterator[Sample]:
    types = [(np.uint8, np.int8), (np.int8, np.int8), (np.uint8, np.uint8), (np.int8, np.uint8)]
    for i, (ending, relu) in enumerate(endings(rng, 5)):
        of_a, of_b = types[i % 4]
        a, b = some_bytes(rng, of_a, 3, 6), some_bytes(rng, of_b, 6, 5)
        zeros = [(None, None), (a[:1, 0], b[0]), (a[:, 0], b[:1, 0].reshape(())), (a[0, 0:1], None)]
        yield sample(a, b, *zeros[i % 4], *ending, relu=relu)
    a, b = some_bytes(rng, np.uint8, 2, 3, 6), some_bytes(rng, np.int8, 6, 5)
    yield sample(a, b, a[0, :, 0], b[0], None, None, None)
    yield sample(a, some_bytes(rng, np.int8, 2, 6, 5), None, None, None, None, None)


@conv_integer.samples
def _(rng: np.random.Generator) -> Iterator[Sample]:
    types = [(np.uint8, np.int8), (np.int8, np.int8), (np.uint8, np.uint8)]
    settings: list[dict[str, Any]] = [
        {}, {"padding": (1, 2)}, {"stride": (2, 1), "padding": (1, 0), "groups": 2},
        {"dilation": (1, 2), "padding": (0, 2)}, {"stride": (2, 2)}, {"padding": (1, 1)},
    ]  # fmt: skip
    for i, ((ending, relu), how) in enumerate(zip(endings(rng, 4), settings)):
        of_x, of_w = types[i % 3]
        x = some_bytes(rng, of_x, 2, 6, 5, 6)
        w = some_bytes(rng, of_w, 4, 6 // how.get("groups", 1), 3, 2)
        zero = [None, x[0, 0, 0, :1].reshape(()), x[0, 0, 0, 1:2]][i % 3]
        w_zero = [None, w[:, 0, 0, 0], w[0, 0, 0, 0:1], w[:, 0, 0, 0]][i % 4]
        yield sample(x, w, zero, w_zero, *ending, relu=relu, **how)


@add_integer.samples
def _(rng: np.random.Generator) -> Iterator[Sample]:
    for dtype, zeros in ((np.uint8, (0, 3, 10)), (np.int8, (-5, 7, -128))):
        a, b = some_bytes(rng, dtype, 2, 3, 4), some_bytes(rng, dtype, 2, 3, 4)
        zero = [np.array(z, dtype) for z in zeros]
        yield sample(a, b, np.array(0.713), np.array(0.437), *zero, relu=dtype is np.int8)


@adaptive_avg_pool2d_integer.samples
def _(rng: np.random.Generator) -> Iterator[Sample]:
    x = some_bytes(rng, np.uint8, 2, 3, 5, 4)
    for size in ((1, 1), (2, 3)):
        zero = np.array(4, np.uint8), np.array(9, np.uint8)
        yield sample(x, np.array(0.8), *zero, output_size=size)


@linear_dynamic.samples
def _(rng: np.random.Generator) -> Iterator[Sample]:
    scale, b = rng.uniform(0.01, 0.02, 5), rng.normal(size=5)
    yield sample(rng.normal(size=(2, 3, 4)), some_bytes(rng, np.int8, 5, 4), scale, b)
    yield sample(rng.uniform(1, 2, (3, 4)), some_bytes(rng, np.int8, 5, 4), scale, None)
    yield sample(-rng.uniform(1, 2, 4), some_bytes(rng, np.int8, 5, 4), scale, b)
    yield sample(np.zeros((2, 4)), some_bytes(rng, np.int8, 5, 4), scale, b)


@conv2d_dynamic.samples
def _(rng: np.random.Generator) -> Iterator[Sample]:
    x, scale, b = rng.normal(size=(2, 4, 5, 6)), rng.uniform(0.01, 0.02, 6), rng.normal(size=6)
    yield sample(x, some_bytes(rng, np.int8, 6, 4, 3, 2), scale, b, padding=(1, 1), relu=True)
    yield sample(x + 9, some_bytes(rng, np.int8, 6, 2, 3, 2), scale, None, groups=2, padding=(1, 0),
                 stride=(2, 1), dilation=(1, 2))  # fmt: skip
