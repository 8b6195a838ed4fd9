"""The lower rungs of the ladder in C++, within the bound of tests/test_native.py, and the roofs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("minidl._native", reason="the C++ kernels are not built")
from minidl import _native
from tests.test_native import (
    LAYERS,
    Array,
    Conv,
    check,
    checked,
    conv2d,
    convs,
    dtypes,
    layouts,
    strided,
    threads,  # noqa: F401  # a fixture that restores their number
)

PRODUCTS = [_native.matmul_naive, _native.matmul_reordered, _native.matmul_tiled]


@checked
@given(
    st.tuples(*[st.sampled_from([0, 1, 2, 5, 16, 33, 97])] * 3), dtypes, layouts, layouts,
    st.integers(0, 2**32),
)  # fmt: skip
def test_products(mnk: tuple[int, int, int], dtype: type, one: str, two: str, seed: int) -> None:
    m, n, k = mnk
    rng = np.random.default_rng(seed)
    a, b = strided(rng, (m, k), dtype, one), strided(rng, (k, n), dtype, two)
    for product in PRODUCTS:
        check(product(a, b), np.matmul, a, b, max(1, k))


@checked
@given(convs(), dtypes, layouts, layouts, st.integers(0, 2**32))
def test_conv2d_naive(conv: Conv, dtype: type, one: str, two: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, w = strided(rng, conv.x, dtype, one), strided(rng, conv.w, dtype, two)
    k = conv.w[1] * conv.w[2] * conv.w[3]
    check(_native.conv2d_naive(x, w, *conv.options), lambda a, b: conv2d(conv, a, b), x, w, k)


def test_the_same_bits_on_any_number_of_threads() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((150, 150), np.float32) for _ in range(2))
    conv = LAYERS[3]
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in (conv.x, conv.w))
    runs = []
    for n in (1, 2, 3):
        _native.set_num_threads(n)
        results = [product(a, b) for product in PRODUCTS]
        runs.append([r.tobytes() for r in (*results, _native.conv2d_naive(x, w, *conv.options))])
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize("product", PRODUCTS, ids=lambda f: f.__name__)
def test_bad_matrices(product: Callable[..., Array]) -> None:
    with pytest.raises(ValueError, match="a has 3 columns, b has 2 rows"):
        product(np.zeros((2, 3)), np.zeros((2, 3)))
    with pytest.raises(ValueError, match=f"{product.__name__}: a must have 2 dimensions"):
        product(np.zeros(3), np.zeros((3, 3)))
    with pytest.raises(TypeError, match="b must be float32 as a is"):
        product(np.zeros((2, 3), np.float32), np.zeros((3, 2)))


def test_conv2d_naive_checks_what_conv2d_checks() -> None:
    x, w = np.zeros((2, 4, 8, 8), np.float32), np.zeros((6, 3, 3, 3), np.float32)
    with pytest.raises(ValueError, match="x has 4 channels, w expects 3"):
        _native.conv2d_naive(x, w)


def test_the_roofs() -> None:
    """They are numbers of the right size: any computer of this century does more than that."""
    assert _native.peak_flops("float32") > 1e8
    assert _native.peak_flops(np.float64) > 1e8
    assert _native.peak_flops(np.int8) > 1e8
    assert _native.memory_bandwidth(3 << 20) > 1e7
    with pytest.raises(TypeError, match="float32 or float64, got int64"):
        _native.peak_flops("int64")
    with pytest.raises(ValueError, match="between 12 and"):
        _native.memory_bandwidth(-1)
