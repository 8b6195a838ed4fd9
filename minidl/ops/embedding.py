"""Embedding: rows of a table, looked up by number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from minidl import backend
from minidl.op import Sample, op, sample


@op
def embedding(weight: Any, indices: Any) -> Any:
    """weight[indices]: (V,D), any shape -> (*shape, D).

    Raises:
        TypeError: indices are not integers.
        IndexError: an index is outside [0, V): which, and where.
    """
    check_indices(indices, weight.shape[0])
    return weight[indices]


@embedding.gradient
def _(g, weight_shape, indices):
    return embedding_weight(g, indices, rows=weight_shape[0]), None


@op
def embedding_weight(y: Any, indices: Any, *, rows: int) -> Any:
    """Add each y to its row of zeros: (*shape, D), shape -> (rows, D)."""
    xp, d = backend.array_module(y), y.shape[-1]
    table = xp.zeros(rows * d, dtype=y.dtype)
    xp.add.at(table, (indices[..., None] * d + xp.arange(d)).reshape(-1), y.reshape(-1))
    return table.reshape(rows, d)


@embedding_weight.gradient
def _(g, indices, *, rows):
    return embedding(g, indices), None


def in_order(y: Any, indices: Any, *, rows: int) -> Any:
    """Sort, then sum each row's run: on a GPU, where `add.at` adds in any order, always the same
    bits."""
    indices, y = indices.reshape(-1), y.reshape(indices.size, y.shape[-1])
    xp = backend.array_module(y)
    table = xp.zeros((rows, y.shape[1]), dtype=y.dtype)
    if indices.size:
        order = np.argsort(indices, kind="stable")
        ordered = indices[order]
        starts = np.flatnonzero(np.diff(ordered, prepend=-1))
        table[ordered[starts]] = xp.add.reduceat(y[order], starts, axis=0)
    return table


embedding_weight.kernel("sorted", default=False)(in_order)
embedding_weight.kernel("sorted", device="cuda")(in_order)


def check_indices(indices: Any, rows: int) -> None:
    if indices.dtype.kind not in "iu":
        raise TypeError(f"embedding takes integer indices, got {indices.dtype}")
    wrong = (indices < 0) | (indices >= rows)
    if wrong.any():
        at = tuple(int(i[0]) for i in wrong.nonzero())
        raise IndexError(
            f"index {int(indices[at])} at {list(at)} is outside [0, {rows}): the table has "
            f"{rows} rows"
        )


@embedding.samples
def _(rng: np.random.Generator) -> Iterator[Sample]:
    table = rng.normal(size=(5, 3))
    yield sample(table, np.array([[1, 4, 1], [0, 1, 2]]))
    yield sample(table, np.array([2, 0, 2, 1]))
    yield sample(table, np.array(3))
    yield sample(table, np.zeros((0, 2), dtype=np.int64))


@embedding_weight.samples
def _(rng: np.random.Generator) -> Iterator[Sample]:
    yield sample(rng.normal(size=(2, 3, 4)), np.array([[1, 4, 1], [0, 1, 2]]), rows=5)
    yield sample(rng.normal(size=(4, 2)), np.array([2, 0, 2, 1]), rows=3)
    yield sample(rng.normal(size=(0, 2)), np.zeros(0, dtype=np.int64), rows=3)
