"""Oracles of `minidl.ops.linalg`."""

import numpy as np

from tests.oracles import loops, pytorch


def product(x, y):
    """Of two matrices."""
    z = np.zeros((x.shape[0], y.shape[1]))
    for i, j, k in np.ndindex(x.shape[0], y.shape[1], x.shape[1]):
        z[i, j] += x[i, k] * y[k, j]
    return z


@loops("matmul")
def _(x, y):
    row, column = x.ndim == 1, y.ndim == 1
    x = x[None] if row else x
    y = y[:, None] if column else y
    batch = np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    z = np.zeros((*batch, x.shape[-2], y.shape[-1]))
    for at in np.ndindex(batch):

        def of(v, at=at):
            own = at[len(batch) - (v.ndim - 2) :]
            return v[tuple(0 if n == 1 else i for i, n in zip(own, v.shape, strict=False))]

        z[at] = product(of(x), of(y))
    z = z[..., 0, :] if row else z
    return z[..., 0] if column else z


@loops("linear")
def _(x, w, b):
    y = np.zeros((*x.shape[:-1], w.shape[0]))
    for at in np.ndindex(y.shape):
        y[at] = 0 if b is None else b[at[-1]]
        for k in range(w.shape[1]):
            y[at] += x[(*at[:-1], k)] * w[at[-1], k]
    return y


@loops("einsum")
def _(*xs, equation):
    left, _, result = equation.partition("->")
    names = left.split(",")
    lengths = {c: n for x, of in zip(xs, names, strict=True) for c, n in zip(of, x.shape)}
    y = np.zeros([lengths[c] for c in result])
    for values in np.ndindex(*lengths.values()):
        at = dict(zip(lengths, values, strict=True))
        term = 1.0
        for x, of in zip(xs, names, strict=True):
            term *= x[tuple(at[c] for c in of)]
        y[tuple(at[c] for c in result)] += term
    return y


@pytorch("matmul")
def _(x, y):
    return x @ y


@pytorch("linear")
def _(x, w, b):
    import torch

    return torch.nn.functional.linear(x, w, b)


@pytorch("einsum")
def _(*xs, equation):
    import torch

    return torch.einsum(equation, *xs)
