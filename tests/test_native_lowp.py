"""The C++ kernels for narrow numbers: integers against exact integer sums, to the bit; weights of
16 and 8 bits within the error bound of tests/test_native.py, taken on the numbers as stored."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_dtypes import bfloat16

pytest.importorskip("minidl._native", reason="the C++ kernels are not built")
from minidl import _native
from minidl.ops.narrow import linear_weight_only
from minidl.ops.quantized import conv_integer, matmul_integer
from tests.test_native import Conv, conv2d, convs

Array = np.ndarray[Any, Any]
checked = settings(
    deadline=None, derandomize=True, max_examples=25 if "MINIDL_ISA" in os.environ else 100
)
FORMULA, CONV_FORMULA = matmul_integer.op.formula, conv_integer.op.formula


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = _native.get_num_threads()
    yield
    _native.set_num_threads(before)


def numbers(rng: np.random.Generator, dtype: type, shape: tuple[int, ...], layout: str) -> Array:
    """Random bytes, or only the two extremes; in memory as `layout` says."""
    limits = np.iinfo(dtype)
    a = rng.integers(limits.min, limits.max + 1, shape).astype(dtype)
    if layout == "extreme":
        return np.where(a > np.mean([limits.min, limits.max]), limits.max, limits.min).astype(dtype)
    if layout == "largest":
        return np.full(shape, limits.max if dtype == np.uint8 else limits.min, dtype)
    if layout == "reversed axes":
        return np.asfortranarray(a)
    if layout == "every second":
        wide = np.zeros((*shape[:-1], 2 * shape[-1]), dtype)
        wide[..., ::2] = a
        return wide[..., ::2]
    if layout == "negative":
        return np.ascontiguousarray(a[..., ::-1])[..., ::-1]
    a.flags.writeable = False
    return a


byte = st.sampled_from([np.int8, np.uint8])
layouts = st.sampled_from(
    ["plain", "extreme", "largest", "reversed axes", "every second", "negative"]
)
sizes = st.sampled_from([1, 2, 3, 4, 5, 16, 33, 97, 300])


def zero_points(rng: np.random.Generator, dtype: type, n: int, kind: str) -> Any:
    if kind == "none":
        return None
    zeros = numbers(rng, dtype, (n,), "plain")
    return zeros if kind == "each" else zeros[:1].reshape(())


kinds = st.sampled_from(["none", "one", "each"])
endings = st.sampled_from(["int32", "float32", "int8", "uint8"])


def ending(rng: np.random.Generator, n: int, kind: str) -> tuple[Any, Any, Any]:
    """scale, bias and zero_point for n channels."""
    bias = rng.integers(-10000, 10000, n).astype(np.int32)
    scale = rng.uniform(1e-4, 1e-2, n).astype(np.float32)
    if kind == "int32":
        return None, bias, None
    if kind == "float32":
        return scale, bias, None
    return scale, bias, numbers(rng, np.dtype(kind).type, (1,), "plain").reshape(())


# ---- Integers -------------------------------------------------------------------------------


@checked
@given(st.tuples(sizes, sizes, sizes), byte, byte, layouts, layouts, kinds, kinds, endings,
       st.booleans(), st.integers(0, 2**32))  # fmt: skip
def test_matmul_integer(
    mnk: tuple[int, int, int], of_a: type, of_b: type, one: str, two: str, a_kind: str,
    b_kind: str, end: str, relu: bool, seed: int,
) -> None:  # fmt: skip
    m, n, k = mnk
    rng = np.random.default_rng(seed)
    a, b = numbers(rng, of_a, (m, k), one), numbers(rng, of_b, (k, n), two)
    zeros = zero_points(rng, of_a, m, a_kind), zero_points(rng, of_b, n, b_kind)
    how = ending(rng, n, end)
    result = matmul_integer(a, b, *zeros, *how, relu=relu)
    expected = FORMULA(a, b, *zeros, *how, relu=relu)
    assert result.dtype == expected.dtype == end
    np.testing.assert_array_equal(result, expected)


@checked
@given(convs(), byte, byte, layouts, layouts, kinds, kinds, endings, st.booleans(),
       st.integers(0, 2**32))  # fmt: skip
def test_conv_integer(
    conv: Conv, of_x: type, of_w: type, one: str, two: str, x_kind: str, w_kind: str, end: str,
    relu: bool, seed: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    x, w = numbers(rng, of_x, conv.x, one), numbers(rng, of_w, conv.w, two)
    x_zero = zero_points(rng, of_x, 1, "one" if x_kind == "each" else x_kind)
    w_zero = zero_points(rng, of_w, conv.w[0], w_kind)
    how = ending(rng, conv.w[0], end)
    geometry = dict(zip(("stride", "padding", "dilation", "groups"), conv.options))
    result = conv_integer(x, w, x_zero, w_zero, *how, relu=relu, **geometry)
    expected = CONV_FORMULA(x, w, x_zero, w_zero, *how, relu=relu, **geometry)
    assert result.dtype == expected.dtype == end
    np.testing.assert_array_equal(result, expected)


LAYERS = [  # several blocks of the sum, many panels, images that share a panel
    Conv((3, 130, 9, 11), (70, 130, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    Conv((5, 700, 4, 4), (33, 700, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    Conv((2, 3, 60, 61), (16, 3, 7, 7), (2, 2), (3, 3), (1, 1), 1),
    Conv((2, 48, 17, 17), (48, 1, 3, 3), (1, 1), (1, 1), (1, 1), 48),
    Conv((2, 1500, 8, 9), (50, 1500, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    # one channel in each group: two words to a row of taps, lines sorted by the strides, an image
    # smaller than its border, more output than one run
    Conv((2, 3, 23, 31), (6, 1, 3, 7), (3, 2), (2, 5), (2, 3), 3),
    Conv((1, 1, 2, 1), (33, 1, 5, 5), (1, 3), (3, 4), (1, 1), 1),
    Conv((3, 1, 28, 28), (32, 1, 3, 3), (1, 1), (1, 1), (1, 1), 1),
]


@pytest.mark.parametrize("end", ["int32", "float32", "uint8"])
@pytest.mark.parametrize("conv", LAYERS, ids=lambda c: f"{c.x}*{c.w}/{c.stride[0]}")
def test_layers_and_threads(conv: Conv, end: str) -> None:
    rng = np.random.default_rng(0)
    x, w = numbers(rng, np.uint8, conv.x, "plain"), numbers(rng, np.int8, conv.w, "plain")
    zeros = np.array(121, np.uint8), numbers(rng, np.int8, conv.w[:1], "plain")
    how = ending(rng, conv.w[0], end)
    geometry = dict(zip(("stride", "padding", "dilation", "groups"), conv.options))
    expected = CONV_FORMULA(x, w, *zeros, *how, **geometry)
    for n in (1, 2, 3):
        _native.set_num_threads(n)
        np.testing.assert_array_equal(conv_integer(x, w, *zeros, *how, **geometry), expected)
    exact = conv2d(conv, x.astype(float) - 121, w - zeros[1].astype(float).reshape(-1, 1, 1, 1))
    sums = conv_integer(x, w, *zeros, None, None, None, **geometry)
    np.testing.assert_array_equal(sums, exact)


@pytest.mark.parametrize("end", ["int32", "float32", "int8"])
@pytest.mark.parametrize("shape", [(1, 3000, 50), (70, 6000, 131), (300, 40, 700)])
def test_matmul_integer_and_threads(shape: tuple[int, int, int], end: str) -> None:
    m, k, n = shape
    rng = np.random.default_rng(0)
    a, b = numbers(rng, np.int8, (m, k), "extreme"), numbers(rng, np.int8, (k, n), "extreme")
    how = ending(rng, n, end)
    expected = FORMULA(a, b, None, None, *how)
    for count in (1, 2, 3):
        _native.set_num_threads(count)
        np.testing.assert_array_equal(matmul_integer(a, b, None, None, *how), expected)


def test_the_largest_sum_is_exact_and_a_larger_one_refused() -> None:
    most = (2**31 - 1) // 255**2
    a, b = np.full((2, most), 255, np.uint8), np.full((most, 3), 255, np.uint8)
    sums = matmul_integer(a, b, None, None, None, None, None)
    assert (sums == most * 255**2).all()
    for call in (matmul_integer, FORMULA):
        with pytest.raises(ValueError, match=f"{most + 1} products may not fit in 32 bits"):
            call(np.resize(a, (2, most + 1)), np.resize(b, (most + 1, 3)), *[None] * 5)
    x, w = np.zeros((1, 33026, 1, 1), np.uint8), np.zeros((1, 33026, 1, 1), np.uint8)
    for call in (conv_integer, CONV_FORMULA):
        with pytest.raises(ValueError, match="33026 products may not fit in 32 bits"):
            call(x, w, *[None] * 5)


def test_rounding_is_half_to_even_and_saturates() -> None:
    a = np.array([[1], [3], [5], [-1], [-3], [127], [-128]], np.int8)
    b, half, zero = np.ones((1, 1), np.int8), np.array(0.5, np.float32), np.array(0, np.int8)
    y = matmul_integer(a, b, None, None, half, None, zero)
    assert y.ravel().tolist() == [0, 2, 2, 0, -2, 64, -64]
    y = matmul_integer(a, b, None, None, half * 1000, None, np.array(255, np.uint8))
    assert y.ravel().tolist() == [255, 255, 255, 0, 0, 255, 0]
    y = matmul_integer(a, b, None, None, half, None, np.array(7, np.uint8), relu=True)
    assert y.ravel().tolist() == [7, 9, 9, 7, 7, 71, 7]


# ---- Narrow weights -------------------------------------------------------------------------


def stored(rng: np.random.Generator, dtype: Any, shape: tuple[int, ...], layout: str) -> Array:
    w = rng.standard_normal(shape) * (30 if dtype == np.int8 else 1)
    w = w.clip(-128, 127).astype(dtype)
    if layout == "reversed axes":
        return np.asfortranarray(w)
    if layout == "every second":
        return np.repeat(w, 2, 1)[:, ::2]
    return w


def check_linear(x: Array, w: Array, scale: Any, b: Any, wrong: float = 1.0) -> None:
    y = linear_weight_only(x, w, scale, b) * np.float32(wrong)
    if wrong == 1:
        packed = linear_weight_only(x, _native.pack_linear(w), scale, b)
        np.testing.assert_array_equal(y, packed)
    exact = x.astype(float) @ w.astype(float).T
    size = abs(x.astype(float)) @ abs(w.astype(float)).T
    if scale is not None:
        exact, size = exact * scale, size * scale
    if b is not None:
        exact, size = exact + b, size + abs(b)
    steps, u = x.shape[1] + 2, 2.0**-24  # the products, then scale and bias
    assert y.dtype == np.float32
    assert (abs(y - exact) <= steps * u / (1 - steps * u) * size).all()


@checked
@given(st.sampled_from([1, 2, 8, 9, 16, 17, 40]), sizes, st.sampled_from([1, 3, 64, 300, 700]),
       st.sampled_from([np.float32, np.float16, bfloat16, np.int8]),
       st.sampled_from(["plain", "reversed axes", "every second"]), st.booleans(), st.booleans(),
       st.integers(0, 2**32))  # fmt: skip
def test_linear(
    m: int, n: int, k: int, dtype: Any, layout: str, scaled: bool, biased: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((m, k), np.float32), stored(rng, dtype, (n, k), layout)
    scale = rng.uniform(0.5, 2, n).astype(np.float32) if scaled else None
    check_linear(x, w, scale, rng.standard_normal(n, np.float32) if biased else None)


def test_the_bound_notices_a_wrong_result() -> None:
    """One that is off by one part in a thousand."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((9, 300), np.float32), stored(rng, np.float16, (50, 300), "plain")
    with pytest.raises(AssertionError):
        check_linear(x, w, None, None, wrong=1.001)


def test_every_half_and_bfloat16_is_read_exactly() -> None:
    """All 65,536 of them, subnormal, infinite and NaN."""
    bits = np.arange(2**16, dtype=np.uint16)
    one = np.ones((1, 1), np.float32)
    for dtype in (np.float16, bfloat16):
        w = bits.view(dtype).reshape(-1, 1)
        with np.errstate(invalid="ignore"):
            expected = w.astype(np.float32).ravel()
        np.testing.assert_array_equal(linear_weight_only(one, w, None, None)[0], expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, bfloat16, np.int8])
@pytest.mark.parametrize("m", [1, 8, 100])
def test_linear_and_threads(m: int, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((m, 1000), np.float32), stored(rng, dtype, (700, 1000), "plain")
    runs = []
    for count in (1, 2, 3):
        _native.set_num_threads(count)
        runs.append(linear_weight_only(x, _native.pack_linear(w), None, None).tobytes())
        runs.append(linear_weight_only(x, w, None, None).tobytes())
    assert len(set(runs)) == 1


# ---- Packed weights -------------------------------------------------------------------------


def test_packed_weights_give_the_same_bits() -> None:
    rng = np.random.default_rng(0)
    a, w = numbers(rng, np.uint8, (5, 70), "plain"), numbers(rng, np.int8, (33, 70), "plain")
    zero = numbers(rng, np.int8, (33,), "plain")
    packed = _native.pack_matmul_integer(w, zero.astype(np.int32))
    assert (packed.shape, packed.dtype, packed.maker) == ((33, 70), "int8", "pack_matmul_integer")
    want = matmul_integer(a, w.T, None, zero, None, None, None)
    np.testing.assert_array_equal(matmul_integer(a, packed, *[None] * 5), want)

    x, w = (
        numbers(rng, np.uint8, (2, 6, 7, 7), "plain"),
        numbers(rng, np.int8, (4, 3, 3, 3), "plain"),
    )
    packed = _native.pack_conv_integer(w, groups=2)
    want = conv_integer(x, w, *[None] * 5, groups=2)
    np.testing.assert_array_equal(conv_integer(x, packed, *[None] * 5, groups=2), want)
    assert "int8(4, 3, 3, 3) by pack_conv_integer" in repr(packed)

    x, w = rng.standard_normal((2, 3, 50), np.float32), stored(rng, np.float16, (20, 50), "plain")
    want = linear_weight_only(x, w, None, None)
    packed = _native.pack_linear(w)
    w[:] = 0  # it has its own copy
    np.testing.assert_array_equal(linear_weight_only(x, packed, None, None), want)
    assert packed.nbytes < 50 * 100 * 2


A8, W8 = np.zeros((3, 5), np.int8), np.zeros((4, 5), np.int8)
X8, K8 = np.zeros((2, 4, 6, 6), np.uint8), np.zeros((6, 4, 3, 3), np.int8)
X32 = np.zeros((3, 5), np.float32)


def none(n: int) -> list[None]:
    return [None] * n


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "must come from pack_matmul_integer, got one from pack_linear",
         lambda: matmul_integer(A8, _native.pack_linear(W8), *none(5))),
        (TypeError, "must come from pack_linear, got one from pack_matmul_integer",
         lambda: linear_weight_only(X32, _native.pack_matmul_integer(W8), None, None)),
        (TypeError, "must come from pack_conv_integer, got one from pack_matmul_integer",
         lambda: conv_integer(X8, _native.pack_matmul_integer(W8), *none(5))),
        (ValueError, r"a has 4 columns, w \(N, K\) = \(4, 5\) expects 5",
         lambda: matmul_integer(A8[:, :4], _native.pack_matmul_integer(W8), *none(5))),
        (ValueError, "has its zero point already", lambda: matmul_integer(
            A8, _native.pack_matmul_integer(W8), None, np.array(3, np.int8), *none(3))),
        (ValueError, "was packed for groups=1, not 2",
         lambda: conv_integer(X8, _native.pack_conv_integer(K8), *none(5), groups=2)),
        (ValueError, "x has 3 channels, w expects 4 in each of 1 groups",
         lambda: conv_integer(X8[:, :3], _native.pack_conv_integer(K8), *none(5))),
        (TypeError, "is for the kernel 'native'",
         lambda: linear_weight_only(X32.astype(float), _native.pack_linear(W8), None, None)),
        (TypeError, "w must be float32, float16, bfloat16 or int8, got uint8",
         lambda: _native.pack_linear(W8.astype(np.uint8))),
        (TypeError, "must be int8 or uint8, got float32",
         lambda: matmul_integer(X32, W8.T, *none(5))),
        (TypeError, "must be int8 or uint8, got int16",
         lambda: _native.pack_matmul_integer(W8.astype(np.int16))),
        (ValueError, "zero_point must lie between -128 and 127, got 200",
         lambda: _native.pack_matmul_integer(W8, 200)),
        (ValueError, r"zero_point must be one number or have shape \(4,\), got shape \(3,\)",
         lambda: _native.pack_matmul_integer(W8, np.zeros(3, np.int32))),
        (ValueError, r"w has no elements, shape \(0, 5\)", lambda: _native.pack_linear(W8[:0])),
        (ValueError, "bias must have shape", lambda: _native.matmul_integer(
            A8, _native.pack_matmul_integer(W8), bias=np.zeros(3, np.int32))),
        (TypeError, "bias must be int32, got int64", lambda: _native.matmul_integer(
            A8, _native.pack_matmul_integer(W8), bias=np.zeros(4, np.int64))),
        (TypeError, "bias is added to the integer sum: int32, not float32",
         lambda: matmul_integer(A8, W8.T, *none(3), np.zeros(4, np.float32), None)),
        (ValueError, "zero_point is that of a requantized result",
         lambda: matmul_integer(A8, W8.T, *none(4), np.array(0, np.int8))),
        (ValueError, "expected dtype int8 or uint8 and a zero point in its range, got int8 and 200",
         lambda: _native.matmul_integer(A8, _native.pack_matmul_integer(W8), dtype="int8",
                                        scale=np.ones(4, np.float32), zero_point=200)),
        (TypeError, "cannot be saved", lambda: pickle.dumps(_native.pack_linear(W8))),
    ],
)  # fmt: skip
def test_bad_arguments(error: type[Exception], message: str, call: Callable[[], object]) -> None:
    with pytest.raises(error, match=message):
        call()


# ---- Instruction sets -----------------------------------------------------------------------


@pytest.mark.skipif("MINIDL_SANITIZE" in os.environ, reason="this run is of one instruction set")
@pytest.mark.parametrize("isa", _native.supported_isas()[1:])
def test_every_instruction_set(isa: str) -> None:
    """The tests above, but for this one, with the kernels that this processor would not choose."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__,
         "--import-mode=append", "-k", "not instruction_set and not bad_arguments"],
        env={**os.environ, "MINIDL_ISA": isa}, capture_output=True, text=True,
        cwd=os.path.dirname(os.path.dirname(__file__)),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
