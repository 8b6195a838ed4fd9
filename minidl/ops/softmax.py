"""Softmax, its logarithm, and log Σ exp, none of which ever overflows."""

from __future__ import annotations

import numpy as np

from minidl.backend.native import native, why_missing
from minidl.op import op, sample
from minidl.ops.elementwise import exp
from minidl.ops.reduce import with_dims


@op
def softmax(x, *, dim):
    """exp(x) / Σ exp(x), along a dimension."""
    e = np.exp(x - x.max(axis=dim, keepdims=True))
    e /= e.sum(axis=dim, keepdims=True)
    return e


@softmax.gradient
def _(g, out, *, dim):
    gy = g * out
    return (gy - out * gy.sum(axis=dim, keepdims=True),)


@op
def log_softmax(x, *, dim):
    z = x - x.max(axis=dim, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=dim, keepdims=True))


@log_softmax.gradient
def _(g, out, *, dim):
    return (g - exp(out) * g.sum(axis=dim, keepdims=True),)


@op
def logsumexp(x, *, dim, keepdim=False):
    largest = x.max(axis=dim, keepdims=True)
    largest = np.where(np.isfinite(largest), largest, 0)
    y = np.log(np.exp(x - largest).sum(axis=dim, keepdims=True)) + largest
    return y if keepdim else y.squeeze(axis=dim)


@logsumexp.gradient
def _(g, out, x, *, dim, keepdim):
    p = exp(x - with_dims(out, x.shape, dim, keepdim))
    return (with_dims(g, x.shape, dim, keepdim) * p,)


@softmax.kernel("native", dtypes=("float32", "float64"), missing=why_missing)
def _(x, *, dim):
    return native.softmax(x, dim % x.ndim)


@softmax.gradient_kernel("native", dtypes=("float32", "float64"), missing=why_missing)
def _(g, out, *, dim):
    return (native.softmax_gradient(g, out, dim % out.ndim),)


@log_softmax.kernel("native", dtypes=("float32", "float64"), missing=why_missing)
def _(x, *, dim):
    return native.log_softmax(x, dim % x.ndim)


@log_softmax.gradient_kernel("native", dtypes=("float32", "float64"), missing=why_missing)
def _(g, out, *, dim):
    return (native.log_softmax_gradient(g, out, dim % out.ndim),)


@softmax.samples
@log_softmax.samples
def _(rng):
    yield sample(rng.normal(size=(3, 4)) * 2, dim=1)
    yield sample(rng.normal(size=(3, 4, 2)) * 2, dim=0)
    yield sample(rng.normal(size=(3, 4, 2)) * 2, dim=-2)
    yield sample(rng.normal(size=(0, 4)), dim=1)
    yield sample(rng.normal(size=(2, 37)) * 9, dim=-1)
    yield sample(rng.normal(size=(2, 3, 37)) * 9, dim=1)


@logsumexp.samples
def _(rng):
    yield sample(rng.normal(size=(3, 4)) * 2, dim=1)
    yield sample(rng.normal(size=(3, 4, 2)) * 2, dim=-2, keepdim=True)
    yield sample(rng.normal(size=(3, 4, 2)) * 2, dim=(0, 2))
    yield sample(rng.normal(size=(0, 4)), dim=1)
