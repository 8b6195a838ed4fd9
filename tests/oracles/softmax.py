"""Oracles of `minidl.ops.softmax`."""

import math

import numpy as np

from tests.oracles import loops, pytorch
from tests.oracles.reduce import groups, reduced


def shares(x, dim):
    """Of each element, its share of Σ exp(x) along a dimension."""
    y = np.zeros(x.shape)
    for at in np.ndindex(x.shape):
        line = list(at)
        total = 0.0
        for i in range(x.shape[dim]):
            line[dim] = i
            total += math.exp(x[tuple(line)])
        y[at] = math.exp(x[at]) / total
    return y


@loops("softmax")
def _(x, *, dim):
    return shares(x, dim)


@loops("log_softmax")
def _(x, *, dim):
    return np.array([math.log(v) for v in shares(x, dim).ravel()]).reshape(x.shape)


@loops("logsumexp")
def _(x, *, dim, keepdim):
    shape, found = groups(x, dim, keepdim)
    return np.array([math.log(math.fsum(map(math.exp, v))) for v in found]).reshape(shape)


@pytorch("softmax")
def _(x, *, dim):
    return x.softmax(dim)


@pytorch("log_softmax")
def _(x, *, dim):
    return x.log_softmax(dim)


@pytorch("logsumexp")
def _(x, *, dim, keepdim):
    return x.logsumexp(tuple(reduced(x.shape, dim)), keepdim)
