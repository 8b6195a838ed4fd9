"""Pipeline schedules: in which order a stage takes its micro-batches forward and backward.

A network is cut into K *stages*, one a rank; a batch into M *micro-batches*. A schedule says what
one stage does, and nothing else: it is a generator of instructions, and needs no rank to be tested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple


class Forward(NamedTuple):
    """Take a micro-batch through this stage, and keep what its backward pass needs."""

    micro_batch: int


class Backward(NamedTuple):
    """Take a micro-batch's gradient back through this stage, and let go of what was kept."""

    micro_batch: int


Schedule = Callable[[int, int, int], Iterator[Forward | Backward]]


def naive(stage: int, stages: int, micro_batches: int) -> Iterator[Forward | Backward]:
    """One micro-batch at a time, there and back: one stage works, the others wait."""
    for m in range(micro_batches):
        yield Forward(m)
        yield Backward(m)


def gpipe(stage: int, stages: int, micro_batches: int) -> Iterator[Forward | Backward]:
    """All forward, then all backward (Huang et al. 2019): M micro-batches are kept at once."""
    for m in range(micro_batches):
        yield Forward(m)
    for m in range(micro_batches):
        yield Backward(m)


def one_forward_one_backward(
    stage: int, stages: int, micro_batches: int
) -> Iterator[Forward | Backward]:
    """1F1B (Narayanan et al. 2019, "PipeDream"; the variant that flushes): as soon as a gradient
    can come back, one goes forward for each that comes. Stage s keeps at most K - s at once."""
    ahead = min(stages - stage - 1, micro_batches)
    for m in range(ahead):
        yield Forward(m)
    for m in range(micro_batches - ahead):
        yield Forward(ahead + m)
        yield Backward(m)
    for m in range(micro_batches - ahead, micro_batches):
        yield Backward(m)


SCHEDULES: dict[str, Schedule] = {
    "naive": naive,
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
}
