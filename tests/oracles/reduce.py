"""Oracles of `minidl.ops.reduce`."""

import math

import numpy as np

from tests.oracles import loops, pytorch


def reduced(shape, dim):
    """The dimensions that are reduced, counted from the front."""
    dims = range(len(shape)) if dim is None else dim if isinstance(dim, tuple) else (dim,)
    return {d % len(shape) for d in dims}


def groups(x, dim, keepdim):
    """The output's shape; for each of its elements, the elements of x that it is made of."""
    dims = reduced(x.shape, dim)
    found = {}
    for at in np.ndindex(*(1 if d in dims else n for d, n in enumerate(x.shape))):
        found[at] = []
    for at in np.ndindex(x.shape):
        found[tuple(0 if d in dims else i for d, i in enumerate(at))].append(x[at].item())
    shape = [1 if d in dims else n for d, n in enumerate(x.shape) if keepdim or d not in dims]
    return shape, found.values()


def reduction(f):
    def oracle(x, *, dim, keepdim, **settings):
        shape, found = groups(x, dim, keepdim)
        return np.array([f(values, **settings) for values in found]).reshape(shape)

    return oracle


def variance(values, correction=1):
    middle = math.fsum(values) / len(values)
    return math.fsum((v - middle) ** 2 for v in values) / (len(values) - correction)


def first(values, best):
    position = 0
    for i, v in enumerate(values):
        if best(v, values[position]):
            position = i
    return position


loops("sum")(reduction(math.fsum))
loops("mean")(reduction(lambda values: math.fsum(values) / len(values)))
loops("var")(reduction(variance))
loops("amax")(reduction(max))
loops("amin")(reduction(min))
loops("argmax")(reduction(lambda values: first(values, lambda a, b: a > b)))
loops("argmin")(reduction(lambda values: first(values, lambda a, b: a < b)))
loops("any")(reduction(any))
loops("all")(reduction(all))


@loops("cumsum")
def _(x, *, dim):
    y = np.zeros(x.shape)
    for at in np.ndindex(x.shape):
        before = list(at)
        for i in range(at[dim] + 1):
            before[dim] = i
            y[at] += x[tuple(before)]
    return y


@loops("argsort")
def _(x, *, dim, descending):
    y = np.zeros(x.shape, int)
    for at in np.ndindex(*(1 if d == dim % x.ndim else n for d, n in enumerate(x.shape))):
        line = tuple(slice(None) if d == dim % x.ndim else i for d, i in enumerate(at))
        values = x[line].tolist()
        sign = -1 if descending else 1
        y[line] = sorted(range(len(values)), key=lambda i, v=values, s=sign: (s * v[i], i))
    return y


def as_named(name):
    def oracle(x, *, dim, keepdim, **settings):
        import torch

        if dim is None:  # not all of PyTorch's take None, and keepdim with it
            dim = tuple(range(x.ndim)) if "arg" not in name else None
        return getattr(torch, name)(x, dim=dim, keepdim=keepdim, **settings)

    pytorch(name)(oracle)


for name in ("sum", "mean", "var", "amax", "amin", "argmax", "argmin", "any", "all"):
    as_named(name)


@pytorch("cumsum")
def _(x, *, dim):
    return x.cumsum(dim)


@pytorch("argsort")
def _(x, *, dim, descending):
    import torch

    return torch.argsort(x, dim=dim, descending=descending, stable=True)
