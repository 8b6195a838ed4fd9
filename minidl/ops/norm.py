"""Normalisation: zero mean and unit variance, over whichever dimensions.

One op serves all: batch norm (Ioffe & Szegedy 2015) takes the statistics of each channel over
the batch, layer norm (Ba et al. 2016) of each sample over its features, group and instance norm
(Wu & He 2018, Ulyanov et al. 2016) of each sample over some channels. See `minidl.nn.functional`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from minidl.op import Sample, op, sample


@op
def standardize(x: Any, weight: Any, bias: Any, *, dim: tuple[int, ...], eps: float = 1e-5) -> Any:
    """x̂ · weight + bias, with x̂ = (x - μ) / √(σ² + ε) and μ, σ² the mean and variance along dim.

    weight and bias broadcast to x, or are None.
    """
    y = x - x.mean(axis=dim, keepdims=True)
    rstd = 1 / np.sqrt(np.square(y).mean(axis=dim, keepdims=True) + float(eps))
    y *= rstd if weight is None else rstd * weight
    if bias is not None:
        y += bias
    return y


@standardize.gradient
def _(g, x, weight, *, dim, eps):
    # The statistics are computed again, so that they are differentiated at second order.
    away = x - x.mean(axis=dim, keepdims=True)
    rstd = ((away * away).mean(axis=dim, keepdims=True) + float(eps)) ** -0.5

    def to_x():
        """Remove from g what would move the mean, and what would scale the deviations."""
        gw = g if weight is None else g * weight
        scaling = (gw * away).mean(axis=dim, keepdims=True) * (rstd * rstd)
        return (gw - gw.mean(axis=dim, keepdims=True) - away * scaling) * rstd

    return to_x, lambda: g * away * rstd, g


@standardize.samples
def _(rng: np.random.Generator) -> Iterator[Sample]:
    x = rng.normal(size=(4, 3, 2, 5)) * 2 + 1
    channel, feature = (rng.normal(size=(2, *shape)) for shape in ((1, 3, 1, 1), (2, 5)))
    yield sample(x, *channel, dim=(0, 2, 3))
    yield sample(x, *feature, dim=(-2, -1))
    yield sample(x, None, None, dim=(1, 2, 3), eps=0.1)
    yield sample(x, channel[0], None, dim=(2, 3))
    yield sample(x[:0], *feature, dim=(2, 3))
