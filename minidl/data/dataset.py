"""Datasets: things with samples. Names and meanings are PyTorch's."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from minidl.backend import random as rng
from minidl.data.randomness import SHUFFLE, choose_seed, stream
from minidl.tensor import Tensor


class Dataset:
    """A map-style dataset: `dataset[i]` is a sample, `len(dataset)` says how many there are."""

    def __getitem__(self, index: int) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no __getitem__")

    def get_batch(self, indices: Sequence[int]) -> Any | None:
        """Optional short cut: the collated samples at once, or None: go sample by sample.

        It must give what `default_collate([self[i] for i in indices])` gives, with arrays for
        Tensors if it likes. `DataLoader` uses it in place of a Python loop over the batch.
        """
        return None

    def __add__(self, other: Dataset) -> ConcatDataset:
        return ConcatDataset([self, other])


class IterableDataset(Dataset):
    """A dataset that is a stream: it has `__iter__`, and no order to shuffle.

    With worker processes every worker iterates over a copy of its own; use `get_worker_info` to
    give each a part of the stream.
    """

    def __iter__(self) -> Iterator[Any]:
        raise NotImplementedError(f"{type(self).__name__} has no __iter__")


def batch_getter(dataset: Any) -> Callable[[Sequence[int]], Any | None] | None:
    """A dataset's `get_batch`, if it speaks for its `__getitem__`.

    A subclass that overrides `__getitem__` alone must not be bypassed by the `get_batch` that it
    inherits.
    """
    for cls in type(dataset).__mro__:
        if "get_batch" in vars(cls):
            getter: Callable[[Sequence[int]], Any | None] = dataset.get_batch
            return getter
        if "__getitem__" in vars(cls):
            return None
    return None


class TensorDataset(Dataset):
    """Samples are rows of tensors (or arrays) of equal length: `dataset[i] = (x[i], y[i])`.

    Raises:
        ValueError: the lengths differ.
    """

    def __init__(self, *tensors: Any) -> None:
        if not tensors:
            raise ValueError("TensorDataset needs at least one tensor")
        if any(len(t) != len(tensors[0]) for t in tensors):
            raise ValueError(f"tensors of different lengths: {[len(t) for t in tensors]}")
        self.tensors = tensors

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return tuple(t[index] for t in self.tensors)

    def get_batch(self, indices: Sequence[int]) -> list[Any] | None:
        if any(isinstance(t, Tensor) and t.requires_grad for t in self.tensors):
            return None  # the tape must see the indexing
        return [(t.array if isinstance(t, Tensor) else t)[indices] for t in self.tensors]

    def __len__(self) -> int:
        return len(self.tensors[0])


class Subset(Dataset):
    """Some of the samples of a dataset, by their indices."""

    def __init__(self, dataset: Any, indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, indices

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.indices[index]]

    def get_batch(self, indices: Sequence[int]) -> Any | None:
        getter = batch_getter(self.dataset)
        return getter([self.indices[i] for i in indices]) if getter else None

    def __len__(self) -> int:
        return len(self.indices)


class ConcatDataset(Dataset):
    """Datasets one after the other."""

    def __init__(self, datasets: Iterable[Any]) -> None:
        self.datasets = list(datasets)
        if not self.datasets:
            raise ValueError("ConcatDataset needs at least one dataset")
        self.cumulative_sizes = list(itertools.accumulate(len(d) for d in self.datasets))

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of a dataset of {len(self)} samples")
        index %= len(self)
        which = bisect.bisect_right(self.cumulative_sizes, index)
        return self.datasets[which][index - (self.cumulative_sizes[which - 1] if which else 0)]

    def __len__(self) -> int:
        return self.cumulative_sizes[-1]


def random_split(
    dataset: Any,
    lengths: Sequence[int | float],
    generator: rng.Generator | None = None,
    seed: int | None = None,
) -> list[Subset]:
    """Split a dataset at random into subsets that do not overlap.

    Args:
        dataset: a map-style dataset.
        lengths: their sizes, or fractions that sum to 1 (rounded down; what is left over goes to
            the first ones, one each).
        generator, seed: what to shuffle by; by default minidl's global generator.

    Raises:
        ValueError: the lengths do not sum to the dataset's.
    """
    n = len(dataset)
    if math.isclose(sum(lengths), 1):
        sizes = [math.floor(n * fraction) for fraction in lengths]
        for i in range(n - sum(sizes)):
            sizes[i % len(sizes)] += 1
    else:
        sizes = [int(length) for length in lengths]
    if sum(sizes) != n or min(sizes) < 0:
        raise ValueError(f"lengths {list(lengths)} must sum to {n} (or, as fractions, to 1)")
    seed = choose_seed(seed, generator or (rng.default_generator if seed is None else None))
    assert seed is not None
    order = stream(seed, 0, SHUFFLE).permutation(n).tolist()
    ends = itertools.accumulate(sizes)
    return [Subset(dataset, order[end - size : end]) for size, end in zip(sizes, ends)]
