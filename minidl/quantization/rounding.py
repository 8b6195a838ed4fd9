"""Weights as integers: symmetric, a scale for each row or for all (Krishnamoorthi 2018, 2.2)."""

from __future__ import annotations

import numpy as np

from minidl.tensor import Tensor


def finite(weight: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """A weight in float32, and the largest |w| of each row.

    Raises:
        ValueError: a row is not finite.
    """
    w = weight.cpu().numpy().astype(np.float32)
    largest = np.abs(w).max(axis=tuple(range(1, w.ndim)), initial=0)
    if not np.isfinite(largest).all():
        raise ValueError(f"row {int(np.argmin(np.isfinite(largest)))} of weight is not finite")
    return w, largest


def steps(largest: np.ndarray, most: int) -> np.ndarray:
    """s = max |w| / most, float32; 1 where there are zeros only."""
    s = np.where(largest > 0, largest / np.float32(most), np.float32(1)).astype(np.float32)
    return np.maximum(s, np.finfo(np.float32).tiny)  # of a row of subnormal numbers


def int8_rows(weight: Tensor, bits: int = 8, per_channel: bool = True) -> tuple[Tensor, Tensor]:
    """q = round(w / s), from -(2^(bits-1) - 1) on: (weight int8, scale float32 (rows,)).

    Args:
        weight: (rows, ...), floats.
        bits: 2 to 8.
        per_channel: each row has its own s, else all have the largest.

    Raises:
        ValueError: a row is not finite.
    """
    w, largest = finite(weight)
    if not per_channel:
        largest = np.full_like(largest, largest.max(initial=0))
    most = 2 ** (bits - 1) - 1
    s = steps(largest, most)
    q = np.clip(np.rint(w / s.reshape(-1, *[1] * (w.ndim - 1))), -most, most).astype(np.int8)
    return Tensor(q).to(weight.device), Tensor(s).to(weight.device)
