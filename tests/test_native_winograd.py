"""Winograd's convolution against the plain formula, within the bound that winograd.h states.

The matrices A, B and G are built here from the six points, in float64. With absolute values of
everything they give the size S of each result, and (K + 40) u / (1 - (K + 40) u) S bounds its
error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("minidl._native", reason="the C++ kernels are not built")
from minidl import _native
from tests.test_native import (
    Conv,
    checked,
    conv2d,
    conv2d_input,
    conv2d_weight,
    layouts,
    strided,
    threads,
)

__all__ = ["threads"]  # a fixture

Array = np.ndarray[Any, Any]

POINTS = np.array([0, 3 / 4, -3 / 4, 3 / 2, -3 / 2])  # and infinity
A = np.vstack([np.vander(POINTS, 4, increasing=True), [0, 0, 0, 1]])
B = np.array([np.poly(np.delete(POINTS, i))[::-1].tolist() + [0] for i in range(5)]
             + [np.poly(POINTS)[::-1]]).T  # fmt: skip
G = np.vstack(
    [[1, p, p * p] / np.prod(p - np.delete(POINTS, i)) for i, p in enumerate(POINTS)] + [[0, 0, 1]]
)


def tiles(x: Array, padding: tuple[int, int], out: tuple[int, int], side: int) -> Array:
    """(N,C,H,W) -> (N,C,tiles down,tiles across,side,side); tile (i, j) begins at (4i, 4j)."""
    down, across = -(-out[0] // 4), -(-out[1] // 4)
    padded = np.zeros((*x.shape[:2], 4 * down + side, 4 * across + side))
    padded[..., padding[0] :, padding[1] :][..., : x.shape[2], : x.shape[3]] = x
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side), (2, 3))
    return windows[:, :, : 4 * down : 4, : 4 * across : 4]


def sandwich(left: Array, x: Array) -> Array:
    return left @ x @ left.T


def by_winograd(x: Array, w: Array, padding: tuple[int, int], m: Callable[[Array], Array]) -> Array:
    """conv2d(x, w), with m of each matrix: m = abs gives the size S."""
    out = tuple(n + 2 * p - 2 for n, p in zip(x.shape[2:], padding))
    points = np.einsum(
        "nchwij,ocij->nohwij",
        sandwich(m(B.T), tiles(x, padding, out, 6)),
        sandwich(m(G), w),
        optimize=True,
    )
    y = sandwich(m(A.T), points).swapaxes(3, 4)
    n, o, down, _, across, _ = y.shape
    return y.reshape(n, o, 4 * down, 4 * across)[..., : out[0], : out[1]]


def weight_by_winograd(
    g: Array, x: Array, padding: tuple[int, int], m: Callable[[Array], Array]
) -> Array:
    points = np.einsum(
        "nchwij,nohwij->ocij",
        sandwich(m(B.T), tiles(x, padding, g.shape[2:], 6)),
        sandwich(m(A), tiles(g, (0, 0), g.shape[2:], 4)),
        optimize=True,
    )
    return sandwich(m(G.T), points)


def turned(w: Array) -> Array:
    """The kernel with which a gradient goes back."""
    return w.swapaxes(0, 1)[..., ::-1, ::-1]


def close(result: Array, exact: Array, size: Array, k: int, bias: Array | None = None) -> None:
    u = 2.0**-24
    bound = (k + 40) * u / (1 - (k + 40) * u) * size
    if bias is not None:
        exact = exact + bias[:, None, None]
        bound = bound + u * (abs(exact) + abs(bias[:, None, None]))
    assert result.dtype == np.float32
    assert result.shape == exact.shape
    assert (abs(result - exact) <= bound).all()


def same(x: Array) -> Array:
    return x


@st.composite
def convs(draw: st.DrawFn) -> Conv:
    n, c = draw(st.integers(0, 3)), draw(st.integers(1, 40))
    o = draw(st.sampled_from([1, 2, 15, 16, 17, 33, 50, 70, 100]))
    padding = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    h, w = (draw(st.integers(max(1, 3 - 2 * p), 22)) for p in padding)
    return Conv((n, c, h, w), (o, c, 3, 3), (1, 1), padding, (1, 1), 1)


def compare(conv: Conv, x: Array, w: Array, g: Array, bias: Array | None) -> tuple[Array, ...]:
    """The three kernels' results, each found equal to its formula."""
    padding, (n, _, oh, ow) = conv.padding, conv.y
    y = _native.conv2d_winograd(x, w, bias, padding)
    gx = _native.conv2d_input_winograd(g, w, conv.x[2:], padding)
    gw = _native.conv2d_weight_winograd(g, x, padding)
    x, w, g = (a.astype(np.float64) for a in (x, w, g))
    back = tuple(2 - p for p in padding)
    close(y, conv2d(conv, x, w), by_winograd(abs(x), abs(w), padding, abs), conv.x[1], bias)
    size = by_winograd(abs(g), abs(turned(w)), back, abs)
    close(gx, conv2d_input(conv, g, w), size, conv.w[0])
    size = weight_by_winograd(abs(g), abs(x), padding, abs)
    close(gw, conv2d_weight(conv, g, x), size, n * -(-oh // 4) * -(-ow // 4))
    return y, gx, gw


@checked
@given(convs(), layouts, layouts, st.booleans(), st.integers(0, 2**32))
def test_winograd(conv: Conv, one: str, two: str, biased: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, w = strided(rng, conv.x, np.float32, one), strided(rng, conv.w, np.float32, two)
    g = strided(rng, conv.y, np.float32, two)
    compare(conv, x, w, g, strided(rng, conv.w[:1], np.float32, one) if biased else None)


# Many blocks of tiles and panels; many channels; an image of one row of tiles; a row of many tiles.
LAYERS = [
    Conv((9, 40, 30, 27), (70, 40, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    Conv((5, 300, 7, 7), (130, 300, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    Conv((40, 16, 3, 3), (16, 16, 3, 3), (1, 1), (0, 0), (1, 1), 1),
    Conv((1, 5, 2, 700), (3, 5, 3, 3), (1, 1), (2, 0), (1, 1), 1),
]


@pytest.mark.parametrize("conv", LAYERS, ids=lambda c: f"{c.x}*{c.w}")
def test_layers_and_threads(conv: Conv) -> None:
    """The same bits with one, two and three threads; and a bound that can be missed."""
    rng = np.random.default_rng(0)
    x, w, g = (rng.standard_normal(s).astype(np.float32) for s in (conv.x, conv.w, conv.y))
    bias = rng.standard_normal(conv.w[0]).astype(np.float32)
    runs = []
    for n in (1, 2, 3):
        _native.set_num_threads(n)
        runs.append([r.tobytes() for r in compare(conv, x, w, g, bias)])
    assert runs[0] == runs[1] == runs[2]


def test_the_oracle_is_winograd() -> None:
    """The matrices of this file compute the convolution and its gradient, so S is theirs."""
    conv = Conv((2, 3, 9, 6), (4, 3, 3, 3), (1, 1), (1, 2), (1, 1), 1)
    rng = np.random.default_rng(0)
    x, w, g = (rng.standard_normal(s) for s in (conv.x, conv.w, conv.y))
    for actual, expected in [
        (by_winograd(x, w, conv.padding, same), conv2d(conv, x, w)),
        (by_winograd(g, turned(w), (1, 0), same), conv2d_input(conv, g, w)),
        (weight_by_winograd(g, x, conv.padding, same), conv2d_weight(conv, g, x)),
    ]:
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)


def test_a_wrong_kernel_would_be_noticed() -> None:
    """On numbers of one sign, by one part in a thousand."""
    conv = Conv((2, 16, 12, 12), (16, 16, 3, 3), (1, 1), (1, 1), (1, 1), 1)
    rng = np.random.default_rng(0)
    x, w = (rng.random(s).astype(np.float32) for s in (conv.x, conv.w))
    y = _native.conv2d_winograd(x, w, None, (1, 1))
    exact, size = conv2d(conv, x, w), by_winograd(x, w, (1, 1), abs)
    close(y, exact, size, 16)
    with pytest.raises(AssertionError):
        close(y * np.float32(1.001), exact, size, 16)


def test_the_usual_error_is_far_below_the_bound() -> None:
    """Near 2e-6 of the largest result; with the points 0, 1, -1, 2, -2 it would be three times."""
    # Without fused multiply-add (the sanitizers' builds have none) each term is rounded twice.
    usual = 4e-6 if _native.isa() == "baseline" or _native.sanitizer else 3e-6
    conv = Conv((4, 64, 28, 28), (64, 64, 3, 3), (1, 1), (1, 1), (1, 1), 1)
    rng = np.random.default_rng(0)
    x, w, g = (rng.standard_normal(s).astype(np.float32) for s in (conv.x, conv.w, conv.y))
    for result, exact in [
        (_native.conv2d_winograd(x, w, None, (1, 1)), conv2d(conv, x, w)),
        (_native.conv2d_input_winograd(g, w, (28, 28), (1, 1)), conv2d_input(conv, g, w)),
        (_native.conv2d_weight_winograd(g, x, (1, 1)), conv2d_weight(conv, g, x)),
    ]:
        assert abs(result - exact).max() <= usual * abs(exact).max()


X, W = np.zeros((2, 3, 8, 8), np.float32), np.zeros((4, 3, 3, 3), np.float32)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "float32, got float64",
         lambda: _native.conv2d_winograd(X.astype(float), W.astype(float))),
        (ValueError, r"kernel of \(2, 3\)", lambda: _native.conv2d_winograd(X, W[:, :, :2])),
        (ValueError, r"padding of \(3, 0\)",
         lambda: _native.conv2d_winograd(X, W, padding=(3, 0))),
        (ValueError, "channels", lambda: _native.conv2d_winograd(X, W[:, :2])),
        (ValueError, r"b must have shape \(4,\)",
         lambda: _native.conv2d_winograd(X, W, np.zeros(3, np.float32))),
        (TypeError, "b must be float32", lambda: _native.conv2d_winograd(X, W, np.zeros(4))),
        (ValueError, "output's shape",
         lambda: _native.conv2d_input_winograd(X[:, :, 1:], W, (8, 8))),
        (ValueError, "output's shape", lambda: _native.conv2d_weight_winograd(X, X)),
    ],
)  # fmt: skip
def test_errors(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=message):
        call()
