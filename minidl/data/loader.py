"""DataLoader: batches of a dataset, epoch after epoch. Names and meanings are PyTorch's."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from minidl import backend, cuda
from minidl.backend import random as rng
from minidl.data.collate import default_collate, map_tensors
from minidl.data.dataset import IterableDataset
from minidl.data.fetch import Collate, fetch, fetch_stream
from minidl.data.randomness import choose_seed
from minidl.data.sampler import BatchSampler, RandomSampler, SequentialSampler
from minidl.data.workers import Work, WorkerPool
from minidl.tensor import Tensor


class DataLoader:
    """Iterating over it gives the batches of one epoch.

    Which batches come depends on (seed, epoch) only: not on the number of workers, nor on other
    random numbers drawn meanwhile. Random augmentation too, as long as it draws from
    `sample_rng()`. So a run can be resumed anywhere::

        state = loader.state_dict()      # also in the middle of an epoch
        ...
        loader.load_state_dict(state)    # in another process
        for batch in loader: ...         # the batches that were still to come

    Args:
        dataset: a map-style dataset (anything with `__getitem__` and `__len__`) or an
            `IterableDataset`.
        batch_size: samples a batch.
        shuffle: another random order each epoch.
        sampler: an iterable of indices, in place of `shuffle`. If it has `set_epoch`, it is told
            the epoch. (To be resumed, it must give the same order for the same epoch.)
        batch_sampler: an iterable of lists of indices, in place of `batch_size`, `shuffle`,
            `sampler` and `drop_last`.
        num_workers: processes that load ahead; 0 loads in this one.
        collate_fn: makes a batch of a list of samples.
        pin_memory: put batches where a GPU can fetch them by itself, for
            ``batch.to("cuda", non_blocking=True)``; without effect where there is no GPU.
        drop_last: leave out a last batch that is not full.
        timeout: seconds to wait for a worker's batch; 0: as long as it takes.
        worker_init_fn: called in each worker with its number, before it loads.
        multiprocessing_context: the start method of the workers ("fork", "spawn", "forkserver")
            or a `multiprocessing` context; by default the platform's. With spawn and forkserver,
            dataset and collate_fn must be picklable, and the script guarded by
            ``if __name__ == "__main__":``.
        generator, seed: what order and augmentation depend on; by default minidl's global seed
            (`minidl.manual_seed`), read when an epoch starts.
        prefetch_factor: batches that each worker (or the thread) loads ahead.
        persistent_workers: keep the workers for the next epoch.
        prefetch_thread: with num_workers=0, load ahead in a thread of this process.
        device: "cuda": batches come on the GPU, each copied there while the one before is in use.

    Raises:
        ValueError: arguments that exclude each other, or are out of range.
        RuntimeError: while iterating: a worker died. (What a dataset raises in a worker comes out
            as it is, caused by the worker's traceback.)
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 1,
        shuffle: bool = False,
        sampler: Iterable[int] | None = None,
        batch_sampler: Iterable[Sequence[int]] | None = None,
        num_workers: int = 0,
        collate_fn: Collate | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: Any = None,
        generator: rng.Generator | None = None,
        *,
        seed: int | None = None,
        prefetch_factor: int | None = 2,
        persistent_workers: bool = False,
        prefetch_thread: bool = False,
        device: str = "cpu",
    ) -> None:
        prefetch_factor = 2 if prefetch_factor is None else prefetch_factor
        if num_workers < 0 or prefetch_factor < 1 or timeout < 0:
            raise ValueError(
                "num_workers and timeout are at least 0 and prefetch_factor at least 1, got "
                f"{num_workers}, {timeout} and {prefetch_factor}"
            )
        if batch_sampler is not None and (
            batch_size != 1 or shuffle or sampler is not None or drop_last
        ):
            raise ValueError("batch_sampler excludes batch_size, shuffle, sampler and drop_last")
        if sampler is not None and shuffle:
            raise ValueError("sampler excludes shuffle")
        if persistent_workers and num_workers == 0:
            raise ValueError("persistent_workers needs num_workers > 0")

        self.dataset, self.batch_size, self.drop_last = dataset, batch_size, drop_last
        self.num_workers, self.prefetch_factor, self.timeout = num_workers, prefetch_factor, timeout
        self.collate_fn = collate_fn or default_collate
        self.worker_init_fn, self.multiprocessing_context = worker_init_fn, multiprocessing_context
        self.persistent_workers, self.prefetch_thread = persistent_workers, prefetch_thread
        self.pin_memory, self.generator = pin_memory, generator
        self.device = device
        if backend.parse_device(device)[0] == "cuda":
            backend.gpu(backend.parse_device(device)[1])  # a missing GPU is an error here and now

        self.is_stream = isinstance(dataset, IterableDataset)
        self.sampler: Any = None
        self.batch_sampler: Any = None
        if self.is_stream:
            if shuffle or sampler is not None or batch_sampler is not None:
                raise ValueError("an IterableDataset has its own order: no sampler, no shuffle")
            BatchSampler((), batch_size)  # checks batch_size
        elif batch_sampler is not None:
            self.batch_sampler = batch_sampler
            self.sampler = getattr(batch_sampler, "sampler", None)
        else:
            if sampler is None:
                sampler = RandomSampler(dataset) if shuffle else SequentialSampler(dataset)
            self.sampler, self.batch_sampler = sampler, BatchSampler(sampler, batch_size, drop_last)

        self._shuffle = shuffle
        self._seed = choose_seed(seed, generator)
        self._epoch, self._batch = 0, 0  # `_batch` batches of epoch `_epoch` were delivered
        self._at_start = True  # the next iter() starts there, rather than with the next epoch
        self._pool: WorkerPool | None = None

    def __len__(self) -> int:
        """Batches an epoch.

        Raises:
            TypeError: the dataset is a stream of unknown length.
        """
        if not self.is_stream:
            return len(self.batch_sampler)
        n = len(self.dataset)
        return n // self.batch_size if self.drop_last else -(-n // self.batch_size)

    # Where it stands ----------------------------------------------------------------------------

    @property
    def seed(self) -> int:
        """What order and augmentation depend on, beside the epoch."""
        return rng.default_generator.seed if self._seed is None else self._seed

    def state_dict(self) -> dict[str, int]:
        """{"seed", "epoch", "batch"}: `batch` batches of epoch `epoch` were delivered."""
        return {"seed": self.seed, "epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next iteration delivers what was still to come when `state` was taken.

        (From a state that was taken within the last batch of an epoch: nothing, and the one
        after it starts the next epoch.)
        """
        self._seed = int(state["seed"])
        self._epoch, self._batch = int(state["epoch"]), int(state["batch"])
        self._at_start = True

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration delivers, from its first batch."""
        self._epoch, self._batch, self._at_start = epoch, 0, True

    # Batches ------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Any]:
        if not self._at_start:  # the last one was left in the middle
            self._epoch, self._batch = self._epoch + 1, 0
        self._at_start = False
        return self._deliver(self._epoch, self._batch, self.seed)

    def _deliver(self, epoch: int, start: int, seed: int) -> Iterator[Any]:
        """The batches of an epoch from number `start` on, counted as they are delivered."""
        load = self._load_here if self.num_workers == 0 else self._load_in_workers
        batches = load(epoch, start, seed)
        if self.num_workers == 0 and self.prefetch_thread:
            batches = in_background(batches, self.prefetch_factor)
        if backend.parse_device(self.device)[0] == "cuda":
            batches = copied_ahead(batches, self.device)
        elif self.pin_memory and cuda.is_available():
            batches = (map_tensors(Tensor.pin_memory, batch) for batch in batches)
        for count, batch in enumerate(batches, start + 1):
            if self._epoch == epoch:
                self._batch = count
            yield batch
        if self._epoch == epoch:
            self.set_epoch(epoch + 1)

    def _load_here(self, epoch: int, start: int, seed: int) -> Iterator[Any]:
        if self.is_stream:
            numbers = itertools.count()
            stream = fetch_stream(
                self.dataset, self.collate_fn, self.batch_size, self.drop_last, seed, epoch, numbers
            )
            yield from itertools.islice(stream, start, None)
        else:
            for indices in self._indices(epoch, start, seed):
                yield fetch(self.dataset, indices, self.collate_fn, seed, epoch)

    def _load_in_workers(self, epoch: int, start: int, seed: int) -> Iterator[Any]:
        pool = self._pool
        if pool is None or pool.closed:
            batching = (self.batch_size, self.drop_last) if self.is_stream else None
            job = Work(
                self.dataset, self.collate_fn, batching, self.worker_init_fn, self.num_workers
            )
            pool = WorkerPool(job, self.multiprocessing_context, self.timeout)
        if self.persistent_workers:
            self._pool = pool
        try:
            if self.is_stream:
                batches = pool.run(itertools.repeat(()), seed, epoch, self.prefetch_factor)
                yield from itertools.islice(batches, start, None)
            else:
                tasks = self._indices(epoch, start, seed)
                yield from pool.run(tasks, seed, epoch, self.prefetch_factor)
        finally:
            if not self.persistent_workers:
                pool.close()

    def _indices(self, epoch: int, start: int, seed: int) -> Iterator[Sequence[int]]:
        """The indices of each batch of an epoch from batch `start` on."""
        if self._shuffle:
            self.sampler.seed = seed
        for sampler in (self.sampler, self.batch_sampler):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
        return itertools.islice(iter(self.batch_sampler), start, None)


def copied_ahead(batches: Iterator[Any], device: str) -> Iterator[Any]:
    """The same batches on a GPU; each is copied while the one before is in use.

    A GPU works through *streams*: what is in one stream happens in order, two streams run side by
    side. Copies have one of their own, and an *event* tells the stream that computes when a batch
    is there. In the other direction, a copy may land in memory that an earlier batch has given
    back: so it waits for all that was asked of the computing stream up to then.
    """
    cp = backend.cupy()
    with backend.device(device):
        stream = cp.cuda.Stream(non_blocking=True)

    def copy(batch: Any) -> tuple[Any, Any, Any]:
        host = map_tensors(Tensor.pin_memory, batch)  # kept until the copy is done
        with backend.device(device):
            stream.wait_event(cp.cuda.get_current_stream().record())
            with stream:
                there = map_tensors(lambda x: x.to(device, non_blocking=True), host)
            return there, stream.record(), host

    def wait_for(copied: tuple[Any, Any, Any]) -> Any:
        with backend.device(device):
            cp.cuda.get_current_stream().wait_event(copied[1])
        return copied[0]

    ahead: tuple[Any, Any, Any] | None = None
    for batch in batches:
        following = copy(batch)
        if ahead is not None:
            yield wait_for(ahead)
            ahead[1].synchronize()  # done long ago; now its pinned memory may go
        ahead = following
    if ahead is not None:
        yield wait_for(ahead)
        ahead[1].synchronize()


def in_background(batches: Iterator[Any], ahead: int) -> Iterator[Any]:
    """The same batches, loaded up to `ahead` in advance by a thread."""
    loaded: queue.Queue[tuple[str, Any]] = queue.Queue(ahead)
    stopped = threading.Event()

    def load() -> None:
        last: tuple[str, Any] = ("end", None)
        try:
            for batch in batches:
                loaded.put(("batch", batch))
                if stopped.is_set():
                    return
        except BaseException as error:
            last = ("error", error)
        loaded.put(last)

    thread = threading.Thread(target=load, name="DataLoader prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = loaded.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        stopped.set()
        while thread.is_alive():  # it may wait for room in the queue
            try:
                loaded.get_nowait()
            except queue.Empty:
                thread.join(0.01)
