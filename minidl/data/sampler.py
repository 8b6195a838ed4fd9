"""Samplers: in which order the samples come, and how they are cut into batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sized

import numpy as np

from minidl.backend import random as rng
from minidl.data.randomness import SHUFFLE, choose_seed, stream


class Sampler:
    """Iterating over it gives indices. One with a `set_epoch(epoch)` is told the epoch first."""

    def __iter__(self) -> Iterator[int]:
        raise NotImplementedError(f"{type(self).__name__} has no __iter__")


class SequentialSampler(Sampler):
    """0, 1, 2, ..."""

    def __init__(self, data_source: Sized) -> None:
        self.data_source = data_source

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.data_source)))

    def __len__(self) -> int:
        return len(self.data_source)


class RandomSampler(Sampler):
    """A random order, another one each epoch, that depends on (seed, epoch) only.

    Args:
        data_source: what to draw from.
        replacement: draw independently, so that samples may come twice.
        num_samples: how many to draw; by default as many as there are.
        generator, seed: what the order depends on; by default minidl's global seed, read when an
            epoch starts.
    """

    def __init__(
        self,
        data_source: Sized,
        replacement: bool = False,
        num_samples: int | None = None,
        generator: rng.Generator | None = None,
        seed: int | None = None,
    ) -> None:
        self.data_source, self.replacement = data_source, replacement
        self._num_samples = num_samples
        self.seed, self.epoch = choose_seed(seed, generator), 0
        if num_samples is not None and num_samples < 0:
            raise ValueError(f"num_samples is at least 0, got {num_samples}")

    @property
    def num_samples(self) -> int:
        return len(self.data_source) if self._num_samples is None else self._num_samples

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        seed = rng.default_generator.seed if self.seed is None else self.seed
        generator = stream(seed, self.epoch, SHUFFLE)
        self.epoch += 1
        return self._draw(generator)

    def _draw(self, generator: np.random.Generator) -> Iterator[int]:
        n, left = len(self.data_source), self.num_samples
        if n == 0 and left:
            raise ValueError(f"cannot draw {left} samples from an empty dataset")
        while left:
            some = generator.integers(n, size=n) if self.replacement else generator.permutation(n)
            yield from some[:left].tolist()
            left -= min(left, n)

    def __len__(self) -> int:
        return self.num_samples


class BatchSampler:
    """Cuts a sampler's indices into lists of `batch_size`; the last may be shorter."""

    def __init__(self, sampler: Iterable[int], batch_size: int, drop_last: bool = False) -> None:
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise ValueError(f"batch_size is an int of at least 1, got {batch_size!r}")
        self.sampler, self.batch_size, self.drop_last = sampler, batch_size, drop_last

    def __iter__(self) -> Iterator[list[int]]:
        indices = iter(self.sampler)
        while batch := list(itertools.islice(indices, self.batch_size)):
            if len(batch) == self.batch_size or not self.drop_last:
                yield batch

    def __len__(self) -> int:
        n = len(self.sampler)  # type: ignore[arg-type]
        return n // self.batch_size if self.drop_last else -(-n // self.batch_size)
