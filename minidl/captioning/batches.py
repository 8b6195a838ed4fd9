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
        images: (M, C, H, W); or annotation vectors (M, L, D) that were computed before.
        words: (N, T) the words that go in, from BOS on; PAD after a caption's end.
        lengths: (N,) how many go in (EOS does not).
        image_of: (N,) which of the images each caption is of; None: one each, in this order.
    """

    images: Tensor
    words: Tensor
    lengths: Tensor
    image_of: Tensor | None = None

    def to(self, device: str) -> CaptionBatch:
        return CaptionBatch._make(None if x is None else x.to(device) for x in self)


class CaptionPairs(Dataset):
    """A dataset with numbers for words; a sample is (image, [numbers of a caption, ...]).

    Args:
        dataset: of (image, captions), with all captions in `dataset.captions`.
        vocabulary: what numbers the tokens.
        together: a sample is an image with all its captions; else each caption is a sample.

    Attributes:
        pairs: of each sample, (which image, its captions' numbers).
    """

    def __init__(self, dataset: Any, vocabulary: Vocabulary, together: bool = False) -> None:
        self.dataset, self.vocabulary = dataset, vocabulary
        self.pairs: list[tuple[int, list[list[int]]]] = []
        for image, captions in enumerate(dataset.captions):
            numbers = [vocabulary.encode(caption) for caption in captions]
            self.pairs += [(image, numbers)] if together else [(image, [n]) for n in numbers]

    @property
    def lengths(self) -> list[int]:
        """Of each sample's longest caption."""
        return [max(map(len, captions)) for _, captions in self.pairs]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Any, list[list[int]]]:
        image, captions = self.pairs[index]
        return self.dataset[image][0], captions


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


def collate(samples: list[tuple[Any, list[list[int]]]]) -> tuple[CaptionBatch, Tensor]:
    """Pad, longest first; of samples as `CaptionPairs` has them.

    Returns:
        The batch, and the words that come out: (sum of lengths,), as the decoder gives its
        logits: the first words of all captions, then the second words of all that have one, ...

    Raises:
        ValueError: the images differ in shape.
    """
    samples = sorted(samples, key=lambda sample: -max(map(len, sample[1])))  # stable
    captions = [(numbers, i) for i, (_, several) in enumerate(samples) for numbers in several]
    captions.sort(key=lambda caption: -len(caption[0]))
    images = [np.asarray(image) for image, _ in samples]
    if len({image.shape for image in images}) > 1:
        raise ValueError(
            f"images of different shapes in a batch: {sorted({i.shape for i in images})}; give "
            "the dataset a transform, Compose([Resize(64), CenterCrop(64)])"
        )
    lengths = np.array([len(numbers) - 1 for numbers, _ in captions])
    words, following = np.full((2, len(captions), lengths[0]), PAD)
    for row, (numbers, _) in enumerate(captions):
        words[row, : lengths[row]], following[row, : lengths[row]] = numbers[:-1], numbers[1:]
    there = np.arange(lengths[0])[:, None] < lengths  # (T, N)
    image_of = Tensor(np.array([i for _, i in captions]))
    batch = CaptionBatch(Tensor(np.stack(images)), Tensor(words), Tensor(lengths), image_of)
    return batch, Tensor(following.T[there])


def caption_loader(
    dataset: Any,
    vocabulary: Vocabulary,
    batch_size: int = 64,
    shuffle: bool = False,
    seed: int | None = None,
    bucket: bool = False,
    together: bool = False,
    **options: Any,
) -> DataLoader:
    """Load (batch, words that come out); see `collate`.

    Args:
        dataset: of (image, captions), with all captions in `dataset.captions`.
        vocabulary: what numbers the tokens.
        batch_size: captions a batch; images, if they come with all their captions.
        shuffle: another order each epoch; else in order.
        bucket: shuffle in batches of like length. That saves steps, but a batch is then no sample
            of the data: where length tells what is in the image (one thing or two), batch norm sees
            other statistics while it learns than later. For encoders that are frozen.
        together: each image comes once in an epoch, with all its captions: the encoder then looks
            once instead of once for each of them. But a batch of as many captions has fewer images,
            and where the encoder learns it learns less from them.
        seed, options: of the `DataLoader` (`num_workers=`, `prefetch_thread=`, `device=`).
    """
    pairs = CaptionPairs(dataset, vocabulary, together)
    if not (shuffle and bucket):
        return DataLoader(pairs, batch_size, shuffle, collate_fn=collate, seed=seed, **options)
    sampler = BucketSampler(pairs.lengths, batch_size, seed)
    return DataLoader(pairs, batch_sampler=sampler, collate_fn=collate, seed=seed, **options)
