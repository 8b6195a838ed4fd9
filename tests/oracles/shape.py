"""Oracles of `minidl.ops.shape`."""

import numpy as np

from tests.oracles import loops, pytorch


def flat(x):
    return [x[at].item() for at in np.ndindex(x.shape)]


def moved(shape, source):
    """An oracle's result of a given shape, whose element `at` is source(at)."""
    return np.array([source(at) for at in np.ndindex(*shape)], float).reshape(shape)


@loops("reshape")
def _(x, *, shape):
    shape = [n if n >= 0 else x.size // -int(np.prod(shape)) for n in shape]
    return np.array(flat(x), float).reshape(shape)


@loops("transpose")
def _(x, *, dim0, dim1):
    def swap(of):
        of = list(of)
        of[dim0], of[dim1] = of[dim1], of[dim0]
        return tuple(of)

    return moved(swap(x.shape), lambda at: x[swap(at)])


@loops("permute")
def _(x, *, dims):
    def source(at):
        own = [0] * x.ndim
        for i, d in enumerate(dims):
            own[d] = at[i]
        return x[tuple(own)]

    return moved([x.shape[d] for d in dims], source)


@loops("expand")
def _(x, *, shape):
    def source(at):
        own = at[len(shape) - x.ndim :]
        return x[tuple(0 if n == 1 else i for i, n in zip(own, x.shape, strict=True))]

    return moved(shape, source)


@loops("flip")
def _(x, *, dims):
    dims = {d % x.ndim for d in dims}
    return moved(
        x.shape,
        lambda at: x[tuple(x.shape[d] - 1 - i if d in dims else i for d, i in enumerate(at))],
    )


@loops("roll")
def _(x, *, shifts, dims):
    if dims is None:
        values = flat(x)
        return np.array(values[-shifts:] + values[:-shifts]).reshape(x.shape)
    pairs = [(shifts, dims)] if isinstance(dims, int) else zip(shifts, dims, strict=True)
    by = dict.fromkeys(range(x.ndim), 0)
    for shift, dim in pairs:
        by[dim % x.ndim] += shift
    return moved(x.shape, lambda at: x[tuple((i - by[d]) % x.shape[d] for d, i in enumerate(at))])


@loops("tril")
def _(x, *, diagonal):
    return moved(x.shape, lambda at: x[at] if at[-1] - at[-2] <= diagonal else 0)


@loops("triu")
def _(x, *, diagonal):
    return moved(x.shape, lambda at: x[at] if at[-1] - at[-2] >= diagonal else 0)


@loops("cat")
def _(*xs, dim):
    dim %= xs[0].ndim
    shape = list(xs[0].shape)
    shape[dim] = sum(x.shape[dim] for x in xs)

    def source(at):
        at = list(at)
        for x in xs:
            if at[dim] < x.shape[dim]:
                return x[tuple(at)]
            at[dim] -= x.shape[dim]

    return moved(shape, source)


@loops("stack")
def _(*xs, dim):
    dim %= xs[0].ndim + 1
    shape = (*xs[0].shape[:dim], len(xs), *xs[0].shape[dim:])
    return moved(shape, lambda at: xs[at[dim]][at[:dim] + at[dim + 1 :]])


def positions(shape, index):
    """Which elements of an array of a given shape an index names: NumPy's own word for it."""
    n = int(np.prod(shape))
    return np.array(np.arange(n, dtype=int).reshape(shape)[index])


@loops("getitem")
def _(x, *, index):
    at = positions(x.shape, index)
    values = flat(x)
    return moved(at.shape, lambda i: values[at[i]])


@loops("index_put")
def _(x, *, index, shape):
    at = positions(shape, index)
    values = [0.0] * int(np.prod(shape))
    for i in np.ndindex(at.shape):
        values[at[i]] += x[i]
    return np.array(values).reshape(shape)


@loops("gather")
def _(x, index, *, dim):
    def source(at):
        own = list(at)
        own[dim] = index[at]
        return x[tuple(own)]

    return moved(index.shape, source)


@loops("scatter_add")
def _(x, index, *, dim, shape):
    y = np.zeros(shape)
    for at in np.ndindex(index.shape):
        own = list(at)
        own[dim] = index[at]
        y[tuple(own)] += x[at]
    return y


# PyTorch ----------------------------------------------------------------------------------


@pytorch("reshape")
def _(x, *, shape):
    return x.reshape(shape)


@pytorch("transpose")
def _(x, *, dim0, dim1):
    return x.transpose(dim0, dim1)


@pytorch("permute")
def _(x, *, dims):
    return x.permute(dims)


@pytorch("expand")
def _(x, *, shape):
    return x.expand(shape)


@pytorch("flip")
def _(x, *, dims):
    return x.flip(dims)


@pytorch("roll")
def _(x, *, shifts, dims):
    return x.roll(shifts, dims)


@pytorch("tril")
def _(x, *, diagonal):
    return x.tril(diagonal)


@pytorch("triu")
def _(x, *, diagonal):
    return x.triu(diagonal)


@pytorch("cat")
def _(*xs, dim):
    import torch

    return torch.cat(xs, dim)


@pytorch("stack")
def _(*xs, dim):
    import torch

    return torch.stack(xs, dim)


@pytorch("getitem")
def _(x, *, index):
    import torch

    at = torch.from_numpy(positions(x.shape, index))
    return x.reshape(-1)[at]


@pytorch("index_put")
def _(x, *, index, shape):
    import torch

    at = torch.from_numpy(positions(shape, index))
    zeros = torch.zeros(int(np.prod(shape)), dtype=x.dtype)
    return zeros.index_put((at,), x, accumulate=True).reshape(shape)


@pytorch("gather")
def _(x, index, *, dim):
    return x.gather(dim, index)


@pytorch("scatter_add")
def _(x, index, *, dim, shape):
    import torch

    return torch.zeros(shape, dtype=x.dtype).scatter_add(dim, index, x)
