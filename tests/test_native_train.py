"""The kernels of a training step, where tests/test_ops.py does not look: accuracy and threads.

That they give what their formulas give is tested there, on every sample and in every layout.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("minidl._native", reason="the C++ kernels are not built")
from minidl import _native
from minidl.backend.random import Key, uniform
from minidl.ops.dropout import dropout
from minidl.ops.elementwise import clone
from minidl.ops.norm import standardize, statistics_of

Array = np.ndarray[Any, Any]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = _native.get_num_threads()
    yield
    _native.set_num_threads(before)


# exp, tanh and sigmoid are not offered alone, but some kernels are nothing else on some inputs.


def exp(v: Array) -> Array:
    """g - exp(y) Σg, of g = (0, -1)."""
    y = np.stack([v, np.zeros_like(v)], axis=1)
    return _native.log_softmax_gradient(np.tile(np.array([0, -1], v.dtype), (len(v), 1)), y, 1)[
        :, 0
    ]


def recurrent(cell: str, a: Array, first: float) -> Array:
    """One step of one unit, without weights."""
    weights = np.zeros((len(a), 1), a.dtype)
    start = np.full((1, a.shape[1], 1), first, a.dtype)
    return _native.recurrent(cell, a, weights, None, None, start, None, False)[0].ravel()


def tanh(v: Array) -> Array:
    return recurrent("tanh", v[None], 0)


def sigmoid(v: Array) -> Array:
    """A GRU's n + z (h - n), of n = 0 and h = 1."""
    return recurrent("gru", np.stack([0 * v, v, 0 * v]), 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("function", "formula"),
    [(exp, np.exp), (tanh, np.tanh), (sigmoid, lambda x: 1 / (1 + np.exp(-x)))],
)
def test_error_of_functions(
    dtype: type, function: Callable[[Array], Array], formula: Callable[[Any], Any]
) -> None:
    """vector_math.h promises 4 units in the last place, where the result is a normal number."""
    rng = np.random.default_rng(0)
    most = 87 if dtype == np.float32 else 708
    parts = rng.uniform(-most, most, 20000), rng.normal(size=20000), rng.normal(size=5000) * 1e-3
    v = np.concatenate(parts).astype(dtype)
    wanted = formula(v.astype(np.longdouble))
    unit = np.spacing(abs(wanted).astype(dtype)).astype(np.longdouble)
    normal = abs(wanted) > np.finfo(dtype).tiny
    assert (abs(function(v) - wanted) <= 4 * unit)[normal].all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_functions_at_the_ends(dtype: type) -> None:
    ends = np.array([-np.inf, np.inf, np.nan, 0, -1e4, 1e4], dtype)
    np.testing.assert_array_equal(tanh(ends), [-1, 1, np.nan, 0, -1, 1])
    np.testing.assert_array_equal(sigmoid(ends[2:]), [np.nan, 0.5, 0, 1])
    np.testing.assert_array_equal(exp(ends), [0, np.inf, np.nan, 1, 0, np.inf])


def results() -> list[Array]:
    """Kernels on sizes that are several jobs, and no multiple of a vector."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    x, g, w = normal(9, 5, 31, 33), normal(9, 5, 31, 33), normal(1, 5, 1, 1)
    rows, to_rows, scale = normal(70, 701), normal(70, 701), normal(701)
    found: list[Any] = []
    for a, b, weight, dim in ((x, g, w, (0, 2, 3)), (rows, to_rows, scale, (1,))):
        mean, var = statistics_of(a, dim)
        found += [mean, var, _native.standardize(a, weight, weight, dim, 1e-5, mean, var)]
        found += _native.standardize_gradient(b, a, weight, dim, 1e-5, mean, var) or ()
    found.append(_native.softmax_gradient(to_rows, _native.softmax(rows, 1), 1))
    found.append(_native.cross_entropy(rows, rng.integers(-1, 701, 70), None, 0.1))
    for mask_shape in (None, (9, 5, 1, 1), (9, 5, 31, 1), (1, 1, 31, 33)):
        found.append(dropout(x, p=0.3, key=Key(5, 7), mask_shape=mask_shape))
    found.append(_native.max_pool2d_gradient(normal(9, 5, 15, 16), x, (2, 2), (2, 2)))
    a, w_hh, first = normal(4 * 37, 5 * 53), normal(4 * 37, 37), normal(2, 53, 37)
    states, kept = _native.recurrent("lstm", a, w_hh, None, None, first, None, True)
    found += [kept, *_native.recurrent_gradient("lstm", normal(*states.shape), kept, w_hh, None)]
    p, m, v = normal(40000), normal(40000), abs(normal(40000))
    _native.adam(
        [p], [normal(40000)], [m], [v], [], [1e-3], [0.1], 0.9, 0.999, 1e-8, 0.1, 1.0, False
    )
    return [*found, states, p, m, v]


def test_threads() -> None:
    """The same bits with one, two and three threads."""
    runs = []
    for n in (1, 2, 3):
        _native.set_num_threads(n)
        runs.append([np.asarray(a).tobytes() for a in results()])
    assert runs[0] == runs[1] == runs[2]


def test_dropout_has_numpys_bits() -> None:
    """Any size and seed, also one of more than 64 bits; whole slices too."""
    for size, key in ((1, Key(0, 0)), (40013, Key(2**64 - 1, 3)), (40013, Key(2**70 + 9, 2**40))):
        kept = dropout(np.ones(size, np.float32), p=0.25, key=key) != 0
        np.testing.assert_array_equal(kept, uniform(key, size) >= 0.25)
        slices = dropout(np.ones((size, 3)), p=0.25, key=key, mask_shape=(size, 1)) != 0
        np.testing.assert_array_equal(slices, np.repeat(kept[:, None], 3, axis=1))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_given_statistics_change_nothing(dtype: type) -> None:
    rng = np.random.default_rng(0)
    x, w, b = rng.normal(3, 2, (4, 3, 5, 7)), *rng.normal(size=(2, 1, 3, 1, 1))
    x, w, b = (a.astype(dtype) for a in (x, w, b))
    dim = (0, 2, 3)
    alone = standardize(x, w, b, dim=dim)
    given = standardize(x, w, b, dim=dim, statistics=statistics_of(x, dim))
    np.testing.assert_array_equal(alone, given)


@pytest.mark.skipif(
    bool({"MINIDL_ISA", "MINIDL_SANITIZE"} & os.environ.keys()),
    reason="this run is of one instruction set",
)
@pytest.mark.parametrize("isa", _native.supported_isas()[1:])
def test_every_instruction_set(isa: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "MINIDL_ISA": isa}, check=True, timeout=300,
    )  # fmt: skip


# Layout -----------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    st.permutations(range(4)),
    st.tuples(*[st.sampled_from([1, 2, 7, 17, 33])] * 4),
    st.sampled_from([np.float32, np.float64]),
    st.sampled_from([1, 2, -1]),
)
def test_a_copy_of_what_lies_crosswise(
    order: list[int], size: tuple[int, ...], dtype: type, step: int
) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((*size[:3], 80), dtype)[:, ::step, :, 5 : 5 + size[3]].transpose(order)
    y = _native.in_order(x)
    if y is None:  # nothing to gain: rows in order, or no neighbours in memory
        assert x.strides[-1] == x.itemsize or size[3] == 1
    else:
        assert y.flags.c_contiguous
        np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(clone(x), x)
