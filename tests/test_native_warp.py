"""`warp_affine` where tests/test_ops.py does not look: known warps, drawn ones, places far away.

Each is tried on the formula and on the kernel.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidl.backend.native import native
from minidl.op import use
from minidl.ops.warp import MODES, PADDINGS, warp_affine, warp_affine_input

Array = np.ndarray[Any, Any]
Function = Callable[..., Array]

needs_native = pytest.mark.skipif(native is None, reason="the C++ kernels are not built")
both_ways = pytest.mark.parametrize("way", ["formula", pytest.param("native", marks=needs_native)])
both_modes = pytest.mark.parametrize("mode", MODES)
all_paddings = pytest.mark.parametrize("padding", PADDINGS)
dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])


@pytest.fixture
def warp(way: str) -> Any:
    with use("warp_affine", way), use("warp_affine_input", way):
        yield warp_affine


def images(dtype: str = "float32", *shape: int) -> Array:
    return np.random.default_rng(0).normal(size=shape or (2, 3, 6, 70)).astype(dtype)


def matrices(*rows: Any, n: int = 2) -> Array:
    return np.tile(np.array(rows, float), (n, 1, 1))


@both_ways
@both_modes
@all_paddings
@dtypes
def test_identity(warp: Function, mode: str, padding: str, dtype: str) -> None:
    x = images(dtype)
    y = warp(x, matrices([1, 0, 0], [0, 1, 0]), mode=mode, padding=padding, fill=7.0)
    np.testing.assert_array_equal(y, x)


@both_ways
@both_modes
def test_whole_shifts_are_slices(warp: Function, mode: str) -> None:
    """Outside: what np.pad puts there."""
    x = images()
    for padding, pad in (
        ("zeros", dict(mode="constant", constant_values=7.0)),
        ("border", dict(mode="edge")),
        ("reflection", dict(mode="symmetric")),
    ):
        m = matrices([1, 0, -15], [0, 1, -9])
        y = warp(x, m, size=(20, 100), mode=mode, padding=padding, fill=7.0)
        padded = np.pad(x, ((0, 0), (0, 0), (9, 20 - 15), (15, 15)), **pad)  # type: ignore
        np.testing.assert_array_equal(y, padded)


@both_ways
@both_modes
def test_quarter_turn(warp: Function, mode: str) -> None:
    x = images("float64", 2, 3, 9, 9)
    counter_clockwise = matrices([0, -1, 8], [1, 0, 0])  # the top left pixel is from the top right
    np.testing.assert_array_equal(warp(x, counter_clockwise, mode=mode), np.rot90(x, axes=(2, 3)))
    angle = np.pi / 2
    cos, sin = np.cos(angle), np.sin(angle)  # cos is 6e-17
    about_centre = matrices([cos, -sin, 4 * (1 - cos + sin)], [sin, cos, 4 * (1 - sin - cos)])
    np.testing.assert_allclose(
        warp(x, about_centre, mode=mode), np.rot90(x, axes=(2, 3)), rtol=0, atol=1e-13
    )


@both_ways
def test_half_way(warp: Function) -> None:
    """Means of two, and of two neighbours at the same distance the even one."""
    x = np.array([[[[1.0, 2.0, 4.0, 8.0]]]])
    m = matrices([1, 0, 0.5], [0, 1, 0], n=1)
    np.testing.assert_array_equal(warp(x, m, fill=10.0), [[[[1.5, 3, 6, 9]]]])
    np.testing.assert_array_equal(warp(x, m, mode="nearest", fill=9.0), [[[[1, 4, 4, 9]]]])


@both_ways
@both_modes
@all_paddings
@dtypes
def test_places_that_are_not_finite_are_fill(
    warp: Function, mode: str, padding: str, dtype: str
) -> None:
    x = images(dtype)
    for bad in (np.nan, np.inf, -np.inf):
        for i, k in np.ndindex(2, 3):
            m = matrices([1, 0, 0.3], [0, 1, 0.2])
            m[1, i, k] = bad
            y = warp(x, m, mode=mode, padding=padding, fill=7.0)
            np.testing.assert_array_equal(y[1], np.full_like(y[1], 7))  # all: 0 * inf is NaN
            assert abs(y[0] - 7).min() > 0 or padding == "zeros"
            back = warp_affine_input(y, m, input_size=(4, 5), mode=mode, padding=padding)
            assert not back[1].any() and np.isfinite(back).all()
    m = matrices([1e308, 1e308, 1e308], [0, 1, 0])  # infinite only when added up
    y = warp(x, m, mode=mode, padding=padding, fill=7.0)
    np.testing.assert_array_equal(y[..., 1:, 1:], np.full_like(y[..., 1:, 1:], 7))


@both_ways
@both_modes
@all_paddings
@pytest.mark.parametrize("far", [2.0**31, 2.0**32, 2.0**63, 1e30, 1.7e308])
def test_far_away(warp: Function, mode: str, padding: str, far: float) -> None:
    """Nothing overflows: outside is outside, a border is a border, a mirror shows the image."""
    x = images("float64", 1, 1, 6, 7)
    for i, sign in np.ndindex(2, 2):
        m = matrices([1, 0, 0], [0, 1, 0], n=1)
        m[0, i, 2] = (-far, far)[sign]
        y = warp(x, m, mode=mode, padding=padding, fill=7.0)
        if padding == "zeros":
            np.testing.assert_array_equal(y, np.full_like(y, 7))
        elif padding == "border":
            edge = -sign
            expected = x[:, :, :, [edge]] if i == 0 else x[:, :, [edge]]
            np.testing.assert_array_equal(y, np.broadcast_to(expected, y.shape))
        elif mode == "nearest":
            assert np.isin(y, x).all()
        else:
            assert x.min() <= y.min() and y.max() <= x.max()
        back = warp_affine_input(y, m, input_size=(6, 7), mode=mode, padding=padding)
        assert np.isclose(back.sum(), 0 if padding == "zeros" else y.sum())


@both_ways
def test_what_is_not_read_does_not_spread(warp: Function) -> None:
    """A NaN in the first pixel stays there."""
    x = images()
    x[:, :, 0, 0] = np.nan
    y = warp(x, matrices([1, 0, 3.5], [0, 1, 2.5]), fill=1.0)
    assert np.isfinite(y).all()


@needs_native
@settings(deadline=None, max_examples=60)
@given(
    m=st.lists(st.integers(-40, 40), min_size=12, max_size=12),
    size=st.tuples(st.integers(1, 6), st.integers(1, 9)),
    out_size=st.tuples(st.integers(0, 5), st.sampled_from([1, 4, 63, 64, 65, 130])),
    channels=st.integers(0, 6),
    mode=st.sampled_from(MODES),
    padding=st.sampled_from(PADDINGS),
    dtype=st.sampled_from(["float32", "float64"]),
    fill=st.sampled_from([0.0, 0.5]),
)
def test_drawn_matrices(
    m: list[int],
    size: tuple[int, int],
    out_size: tuple[int, int],
    channels: int,
    mode: str,
    padding: str,
    dtype: str,
    fill: float,
) -> None:
    """Eighths, so that places are exact, and half-way is half-way in both."""
    how: dict[str, Any] = dict(mode=mode, padding=padding)
    to_x = np.array(m, np.float64).reshape(2, 2, 3) / 8
    x, y = images(dtype, 2, channels, *size), images(dtype, 2, channels, *out_size)
    bound = 1e-12 if dtype == "float64" else 1e-5
    expected = warp_affine.op.formula(x.astype("float64"), to_x, size=out_size, fill=fill, **how)
    actual = warp_affine(x, to_x, size=out_size, fill=fill, **how)
    assert actual.dtype == x.dtype
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)
    expected = warp_affine_input.op.formula(y.astype("float64"), to_x, input_size=size, **how)
    actual = warp_affine_input(y, to_x, input_size=size, **how)
    assert actual.dtype == y.dtype
    bound *= max(1.0, float(abs(expected).max(initial=0)))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=4 * bound)


@both_ways
def test_bad_arguments(warp: Function) -> None:
    x, m = images(), matrices([1, 0, 0], [0, 1, 0])
    for call, said in (
        (lambda: warp(x, m[:1]), r"\(1, 2, 3\)"),
        (lambda: warp(x, m, mode="cubic"), "cubic"),
        (lambda: warp(x, m, padding="wrap"), "wrap"),
        (lambda: warp(x[:, :, :0], m), r"\(0, 70\)"),
        (lambda: warp_affine_input(x, m, input_size=(3, 0)), r"\(3, 0\)"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    with pytest.raises(TypeError, match="uint8"):
        warp(x.astype("uint8"), m)


def test_labels_by_the_nearest() -> None:
    """Integer images, such as the classes of pixels, are fetched but not averaged."""
    x = np.arange(24).reshape(1, 1, 4, 6)
    y = warp_affine(x, matrices([-1, 0, 5.2], [0, 1, 1], n=1), mode="nearest", fill=-1)
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(y[0, 0, :3], x[0, 0, 1:, ::-1])
    np.testing.assert_array_equal(y[0, 0, 3], np.full(6, -1))


@needs_native
def test_threads() -> None:
    """The same bits with one, two and three threads."""
    x, runs = images("float32", 3, 9, 60, 70), []
    m = matrices([0.8, -0.6, 20.3], [0.6, 0.8, -7.7], n=3)
    before = native.get_num_threads()
    try:
        for n in (1, 2, 3):
            native.set_num_threads(n)
            y = [warp_affine(x, m, size=(90, 80), padding=padding) for padding in PADDINGS]
            y += [warp_affine_input(x, m, input_size=(50, 40), padding=p) for p in PADDINGS]
            runs.append([a.tobytes() for a in y])
    finally:
        native.set_num_threads(before)
    assert runs[0] == runs[1] == runs[2]


@needs_native
@pytest.mark.skipif(
    bool({"MINIDL_ISA", "MINIDL_SANITIZE"} & os.environ.keys()),
    reason="this run is of one instruction set",
)
@pytest.mark.parametrize("isa", native.supported_isas()[1:] if native else [])
def test_every_instruction_set(isa: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "MINIDL_ISA": isa}, check=True, timeout=300,
    )  # fmt: skip
