"""Gradient aggregation in plain sight: four ways to sum an array over all ranks, by send and recv.

Each leaves the same sum on every rank, in place. What they cost for p ranks and S bytes (α: time
for a message to arrive, β: seconds a byte; Thakur et al. 2005, "Optimization of collective
communication operations in MPICH"):

    parameter_server    2α + 2(p-1) Sβ at the server         the server's link carries everything
    tree                2 lg p (α + Sβ)                      few messages, all of them long
    ring                2(p-1) α + 2(p-1)/p Sβ               no link carries more than 2S, ever
    halving_doubling    2 lg p α + 2(p-1)/p Sβ               the best of both, for p a power of two

For real work use `Communicator.allreduce`: MPI has these inside, in C.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minidl.distributed.communicator import Communicator

ALGORITHMS: dict[str, Callable[[Communicator, np.ndarray], None]] = {}


def algorithm(
    function: Callable[[Communicator, np.ndarray], None],
) -> Callable[[Communicator, np.ndarray], None]:
    """Register an all-reduce: `function(communicator, x)` sums x over all ranks, in place."""
    ALGORITHMS[function.__name__] = function
    return function


def exchange(c: Communicator, out: np.ndarray, dest: int, source: int, like: np.ndarray) -> Any:
    """Send to one rank while receiving from another (both may be the same): no one waits first."""
    sent = c.send(out, dest, async_op=True)
    received = c.recv(np.empty_like(like), source)
    sent.wait()
    return received


@algorithm
def parameter_server(c: Communicator, x: np.ndarray) -> None:
    """All send to rank 0, which adds up and sends the sum back (Li et al. 2014)."""
    if c.rank == 0:
        for worker in range(1, c.world_size):
            x += c.recv(np.empty_like(x), worker)
        for worker in range(1, c.world_size):
            c.send(x, worker)
    else:
        c.send(x, 0)
        c.recv(x, 0)


@algorithm
def tree(c: Communicator, x: np.ndarray) -> None:
    """Up a binomial tree adding, and down again.

    Ranks 1, 3, 5, ... send to their left neighbours, then 2, 6, 10, ... to the rank two before
    them, and so on, until rank 0 has the sum.
    """
    distance = 1
    while distance < c.world_size and not c.rank & distance:
        if c.rank + distance < c.world_size:
            x += c.recv(np.empty_like(x), c.rank + distance)
        distance *= 2
    if c.rank > 0:
        c.send(x, c.rank - distance)
        c.recv(x, c.rank - distance)
    while distance > 1:
        distance //= 2
        if c.rank + distance < c.world_size:
            c.send(x, c.rank + distance)


@algorithm
def ring(c: Communicator, x: np.ndarray) -> None:
    """Cut x into p pieces that go round the ring twice (Patarasuk & Yuan 2009).

    First time round each rank adds its own to what comes from the left and passes it on to the
    right; after p - 1 steps every rank has one finished piece. The second time round these are
    passed on as they are.
    """
    p, left, right = c.world_size, (c.rank - 1) % c.world_size, (c.rank + 1) % c.world_size
    pieces = np.array_split(x.reshape(-1), p)  # views; the first may be longer by one
    for step in range(p - 1):
        out, into = pieces[(c.rank - step) % p], pieces[(c.rank - step - 1) % p]
        into += exchange(c, out, right, left, into)
    for step in range(p - 1):
        out, into = pieces[(c.rank + 1 - step) % p], pieces[(c.rank - step) % p]
        into[...] = exchange(c, out, right, left, into)


@algorithm
def halving_doubling(c: Communicator, x: np.ndarray) -> None:
    """Exchange halves, quarters, eighths, ... adding, and the same way back (Rabenseifner 2004).

    It needs a power of two of ranks. So of the first ranks, as many pairs as there are ranks too
    many begin as one: the even one gives its x to the odd one, and gets the sum at the end.
    """
    flat = x.reshape(-1)
    power = 1 << (c.world_size.bit_length() - 1)  # the largest power of two up to p
    pairs = c.world_size - power
    if c.rank < 2 * pairs:
        if c.rank % 2 == 0:
            c.send(flat, c.rank + 1)
            c.recv(flat, c.rank + 1)
            return
        flat += c.recv(np.empty_like(flat), c.rank - 1)
    me = c.rank // 2 if c.rank < 2 * pairs else c.rank - pairs  # among those that go on

    def partner(distance: int) -> int:
        other = me ^ distance
        return 2 * other + 1 if other < pairs else other + pairs

    part, way = flat, []
    distance = power // 2
    while distance:
        middle = len(part) // 2
        halves = [part[:middle], part[middle:]]
        mine = bool(me & distance)
        keep, give = halves[mine], halves[not mine]
        keep += exchange(c, give, partner(distance), partner(distance), keep)
        way.append((distance, keep, give))
        part, distance = keep, distance // 2
    for distance, keep, give in reversed(way):
        give[...] = exchange(c, keep, partner(distance), partner(distance), give)
    if c.rank < 2 * pairs:
        c.send(flat, c.rank - 1)


# Fewer bytes ----------------------------------------------------------------------------------
#
# What a rank could not say this time it says the next: the *error* of compressing is added to what
# comes next (Seide et al. 2014; Stich et al. 2018, "Sparsified SGD with memory"). So nothing is
# lost, only late. An object remembers the error of one array: use another for another array.


class FP16:
    """Sum over a ring in half precision: half the bytes.

    Numbers are divided by p beforehand, so that the sum of p of them fits where one does (up to
    65,504). What the ring itself rounds is not fed back.
    """

    def __init__(self) -> None:
        self.error: np.ndarray | float = 0.0

    def __call__(self, c: Communicator, x: np.ndarray) -> None:
        wanted = x + self.error
        said = (wanted / c.world_size).astype(np.float16)
        self.error = wanted - said.astype(x.dtype) * c.world_size
        ring(c, said)
        np.multiply(said, c.world_size, out=x, dtype=x.dtype)


class TopK:
    """Say only the largest numbers (Aji & Heafield 2017): a position and a value for each.

    Every rank chooses its own, so the sum is put together from all ranks' choices.

    Args:
        fraction: of the numbers that are said, in (0, 1]; at least one is.
        error_feedback: False: forget what is not said (training then stops short of the optimum).
    """

    def __init__(self, fraction: float = 0.01, error_feedback: bool = True) -> None:
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction is in (0, 1], got {fraction}")
        self.fraction, self.error_feedback = fraction, error_feedback
        self.error: np.ndarray | float = 0.0

    def __call__(self, c: Communicator, x: np.ndarray) -> None:
        if x.size == 0:
            return
        wanted = (x + self.error).reshape(-1)
        k = max(1, round(self.fraction * x.size))
        largest = np.argpartition(np.abs(wanted), x.size - k)[x.size - k :].astype(np.int32)
        positions, values = c.all_gather(largest), c.all_gather(wanted[largest])
        wanted[largest] = 0
        if self.error_feedback:
            self.error = wanted.reshape(x.shape)
        x[...] = 0
        for where, what in zip(positions, values):
            x.reshape(-1)[where] += what  # a rank's own positions differ from one another
