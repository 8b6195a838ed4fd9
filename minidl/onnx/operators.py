"""ONNX's operators on 8-bit integers, with ONNX's names, argument order and attributes.

    y = qlinear_conv(x, x_scale, x_zero_point, w, w_scale, w_zero_point, y_scale, y_zero_point, B,
                     pads=(1, 1, 1, 1), group=2)

They run on minidl's integer kernels (`minidl/ops/quantized.py`), on arrays as on Tensors, on NumPy
as on CuPy. Scales and zero points may be arrays, Tensors or, scales, numbers. All follow one rule,

    q = saturate(round(x / scale) + zero_point)

where halves are rounded to the even neighbour and what is too large becomes the largest number of
the type. Products of integers are exact sums of 32 bits. Where they become 8 bits again, a sum is
multiplied by one float32, x_scale · w_scale / y_scale, as ONNX Runtime does.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from minidl import backend
from minidl.ops import quantized
from minidl.ops.elementwise import astype
from minidl.ops.shape import pad, reshape
from minidl.tensor import Tensor, raw

Ints = Sequence[int]


def quantize_linear(x: Any, y_scale: Any, y_zero_point: Any = None, *, axis: int = 1) -> Any:
    """saturate(round(x / y_scale) + y_zero_point).

    Args:
        x: floats of any shape.
        y_scale: one, or one for each index along ``axis``; positive.
        y_zero_point: as many, whose dtype (int8, uint8, int16 or uint16) is that of the result; or
            None: 0, uint8.

    Raises:
        TypeError: y_zero_point is of another dtype.
    """
    zero = bare(np.uint8(0) if y_zero_point is None else y_zero_point, x)
    if zero.dtype.name not in ("int8", "uint8", "int16", "uint16"):
        raise TypeError(f"y_zero_point must be of 8 or 16 bits, got {zero.dtype}")
    return quantized.quantize_linear(x, scale_of("y_scale", y_scale, x), zero, axis=axis)


def dequantize_linear(x: Any, x_scale: Any, x_zero_point: Any = None, *, axis: int = 1) -> Any:
    """(x - x_zero_point) · x_scale.

    Args:
        x: integers of any shape; int32 (a bias) has no zero point.
        x_scale: one, or one for each index along ``axis``; its dtype is that of the result.
        x_zero_point: as many, of x's dtype; or None: 0.

    Raises:
        TypeError: x_zero_point is not of x's dtype.
    """
    scale, zero = scale_of("x_scale", x_scale, x), zero_of("x", x, x_zero_point)
    return quantized.dequantize_linear(x, scale, zero, axis=axis)


def dynamic_quantize_linear(x: Any) -> tuple[Any, Any, Any]:
    """(y uint8, y_scale, y_zero_point): the range is that of x, and has 0 in it.

    y_scale = (max(x, 0) - min(x, 0)) / 255,  y_zero_point = saturate(round(-min(x, 0) / y_scale)).
    Of an x that is all 0 the scale is 1.
    """
    found = quantized.dynamic_quantize_linear(raw(x))
    return tuple(map(Tensor, found)) if isinstance(x, Tensor) else found  # type: ignore[return-value]


# Products ---------------------------------------------------------------------------------


def matmul_integer(A: Any, B: Any, a_zero_point: Any = None, b_zero_point: Any = None) -> Any:
    """(A - a_zero_point) @ (B - b_zero_point), int32, exact.

    Args:
        A, B: int8 or uint8, of shapes that NumPy's matmul takes.
        a_zero_point: of A's dtype: one, one for each row (M,), or (..., M, 1).
        b_zero_point: of B's dtype: one, one for each column (N,), or (..., 1, N).

    Raises:
        TypeError: dtypes do not fit.
        ValueError: shapes do not fit; a sum might need more than 32 bits.
    """
    row, column = A.ndim == 1, B.ndim == 1
    A = reshape(A, shape=(1, *A.shape)) if row else A
    B = reshape(B, shape=(*B.shape, 1)) if column else B
    a_zero, b_zero = zero_of("A", A, a_zero_point), zero_of("B", B, b_zero_point)
    batch, m, n = np.broadcast_shapes(A.shape[:-2], B.shape[:-2]), A.shape[-2], B.shape[-1]
    if B.ndim == 2:  # one tall matrix, for which there is a kernel
        if a_zero is not None and a_zero.size > 1:
            a_zero = np.broadcast_to(by_row(a_zero), (*batch, m, 1)).reshape(-1)
        A = reshape(A, shape=(-1, A.shape[-1]))
        b_zero = None if b_zero is None else b_zero.reshape(-1)
    y = quantized.matmul_integer(A, B, a_zero, b_zero, None, None, None)
    return reshape(y, shape=(*batch, *(() if row else (m,)), *(() if column else (n,))))


def qlinear_matmul(
    a: Any,
    a_scale: Any,
    a_zero_point: Any,
    b: Any,
    b_scale: Any,
    b_zero_point: Any,
    y_scale: Any,
    y_zero_point: Any,
) -> Any:
    """saturate(round((a - a_zero_point) @ (b - b_zero_point) · M) + y_zero_point) with
    M = a_scale · b_scale / y_scale.

    Args:
        a, b, a_zero_point, b_zero_point: as in `matmul_integer`.
        a_scale: one, one for each row (M,), or (..., M, 1).
        b_scale: one, one for each column (N,), or (..., 1, N).
        y_scale: one.
        y_zero_point: one, int8 or uint8: the dtype of the result.

    Raises:
        TypeError: dtypes do not fit.
        ValueError: shapes do not fit; a sum might need more than 32 bits.
    """
    of_a, of_b = float32("a_scale", a_scale, a), float32("b_scale", b_scale, a)
    scale = multiplier(by_row(of_a) if a.ndim > 1 else of_a, of_b, y_scale)
    scale = scale.reshape(()) if scale.size == 1 else scale
    unit, zero = bare(np.float32(1), a), byte("y_zero_point", y_zero_point, a)
    y = matmul_integer(a, b, a_zero_point, b_zero_point)
    return quantized.quantize_linear(astype(y, dtype=np.float32) * scale, unit, zero)


def conv_integer(
    x: Any,
    w: Any,
    x_zero_point: Any = None,
    w_zero_point: Any = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Ints | None = None,
    group: int = 1,
    kernel_shape: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Any:
    """The convolution of x - x_zero_point and w - w_zero_point, int32, exact.

    Args:
        x: (N, C, H, W) or (N, C, L), int8 or uint8. Beyond its edges lies x_zero_point.
        w: (O, C/group, kH, kW) or (O, C/group, k), int8 or uint8.
        x_zero_point: one, of x's dtype.
        w_zero_point: one, or one for each of O, of w's dtype.
        auto_pad: "NOTSET": `pads`; "VALID": none; "SAME_UPPER", "SAME_LOWER": as many that the
            output has ceil(size / stride) pixels, an odd one at the end, or at the beginning.
        dilations, strides: one for each axis, by default 1.
        kernel_shape: if given, that of w.
        pads: the beginning of each axis, then the end of each: (top, left, bottom, right).

    Raises:
        TypeError: dtypes do not fit.
        ValueError: shapes or attributes do not fit; a sum might need more than 32 bits.
    """
    attributes = auto_pad, dilations, kernel_shape, pads, strides
    return convolve(x, x_zero_point, w, w_zero_point, None, None, None, group, *attributes)


def qlinear_conv(
    x: Any,
    x_scale: Any,
    x_zero_point: Any,
    w: Any,
    w_scale: Any,
    w_zero_point: Any,
    y_scale: Any,
    y_zero_point: Any,
    B: Any = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Ints | None = None,
    group: int = 1,
    kernel_shape: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Any:
    """saturate(round((Σ (x - x_zero_point)(w - w_zero_point) + B) · M) + y_zero_point) with
    M = x_scale · w_scale / y_scale.

    Args:
        x, x_zero_point, w, w_zero_point, and the attributes: as in `conv_integer`.
        x_scale, y_scale: one.
        w_scale: one, or one for each of O.
        y_zero_point: one, int8 or uint8: the dtype of the result.
        B: int32, one for each of O, in units of x_scale · w_scale; or None.

    Raises:
        TypeError: dtypes do not fit.
        ValueError: shapes or attributes do not fit; a sum might need more than 32 bits.
    """
    of_x = one("x_scale", float32("x_scale", x_scale, x))
    scale = multiplier(of_x, float32("w_scale", w_scale, x), y_scale)
    zero, bias = byte("y_zero_point", y_zero_point, x), None if B is None else bare(B, x)
    if bias is not None and bias.dtype != np.int32:
        raise TypeError(f"B is added to the integer sum: int32, not {bias.dtype}")
    attributes = auto_pad, dilations, kernel_shape, pads, strides
    return convolve(x, x_zero_point, w, w_zero_point, scale, bias, zero, group, *attributes)


def convolve(
    x: Any,
    x_zero_point: Any,
    w: Any,
    w_zero_point: Any,
    scale: Any,
    bias: Any,
    zero_point: Any,
    group: int,
    auto_pad: str,
    dilations: Ints | None,
    kernel_shape: Ints | None,
    pads: Ints | None,
    strides: Ints | None,
) -> Any:
    """`quantized.conv_integer`, with ONNX's attributes."""
    axes = x.ndim - 2
    if axes not in (1, 2) or w.ndim != x.ndim:
        raise ValueError(
            f"x and w must be (N, C, H, W) and (O, C, kH, kW), or without H and kH; got shapes "
            f"{tuple(x.shape)} and {tuple(w.shape)}"
        )
    kernel = tuple(w.shape[2:])
    if kernel_shape is not None and tuple(kernel_shape) != kernel:
        raise ValueError(f"kernel_shape is {tuple(kernel_shape)}, w has {kernel}")
    stride = numbers("strides", strides, axes, 1)
    dilation = numbers("dilations", dilations, axes, 1)
    pads = explicit_pads(auto_pad, pads, x.shape[2:], kernel, stride, dilation)
    x_zero, w_zero = zero_of("x", x, x_zero_point), zero_of("w", w, w_zero_point)
    x_zero = None if x_zero is None else one("x_zero_point", x_zero)
    before, after = pads[:axes], pads[axes:]
    if before != after:
        border = 0 if x_zero is None else x_zero.item()
        x, before = pad(x, [*chain(*zip(before[::-1], after[::-1]))], border), (0,) * axes
    if axes == 1:  # an image one pixel high
        x = reshape(x, shape=(*x.shape[:2], 1, x.shape[2]))
        w = reshape(w, shape=(*w.shape[:2], 1, w.shape[2]))
        stride, dilation, before = (1, *stride), (1, *dilation), (0, *before)
    y = quantized.conv_integer(
        x, w, x_zero, w_zero, scale, bias, zero_point,
        stride=stride, padding=before, dilation=dilation, groups=group,
    )  # fmt: skip
    return reshape(y, shape=(*y.shape[:2], y.shape[3])) if axes == 1 else y


def explicit_pads(
    auto_pad: str, pads: Ints | None, size: Ints, kernel: Ints, stride: Ints, dilation: Ints
) -> tuple[int, ...]:
    """The padding at the beginning of each axis, then that at the end of each.

    Raises:
        ValueError: an unknown auto_pad; not two pads for each axis; negative ones.
    """
    if auto_pad in ("", "NOTSET"):
        return numbers("pads", pads, 2 * len(size), 0)
    if auto_pad == "VALID":
        return (0,) * 2 * len(size)
    if auto_pad not in ("SAME_UPPER", "SAME_LOWER"):
        raise ValueError(f"auto_pad {auto_pad!r}: expected NOTSET, VALID, SAME_UPPER or SAME_LOWER")
    total = [
        max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        for n, k, s, d in zip(size, kernel, stride, dilation, strict=True)
    ]
    less, more = tuple(p // 2 for p in total), tuple(p - p // 2 for p in total)
    return (*less, *more) if auto_pad == "SAME_UPPER" else (*more, *less)


# Arguments --------------------------------------------------------------------------------


def numbers(name: str, given: Ints | None, count: int, default: int) -> tuple[int, ...]:
    found = (default,) * count if given is None else tuple(given)
    if len(found) != count or min(found) < default:
        raise ValueError(f"{name} must be {count} numbers of at least {default}, got {given}")
    return found


def bare(x: Any, like: Any) -> Any:
    """An array, of a Tensor or a number too, where `like` is. (Of shape () it stays an array.)"""
    x, like = (v.array if isinstance(v, Tensor) else v for v in (x, like))
    return backend.to_device(np.asarray(x) if np.isscalar(x) else x, backend.device_name(like))


def one(name: str, x: Any) -> Any:
    """The only number of an array, of shape ()."""
    if x.size != 1:
        raise ValueError(f"{name} must be one number, got shape {tuple(x.shape)}")
    return x.reshape(())


def byte(name: str, x: Any, like: Any) -> Any:
    """A single int8 or uint8."""
    quantized.expect_bytes(name, x := bare(x, like))
    return one(name, x)


def scale_of(name: str, x: Any, like: Any) -> Any:
    x = bare(np.float32(x) if isinstance(x, int | float) else x, like)
    if x.dtype.kind != "f":
        raise TypeError(f"{name} must be floating, got {x.dtype}")
    return x


def float32(name: str, scale: Any, like: Any) -> Any:
    return scale_of(name, scale, like).astype(np.float32)


def multiplier(x_scale: Any, w_scale: Any, y_scale: Any) -> Any:
    """x_scale · w_scale / y_scale."""
    return bare(x_scale * w_scale / one("y_scale", float32("y_scale", y_scale, x_scale)), x_scale)


def zero_of(name: str, x: Any, zero_point: Any) -> Any:
    """A zero point as an array, or None."""
    if zero_point is None:
        return None
    zero = bare(zero_point, x)
    if zero.dtype != x.dtype:
        raise TypeError(f"{name} is {x.dtype}, its zero point {zero.dtype}: they must be alike")
    return zero


def by_row(v: Any) -> Any:
    """(M,) as (M, 1): what broadcasts along the rows of a matrix; others as they are."""
    return v.reshape(-1, 1) if v.ndim == 1 else v
