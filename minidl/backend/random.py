"""Counter-based random numbers (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

Philox turns (key, counter) into random bits by a fixed mixing function. There is no state to
carry along: number i of call c under seed s is Philox(key=s, counter=(i, c)), whoever computes
it, in whatever order. So NumPy, C++ and CUDA give the same bits on any number of threads, and a
run is resumed by remembering two integers.
"""

from __future__ import annotations

import secrets
from typing import NamedTuple

import numpy as np


class Key(NamedTuple):
    """Names one stream of random numbers; see `generator` and `uniform`."""

    seed: int
    call: int


class Generator:
    """Hands out streams, one after the other: (seed, 0), (seed, 1), ..."""

    def __init__(self, seed: int | None = None) -> None:
        self.manual_seed(secrets.randbits(63) if seed is None else seed)

    def manual_seed(self, seed: int) -> Generator:
        """Start over from a seed (an int of at least 0)."""
        if seed < 0:
            raise ValueError(f"a seed is an int of at least 0, got {seed}")
        self.seed, self.calls = int(seed), 0
        return self

    def next_key(self) -> Key:
        """A stream that was not handed out before."""
        self.calls += 1
        return Key(self.seed, self.calls - 1)

    def state_dict(self) -> dict[str, int]:
        """The two integers that a resumed run needs."""
        return {"seed": self.seed, "calls": self.calls}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was taken."""
        self.seed, self.calls = int(state["seed"]), int(state["calls"])


default_generator = Generator(0)


def manual_seed(seed: int) -> Generator:
    """Seed all of minidl's random numbers: initialisation, shuffling, dropout, augmentation."""
    return default_generator.manual_seed(seed)


def philox(key: Key) -> np.random.Philox:
    """NumPy's Philox4x64-10 at the start of a stream."""
    return np.random.Philox(key=key.seed, counter=[0, key.call, 0, 0])


def generator(key: Key | None = None) -> np.random.Generator:
    """A NumPy generator over a stream (by default a fresh one), on the CPU."""
    return np.random.Generator(philox(key or default_generator.next_key()))


def uniform(key: Key, size: int) -> np.ndarray:
    """Floats in [0, 1): (size,), float32. Number i depends on (key, i) only.

    Each is 24 of the 32 bits that Philox gives for it, so every value is exact in float32.
    """
    bits = philox(key).random_raw((size + 1) // 2).view(np.uint32)[:size]
    return (bits >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)
