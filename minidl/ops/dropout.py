"""Dropout: numbers set to zero at random (Srivastava et al. 2014)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from minidl import backend
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


@dropout.samples
def _(rng: np.random.Generator) -> Iterator[Sample]:
    yield sample(rng.normal(size=(5, 7)), p=0.5, key=Key(0, 3))
    yield sample(rng.normal(size=(2, 3, 4, 4)), p=0.3, key=Key(1, 0), mask_shape=(2, 3, 1, 1))
    yield sample(rng.normal(size=9), p=0.0, key=Key(0, 0))
    yield sample(rng.normal(size=9), p=1.0, key=Key(0, 0))
    yield sample(rng.normal(size=(0, 3)), p=0.5, key=Key(0, 0))
