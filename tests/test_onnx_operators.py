"""ONNX's operators on integers against their definitions, in plain loops and Python's integers."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import minidl
from minidl.onnx.operators import (
    conv_integer,
    dequantize_linear,
    dynamic_quantize_linear,
    matmul_integer,
    qlinear_conv,
    qlinear_matmul,
    quantize_linear,
)

F32 = np.float32


def some(rng: np.random.Generator, dtype: Any, *shape: int) -> np.ndarray:
    limits = np.iinfo(dtype)
    return np.asarray(rng.integers(limits.min, limits.max + 1, shape), dtype)


def saturated(real: Fraction, zero: Any) -> int:
    """round(real), half to even, plus the zero point, within its type."""
    limits = np.iinfo(zero.dtype)
    return min(max(round(real) + int(zero), limits.min), limits.max)


def exact(x: Any) -> Fraction:
    return Fraction(float(x))


def both(f: Any, *args: Any, **attributes: Any) -> np.ndarray:
    """The result for arrays, after it was found to be that for Tensors."""
    y = f(*args, **attributes)
    wrapped = [minidl.Tensor(a) if isinstance(a, np.ndarray) else a for a in args]
    again = f(*wrapped, **attributes)
    assert isinstance(y, np.ndarray) and isinstance(again, minidl.Tensor)
    np.testing.assert_array_equal(again.numpy(), y)
    return y


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16"])
def test_quantize_and_dequantize(dtype: str) -> None:
    """Scales are powers of two, so that halves are halves."""
    rng = np.random.default_rng(0)
    x = (rng.integers(-4000, 4000, (2, 3, 50)) / 16).astype("f")
    for axis, scale in ((1, F32([0.125, 1, 4])), (0, F32([0.25, 2])), (-1, F32(0.5)), (1, 0.5)):
        zero = some(rng, dtype, *np.shape(scale))
        q = both(quantize_linear, x, scale, zero, axis=axis)
        assert q.dtype == dtype
        back = both(dequantize_linear, q, scale, zero, axis=axis)
        assert back.dtype == np.float32
        for i in np.ndindex(x.shape):
            s, z = (v[i[axis]] if np.ndim(v) else v for v in (scale, zero))
            assert q[i] == saturated(exact(x[i]) / exact(s), np.asarray(z))
            assert exact(back[i]) == (int(q[i]) - int(z)) * exact(s)
    plain = both(quantize_linear, x, F32(1) + x[0, 0, 0] * 0)
    np.testing.assert_array_equal(plain, np.clip(np.rint(x), 0, 255))
    assert plain.dtype == np.uint8
    sums = rng.integers(-(2**23), 2**23, 9).astype(np.int32)
    np.testing.assert_array_equal(both(dequantize_linear, sums, F32(0.5)), sums * F32(0.5))


def product(a: Any, b: Any, a_zero: Any, b_zero: Any) -> dict[tuple[int, ...], int]:
    """Every sum of a matrix product, by its index; batches are broadcast."""
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = np.broadcast_to(a, batch + a.shape[-2:]), np.broadcast_to(b, batch + b.shape[-2:])
    a_zero = np.broadcast_to(a_zero, (*a.shape[:-1], 1)).astype(int)
    b_zero = np.broadcast_to(b_zero, (*b.shape[:-2], 1, b.shape[-1])).astype(int)
    found = {}
    for *of, m, n in np.ndindex(*batch, a.shape[-2], b.shape[-1]):
        at = tuple(of)
        found[(*of, m, n)] = sum(
            (int(a[(*at, m, k)]) - int(a_zero[(*at, m, 0)]))
            * (int(b[(*at, k, n)]) - int(b_zero[(*at, 0, n)]))
            for k in range(a.shape[-1])
        )
    return found


TYPES = list(itertools.product(("uint8", "int8"), repeat=2))


@pytest.mark.parametrize("of_a, of_b", TYPES)
@pytest.mark.parametrize("a_batch, b_batch", [((), ()), ((2, 3), ()), ((2,), (2,)), ((3, 1), (2,))])
def test_matrix_products(of_a: str, of_b: str, a_batch: Any, b_batch: Any) -> None:
    """A zero point and a scale for all, for each row or column, for each row of each matrix."""
    rng = np.random.default_rng(1)
    a, b = some(rng, of_a, *a_batch, 4, 9), some(rng, of_b, *b_batch, 9, 5)
    rows, columns = some(rng, of_a, 4), some(rng, of_b, 5)
    zeros: list[tuple[Any, Any]] = [
        (some(rng, of_a), some(rng, of_b, 1)),
        (rows, columns),
        (some(rng, of_a, *a_batch, 4, 1), some(rng, of_b, *b_batch, 1, 5)),
    ]
    for a_zero, b_zero in zeros:
        by_row = a_zero[:, None] if a_zero.ndim == 1 else a_zero
        sums = product(a, b, by_row, b_zero)
        y = both(matmul_integer, a, b, a_zero, b_zero)
        assert y.dtype == np.int32 and {i: int(y[i]) for i in np.ndindex(y.shape)} == sums

        def scale(zero: Any) -> Any:
            return F32(2.0) ** rng.integers(-6, -1, zero.shape)

        a_scale, b_scale, y_scale = scale(a_zero), scale(b_zero), F32([16])
        y_zero = some(rng, "int8" if of_a == "uint8" else "uint8")
        given = a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero
        y = both(qlinear_matmul, *given)
        assert y.dtype == y_zero.dtype and y.shape == (
            *np.broadcast_shapes(a_batch, b_batch), 4, 5)  # fmt: skip
        of_row = np.broadcast_to(a_scale[:, None] if a_scale.ndim == 1 else a_scale, y.shape)
        of_column = np.broadcast_to(b_scale, y.shape)
        for i, total in sums.items():
            factor = exact(of_row[i]) * exact(of_column[i]) / 16
            assert y[i] == saturated(total * factor, y_zero)


def test_vectors() -> None:
    a, b = np.array([2, 3, 5], "u1"), np.arange(6, dtype="i1").reshape(3, 2)
    np.testing.assert_array_equal(both(matmul_integer, a, b, np.uint8(1)), [20, 27])
    np.testing.assert_array_equal(both(matmul_integer, b.T, a, None, np.uint8(1)), [20, 27])
    assert both(matmul_integer, a, a) == 38
    y = both(qlinear_matmul, a, 0.5, np.uint8(1), b, F32([1, 2]), None, 0.5, np.int8(-20))
    np.testing.assert_array_equal(y, [0, 34])


def convolution(
    x: Any, w: Any, x_zero: Any, w_zero: Any, stride: Any, pads: Any, dilation: Any, group: int
) -> dict[tuple[int, ...], int]:
    """Every sum of a convolution; what lies outside counts as 0."""
    n, _, *size = x.shape
    o, per_group, *kernel = w.shape
    ends = [
        (length + pads[i] + pads[i + 2] - (k - 1) * d - 1) // s + 1
        for i, (length, k, s, d) in enumerate(zip(size, kernel, stride, dilation))
    ]
    found = {}
    for at in np.ndindex(n, o, *ends):
        image, channel, p, q = at
        total = 0
        for j, u, v in np.ndindex(per_group, *kernel):
            row = p * stride[0] + u * dilation[0] - pads[0]
            column = q * stride[1] + v * dilation[1] - pads[1]
            if 0 <= row < size[0] and 0 <= column < size[1]:
                pixel = int(x[image, channel // (o // group) * per_group + j, row, column])
                weight = int(w[channel, j, u, v]) - int(w_zero.reshape(-1)[channel % w_zero.size])
                total += (pixel - int(x_zero.reshape(()))) * weight
        found[at] = total
    return found


GEOMETRY: list[tuple[dict[str, Any], Any, Any]] = [  # attributes, all pads, other numbers
    ({}, (0, 0, 0, 0), {}),
    ({"pads": (1, 2, 1, 2)}, (1, 2, 1, 2), {}),
    ({"pads": (0, 2, 1, 0), "strides": (2, 1)}, (0, 2, 1, 0), {"stride": (2, 1)}),
    ({"group": 2, "dilations": (1, 2)}, (0, 0, 0, 0), {"group": 2, "dilation": (1, 2)}),
    ({"auto_pad": "SAME_UPPER", "strides": (2, 2)}, (1, 0, 1, 0), {"stride": (2, 2)}),
    ({"auto_pad": "SAME_UPPER"}, (1, 0, 1, 1), {}),
    ({"auto_pad": "SAME_LOWER"}, (1, 1, 1, 0), {}),
    ({"auto_pad": "VALID", "kernel_shape": (3, 2)}, (0, 0, 0, 0), {}),
]


@pytest.mark.parametrize("attributes, pads, how", GEOMETRY)
@pytest.mark.parametrize("of_x, of_w", TYPES)
def test_convolutions(attributes: Any, pads: Any, how: Any, of_x: str, of_w: str) -> None:
    rng = np.random.default_rng(2)
    group = how.get("group", 1)
    x, w = some(rng, of_x, 2, 4, 5, 6), some(rng, of_w, 4, 4 // group, 3, 2)
    geometry = how.get("stride", (1, 1)), pads, how.get("dilation", (1, 1)), group
    for x_zero, w_zero in ((some(rng, of_x), some(rng, of_w)),
                           (some(rng, of_x, 1), some(rng, of_w, 4))):  # fmt: skip
        sums = convolution(x, w, x_zero, w_zero, *geometry)
        y = both(conv_integer, x, w, x_zero, w_zero, **attributes)
        assert y.dtype == np.int32 and {i: int(y[i]) for i in np.ndindex(y.shape)} == sums
        scales = F32(0.25), F32(2.0) ** rng.integers(-9, -4, w_zero.shape), F32([2])
        y_zero, bias = some(rng, of_w, 1), rng.integers(-5000, 5000, 4).astype(np.int32)
        for B in (None, bias):
            args = x, scales[0], x_zero, w, scales[1], w_zero, scales[2], y_zero, B
            y = both(qlinear_conv, *args, **attributes)
            assert y.dtype == y_zero.dtype and y.shape == tuple(np.add(max(sums), 1))
            for i, total in sums.items():
                factor = exact(scales[1].reshape(-1)[i[1] % scales[1].size]) / 8
                real = (total + (0 if B is None else int(B[i[1]]))) * factor
                assert y[i] == saturated(real, y_zero[0])


def test_signals() -> None:
    """Convolutions with one axis, as images one pixel high."""
    rng = np.random.default_rng(3)
    x, w = some(rng, "uint8", 2, 4, 9), some(rng, "int8", 3, 4, 3)
    zero = some(rng, "uint8"), some(rng, "int8", 3)
    y = both(conv_integer, x, w, *zero, pads=(2, 0), strides=(2,), dilations=(2,))
    image = conv_integer(x[:, :, None], w[:, :, None], *zero, pads=(0, 2, 0, 0), strides=(1, 2),
                         dilations=(1, 2))  # fmt: skip
    np.testing.assert_array_equal(y, image[:, :, 0])


def test_dynamic_quantization() -> None:
    x = np.array([[0, 2, -3, -2.5, 1.34, 0.5]], "f")  # ONNX's own example
    y, scale, zero = dynamic_quantize_linear(x)
    np.testing.assert_array_equal(y, [[153, 255, 0, 26, 221, 179]])
    assert scale == F32(5) / F32(255) and zero == 153
    assert (y.dtype, scale.dtype, zero.dtype) == (np.uint8, np.float32, np.uint8)
    for low, high in ((1, 5), (-5, -1), (0, 0), (-1, 1)):
        x = np.random.default_rng(0).uniform(low, high, (3, 40)).astype("f")
        y, scale, zero = dynamic_quantize_linear(x)
        y_, scale_, zero_ = dynamic_quantize_linear(minidl.Tensor(x))
        for ours, of_tensors in ((y, y_), (scale, scale_), (zero, zero_)):
            np.testing.assert_array_equal(of_tensors.numpy(), ours)
        bottom, top = min(x.min(), F32(0)), max(x.max(), F32(0))
        assert scale == ((top - bottom) / F32(255) or 1)
        assert zero == np.rint(-bottom / scale)
        assert np.abs(dequantize_linear(y, scale, zero) - x).max() <= scale * 0.50001


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, w: conv_integer(x, w, np.int8(0)), "x is uint8, its zero point int8"),
        (lambda x, w: conv_integer(x, w[0]), r"\(O, C, kH, kW\)"),
        (lambda x, w: conv_integer(x.astype("f"), w), "x must be int8 or uint8, got float32"),
        (lambda x, w: conv_integer(x, w, x[0, 0, 0]), r"x_zero_point must be one number.*\(4,\)"),
        (lambda x, w: conv_integer(x, w, auto_pad="SAME"), "auto_pad 'SAME': expected NOTSET"),
        (lambda x, w: conv_integer(x, w, pads=(1, 1)), "pads must be 4 numbers of at least 0"),
        (lambda x, w: conv_integer(x, w, strides=(0, 1)), "strides must be 2 numbers of at least"),
        (lambda x, w: conv_integer(x, w, kernel_shape=(2, 2)), "kernel_shape is"),
        (lambda x, w: matmul_integer(np.zeros((1, 40000), "u1"), np.zeros((40000, 1), "u1")),
         "may not fit in 32 bits"),
        (lambda x, w: qlinear_conv(x, 1, x[0, 0, 0, 0], w, 0.1, None, 1, w[0, 0, 0, 0], F32([1])),
         "int32, not float32"),
        (lambda x, w: qlinear_conv(x, 1, None, w, 0.1, None, 1, F32(3)), "y_zero_point must be"),
        (lambda x, w: qlinear_matmul(x, np.arange(2), None, w, 1.0, None, 1.0, np.uint8(0)),
         "a_scale must be floating, got int64"),
        (lambda x, w: quantize_linear(F32([1]), 0.1, np.int32(0)), "of 8 or 16 bits, got int32"),
        (lambda x, w: dequantize_linear(x, 0.1, np.int8(0)), "x is uint8, its zero point int8"),
    ],
)  # fmt: skip
def test_refusals(call: Any, message: str) -> None:
    x, w = np.zeros((1, 2, 4, 4), "u1"), np.zeros((2, 2, 3, 3), "i1")
    with pytest.raises((TypeError, ValueError), match=message):
        call(x, w)
