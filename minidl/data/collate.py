"""From a list of samples to a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from minidl.tensor import Tensor


def default_collate(samples: list[Any]) -> Any:
    """Stack samples into a batch, whatever they are made of.

    ====================================  =================================================
    a sample is                           the batch is
    ====================================  =================================================
    a Tensor or array (...)               a Tensor (N, ...) of the same dtype
    a bool, int, float                    a Tensor (N,), bool, int64, float32
    a str, bytes                          a list
    a dict                                a dict of batches
    a tuple or list                       a list of batches (a named tuple stays one)
    ====================================  =================================================

    (PyTorch makes float64 of Python floats; minidl never makes float64 of what is not.)

    Raises:
        ValueError: shapes or lengths differ between the samples.
        TypeError: a sample is something else.
    """
    first = samples[0]
    if isinstance(first, Tensor):
        arrays = [s.array for s in samples]
        return Tensor(_stack(arrays))
    if isinstance(first, np.ndarray | np.generic):
        return Tensor(_stack([np.asarray(s) for s in samples]))
    if isinstance(first, bool):
        return Tensor(np.array(samples, dtype=np.bool_))
    if isinstance(first, int | float):
        floating = any(isinstance(s, float) for s in samples)
        return Tensor(np.array(samples, dtype=np.float32 if floating else np.int64))
    if isinstance(first, str | bytes):
        return samples
    if isinstance(first, Mapping):
        return {key: default_collate([s[key] for s in samples]) for key in first}
    if isinstance(first, tuple | list):
        if any(len(s) != len(first) for s in samples):
            raise ValueError(
                f"samples of different lengths in a batch: {sorted({len(s) for s in samples})}; "
                "give the DataLoader a collate_fn that pads them"
            )
        fields = [default_collate(list(field)) for field in zip(*samples)]
        return type(first)(*fields) if hasattr(first, "_fields") else fields
    raise TypeError(
        f"default_collate takes tensors, arrays, numbers, strings, dicts, tuples and lists, got "
        f"{type(first).__name__}; give the DataLoader a collate_fn"
    )


def _stack(arrays: list[Any]) -> Any:
    shapes = {a.shape for a in arrays}
    if len(shapes) > 1:
        raise ValueError(
            f"samples of different shapes in a batch: {sorted(shapes)}; resize them in a "
            "transform, or give the DataLoader a collate_fn"
        )
    return np.stack(arrays)


def default_convert(batch: Any) -> Any:
    """Arrays, also inside dicts, tuples and lists, become Tensors; the rest stays."""
    if isinstance(batch, Tensor):
        return batch
    if hasattr(batch, "dtype"):
        return Tensor(batch)
    if isinstance(batch, Mapping):
        return {key: default_convert(value) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return [default_convert(value) for value in batch]
    return batch


def map_tensors(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """A batch with every tensor in it changed, in the same nesting."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(function, value) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        fields = [map_tensors(function, value) for value in batch]
        return type(batch)(*fields) if hasattr(batch, "_fields") else type(batch)(fields)
    return batch
