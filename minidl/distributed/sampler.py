"""Samplers that give each rank its part of the samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import minidl.distributed as dist
from minidl.data.sampler import RandomSampler, Sampler, SequentialSampler


def replica(num_replicas: int | None, rank: int | None) -> tuple[int, int]:
    """How many ranks, and which this is; by default those of `dist.communicator()`.

    Raises:
        ValueError: there is no such rank.
    """
    num_replicas = dist.world_size() if num_replicas is None else num_replicas
    rank = dist.rank() if rank is None else rank
    if not 0 <= rank < num_replicas:
        raise ValueError(f"rank is from 0 to num_replicas - 1 = {num_replicas - 1}, got {rank}")
    return num_replicas, rank


class DistributedSampler(Sampler):
    """Every rank's share of a dataset: samples rank, rank + R, rank + 2R, ... of one order.

    A `DataLoader` of batch_size B / R on each of R ranks then delivers, together, the batches of
    one process with batch_size B. Only at the end the ranks get equally many: some samples come
    twice, or with `drop_last` not at all. (`DistributedBatchSampler` does without.)

    Args:
        dataset: what to draw from.
        num_replicas, rank: how many ranks, and which this is (default: `dist.communicator()`'s).
        shuffle: another random order each epoch.
        seed: of the order; the same on all ranks.
        drop_last: leave samples out rather than repeat some.
    """

    def __init__(
        self,
        dataset: Any,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        self.dataset, self.shuffle, self.seed, self.drop_last = dataset, shuffle, seed, drop_last
        self.num_replicas, self.rank = replica(num_replicas, rank)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next. (A `DataLoader` does it by itself.)"""
        self.epoch = epoch

    def __len__(self) -> int:
        n, ranks = len(self.dataset), self.num_replicas
        return n // ranks if self.drop_last else -(-n // ranks)

    def __iter__(self) -> Iterator[int]:
        order: Any = SequentialSampler(self.dataset)
        if self.shuffle:
            order = RandomSampler(self.dataset, seed=self.seed)
            order.set_epoch(self.epoch)
        indices = list(order)
        total = len(self) * self.num_replicas
        while len(indices) < total:
            indices += indices[: total - len(indices)]
        return iter(indices[self.rank : total : self.num_replicas])


class DistributedBatchSampler:
    """Every rank's share of each batch: its samples rank, rank + R, rank + 2R, ...

    Together the ranks deliver exactly the batches of one process, the last and shorter one too.
    Shares may differ by one sample, and be empty: `DataParallel` weighs them.

    Args:
        batch_sampler: gives the whole batches, the same on all ranks (`minidl.data.BatchSampler`).
        num_replicas, rank: how many ranks, and which this is (default: `dist.communicator()`'s).
    """

    def __init__(
        self, batch_sampler: Any, num_replicas: int | None = None, rank: int | None = None
    ) -> None:
        self.batch_sampler = batch_sampler
        self.sampler = getattr(batch_sampler, "sampler", None)  # a DataLoader tells it the epoch
        self.num_replicas, self.rank = replica(num_replicas, rank)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batch_sampler:
            yield list(batch)[self.rank :: self.num_replicas]
