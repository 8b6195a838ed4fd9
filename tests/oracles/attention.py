"""Oracles of `minidl.ops.attention`."""

import math

import numpy as np

from tests.oracles import loops, pytorch


@loops("additive_scores")
def _(u, v, w):
    e = np.zeros(u.shape[:2])
    for n, i in np.ndindex(e.shape):
        e[n, i] = math.fsum(w[0, a] * math.tanh(u[n, i, a] + v[n, a]) for a in range(u.shape[2]))
    return e


@pytorch("additive_scores")
def _(u, v, w):
    return (u + v[:, None]).tanh() @ w[0]
