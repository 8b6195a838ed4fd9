"""Reductions: sums, means and extremes along dimensions; sorting."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minidl.op import op, sample
from minidl.ops.elementwise import abs_, pow_, sqrt, where
from minidl.ops.shape import cat_, expand, flip, gather


def count(shape, dim):
    """How many elements are reduced to one."""
    if dim is None:
        return math.prod(shape)
    return math.prod(shape[d] for d in (dim if isinstance(dim, tuple) else (dim,)))


def with_dims(y, shape, dim, keepdim):
    """A reduced y, with length 1 where the input of a given shape was reduced."""
    if keepdim:
        return y
    dims = range(len(shape)) if dim is None else dim if isinstance(dim, tuple) else (dim,)
    reduced = {d % len(shape) for d in dims}
    return y.reshape(tuple(1 if d in reduced else n for d, n in enumerate(shape)))


@op
def sum_(x, *, dim=None, keepdim=False):
    return x.sum(axis=dim, keepdims=keepdim)


@sum_.gradient
def _(g, x_shape, *, dim, keepdim):
    return (expand(with_dims(g, x_shape, dim, keepdim), shape=x_shape),)


@op
def mean(x, *, dim=None, keepdim=False):
    return x.mean(axis=dim, keepdims=keepdim)


@mean.gradient
def _(g, x_shape, *, dim, keepdim):
    g = with_dims(g, x_shape, dim, keepdim) * (1 / max(count(x_shape, dim), 1))
    return (expand(g, shape=x_shape),)


@op
def var(x, *, dim=None, keepdim=False, correction=1):
    """Σ (x - mean)² / (n - correction); of one element, with correction 1, NaN."""
    return x.var(axis=dim, keepdims=keepdim, ddof=correction)


@var.gradient
def _(g, x, *, dim, keepdim, correction):
    n = max(count(x.shape, dim) - correction, 0)
    away = x - mean(x, dim=dim, keepdim=True)
    return (with_dims(g, x.shape, dim, keepdim) * away * (2 / n if n else math.inf),)


def std(x: Any, *, dim: Any = None, keepdim: bool = False, correction: float = 1) -> Any:
    """√var, with gradient 0 (not NaN) where the variance is 0."""
    v = var(x, dim=dim, keepdim=keepdim, correction=correction)
    return safe_sqrt(v)


def safe_sqrt(x):
    """√x, with gradient 1 (not ∞) at 0, for sums of squares: their gradient there is 0."""
    positive = x > 0
    return where(positive, sqrt(where(positive, x, 1)), x)


@op
def amax(x, *, dim=None, keepdim=False):
    return x.max(axis=dim, keepdims=keepdim)


@op
def amin(x, *, dim=None, keepdim=False):
    return x.min(axis=dim, keepdims=keepdim)


@amax.gradient
@amin.gradient
def _(g, out, x, *, dim, keepdim):
    """Ties share it evenly."""
    winners = (x == with_dims(out, x.shape, dim, keepdim)).astype(g.dtype)
    share = winners / winners.sum(axis=dim, keepdims=True)
    return (with_dims(g, x.shape, dim, keepdim) * share,)


def prod(x: Any, *, dim: int | None = None, keepdim: bool = False) -> Any:
    """The product, as a tree of multiplications: right at zeros too, to any order."""
    shape = x.shape
    if dim is None:
        x, axis = x.reshape(-1), 0
    else:
        axis = dim % max(x.ndim, 1)
    at = (slice(None),) * axis
    if x.shape[axis] == 0:
        return sum_(x, dim=axis, keepdim=keepdim) + 1
    while (n := x.shape[axis]) > 1:
        pairs = x[(*at, slice(0, n - 1, 2))] * x[(*at, slice(1, n, 2))]
        if n % 2:
            pairs = cat_(pairs, x[(*at, slice(n - 1, n))], dim=axis)
        x = pairs
    kept = tuple(1 if dim is None or d == axis else n for d, n in enumerate(shape))
    return x.reshape(kept if keepdim else x.shape[:axis] + x.shape[axis + 1 :])


def norm(x: Any, *, p: Any = 2, dim: Any = None, keepdim: bool = False) -> Any:
    """(Σ |x|ᵖ)^(1/p); p may be inf, -inf or 0 (how many are not 0). The gradient at 0 is 0."""
    settings = {"dim": dim, "keepdim": keepdim}
    if p in (2, "fro"):
        return safe_sqrt(sum_(x * x, **settings))
    if p == 1:
        return sum_(abs_(x), **settings)
    if p == math.inf:
        return amax(abs_(x), **settings)
    if p == -math.inf:
        return amin(abs_(x), **settings)
    if p == 0:
        return sum_((x != 0).astype(x.dtype), **settings)
    total = sum_(pow_(abs_(x), p), **settings)
    positive = total > 0
    return where(positive, pow_(where(positive, total, 1), 1 / p), total)


@op
def cumsum(x, *, dim):
    return x.cumsum(axis=dim)


@cumsum.gradient
def _(g, *, dim):
    return (flip(cumsum(flip(g, dims=(dim,)), dim=dim), dims=(dim,)),)


# Positions --------------------------------------------------------------------------------


@op(constant=True)
def argmax(x, *, dim=None, keepdim=False):
    """The position of the first largest element (in the flattened x, without dim)."""
    return np.argmax(x, axis=dim, keepdims=keepdim)


@op(constant=True)
def argmin(x, *, dim=None, keepdim=False):
    return np.argmin(x, axis=dim, keepdims=keepdim)


@op(constant=True)
def argsort(x, *, dim=-1, descending=False):
    """The positions that sort x; equal elements keep their order."""
    if not descending:
        return np.argsort(x, axis=dim, kind="stable")
    last = x.shape[dim] - 1 if x.ndim else 0
    return np.flip(last - np.argsort(np.flip(x, dim), axis=dim, kind="stable"), dim)


@op(constant=True)
def any_(x, *, dim=None, keepdim=False):
    return x.any(axis=dim, keepdims=keepdim)


@op(constant=True)
def all_(x, *, dim=None, keepdim=False):
    return x.all(axis=dim, keepdims=keepdim)


def sort(x: Any, *, dim: int = -1, descending: bool = False) -> tuple[Any, Any]:
    """Sorted values and their positions in x."""
    indices = argsort(x, dim=dim, descending=descending)
    return gather(x, indices, dim=dim), indices


def topk(x: Any, *, k: int, dim: int = -1, largest: bool = True) -> tuple[Any, Any]:
    """The k largest (or smallest) values, in order, and their positions in x."""
    if not 0 <= k <= x.shape[dim]:
        raise ValueError(f"topk: k is {k}, dimension {dim} has {x.shape[dim]} elements")
    indices = argsort(x, dim=dim, descending=largest)
    indices = indices[(slice(None),) * (dim % x.ndim) + (slice(0, k),)]
    return gather(x, indices, dim=dim), indices


# Samples ----------------------------------------------------------------------------------

DIMS: tuple[dict[str, Any], ...] = ({}, {"dim": 1}, {"dim": -1, "keepdim": True}, {"dim": (0, 2)})


@sum_.samples
@mean.samples
@var.samples
def _(rng):
    for settings in DIMS:
        yield sample(rng.normal(size=(3, 4, 2)), **settings)
    yield sample(rng.normal(size=(2, 3)), keepdim=True)
    yield sample(rng.normal(size=(0, 3)), dim=1)


@amax.samples
@amin.samples
def _(rng):
    for settings in DIMS:
        yield sample(apart(rng, (3, 4, 2)), **settings)
    yield sample(apart(rng, (2, 3)), keepdim=True)
    yield sample(np.zeros((0, 3)), dim=1)


@cumsum.samples
def _(rng):
    yield sample(rng.normal(size=(3, 4)), dim=0)
    yield sample(rng.normal(size=(3, 4, 2)), dim=-2)
    yield sample(rng.normal(size=(0, 4)), dim=1)


@argmax.samples
@argmin.samples
def _(rng):
    yield sample(rng.integers(0, 3, size=(3, 4, 2)) * 1.0)
    yield sample(rng.integers(0, 3, size=(3, 4, 2)) * 1.0, dim=1)
    yield sample(rng.integers(0, 3, size=(3, 4, 2)) * 1.0, dim=-1, keepdim=True)


@any_.samples
@all_.samples
def _(rng):
    for settings in ({}, {"dim": 1}, {"dim": -1, "keepdim": True}):
        yield sample(rng.random((3, 4, 2)) < 0.5, **settings)


@argsort.samples
def _(rng):
    yield sample(rng.integers(0, 3, size=(3, 6)) * 1.0)
    yield sample(rng.integers(0, 3, size=(6, 3)) * 1.0, dim=0, descending=True)


def apart(rng, shape):
    """Numbers at least 0.1 apart, in random order: no finite difference makes another one win."""
    return (rng.permutation(math.prod(shape)).reshape(shape) - math.prod(shape) / 2) * 0.1
