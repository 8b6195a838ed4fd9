"""Gradient clipping, and all parameters as one vector."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

import minidl
from minidl.autograd import written
from minidl.nn.utils import rnn
from minidl.tensor import Tensor

__all__ = [
    "clip_grad_norm_", "clip_grad_value_", "parameters_to_vector", "rnn", "vector_to_parameters",
]  # fmt: skip


def gradients(parameters: Tensor | Iterable[Tensor]) -> list[Any]:
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    return [p.grad.array for p in parameters if p.grad is not None]


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Scale all gradients by one factor, so that their norm together is at most `max_norm`.

    Pascanu et al. 2013, algorithm 1. Nothing waits for a GPU.

    Args:
        parameters: whose `.grad` is scaled, in place.
        max_norm: the largest norm left.
        norm_type: p of the p-norm; math.inf: the largest entry.
        error_if_nonfinite: refuse (before anything is scaled) if the norm is infinite or NaN.

    Returns:
        The norm before clipping, 0-d.

    Raises:
        RuntimeError: the norm is not finite, and `error_if_nonfinite`.
    """
    arrays = gradients(parameters)
    if not arrays:
        return Tensor(np.zeros((), np.float32))
    if norm_type == 2:
        total = sum_(np.vdot(g, g) if g.dtype != np.float16 else (g.astype("f") ** 2).sum()
                     for g in arrays) ** 0.5  # fmt: skip
    elif norm_type == math.inf:
        total = max_(abs(g).max() for g in arrays)
    else:
        total = sum_((abs(g) ** norm_type).sum() for g in arrays) ** (1 / norm_type)
    if error_if_nonfinite and not np.isfinite(total):
        raise RuntimeError(f"the gradients' norm is {total}: not finite, nothing was clipped")
    factor = np.minimum(max_norm / (total + 1e-6), 1.0)
    for g in arrays:
        np.multiply(g, factor.astype(g.dtype), out=g)
        written(g)
    return Tensor(total)


def sum_(values: Iterable[Any]) -> Any:
    first, *rest = values
    for value in rest:
        first = first + value
    return first


def max_(values: Iterable[Any]) -> Any:
    first, *rest = values
    for value in rest:
        first = np.maximum(first, value)
    return first


def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip_value: float) -> None:
    """Clip every number of every gradient to [-clip_value, clip_value], in place."""
    for g in gradients(parameters):
        np.clip(g, -clip_value, clip_value, out=g)
        written(g)


def parameters_to_vector(parameters: Iterable[Tensor]) -> Tensor:
    """All parameters one after the other: (total,)."""
    return minidl.cat([p.reshape(-1) for p in parameters])


def vector_to_parameters(vec: Tensor, parameters: Iterable[Tensor]) -> None:
    """Copy a vector's numbers into parameters: undoes `parameters_to_vector`.

    Raises:
        ValueError: the vector is too long or too short; nothing is changed.
    """
    parameters = list(parameters)
    total = sum(p.numel() for p in parameters)
    if vec.shape != (total,):
        raise ValueError(f"the parameters hold {total} numbers, the vector's shape is {vec.shape}")
    start = 0
    for p in parameters:
        p.array[...] = vec.array[start : start + p.numel()].reshape(p.shape)
        written(p.array)
        start += p.numel()
