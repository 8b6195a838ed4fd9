"""Batches of images and captions of about the same length, padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from minidl.backend import random as rng
from minidl.captioning.vocabulary import PAD, Vocabulary
from minidl.data import DataLoader, Dataset, Sampler
from minidl.data.randomness import SHUFFLE, stream
from minidl.tensor import Tensor

__all__ = ["BucketSampler", "CaptionBatch", "CaptionPairs", "caption_loader", "collate"]


class CaptionBatch(NamedTuple):
    """What a captioner is given; the captions come longest first.

    Attributes:
        images: (N, C, H, W); or annotation vectors (N, L, D) that were computed before.
        words: (N, T) the words that go in, from BOS on; PAD after a caption's end.
        lengths: (N,) how many go in (EOS does not).
    """

    images: Tensor
    words: Tensor
    lengths: Tensor

    def to(self, device: str) -> CaptionBatch:
        return CaptionBatch(*(tensor.to(device) for tensor in self))


class CaptionPairs(Dataset):
    """Every caption of a dataset as a sample of its own: (image, numbers of its tokens).

    Args:
        dataset: of (image, captions), with all captions in `dataset.captions`.
        vocabulary: what numbers the tokens.

    Attributes:
        pairs: of each sample, (which image, numbers).
    """

    def __init__(self, dataset: Any, vocabulary: Vocabulary) -> None:
        self.dataset, self.vocabulary = dataset, vocabulary
        self.pairs = [
            (image, vocabulary.encode(caption))
            for image, captions in enumerate(dataset.captions)
            for caption in captions
        ]

    @property
    def lengths(self) -> list[int]:
        return [len(numbers) for _, numbers in self.pairs]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Any, list[int]]:
        image, numbers = self.pairs[index]
        return self.dataset[image][0], numbers


class BucketSampler(Sampler):
    """Batches of indices, of samples of about the same length; another order each epoch.

    A shuffled epoch is cut into pools of 50 batches; within a pool, samples are sorted by length.
    So next to nothing is padding, and batches still differ from epoch to epoch.

    Args:
        lengths: of each sample.
        batch_size: samples a batch; the last of an epoch may be smaller.
        seed: what the order depends on, beside the epoch; by default minidl's global seed.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int | None = None) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is at least 1, got {batch_size}")
        self.lengths, self.batch_size, self.seed = np.asarray(lengths), batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        seed = rng.default_generator.seed if self.seed is None else self.seed
        generator = stream(seed, self.epoch, SHUFFLE)
        self.epoch += 1
        order, pool = generator.permutation(len(self.lengths)), 50 * self.batch_size
        batches = []
        for start in range(0, len(order), pool):
            part = order[start : start + pool]
            part = part[np.argsort(self.lengths[part], kind="stable")]
            batches += [part[i : i + self.batch_size] for i in range(0, len(part), self.batch_size)]
        for number in generator.permutation(len(batches)):
            yield batches[number].tolist()


def collate(samples: list[tuple[Any, list[int]]]) -> tuple[CaptionBatch, Tensor]:
    """Pad, longest first.

    Returns:
        The batch, and the words that come out: (sum of lengths,), as the decoder gives its
        logits: the first words of all captions, then the second words of all that have one, ...

    Raises:
        ValueError: the images differ in shape.
    """
    samples = sorted(samples, key=lambda sample: -len(sample[1]))  # stable
    images = [np.asarray(image) for image, _ in samples]
    if len({image.shape for image in images}) > 1:
        raise ValueError(
            f"images of different shapes in a batch: {sorted({i.shape for i in images})}; give "
            "the dataset a transform, Compose([Resize(64), CenterCrop(64)])"
        )
    lengths = np.array([len(numbers) - 1 for _, numbers in samples])
    words, following = np.full((2, len(samples), lengths[0]), PAD)
    for row, (_, numbers) in enumerate(samples):
        words[row, : lengths[row]], following[row, : lengths[row]] = numbers[:-1], numbers[1:]
    there = np.arange(lengths[0])[:, None] < lengths  # (T, N)
    batch = CaptionBatch(Tensor(np.stack(images)), Tensor(words), Tensor(lengths))
    return batch, Tensor(following.T[there])


def caption_loader(
    dataset: Any,
    vocabulary: Vocabulary,
    batch_size: int = 64,
    shuffle: bool = False,
    seed: int | None = None,
    bucket: bool = False,
    **options: Any,
) -> DataLoader:
    """Load (batch, words that come out); see `collate`.

    Args:
        dataset: of (image, captions), with all captions in `dataset.captions`.
        vocabulary: what numbers the tokens.
        batch_size: captions a batch.
        shuffle: another order each epoch; else in order.
        bucket: shuffle in batches of like length. That saves steps, but a batch is then no sample
            of the data: where length tells what is in the image (one thing or two), batch norm sees
            other statistics while it learns than later. For encoders that are frozen.
        seed, options: of the `DataLoader` (`num_workers=`, `prefetch_thread=`, `device=`).
    """
    pairs = CaptionPairs(dataset, vocabulary)
    if not (shuffle and bucket):
        return DataLoader(pairs, batch_size, shuffle, collate_fn=collate, seed=seed, **options)
    sampler = BucketSampler(pairs.lengths, batch_size, seed)
    return DataLoader(pairs, batch_sampler=sampler, collate_fn=collate, seed=seed, **options)
