"""Sequences of unequal length in one batch: padded, or packed without the padding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

import minidl
from minidl import backend
from minidl.ops.shape import index_put
from minidl.tensor import Tensor


class PackedSequence(NamedTuple):
    """Sequences without padding: at each time, the steps of all that are still running.

    Attributes:
        data: (sum of lengths, ...): first all first steps, then all second steps, ...
        batch_sizes: how many sequences are still running at each time, (T,), on the CPU.
        sorted_indices: in which order the sequences were put, longest first; None: as they came.
        unsorted_indices: undoes that.
    """

    data: Tensor
    batch_sizes: Tensor
    sorted_indices: Tensor | None = None
    unsorted_indices: Tensor | None = None


def numbers(x: Any) -> np.ndarray:
    """A tensor, an array or a list as a NumPy array."""
    return np.asarray(backend.to_device(x.array, "cpu") if isinstance(x, Tensor) else x)


def on_device_of(x: Tensor, index: np.ndarray) -> Any:
    return backend.to_device(index, x.device)


def pack_padded_sequence(
    input: Tensor, lengths: Any, batch_first: bool = False, enforce_sorted: bool = True
) -> PackedSequence:
    """Leave out the padding of (T, N, ...), or of (N, T, ...) with `batch_first`.

    Args:
        input: padded sequences.
        lengths: of each sequence, (N,).
        enforce_sorted: refuse sequences that do not come longest first; False: sort them.

    Raises:
        ValueError: not one length per sequence; a length below 1 or above T; not sorted.
    """
    x = input.transpose(0, 1) if batch_first else input
    lengths = numbers(lengths).astype(np.int64)
    if lengths.shape != (x.shape[1],):
        raise ValueError(f"{x.shape[1]} sequences need as many lengths, got shape {lengths.shape}")
    if lengths.size and (lengths.min() < 1 or lengths.max() > x.shape[0]):
        raise ValueError(
            f"lengths must be in [1, {x.shape[0]}], got [{lengths.min()}, {lengths.max()}]"
        )
    order = np.arange(len(lengths))
    if enforce_sorted:
        if (np.diff(lengths) > 0).any():
            raise ValueError(
                "the sequences must come longest first: sort them, or pass enforce_sorted=False"
            )
    else:
        order = np.argsort(-lengths, kind="stable")
        lengths = lengths[order]
    running = np.arange(lengths.max(initial=0))[:, None] < lengths  # (T, N)
    x = x if enforce_sorted else x[:, on_device_of(x, order)]
    data = x[on_device_of(x, running)]
    sizes = Tensor(running.sum(axis=1))
    if enforce_sorted:
        return PackedSequence(data, sizes)
    back = np.argsort(order)
    return PackedSequence(
        data, sizes, Tensor(on_device_of(x, order)), Tensor(on_device_of(x, back))
    )


def pad_packed_sequence(
    sequence: PackedSequence,
    batch_first: bool = False,
    padding_value: float = 0.0,
    total_length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Undo `pack_padded_sequence`.

    Args:
        sequence: what was packed.
        batch_first: return (N, T, ...) instead of (T, N, ...).
        padding_value: what follows the ends.
        total_length: T; by default the longest sequence's.

    Returns:
        The padded sequences, and their lengths.

    Raises:
        ValueError: `total_length` is too short.
    """
    sizes = numbers(sequence.batch_sizes)
    longest, total = len(sizes), len(sizes) if total_length is None else total_length
    if total < longest:
        raise ValueError(f"total_length {total} is less than the longest sequence, {longest}")
    running = np.zeros((total, int(sizes.max(initial=0))), bool)
    running[:longest] = np.arange(running.shape[1]) < sizes[:, None]
    lengths, data = running.sum(axis=0), sequence.data
    x = index_put(data, index=running, shape=(*running.shape, *data.shape[1:]))
    if padding_value != 0:
        mask = running.reshape(*running.shape, *[1] * (data.ndim - 1))
        x = minidl.where(Tensor(on_device_of(data, mask)), x, padding_value)
    if sequence.unsorted_indices is not None:
        order = numbers(sequence.unsorted_indices)
        x, lengths = x[:, on_device_of(x, order)], lengths[order]
    return x.transpose(0, 1) if batch_first else x, Tensor(lengths)


def repack(x: Tensor, like: PackedSequence) -> PackedSequence:
    """Sequences (T, N, ...), padded and sorted, packed as others were."""
    running = np.arange(x.shape[1]) < numbers(like.batch_sizes)[:, None]
    return like._replace(data=x[on_device_of(x, running)])


def pad_sequence(
    sequences: Iterable[Tensor], batch_first: bool = False, padding_value: float = 0.0
) -> Tensor:
    """Sequences (Tᵢ, ...) as one tensor (T, N, ...), or (N, T, ...), padded to the longest.

    Raises:
        ValueError: there are none.
    """
    sequences = list(sequences)
    if not sequences:
        raise ValueError("pad_sequence needs at least one sequence")
    longest = max(len(s) for s in sequences)
    padded = []
    for s in sequences:
        missing = (longest - len(s), *s.shape[1:])
        filler = backend.array_module(s.array).full(missing, padding_value, s.dtype)
        padded.append(minidl.cat([s, Tensor(filler)], dim=0) if missing[0] else s)
    return minidl.stack(padded, dim=0 if batch_first else 1)


def pack_sequence(sequences: Sequence[Tensor], enforce_sorted: bool = True) -> PackedSequence:
    """Sequences (Tᵢ, ...), packed."""
    lengths = [len(s) for s in sequences]
    return pack_padded_sequence(pad_sequence(sequences), lengths, enforce_sorted=enforce_sorted)
