"""Shape ops: the same elements in another arrangement, or some of them.

Each gradient is an arrangement too: `getitem` and `index_put` are each other's, so are `gather`
and `scatter_add`, `expand` and a sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from minidl import backend
from minidl.op import op, sample


@op
def reshape(x, *, shape):
    return x.reshape(shape)


@reshape.gradient
def _(g, x_shape, *, shape):
    return (g.reshape(x_shape),)


@op
def transpose(x, *, dim0, dim1):
    """Swap two dimensions."""
    return x.swapaxes(dim0, dim1)


@transpose.gradient
def _(g, *, dim0, dim1):
    return (g.swapaxes(dim0, dim1),)


@op
def permute(x, *, dims):
    """Dimension i of the result is dimension dims[i] of x."""
    return x.transpose(dims)


@permute.gradient
def _(g, *, dims):
    inverse = sorted(range(len(dims)), key=lambda i: dims[i] % len(dims))
    return (permute(g, dims=tuple(inverse)),)


@op
def expand(x, *, shape):
    """A read-only view of x, repeated along dimensions of length 1 and new ones in front."""
    return np.broadcast_to(x, shape)


@expand.gradient
def _(g, *, shape):
    return (g,)  # the walk undoes broadcasting


@op
def flip(x, *, dims):
    return np.flip(x, dims)


@flip.gradient
def _(g, *, dims):
    return (flip(g, dims=dims),)


@op
def roll(x, *, shifts, dims=None):
    """Shift along dims; what leaves at one end comes in at the other."""
    return np.roll(x, shifts, dims)


@roll.gradient
def _(g, *, shifts, dims):
    back = tuple(-s for s in shifts) if isinstance(shifts, tuple) else -shifts
    return (roll(g, shifts=back, dims=dims),)


@op
def tril(x, *, diagonal=0):
    """The lower triangle of matrices (..., m, n), zeros above it."""
    return np.tril(x, diagonal)


@tril.gradient
def _(g, *, diagonal):
    return (tril(g, diagonal=diagonal),)


@op
def triu(x, *, diagonal=0):
    """The upper triangle of matrices (..., m, n), zeros below it."""
    return np.triu(x, diagonal)


@triu.gradient
def _(g, *, diagonal):
    return (triu(g, diagonal=diagonal),)


# Together ---------------------------------------------------------------------------------


@op
def cat_(*xs, dim=0):
    """Arrays one after the other along an existing dimension."""
    return np.concatenate(xs, axis=dim)


@cat_.gradient
def _(g, xs_shape, *, dim):
    at = (slice(None),) * (dim % g.ndim)
    ends = np.cumsum([0, *(shape[dim] for shape in xs_shape)]).tolist()
    return [lambda a=a, b=b: g[(*at, slice(a, b))] for a, b in pairwise(ends)]


@op
def stack_(*xs, dim=0):
    """Arrays of one shape, side by side along a new dimension."""
    return np.stack(xs, axis=dim)


@stack_.gradient
def _(g, xs_shape, *, dim):
    at = (slice(None),) * (dim % g.ndim)
    return [lambda i=i: g[(*at, i)] for i in range(len(xs_shape))]


# Some of the elements ---------------------------------------------------------------------


@op
def getitem(x, *, index):
    """x[index], all of NumPy's indexing: numbers, slices, None, ..., masks, arrays of positions."""
    return x[beside(x, index)]


@getitem.gradient
def _(g, x_shape, *, index):
    return (index_put(g, index=index, shape=x_shape),)


@op
def index_put(x, *, index, shape):
    """Zeros of a shape, with x added at index: what comes twice is summed."""
    xp = backend.array_module(x)
    out, index = xp.zeros(shape, x.dtype), beside(x, index)
    parts = index if isinstance(index, tuple) else (index,)
    rows = isinstance(index, np.ndarray) and index.ndim == 1 and index.dtype.kind in "iu"
    if rows and x.shape[0] == len(index) and out.size > 256 * len(out):  # few long rows
        for i, row in zip(index, x):  # the same sums in the same order; `add.at` takes 30 times
            out[i] += row
    elif any(isinstance(i, list) or (hasattr(i, "dtype") and i.dtype.kind != "b") for i in parts):
        xp.add.at(out, index, x)
    else:  # numbers, slices and masks name no element twice
        out[index] = x
    return out


@index_put.gradient
def _(g, *, index, shape):
    return (getitem(g, index=index),)


def beside(x, index):
    """An index whose arrays are where x is. (Positions that were computed on the CPU, say.)"""
    if isinstance(x, np.ndarray):
        return index
    if isinstance(index, tuple):
        return tuple(beside(x, part) for part in index)
    if isinstance(index, np.ndarray | list):
        return backend.to_device(np.asarray(index), backend.device_name(x))
    return index


@op
def gather(x, index, *, dim):
    """out[i][j][k] = x[i][index[i][j][k]][k] for dim = 1, and so on; shaped as index."""
    return np.take_along_axis(within(x, index, dim), index, axis=dim)


@gather.gradient
def _(g, x_shape, index, *, dim):
    return scatter_add(g, index, dim=dim, shape=x_shape), None


@op
def scatter_add(x, index, *, dim, shape):
    """Zeros of a shape, with x added where `gather` would read."""
    xp = backend.array_module(x)
    out = xp.zeros(shape, x.dtype)
    where_ = list(np.ogrid[tuple(slice(n) for n in index.shape)])
    where_[dim] = index
    xp.add.at(out, tuple(xp.asarray(i) for i in where_), x)
    return out


@scatter_add.gradient
def _(g, index, *, dim, shape):
    return gather(g, index, dim=dim), None


def within(x, index, dim):
    """x, cut to index's lengths in all dimensions but one (as PyTorch's gather reads it)."""
    dim = dim % max(x.ndim, 1)
    if x.ndim != index.ndim or any(index.shape[d] > x.shape[d] for d in range(x.ndim) if d != dim):
        raise ValueError(
            f"gather: index has shape {index.shape}, x {x.shape}: they need as many dimensions, "
            f"and index may be longer in dimension {dim} only"
        )
    return x[tuple(slice(None) if d == dim else slice(n) for d, n in enumerate(index.shape))]


def pad(x: Any, padding: Sequence[int], value: float = 0.0) -> Any:
    """x with a border, as F.pad: (left, right) of the last dimension, then the one before, ..."""
    if len(padding) % 2 or len(padding) > 2 * x.ndim:
        raise ValueError(
            f"pad: {len(padding)} numbers for {x.ndim} dimensions: two each, last dimension first"
        )
    pairs = [(0, 0)] * (x.ndim - len(padding) // 2)
    pairs += list(zip(padding[-2::-2], padding[-1::-2], strict=True))
    if any(n < 0 for n in padding):  # cut off
        cuts = zip(x.shape, pairs, strict=True)
        x = x[tuple(slice(max(-a, 0), n - max(-b, 0)) for n, (a, b) in cuts)]
        pairs = [(max(a, 0), max(b, 0)) for a, b in pairs]
    inside = tuple(slice(a, a + n) for n, (a, b) in zip(x.shape, pairs, strict=True))
    shape = tuple(a + n + b for n, (a, b) in zip(x.shape, pairs, strict=True))
    out = index_put(x, index=inside, shape=shape)
    if value != 0.0:  # along the other dimensions, the batch among them, it is repeated
        framed = [pair != (0, 0) for pair in pairs]
        border = np.full([n if f else 1 for n, f in zip(shape, framed)], value, x.dtype)
        border[tuple(i if f else slice(None) for i, f in zip(inside, framed))] = 0
        out = out + backend.to_device(border, backend.device_name(getattr(x, "array", x)))
    return out


# Samples ----------------------------------------------------------------------------------


@reshape.samples
def _(rng):
    yield sample(rng.normal(size=(3, 4)), shape=(2, 6))
    yield sample(rng.normal(size=(3, 4)), shape=(-1,))
    yield sample(np.array(rng.normal()), shape=(1, 1))
    yield sample(rng.normal(size=(0, 4)), shape=(2, 0))


@transpose.samples
def _(rng):
    yield sample(rng.normal(size=(3, 4)), dim0=0, dim1=1)
    yield sample(rng.normal(size=(3, 4, 2)), dim0=-1, dim1=0)
    yield sample(rng.normal(size=(0, 4)), dim0=0, dim1=1)


@permute.samples
def _(rng):
    yield sample(rng.normal(size=(3, 4, 2)), dims=(2, 0, 1))
    yield sample(rng.normal(size=(3, 4, 2)), dims=(-1, 0, -2))
    yield sample(rng.normal(size=(0, 4)), dims=(1, 0))


@expand.samples
def _(rng):
    yield sample(rng.normal(size=(3, 1)), shape=(3, 4))
    yield sample(rng.normal(size=3), shape=(2, 4, 3))
    yield sample(np.array(rng.normal()), shape=(2, 2))
    yield sample(rng.normal(size=(1, 3)), shape=(0, 3))


@flip.samples
def _(rng):
    yield sample(rng.normal(size=(3, 4)), dims=(0,))
    yield sample(rng.normal(size=(3, 4, 2)), dims=(-1, 0))


@roll.samples
def _(rng):
    yield sample(rng.normal(size=(3, 4)), shifts=2)
    yield sample(rng.normal(size=(3, 4)), shifts=-1, dims=1)
    yield sample(rng.normal(size=(3, 4)), shifts=(1, 2), dims=(0, 1))


@tril.samples
@triu.samples
def _(rng):
    yield sample(rng.normal(size=(4, 4)))
    yield sample(rng.normal(size=(2, 3, 4)), diagonal=1)
    yield sample(rng.normal(size=(4, 3)), diagonal=-1)


@cat_.samples
def _(rng):
    yield sample(rng.normal(size=(2, 3)), rng.normal(size=(1, 3)), rng.normal(size=(4, 3)))
    yield sample(rng.normal(size=(2, 3)), rng.normal(size=(2, 1)), dim=-1)
    yield sample(rng.normal(size=(0, 3)), rng.normal(size=(2, 3)), dim=0)


@stack_.samples
def _(rng):
    yield sample(rng.normal(size=(2, 3)), rng.normal(size=(2, 3)))
    yield sample(rng.normal(size=(2, 3)), rng.normal(size=(2, 3)), rng.normal(size=(2, 3)), dim=-1)
    yield sample(rng.normal(size=(0, 3)), rng.normal(size=(0, 3)), dim=1)


INDICES = (
    1,
    -1,
    slice(None, None, 2),
    slice(None, None, -1),
    (slice(1, None), 2),
    (Ellipsis, None, 0),
    (None, 1),
    np.array([0, 2, 0, -1]),
    (np.array([0, 2, 0]), np.array([1, 1, 1])),
    (slice(None), np.array([[0, 1], [1, 0]])),
    np.array([True, False, True]),
    np.array([[True, False, True, False]] * 3),
    np.array([], dtype=int),
    (),
)


@getitem.samples
def _(rng):
    for index in INDICES:
        yield sample(rng.normal(size=(3, 4)), index=index)
    yield sample(rng.normal(size=5), index=2)
    yield sample(rng.normal(size=(0, 4)), index=(slice(None), 1))


@index_put.samples
def _(rng):
    for index in INDICES:
        shape = np.zeros((3, 4))[index].shape
        yield sample(rng.normal(size=shape), index=index, shape=(3, 4))


@gather.samples
def _(rng):
    yield sample(rng.normal(size=(3, 4)), rng.integers(0, 4, size=(3, 6)), dim=1)
    yield sample(rng.normal(size=(3, 4)), rng.integers(0, 3, size=(2, 2)), dim=0)
    yield sample(rng.normal(size=5), rng.integers(0, 5, size=3), dim=-1)


@scatter_add.samples
def _(rng):
    index = rng.integers(0, 4, size=(3, 6))
    yield sample(rng.normal(size=(3, 6)), index, dim=1, shape=(3, 4))
    yield sample(rng.normal(size=(2, 2)), rng.integers(0, 3, size=(2, 2)), dim=0, shape=(3, 4))
