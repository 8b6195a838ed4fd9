"""Loading one batch: what happens in the caller and in the worker processes alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from minidl.data.collate import default_collate, default_convert, map_tensors
from minidl.data.dataset import batch_getter
from minidl.data.randomness import COLLATE, loading

Collate = Callable[[list[Any]], Any]


def fetch(dataset: Any, indices: Sequence[int], collate: Collate, seed: int, epoch: int) -> Any:
    """The batch of the samples at some indices.

    At once where the dataset can (`Dataset.get_batch`, or PyTorch's `__getitems__`), else sample
    by sample. An exception carries a note that says which sample it was.

    No indices, no samples (a rank's share of a small batch): arrays of length 0, with the shapes
    that the first sample has.
    """
    if not len(indices):
        return map_tensors(lambda x: x[:0], fetch(dataset, [0], collate, seed, epoch))
    if collate is default_collate and (get_batch := batch_getter(dataset)):
        with loading(seed, epoch, indices), noting(f"the batch of samples {list(indices)[:8]}..."):
            batch = get_batch(indices)
        if batch is not None:
            return default_convert(batch)
    if hasattr(dataset, "__getitems__"):
        with loading(seed, epoch, indices):
            samples = dataset.__getitems__(indices)
    else:
        samples = []
        for index in indices:
            with loading(seed, epoch, (index,)), noting(f"sample {index}"):
                samples.append(dataset[index])
    with loading(seed, epoch, indices, COLLATE):  # mixup draws here
        return collate(samples)


class noting:
    """Adds "while loading ..." to an exception."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, Exception):
            error.add_note(f"(while loading {self.what})")


def fetch_stream(
    dataset: Any,
    collate: Collate,
    batch_size: int,
    drop_last: bool,
    seed: int,
    epoch: int,
    numbers: Iterator[int],
) -> Iterator[Any]:
    """Batches of an `IterableDataset`, one after the other.

    `numbers` says which number each sample has, for `sample_rng`; a worker counts in steps of
    the number of workers.
    """
    samples, ended = iter(dataset), False
    while not ended:
        batch: list[Any] = []
        while len(batch) < batch_size and not ended:
            with loading(seed, epoch, (next(numbers),)):
                try:
                    batch.append(next(samples))
                except StopIteration:
                    ended = True
        if len(batch) == batch_size or (batch and not drop_last):
            yield collate(batch)
