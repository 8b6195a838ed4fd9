"""Elementwise ops: each output element depends on one element of each (broadcast) input.

At kinks and poles the gradients are PyTorch's; tests/kinks.py lists and tests them. What has
derivative 0 wherever it has one (`sign`, `floor`, comparisons) is a constant to the tape.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minidl import backend
from minidl.backend.native import native, why_missing
from minidl.op import op, sample

# Arithmetic -------------------------------------------------------------------------------


@op
def add(x, y):
    return x + y


@add.gradient
def _(g):
    return g, g


@op
def sub(x, y):
    return x - y


@sub.gradient
def _(g):
    return g, lambda: -g


@op
def mul(x, y):
    return x * y


@mul.gradient
def _(g, x, y):
    return g * y, lambda: g * x


@op
def div(x, y):
    return x / y


@div.gradient
def _(g, out, y):
    return lambda: g / y, lambda: -g * out / y


@op
def neg(x):
    return -x


@neg.gradient
def _(g):
    return (-g,)


@op
def pow_(x, y):
    return x**y


@pow_.gradient
def _(g, out, x, y):
    """d/dx xʸ = y·xʸ⁻¹, also 0 where x = y = 0; d/dy xʸ = xʸ·log x, also 0 where x = 0 ≤ y."""

    def to_x():
        if isinstance(y, int | float):
            return g * (y * x ** (y - 1 if y else 1))
        return g * (y * x ** where((x == 0) & (y == 0), 1, y - 1))

    def to_y():
        if isinstance(x, int | float):
            return g * (out * math.log(x)) if x > 0 else g * where(y < 0, math.nan, x * out)
        pole = (x == 0) & (y >= 0)
        return g * where(pole, 0, out * log(where(pole, 1, x)))

    return to_x, to_y


# Functions of one variable ----------------------------------------------------------------


@op
def exp(x):
    return np.exp(x)


@exp.gradient
def _(g, out):
    return (g * out,)


@op
def log(x):
    return np.log(x)


@log.gradient
def _(g, x):
    return (g / x,)


@op
def log1p(x):
    return np.log1p(x)


@log1p.gradient
def _(g, x):
    return (g / (x + 1),)


@op
def sqrt(x):
    return np.sqrt(x)


@sqrt.gradient
def _(g, out):
    return (g / (out * 2),)


@op
def abs_(x):
    return np.abs(x)


@abs_.gradient
def _(g, x):
    return (g * sign(x),)


@op
def sin(x):
    return np.sin(x)


@sin.gradient
def _(g, x):
    return (g * cos(x),)


@op
def cos(x):
    return np.cos(x)


@cos.gradient
def _(g, x):
    return (-g * sin(x),)


@op
def tanh(x):
    return np.tanh(x)


@tanh.gradient
def _(g, out):
    return (g - g * out * out,)


@op
def sigmoid(x):
    """1 / (1 + exp(-x)), written so that exp never overflows."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


@sigmoid.gradient
def _(g, out):
    return (g * (out * (1 - out)),)


@op
def softplus(x):
    """log(1 + exp(x)), written so that exp never overflows; -softplus(-x) is log σ(x)."""
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


@softplus.gradient
def _(g, x):
    return (g * sigmoid(x),)


@op
def relu(x):
    return np.maximum(x, 0)


@relu.gradient
def _(g, out):
    return (g * (out > 0),)


@relu.kernel("native", dtypes=("float32", "float64"), missing=why_missing)
def _(x):
    return native.relu(x)


@relu.gradient_kernel("native", dtypes=("float32", "float64"), missing=why_missing)
def _(g, out):
    return (native.relu_gradient(g, out),)


@op
def erf(x):
    """2/√π ∫₀ˣ exp(-t²) dt. NumPy has none: Python's, element by element."""
    return _erf(x).astype(x.dtype) if x.ndim else np.asarray(math.erf(x), x.dtype)


_erf = np.frompyfunc(math.erf, 1, 1)


@erf.gradient
def _(g, x):
    return (g * (exp(-x * x) * (2 / math.sqrt(math.pi))),)


@erf.kernel("rational", dtypes=("float32",))
def _(x):
    """x P(x²) / Q(x²); beyond ±4, erf is ±1 in float32. (The coefficients are Eigen's.)"""
    x = np.clip(x, -4, 4)
    return x * np.polyval(ERF_P, x * x) / np.polyval(ERF_Q, x * x)


@erf.kernel("cupyx", device="cuda")
def _(x):
    from cupyx.scipy.special import erf

    return erf(x)


# fmt: off
ERF_P = [np.float32(c) for c in (
    -2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05,
    -7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02,
)]
ERF_Q = [np.float32(c) for c in (
    -1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03,
    -1.42647390514189e-02,
)]
# fmt: on


def gelu(x: Any, approximate: str = "none") -> Any:
    """x Φ(x) (Hendrycks & Gimpel 2016), or its tanh approximation."""
    if approximate == "tanh":
        return x * (tanh((x + x * x * x * 0.044715) * math.sqrt(2 / math.pi)) + 1) * 0.5
    if approximate != "none":
        raise ValueError(f"gelu: approximate is 'none' or 'tanh', got {approximate!r}")
    return x * (erf(x * math.sqrt(0.5)) + 1) * 0.5


# Choosing ---------------------------------------------------------------------------------


@op
def clamp(x, *, min=None, max=None):
    """x, held between two numbers (None: no bound). The gradient at a bound is 1."""
    if min is None and max is None:
        raise ValueError("clamp needs a min, a max, or both")
    return np.clip(x, min, max)


@clamp.gradient
def _(g, x, *, min, max):
    inside = x <= max if min is None else x >= min if max is None else (x >= min) & (x <= max)
    return (where(inside, g, 0),)


@op
def maximum(x, y):
    return np.maximum(x, y)


@maximum.gradient
def _(g, x, y):
    """At a tie each side gets half."""
    return (
        lambda: where(x == y, g * 0.5, where(x > y, g, 0)),
        lambda: where(x == y, g * 0.5, where(x > y, 0, g)),
    )


@op
def minimum(x, y):
    return np.minimum(x, y)


@minimum.gradient
def _(g, x, y):
    return (
        lambda: where(x == y, g * 0.5, where(x < y, g, 0)),
        lambda: where(x == y, g * 0.5, where(x < y, 0, g)),
    )


@op
def where(condition, x, y):
    """x where the condition holds, else y. A NaN in the other one's gradient does not leak."""
    return np.where(condition, x, y)


@where.gradient
def _(g, condition, x_shape, y_shape):
    return None, lambda: where(condition, g, 0), lambda: where(condition, 0, g)


# To another dtype or device ---------------------------------------------------------------


@op
def astype(x, *, dtype):
    """A number that is too large for float16 becomes infinite."""
    with np.errstate(over="ignore"):
        return x.astype(dtype)


@astype.gradient
def _(g, x_dtype, *, dtype):
    return (astype(g, dtype=x_dtype),)


@op
def to_device(x, *, device, non_blocking=False):
    return backend.to_device(x, device, non_blocking)


@to_device.gradient
def _(g, x_device, *, device, non_blocking):
    return (to_device(g, device=x_device),)


@op
def clone(x):
    """A copy, on the tape."""
    return x.copy()


@clone.gradient
def _(g):
    return (g,)


@clone.kernel("native", dtypes=("float32", "float64"), missing=why_missing)
def _(x):
    """Arrays that lie crosswise are turned in tiles: `contiguous` after a permute."""
    if x.size < 4096 or x.strides[-1] == x.itemsize or not x.dtype.isnative:
        return x.copy()
    y = native.in_order(x)
    return x.copy() if y is None else y


# Constants --------------------------------------------------------------------------------


@op(constant=True)
def sign(x):
    return np.sign(x)


@op(constant=True)
def floor(x):
    return np.floor(x)


@op(constant=True)
def ceil(x):
    return np.ceil(x)


@op(constant=True)
def round_(x, *, decimals=0):
    """To the nearest, halves to the nearest even number."""
    return np.round(x, decimals)


@op(constant=True)
def floor_divide(x, y):
    return x // y


@op(constant=True)
def isnan(x):
    return np.isnan(x)


@op(constant=True)
def isinf(x):
    return np.isinf(x)


@op(constant=True)
def isfinite(x):
    return np.isfinite(x)


@op(constant=True)
def eq(x, y):
    return x == y


@op(constant=True)
def ne(x, y):
    return x != y


@op(constant=True)
def lt(x, y):
    return x < y


@op(constant=True)
def le(x, y):
    return x <= y


@op(constant=True)
def gt(x, y):
    return x > y


@op(constant=True)
def ge(x, y):
    return x >= y


@op(constant=True)
def logical_not(x):
    return np.logical_not(x)


@op(constant=True)
def logical_and(x, y):
    return np.logical_and(x, y)


@op(constant=True)
def logical_or(x, y):
    return np.logical_or(x, y)


@op(constant=True)
def logical_xor(x, y):
    return np.logical_xor(x, y)


@op(constant=True)
def bitwise_not(x):
    return ~x


@op(constant=True)
def bitwise_and(x, y):
    return x & y


@op(constant=True)
def bitwise_or(x, y):
    return x | y


@op(constant=True)
def bitwise_xor(x, y):
    return x ^ y


# Samples ----------------------------------------------------------------------------------


@add.samples
@sub.samples
@mul.samples
@maximum.samples
@minimum.samples
def _(rng):
    yield sample(rng.normal(size=(3, 4)), rng.normal(size=(3, 4)))
    yield sample(rng.normal(size=(3, 1)), rng.normal(size=4))
    yield sample(rng.normal(), rng.normal(size=(2, 1, 3)))
    yield sample(rng.normal(size=(0, 4)), rng.normal(size=4))


@div.samples
def _(rng):
    yield sample(rng.normal(size=(3, 4)), rng.uniform(0.5, 2, size=(3, 4)))
    yield sample(rng.normal(size=(3, 1)), -rng.uniform(0.5, 2, size=4))
    yield sample(rng.normal(), rng.uniform(0.5, 2, size=(2, 1, 3)))
    yield sample(rng.normal(size=(0, 4)), rng.uniform(0.5, 2, size=4))


@pow_.samples
def _(rng):
    yield sample(rng.uniform(0.5, 2, size=(3, 4)), rng.normal(size=(3, 4)))
    yield sample(rng.uniform(0.5, 2, size=(3, 1)), rng.normal(size=4))
    yield sample(rng.normal(size=(3, 4)), 3)
    yield sample(rng.uniform(0.5, 2, size=(3, 4)), -0.5)
    yield sample(2.0, rng.normal(size=5))
    yield sample(rng.uniform(0.5, 2, size=(0, 4)), 2)


@exp.samples
@sin.samples
@cos.samples
@tanh.samples
@sigmoid.samples
@softplus.samples
@erf.samples
@neg.samples
@clone.samples
def _(rng):
    yield sample(rng.normal(size=(3, 4)) * 2)
    yield sample(np.array(rng.normal()))
    yield sample(rng.normal(size=(0, 4)))


@log.samples
@log1p.samples
@sqrt.samples
def _(rng):
    yield sample(rng.uniform(0.5, 3, size=(3, 4)))
    yield sample(np.array(rng.uniform(0.5, 3)))
    yield sample(rng.uniform(0.5, 3, size=(0, 4)))


@abs_.samples
@relu.samples
def _(rng):
    yield sample(away_from_zero(rng, (3, 5)))
    yield sample(away_from_zero(rng, ()))
    yield sample(away_from_zero(rng, (0, 4)))


@clamp.samples
def _(rng):
    for bounds in ({"min": -0.05, "max": 0.05}, {"min": 0.0}, {"max": 0.0}):
        yield sample(away_from_zero(rng, (3, 5)), **bounds)
    yield sample(away_from_zero(rng, (0, 5)), min=-0.05, max=0.05)


@where.samples
def _(rng):
    yield sample(rng.random((3, 4)) < 0.5, rng.normal(size=(3, 4)), rng.normal(size=(3, 4)))
    yield sample(rng.random((3, 1)) < 0.5, rng.normal(size=4), np.array(rng.normal()))
    yield sample(rng.random((3, 4)) < 0.5, rng.normal(size=(3, 4)), 1.5)
    yield sample(np.zeros((0, 4), bool), rng.normal(size=(0, 4)), rng.normal(size=4))


@astype.samples
def _(rng):
    yield sample(rng.normal(size=(3, 4)), dtype=np.dtype("float64"))


@to_device.samples
def _(rng):
    yield sample(rng.normal(size=(3, 4)), device="cpu")


@floor.samples
@ceil.samples
@isnan.samples
@isinf.samples
@isfinite.samples
@logical_not.samples
def _(rng):
    yield sample(rng.normal(size=(3, 4)) * 3)
    yield sample(np.array([0.0, -0.0, 0.5, -0.5, 1.5, np.inf, -np.inf, np.nan]))


@sign.samples
def _(rng):
    yield sample(np.array([0.0, -0.0, 0.5, -0.5, np.inf, -np.inf]))
    yield sample(rng.integers(-1, 2, size=(3, 4)))


@round_.samples
def _(rng):
    yield sample(np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.3, 7.0]))
    yield sample(rng.normal(size=(3, 4)) * 3, decimals=2)


@floor_divide.samples
def _(rng):
    yield sample(rng.normal(size=(3, 4)) * 5, rng.uniform(0.5, 2, size=4))
    yield sample(rng.integers(-9, 9, size=(3, 4)), 4)


@eq.samples
@ne.samples
@lt.samples
@le.samples
@gt.samples
@ge.samples
@logical_and.samples
@logical_or.samples
@logical_xor.samples
def _(rng):
    yield sample(rng.integers(-1, 2, size=(3, 4)) * 1.0, rng.integers(-1, 2, size=4) * 1.0)
    yield sample(rng.integers(-1, 2, size=(3, 4)) * 1.0, 0.0)
    yield sample(np.array([np.nan, np.inf, 1.0]), np.array([np.nan, np.inf, -np.inf]))


@bitwise_not.samples
def _(rng):
    yield sample(rng.integers(-8, 8, size=(3, 4)))
    yield sample(rng.random((3, 4)) < 0.5)


@bitwise_and.samples
@bitwise_or.samples
@bitwise_xor.samples
def _(rng):
    yield sample(rng.integers(-8, 8, size=(3, 4)), rng.integers(-8, 8, size=4))
    yield sample(rng.random((3, 4)) < 0.5, rng.random((3, 4)) < 0.5)


def away_from_zero(rng, shape):
    """Numbers of both signs, of size 0.1 and more: no finite difference steps over a kink at 0."""
    return np.array(rng.choice([-1.0, 1.0], size=shape) * rng.uniform(0.1, 2, size=shape))
