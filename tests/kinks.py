"""Where a function has no derivative, or a formula for it divides 0 by 0: what the gradient is.

PyTorch's answers, every one (compared with it in `.ci/run`). Each row is a name; a function of the
module `t` (minidl or torch: they have the same names) and of tensors; the points, float64 lists
that require gradients; and the gradient expected at each, for an output gradient of ones.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, nan
from typing import Any, NamedTuple

# fmt: off


class Kink(NamedTuple):
    name: str
    function: Callable[..., Any]  # (t, x, y, ...) -> tensor
    points: tuple[Any, ...]
    gradients: tuple[Any, ...]


KINKS = [
    Kink("relu at 0", lambda t, x: t.relu(x), ([0.0, -0.0],), ([0, 0],)),
    Kink("abs at 0", lambda t, x: t.abs(x), ([0.0, -0.0],), ([0, 0],)),
    Kink("sqrt at 0", lambda t, x: t.sqrt(x), ([0.0],), ([inf],)),
    Kink("log at 0", lambda t, x: t.log(x), ([0.0],), ([inf],)),
    Kink("1/x at 0", lambda t, x: 1 / x, ([0.0],), ([-inf],)),
    Kink("sigmoid far out", lambda t, x: t.sigmoid(x), ([-800.0, 800.0],), ([0, 0],)),
    Kink("tanh far out", lambda t, x: t.tanh(x), ([-800.0, 800.0],), ([0, 0],)),
    # Powers
    Kink("x**0", lambda t, x: x**0, ([0.0, 2.0, -2.0],), ([0, 0, 0],)),
    Kink("x**1 at 0", lambda t, x: x**1, ([0.0],), ([1],)),
    Kink("x**2 at 0", lambda t, x: x**2, ([0.0],), ([0],)),
    Kink("x**0.5 at 0", lambda t, x: x**0.5, ([0.0],), ([inf],)),
    Kink("x**-1 at 0", lambda t, x: x**-1.0, ([0.0],), ([-inf],)),
    Kink("x**y at x = 0", lambda t, x, y: x**y,
         ([0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 2.0, 0.5]), ([0, 1, 0, inf], [0, 0, 0, 0])),
    Kink("x**y at y = 0", lambda t, x, y: x**y, ([2.0], [0.0]), ([0], [0.6931471805599453])),
    Kink("x**y, x < 0", lambda t, x, y: x**y, ([-2.0], [3.0]), ([12], [nan])),
    Kink("0**y", lambda t, y: 0.0**y, ([0.0, 2.0],), ([0, 0],)),
    # Choosing
    Kink("maximum, tie", lambda t, x, y: t.maximum(x, y), ([1.0], [1.0]), ([.5], [.5])),
    Kink("minimum, tie", lambda t, x, y: t.minimum(x, y), ([1.0], [1.0]), ([.5], [.5])),
    Kink("clamp at its bounds", lambda t, x: t.clamp(x, -1.0, 1.0),
         ([-2.0, -1.0, 0.0, 1.0, 2.0],), ([0, 1, 1, 1, 0],)),
    Kink("clamp(min) at it", lambda t, x: t.clamp(x, min=0.0), ([-1.0, 0.0],), ([0, 1],)),
    Kink("clamp(max) at it", lambda t, x: t.clamp(x, max=0.0), ([1.0, 0.0],), ([0, 1],)),
    Kink("where, the other derivative infinite", lambda t, x: t.where(x > 0, t.sqrt(x), 0 * x),
         ([0.0, 4.0],), ([nan, .25],)),  # 0 * inf: take where of the *argument* instead
    Kink("where, NaN not reached", lambda t, x, y: t.where(x > 0, x, y),
         ([1.0, 2.0], [nan, nan]), ([1, 1], [0, 0])),
    # Reductions
    Kink("amax, ties", lambda t, x: t.amax(x, 0), ([3.0, 1.0, 3.0],), ([.5, 0, .5],)),
    Kink("amin, ties", lambda t, x: t.amin(x, 0), ([1.0, 3.0, 1.0],), ([.5, 0, .5],)),
    Kink("max() of all, ties", lambda t, x: x.max(), ([3.0, 1.0, 3.0, 3.0],),
         ([1 / 3, 0, 1 / 3, 1 / 3],)),
    Kink("min() of all, ties", lambda t, x: x.min(), ([1.0, 3.0, 1.0],), ([.5, 0, .5],)),
    Kink("max(dim), ties", lambda t, x: x.max(0).values, ([3.0, 1.0, 3.0],), ([1, 0, 0],)),
    Kink("min(dim), ties", lambda t, x: x.min(0).values, ([1.0, 3.0, 1.0],), ([1, 0, 0],)),
    Kink("norm at 0", lambda t, x: x.norm(), ([0.0, 0.0],), ([0, 0],)),
    Kink("norm, p = 1, at 0", lambda t, x: x.norm(1), ([0.0, 2.0],), ([0, 1],)),
    Kink("norm, p = inf, ties", lambda t, x: x.norm(inf), ([2.0, -2.0],), ([.5, -.5],)),
    Kink("var of one element", lambda t, x: x.var(), ([1.0],), ([nan],)),
    Kink("var of equal elements", lambda t, x: x.var(), ([1.0, 1.0],), ([0, 0],)),
    Kink("std of equal elements", lambda t, x: x.std(), ([1.0, 1.0],), ([0, 0],)),
    Kink("prod with one 0", lambda t, x: x.prod(), ([0.0, 2.0, 3.0],), ([6, 0, 0],)),
    Kink("prod with two 0s", lambda t, x: x.prod(), ([0.0, 0.0, 3.0],), ([0, 0, 0],)),
    Kink("logsumexp with -inf", lambda t, x: t.logsumexp(x, 0), ([0.0, -inf],), ([1, 0],)),
    Kink("softmax with -inf", lambda t, x: t.softmax(x, 0)[0], ([0.0, -inf],), ([0, 0],)),
]  # fmt: skip
