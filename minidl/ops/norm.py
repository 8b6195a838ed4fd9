"""Normalisation: zero mean and unit variance, over whichever dimensions.

One op serves all: batch norm (Ioffe & Szegedy 2015) takes the statistics of each channel over
the batch, layer norm (Ba et al. 2016) of each sample over its features, group and instance norm
(Wu & He 2018, Ulyanov et al. 2016) of each sample over some channels. See `minidl.nn.functional`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from minidl.backend.native import native, why_missing
from minidl.op import Sample, op, sample

Statistics = tuple[Any, Any]


def statistics_of(x: Any, dim: tuple[int, ...]) -> Statistics:
    """Mean and variance (the sum of squares over n, not n - 1) of an array; dim keeps length 1."""
    if x.dtype.itemsize == 2:  # squares of 16-bit numbers need more
        x = x.astype(np.float32)
    if type(x) is np.ndarray and standardize.op.select("cpu", x.dtype.name)[0] == "native":
        found = native.statistics(x, positions(x, dim))  # type: ignore[union-attr]
        if found is not None:
            kept = [1 if d in positions(x, dim) else n for d, n in enumerate(x.shape)]
            return found[0].reshape(kept), found[1].reshape(kept)
    mean = x.mean(axis=dim, keepdims=True)
    return mean, np.square(x - mean).mean(axis=dim, keepdims=True)


def positions(x: Any, dim: tuple[int, ...]) -> list[int]:
    """Dimensions counted from the front."""
    return [d % x.ndim for d in dim]


@op
def standardize(
    x: Any,
    weight: Any,
    bias: Any,
    *,
    dim: tuple[int, ...],
    eps: float = 1e-5,
    statistics: Statistics | None = None,
) -> Any:
    """x̂ · weight + bias, with x̂ = (x - μ) / √(σ² + ε) and μ, σ² the mean and variance along dim.

    weight and bias broadcast to x, or are None. `statistics` are μ and σ², if the caller has
    computed them already; they save time, and change nothing.
    """
    mean, var = statistics or (x.mean(axis=dim, keepdims=True), None)
    y = x - mean.astype(x.dtype, copy=False)
    var = np.square(y).mean(axis=dim, keepdims=True) if var is None else var
    rstd = 1 / np.sqrt(var.astype(x.dtype, copy=False) + float(eps))
    y *= rstd if weight is None else rstd * weight
    if bias is not None:
        y += bias
    return y


@standardize.gradient
def _(g, x, weight, bias_shape, *, dim, eps, statistics):
    # The statistics are computed again, so that they are differentiated at second order.
    away = x - x.mean(axis=dim, keepdims=True)
    rstd = ((away * away).mean(axis=dim, keepdims=True) + float(eps)) ** -0.5

    def to_x():
        """Remove from g what would move the mean, and what would scale the deviations."""
        gw = g if weight is None else g * weight
        scaling = (gw * away).mean(axis=dim, keepdims=True) * (rstd * rstd)
        return (gw - gw.mean(axis=dim, keepdims=True) - away * scaling) * rstd

    return to_x, lambda: g * away * rstd, g


@standardize.kernel("native", dtypes=("float32", "float64"), missing=why_missing)
def _(x, weight, bias, *, dim, eps=1e-5, statistics=None):
    """The formula where the groups do not lie in memory as those of the usual norms."""
    mean, var = statistics or statistics_of(x, dim)
    y = native.standardize(x, weight, bias, positions(x, dim), eps, mean, var)
    return standardize.op.formula(x, weight, bias, dim=dim, eps=eps) if y is None else y


@standardize.gradient_kernel("native", dtypes=("float32", "float64"), missing=why_missing)
def _(g, x, weight, bias_shape, *, dim, eps, statistics):
    """The rule where the forward kernel is the formula."""
    mean, var = statistics or statistics_of(x, dim)
    found = native.standardize_gradient(g, x, weight, positions(x, dim), eps, mean, var)
    if found is None:
        how = {"dim": dim, "eps": eps, "statistics": statistics}
        return standardize.op.rule(g, x, weight, bias_shape, **how)
    to_x, to_weight, to_bias = found
    return to_x, to_weight, to_bias if weight is not None and bias_shape == weight.shape else g


@op
def scale_shift(x: Any, scale: Any, shift: Any) -> Any:
    """x · scale + shift, one of each for a channel: (N,C,...), (C,), (C,) -> (N,C,...)."""
    along = (*scale.shape, *(1,) * (x.ndim - 2))
    return x * scale.reshape(along) + shift.reshape(along)


@scale_shift.gradient
def _(g, x, scale):
    along, dims = (*scale.shape, *(1,) * (x.ndim - 2)), (0, *range(2, x.ndim))
    return (
        lambda: g * scale.reshape(along),
        lambda: (g * x).sum(axis=dims),
        lambda: g.sum(axis=dims),
    )


@scale_shift.kernel("native", dtypes=("float32", "float64"), missing=why_missing)
def _(x, scale, shift):
    return native.scale_shift(x, scale, shift)


@scale_shift.samples
def _(rng: np.random.Generator) -> Iterator[Sample]:
    for shape in ((2, 3, 4, 5), (7, 3), (2, 5, 19), (0, 2, 3)):
        yield sample(rng.normal(size=shape), *rng.normal(size=(2, shape[1])))


@standardize.samples
def _(rng: np.random.Generator) -> Iterator[Sample]:
    x = rng.normal(size=(4, 3, 2, 5)) * 2 + 1
    channel, feature = (rng.normal(size=(2, *shape)) for shape in ((1, 3, 1, 1), (2, 5)))
    yield sample(x, *channel, dim=(0, 2, 3))
    yield sample(x, *feature, dim=(-2, -1))
    yield sample(x, None, None, dim=(1, 2, 3), eps=0.1)
    yield sample(x, channel[0], None, dim=(2, 3))
    yield sample(x[:0], *feature, dim=(2, 3))
    grouped = rng.normal(size=(3, 2, 2, 5, 7)) - 1
    yield sample(grouped, *rng.normal(size=(2, 1, 2, 2, 1, 1)), dim=(2, 3, 4))
    yield sample(rng.normal(size=(6, 37)), *rng.normal(size=(2, 37)), dim=(1,))
    yield sample(rng.normal(size=(9, 5)), *rng.normal(size=(2, 1, 5)), dim=(0,))
    yield sample(rng.normal(size=(3, 2, 37)), rng.normal(size=(1, 2, 1)), None, dim=(0, 2))
    yield sample(x, feature[0], channel[1], dim=(2, 3))
    yield sample(x, *feature, dim=(1, 3))
