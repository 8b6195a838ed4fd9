"""Attention: how well each place fits what is to be said."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from minidl.backend.native import native, why_missing
from minidl.op import Sample, op, sample
from minidl.ops.elementwise import tanh
from minidl.ops.linalg import matmul


@op
def additive_scores(u: Any, v: Any, w: Any) -> Any:
    """e_i = wᵀ tanh(u_i + v): places (N, L, A), a state (N, A), (1, A) -> (N, L).

    Bahdanau et al. 2015, appendix A.1.2; Xu et al. 2015, equation 4. The weight is that of a linear
    layer with one output.
    """
    return np.tanh(u + v[:, None]) @ w[0]


@additive_scores.gradient
def _(g, u, v, w):
    n, places, size = u.shape
    t = tanh(u + v.reshape((n, 1, size)))
    d = g.reshape((n, places, 1)) * w * (1 - t * t)
    return (
        d,
        lambda: d.sum(axis=1),
        lambda: matmul(g.reshape((1, n * places)), t.reshape((n * places, size))),
    )


@additive_scores.kernel("native", dtypes=("float32", "float64"), missing=why_missing)
def _(u, v, w):
    return native.additive_scores(u, v, w)


@additive_scores.gradient_kernel("native", dtypes=("float32", "float64"), missing=why_missing)
def _(g, u, v, w):
    gu, gv, gw = native.additive_scores_gradient(g, u, v, w)
    return gu, gv, gw.sum(axis=0, keepdims=True)


@additive_scores.samples
def _(rng: np.random.Generator) -> Iterator[Sample]:
    for n, places, size in ((2, 3, 5), (1, 1, 1), (3, 4, 37), (0, 2, 3), (2, 0, 3)):
        u, v = rng.normal(size=(n, places, size)), rng.normal(size=(n, size))
        yield sample(u, v, rng.normal(size=(1, size)))
