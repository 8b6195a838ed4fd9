"""Random numbers that belong to a sample, not to whoever loads it.

Augmentation must not depend on how many workers load the data, or on where a run was stopped and
resumed. So each sample has a stream of its own (Philox; see `minidl.backend.random`), named by
(seed, epoch, index). A random transform asks for it::

    class RandomHorizontalFlip:
        def __call__(self, image):  # (C, H, W)
            return image[:, :, ::-1] if sample_rng().random() < 0.5 else image

Within one sample all transforms draw from the same generator, one after the other. Outside a
`DataLoader` (``dataset[0]`` in a terminal), `sample_rng` opens a fresh stream of minidl's default
generator, which `minidl.manual_seed` seeds.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from minidl.backend import random as rng

# What a stream is for; word 2 of the Philox counter, so no two purposes share a number.
SAMPLE, SHUFFLE, WORKER, COLLATE = 0, 1, 2, 3


def stream(seed: int, epoch: int, purpose: int, index: int = 0) -> np.random.Generator:
    """The stream of (seed, epoch, purpose, index).

    The key's second word is epoch + 1; `minidl.backend.random` leaves it at 0, so that these
    streams differ from dropout's and the initialisers'.
    """
    key = np.array([seed & (2**64 - 1), epoch + 1], dtype=np.uint64)
    counter = np.array([0, index, purpose, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def choose_seed(seed: int | None, generator: rng.Generator | None) -> int | None:
    """The seed that was given, one drawn from the generator that was given, or None.

    Raises:
        ValueError: both were given.
    """
    if generator is None:
        return seed
    if seed is not None:
        raise ValueError("give a seed or a generator, not both")
    return int(rng.generator(generator.next_key()).integers(2**63))


class _Loading(threading.local):
    """The samples that this thread is loading, and their generators, made when asked for."""

    samples: tuple[int, int, Sequence[int], int] | None = None  # seed, epoch, indices, purpose
    generators: list[np.random.Generator] | None = None


_loading = _Loading()


@contextmanager
def loading(seed: int, epoch: int, indices: Sequence[int], purpose: int = SAMPLE) -> Iterator[None]:
    """While samples are loaded (or made a batch of: COLLATE): `sample_rng` is theirs."""
    before = _loading.samples, _loading.generators
    _loading.samples, _loading.generators = (seed, epoch, indices, purpose), None
    try:
        yield
    finally:
        _loading.samples, _loading.generators = before


def sample_rng() -> np.random.Generator:
    """The generator of the sample that is being loaded.

    Raises:
        RuntimeError: a whole batch is being loaded at once: use `sample_rngs`.
    """
    return sample_rngs(1)[0]


def sample_rngs(count: int) -> list[np.random.Generator]:
    """The generators of the `count` samples that are being loaded at once.

    For random transforms that work on a whole batch: drawing from each sample's own generator,
    they give what they would give sample by sample.

    Raises:
        RuntimeError: another number of samples is being loaded.
    """
    if _loading.samples is None:
        return [rng.generator() for _ in range(count)]
    seed, epoch, indices, purpose = _loading.samples
    if len(indices) != count:
        raise RuntimeError(
            f"random numbers asked for {count} sample(s) while {len(indices)} are loaded at once: "
            "a random transform that declares `batched = True` calls sample_rngs(len(images))"
        )
    if _loading.generators is None:
        _loading.generators = [stream(seed, epoch, purpose, int(i)) for i in indices]
    return _loading.generators
