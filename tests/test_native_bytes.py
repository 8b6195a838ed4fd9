"""What stands between integer products, in C++: the formulas' bits, for both kinds of bytes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from minidl.backend.native import native
from minidl.ops.pool import max_pool2d
from minidl.ops.quantized import adaptive_avg_pool2d_integer, add_integer, quantize_linear

if native is None:
    pytest.skip("the C++ kernels are not built", allow_module_level=True)

BYTES: Any = [np.int8, np.uint8]


def some(rng: np.random.Generator, dtype: Any, *shape: int) -> Any:
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max + 1, shape).astype(dtype)


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("size", [1, 7, 255, 100_001])
def test_quantize(dtype: Any, size: int) -> None:
    rng = np.random.default_rng(size)
    for scale in np.float32([0.03, 1.0, 3e-5]):
        x = (rng.normal(size=size) * 60 * scale).astype(np.float32)
        x[: size // 2] = (np.rint(x[: size // 2] / scale) + 0.5) * scale  # ties, or nearly
        zero = some(rng, dtype, 1).reshape(())
        expected = quantize_linear.op.formula(x, scale, zero)
        np.testing.assert_array_equal(quantize_linear(x, np.asarray(scale), zero), expected)
    wide = np.float32([-1e30, -np.inf, 1e30, np.inf, 0, -0.0])
    expected = quantize_linear.op.formula(wide, np.float32(0.1), np.array(1, dtype))
    found = quantize_linear(wide, np.array(0.1, np.float32), np.array(1, dtype))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("relu", [False, True])
def test_add(dtype: Any, relu: bool) -> None:
    rng = np.random.default_rng(int(relu))
    for shape in ((3,), (2, 5, 7, 3), (1, 64, 40, 41)):
        a, b = some(rng, dtype, *shape), some(rng, dtype, *shape)
        for _ in range(5):
            scales = [np.asarray(s, np.float32) for s in rng.uniform(0.2, 1.5, 2)]
            zeros = [z.reshape(()) for z in some(rng, dtype, 3, 1)]
            found = add_integer(a, b, *scales, *zeros, relu=relu)
            expected = add_integer.op.formula(a, b, *scales, *zeros, relu=relu)
            np.testing.assert_array_equal(found, expected)
    half = np.asarray(0.5, np.float32), np.asarray(0.5, np.float32)  # all ties, and all pairs
    a, b = np.meshgrid(np.arange(256), np.arange(256))
    a, b = (x.astype(np.uint8).view(dtype) for x in (a, b))
    zeros = [np.array(z, dtype) for z in (3, 5, 7)]
    expected = add_integer.op.formula(a, b, *half, *zeros, relu=relu)
    np.testing.assert_array_equal(add_integer(a, b, *half, *zeros, relu=relu), expected)


@pytest.mark.parametrize("dtype", BYTES)
def test_max_pool(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    pairs = [(1, 1), (2, 2), (2, 1), (3, 2), (1, 3)]
    for kernel, stride in itertools.product(pairs, pairs):
        x = some(rng, dtype, 2, 3, 9, 37)
        for padding, dilation in (((0, 0), (1, 1)), ((kernel[0] // 2, kernel[1] // 2), (1, 2))):
            how = {"kernel_size": kernel, "stride": stride, "padding": padding,
                   "dilation": dilation}  # fmt: skip
            for image in (x, x[:, ::2, :, ::-1]):
                expected = max_pool2d.op.formula(image, **how)
                np.testing.assert_array_equal(max_pool2d(image, **how), expected)


@pytest.mark.parametrize("dtype", BYTES)
def test_mean(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    for shape in ((2, 3, 1, 1), (2, 5, 7, 8), (1, 300, 16, 16), (2, 3, 4, 2)):
        x = some(rng, dtype, *shape)
        for scale in (1.0, 0.5, *rng.uniform(0.2, 4, 20)):  # of eight bytes: many ties
            given = np.asarray(scale, np.float32), *(z.reshape(()) for z in some(rng, dtype, 2, 1))
            expected = adaptive_avg_pool2d_integer.op.formula(x, *given, output_size=(1, 1))
            found = adaptive_avg_pool2d_integer(x, *given, output_size=(1, 1))
            np.testing.assert_array_equal(found, expected)


def test_refusals() -> None:
    assert native is not None
    q, x = np.zeros((2, 3), np.uint8), np.zeros((2, 3), np.float32)
    one = 0.5, 0.5, 0, 0, 0
    calls: list[tuple[type[Exception], str, Any]] = [
        (ValueError, "one shape and type", lambda: native.add_integer(q, q[:1], *one, relu=False)),
        (ValueError, "one shape and type",
         lambda: native.add_integer(q, q.view(np.int8), *one, relu=False)),
        (TypeError, "a must be int8 or uint8", lambda: native.add_integer(x, x, *one, relu=False)),
        (ValueError, "between 0 and 255, got -1",
         lambda: native.add_integer(q, q, 0.5, 0.5, 0, -1, 0, relu=False)),
        (ValueError, "between -128 and 127, got 128",
         lambda: native.quantize_linear(x, 0.5, 128, "int8")),
        (TypeError, "dtype must be int8 or uint8",
         lambda: native.quantize_linear(x, 1, 0, "int16")),
        (TypeError, "x must be int8 or uint8, got float32",
         lambda: native.max_pool2d_bytes(x[None, None], (1, 1), (1, 1))),
        (ValueError, "dimensions", lambda: native.max_pool2d_bytes(q, (1, 1), (1, 1))),
        (ValueError, "no mean of nothing",
         lambda: native.mean_integer(np.zeros((1, 2, 0, 3), np.uint8), 1, 0, 0)),
        (TypeError, "x must be int8", lambda: native.mean_integer(x[None, None], 1, 0, 0)),
    ]  # fmt: skip
    for kind, message, call in calls:
        with pytest.raises(kind, match=message):
            call()
