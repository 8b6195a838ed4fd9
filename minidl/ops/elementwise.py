"""Elementwise ops: each output element depends on one element of each (broadcast) input.

At kinks the subgradients are PyTorch's: see the table in tests/test_kinks.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minidl.op import op, sample


@op
def add(x, y):
    return x + y


@add.gradient
def _(g):
    return g, g


@add.samples
def _(rng):
    yield sample(rng.normal(size=(3, 4)), rng.normal(size=(3, 4)))
    yield sample(rng.normal(size=(3, 1)), rng.normal(size=4))


@op
def mul(x, y):
    return x * y


@mul.gradient
def _(g, x, y):
    return lambda: g * y, lambda: g * x


@op
def tanh(x):
    return np.tanh(x)


@tanh.gradient
def _(g, out):
    return (g * (1 - out * out),)


@op
def matmul(x, y):
    return x @ y

@matmul.gradient
def _(g, x, y):
    return lambda: g @ y.T, lambda: x.T @ g
