"""Dropout: numbers set to zero at random (Srivastava et al. 2014)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from minidl import backend
from minidl.backend.native import native, why_missing
from minidl.backend.random import Key, uniform
from minidl.op import Sample, op, sample


@op
def dropout(x: Any, *, p: float, key: Key, mask_shape: tuple[int, ...] | None = None) -> Any:
    """Each number is 0 with probability p, else divided by 1 - p: so the mean stays.

    Number i is dropped if the i-th random number of the stream `key` is below p. Nothing is
    remembered: whoever has the key finds the same mask again, on any device. A `mask_shape` that
    broadcasts to x's drops whole slices, (N, C, 1, 1) whole channels.
    """
    shape = x.shape if mask_shape is None else mask_shape
    keep = uniform(key, math.prod(shape)).reshape(shape) >= p
    scale = float(1 / (1 - p)) if p < 1 else 1.0  # of p = 1 nothing is kept
    return np.where(backend.to_device(keep, backend.device_name(x)), x * scale, 0)


@dropout.gradient
def _(g, *, p, key, mask_shape):
    return (dropout(g, p=p, key=key, mask_shape=mask_shape),)


@dropout.kernel("native", dtypes=("float32", "float64"), missing=why_missing)
def _(x, *, p, key, mask_shape=None):
    """The same bits; the formula where a mask does not cover runs of x."""
    shape = x.shape if mask_shape is None else mask_shape
    whole = len(shape) == x.ndim and max((i + 1 for i, n in enumerate(shape) if n > 1), default=0)
    if shape[:whole] != x.shape[:whole] or x.size == 0:
        return dropout.op.formula(x, p=p, key=key, mask_shape=mask_shape)
    high, low = divmod(key.seed, 2**64)
    threshold = math.ceil(float(np.float32(p)) * 2**24)
    repeat = math.prod(x.shape[whole:])
    scale = float(1 / (1 - p)) if p < 1 else 1.0
    return native.dropout(x, low, high, key.call, threshold, scale, repeat)


@dropout.samples
def _(rng: np.random.Generator) -> Iterator[Sample]:
    yield sample(rng.normal(size=(5, 7)), p=0.5, key=Key(0, 3))
    yield sample(rng.normal(size=(2, 3, 4, 4)), p=0.3, key=Key(1, 0), mask_shape=(2, 3, 1, 1))
    yield sample(rng.normal(size=(2, 37)), p=0.1, key=Key(2**70 + 5, 9), mask_shape=(1, 37))
    yield sample(rng.normal(size=(3, 2, 5)), p=0.3, key=Key(1, 0), mask_shape=(3, 1, 1))
    yield sample(rng.normal(size=9), p=0.0, key=Key(0, 0))
    yield sample(rng.normal(size=9), p=1.0, key=Key(0, 0))
    yield sample(rng.normal(size=(0, 3)), p=0.5, key=Key(0, 0))
