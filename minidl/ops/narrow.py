"""Narrow weights: of 16, 8 or 4 bits, in a product that is computed with floats.

Where a product waits for its weights to come from memory, half the bytes are half the time. As in
`quantized.py`, the kernel takes weights packed beforehand in place of an array (`pack_linear`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from minidl.backend import array_module
from minidl.backend.native import native, why_missing
from minidl.op import Sample, op, sample
from minidl.ops.linalg import matmul
from minidl.ops.quantized import expect_array, is_packed, packer, some_bytes
from minidl.tensor import raw

pack_linear = packer("pack_linear")


@op
def linear_weight_only(x, w, scale, b):
    """(x wᵀ) * scale + b, where only the weights are narrow.

    Args:
        x: (..., in), a float; so is the result. Sums are kept in its precision.
        w: (out, in), float16, bfloat16 or int8; or what `pack_linear` made of it.
        scale: None, or one for each of out: what one unit of an int8 weight is worth.
        b: None, or (out,).
    """
    expect_array(w)
    y = matmul(x, w.T.astype(x.dtype))
    if scale is not None:
        y *= scale
    if b is not None:
        y += b
    return y


@linear_weight_only.gradient
def _(g, x, w, scale, b_shape):
    if is_packed(w):
        raise RuntimeError(f"{w!r} is for inference: pass the array itself to differentiate")
    scaled = g if scale is None else g * scale
    return (
        lambda: linear_weight_only(scaled, w.T, None, None),
        lambda: matmul(scaled.reshape((-1, w.shape[0])).T, x.reshape((-1, w.shape[1]))),
        lambda: g * linear_weight_only(x, w, None, None),
        g,
    )


@linear_weight_only.kernel("native", dtypes=("float32",), missing=why_missing)
def _(x, w, scale, b):
    """Few rows: each weight is read once and widened in a register. Many: a block at a time."""
    if x.size == 0 or (not is_packed(w) and w.size == 0):
        return linear_weight_only.op.formula(x, w, scale, b)
    y = native.linear(x.reshape(-1, x.shape[-1]), w, scale, b)
    return y.reshape(*x.shape[:-1], w.shape[0])


def pack_int4(q: Any) -> Any:
    """Two numbers from -8 to 7 in a byte, the first in the lower half (as ONNX packs int4).

    Args:
        q: (rows, columns), integers.

    Returns:
        (rows, ⌈columns / 2⌉), uint8. Of an odd number of columns the last half is 0.
    """
    xp = array_module(q)
    halves = xp.zeros((len(q), (q.shape[1] + 1) // 2, 2), np.uint8)
    halves.reshape(len(q), -1)[:, : q.shape[1]] = q.astype(np.uint8) & 15
    return halves[..., 0] + 16 * halves[..., 1]


def unpack_int4(packed: Any, columns: int) -> Any:
    """What `pack_int4` took, as int8: (rows, columns)."""
    halves = array_module(packed).stack([packed & 15, packed // 16], axis=-1).astype(np.int8)
    q = halves - (halves > 7) * np.int8(16)  # a half byte from 8 to 15 stands for -8 to -1
    return q.reshape(len(packed), -1)[:, :columns]


@op
def linear_int4(x, w, scale, b, *, group_size):
    """x (scale · w)ᵀ + b, where each byte of w is two weights.

    Args:
        x: (..., in), a float; so is the result. Sums are kept in its precision.
        w: (out, ⌈in / 2⌉), uint8, as of `pack_int4`.
        scale: (out, ⌈in / group_size⌉): each row has a scale for every `group_size` weights.
        b: None, or (out,).
    """
    y = matmul(x, widened_int4(w, scale, x.shape[-1], group_size).astype(x.dtype).T)
    return y if b is None else y + b


def widened_int4(w: Any, scale: Any, columns: int, group_size: int) -> Any:
    """The weights that int4 numbers stand for, in scale's dtype: (out, in)."""
    return unpack_int4(w, columns) * scale.repeat(group_size, axis=1)[:, :columns]


@linear_int4.gradient
def _(g, x, w, scale, b_shape, *, group_size):
    packed, columns = raw(w), x.shape[-1]
    xp = array_module(packed)
    q = unpack_int4(packed, columns).astype(x.dtype)
    group = xp.arange(columns)[:, None] // group_size == xp.arange(scale.shape[1])
    group = group.astype(x.dtype)  # (in, groups): 1 where a weight is of a group
    tall = lambda a: a.reshape((-1, a.shape[-1]))  # noqa: E731
    return (
        lambda: matmul(g, matmul(scale, group.T) * q),
        None,
        lambda: matmul(matmul(tall(g).T, tall(x)) * q, group),
        g,
    )


@linear_int4.kernel("native", dtypes=("float32",), missing=why_missing)
def _(x, w, scale, b, *, group_size):
    """Few rows: each byte is read once, and widened in a register."""
    columns, rows = x.shape[-1], math.prod(x.shape[:-1])
    whole = group_size % 32 == 0 or group_size >= columns
    if not 0 < rows <= 16 or not whole or 0 in w.shape or scale.dtype != np.float32:
        return linear_int4.op.formula(x, w, scale, b, group_size=group_size)
    y = native.linear_int4(x.reshape(rows, columns), w, scale, group_size, b)
    return y.reshape(*x.shape[:-1], len(w))


# Samples ----------------------------------------------------------------------------------


@linear_int4.samples
def _(rng: np.random.Generator) -> Iterator[Sample]:
    x, b = rng.normal(size=(2, 3, 7)), rng.normal(size=5)
    w = some_bytes(rng, np.uint8, 5, 4)
    yield sample(x, w, rng.uniform(0.01, 0.02, (5, 1)), b, group_size=7)
    yield sample(x[0], w, rng.uniform(0.01, 0.02, (5, 2)), None, group_size=4)
    yield sample(x[0, 0], w, rng.uniform(0.01, 0.02, (5, 3)), b, group_size=3)
    yield sample(x[..., :6], w[:, :3], rng.uniform(0.01, 0.02, (5, 3)), b, group_size=2)


@linear_weight_only.samples
def _(rng: np.random.Generator) -> Iterator[Sample]:
    x, w, b = rng.normal(size=(2, 3, 4)), rng.normal(size=(5, 4)), rng.normal(size=5)
    scale = rng.uniform(0.01, 0.02, 5)
    yield sample(x, w, None, b)
    yield sample(x[0], some_bytes(rng, np.int8, 5, 4), scale, b)
    yield sample(x[0, 0], some_bytes(rng, np.int8, 5, 4), scale, None)
    yield sample(x, w, scale, None)
