"""Communicator: how ranks talk to one another; the same few words over every engine.

A *rank* is one of `world_size` copies of the same program. All ranks of a communicator make the
same *collective* calls in the same order (allreduce, broadcast, ...), or send to and receive from
one another. What a backend has to add is `_start`, `split` and `abort`:

- `minidl.distributed.simulation`: ranks are threads of this process, one running at a time;
- `minidl.distributed.mpi`: ranks are processes, on one machine or many.

MPI leaves undefined what happens when ranks disagree: wrong numbers, a crash, or waiting for ever.
So each call carries its description (`Call`), and a disagreement is an error that names both.
"""

from __future__ import annotations

import functools
import os
import pickle
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minidl import backend
from minidl.autograd import written
from minidl.tensor import Tensor

PACKAGE = str(Path(__file__).parents[1]) + os.sep


class CommunicationError(RuntimeError):
    """Ranks disagree about what to do, or wait for one another for ever."""


class Call(NamedTuple):
    """One rank's call: all that the other ranks must agree with, and where it stands."""

    number: int  # of the communicator's collective calls, from 1 on; 0: send and recv
    name: str
    argument: str
    shape: tuple[int, ...]
    dtype: str  # and where the array lies
    where: str  # file:line of the user's call

    def agrees(self, other: Call) -> bool:
        """Whether two ranks' calls can meet (their places in the source may differ)."""
        return self[:-1] == other[:-1]

    def __str__(self) -> str:
        what = f" of {self.dtype} {self.shape}" if self.dtype else ""
        nth = f", collective call {self.number}" if self.number else ""
        return f"{self.name}({self.argument}){what} at {self.where}{nth}"


def disagreement(rank: int, mine: Call, other: int, theirs: Call) -> CommunicationError:
    return CommunicationError(
        f"ranks disagree: rank {rank} calls {mine}; rank {other} calls {theirs}. All ranks must "
        "make the same calls in the same order, on arrays of one shape and dtype"
    )


def where() -> str:
    """file:line of the call that led here, outside minidl (or at least outside this folder)."""
    frame: Any = sys._getframe(1)
    inner = ""
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(PACKAGE):
            return f"{file}:{frame.f_lineno}"
        if not inner and not file.startswith(PACKAGE + "distributed"):
            inner = f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return inner or "?"


class Work:
    """A call that is going on. The arrays that it uses must be left alone until it is over."""

    def wait(self) -> Any:
        """Wait for the end, and return what the call returns.

        Raises:
            CommunicationError: ranks disagree, or one that is waited for has ended.
        """
        raise NotImplementedError

    def is_completed(self) -> bool:
        """Whether `wait` would return at once."""
        raise NotImplementedError


class Communicator:
    """The ranks 0 .. world_size - 1, and what they can do together.

    Arrays are NumPy's or CuPy's, or Tensors; what comes is where x is, in the host's memory or on
    this rank's GPU. With ``async_op=True`` a call returns a `Work` at once, and goes on while the
    program does.

    Attributes:
        rank: which one this is.
        world_size: how many there are.
    """

    rank: int
    world_size: int
    calls = 0  # collective calls made so far

    # Collective calls: all ranks make the same -----------------------------------------------

    def allreduce(self, x: Any, op: str = "sum", async_op: bool = False) -> Any:
        """Put the sum (or "max", "min") of all ranks' x in place of each x. Returns x.

        A NaN on any rank becomes a NaN on all.
        """
        check_op(op)
        return self._collective("allreduce", op, in_place(x), async_op, x)

    def reduce_scatter(self, x: Any, op: str = "sum", async_op: bool = False) -> Any:
        """Sum all ranks' x: (world_size * k, ...), and return this rank's part of it: (k, ...)."""
        check_op(op)
        array = readable(x)
        if array.ndim == 0 or len(array) % self.world_size:
            raise ValueError(
                f"reduce_scatter cuts the first dimension into {self.world_size} equal parts: it "
                f"must be a multiple of {self.world_size}, the shape is {array.shape}"
            )
        return self._collective("reduce_scatter", op, array, async_op)

    def all_gather(self, x: Any, async_op: bool = False) -> Any:
        """All ranks' x: (...), stacked: (world_size, ...)."""
        return self._collective("all_gather", "", readable(x), async_op)

    def broadcast(self, x: Any, root: int = 0, async_op: bool = False) -> Any:
        """Put the x of rank `root` in place of every rank's. Returns x."""
        self._check_rank(root)
        return self._collective("broadcast", f"root={root}", in_place(x), async_op, x)

    def broadcast_all(self, arrays: Sequence[Any], root: int = 0) -> None:
        """Put several arrays of rank `root` in place of every rank's, in one message.

        (All of them in the host's memory, or all on one GPU.)
        """
        targets = [in_place(x) for x in arrays]
        if not targets:
            return
        xp = backend.array_module(targets[0])
        everything = xp.concatenate([as_bytes(x) for x in targets])
        self.broadcast(everything, root)
        if self.rank != root:
            ends = np.cumsum([x.nbytes for x in targets])
            for x, end in zip(targets, ends):
                as_bytes(x)[...] = everything[end - x.nbytes : end]

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self._collective("barrier", "", None, False)

    def all_gather_object(self, value: Any) -> list[Any]:
        """A list of all ranks' values (anything that can be pickled), for what is small."""
        data = np.frombuffer(pickle.dumps(value), np.uint8)
        lengths = self.all_gather(np.array(len(data)))
        padded = np.zeros(lengths.max(), np.uint8)
        padded[: len(data)] = data
        rows = self.all_gather(padded)
        return [pickle.loads(row[:n].tobytes()) for row, n in zip(rows, lengths)]

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        """The value of rank `root` (anything that can be pickled), on all ranks."""
        data = np.frombuffer(pickle.dumps(value) if self.rank == root else b"", np.uint8).copy()
        length = self.broadcast(np.array(len(data)), root)
        if self.rank != root:
            data = np.empty(int(length), np.uint8)
        return pickle.loads(self.broadcast(data, root).tobytes())

    def split(self, color: int, key: int | None = None) -> Communicator:
        """A communicator of those ranks that give the same color, in the order of their keys
        (by default: of their ranks)."""
        raise NotImplementedError

    # From one rank to another -----------------------------------------------------------------

    def send(self, x: Any, dest: int, tag: int = 0, async_op: bool = False) -> Any:
        """Send x to rank `dest`, which receives it with the same tag. (Returns when x may be
        changed again; that may be before it is received, or not.)"""
        return self._message("send", "dest", dest, tag, readable(x), async_op, x)

    def recv(self, x: Any, source: int, tag: int = 0, async_op: bool = False) -> Any:
        """Fill x with what rank `source` sends; shape and dtype must agree. Returns x."""
        return self._message("recv", "source", source, tag, in_place(x), async_op, x)

    def abort(self, code: int = 1) -> None:
        """End all ranks at once."""
        raise NotImplementedError

    # For the backends ----------------------------------------------------------------------------

    def _start(
        self, call: Call, array: Any, peer: int, tag: int, result: Any, async_op: bool
    ) -> Work:
        """Begin a call. `wait` returns what the call makes, or `result` where x is changed.

        Args:
            peer: the other rank, or the root.
            async_op: False: `wait` follows at once.
        """
        raise NotImplementedError

    def _collective(
        self, name: str, argument: str, array: Any, async_op: bool, result: Any = None
    ) -> Any:
        self.calls += 1
        call = describe(self.calls, name, argument, array)
        root = int(argument[5:]) if name == "broadcast" else -1
        work = self._start(call, array, root, 0, result, async_op)
        return work if async_op else work.wait()

    def _message(
        self, name: str, role: str, peer: int, tag: int, array: Any, async_op: bool, result: Any
    ) -> Any:
        self._check_rank(peer)
        if not 0 <= tag < 1 << 14:
            raise ValueError(f"a tag is an int from 0 to {(1 << 14) - 1}, got {tag}")
        argument = f"{role}={peer}" + (f", tag={tag}" if tag else "")
        call = describe(0, name, argument, array)
        work = self._start(call, array, peer, tag, result, async_op)
        return work if async_op else work.wait()

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"there is no rank {rank}: the ranks are 0 to {self.world_size - 1}")


def describe(number: int, name: str, argument: str, array: Any) -> Call:
    if array is None:
        return Call(number, name, argument, (), "", where())
    # A message may come from a GPU and go to the host; but all call NCCL, or none does.
    kind = array.dtype.name + " on a GPU" * (number > 0 and on_gpu(array))
    return Call(number, name, argument, array.shape, kind, where())


def check_op(op: str) -> None:
    if op not in REDUCTIONS:
        raise ValueError(f"op is one of {', '.join(REDUCTIONS)}, got {op!r}")


def on_gpu(array: Any) -> bool:
    """Whether it is an array of CuPy's."""
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(array, cupy.ndarray)


def as_bytes(array: Any) -> Any:
    return array.reshape(-1).view(np.uint8)


def readable(x: Any) -> Any:
    """x as an array in one piece, copied if it must be.

    Raises:
        TypeError: not an array or Tensor.
    """
    array = x.array if isinstance(x, Tensor) else x
    if on_gpu(array):
        return backend.cupy().asarray(array, order="C")
    if not isinstance(array, np.ndarray | np.generic):
        raise TypeError(f"ranks exchange arrays (NumPy, CuPy) and Tensors, got {type(x).__name__}")
    return np.asarray(array, order="C")


def in_place(x: Any) -> Any:
    """x as an array to be written to.

    Raises:
        TypeError: as `readable`.
        ValueError: its memory is not in one piece, or read-only.
    """
    array = x.array if isinstance(x, Tensor) else x
    if isinstance(array, np.generic):
        raise TypeError(f"the result is written to the array itself, got {type(x).__name__}")
    if isinstance(array, np.ndarray) or on_gpu(array):
        if not array.flags.c_contiguous or not getattr(array.flags, "writeable", True):
            raise ValueError(
                f"the result is written to the array of shape {array.shape} itself: it must be "
                "writeable and contiguous (np.ascontiguousarray(x) makes a copy that is)"
            )
        written(array)
    return readable(x)


def tree_sum(arrays: list[np.ndarray]) -> np.ndarray:
    """Sum neighbours, then the sums of neighbours, ...: the order in which MPI adds the arrays of
    2 and 4 ranks."""
    while len(arrays) > 1:
        pairs = [a + b for a, b in zip(arrays[::2], arrays[1::2])]
        arrays = pairs + arrays[2 * len(pairs) :]
    return arrays[0]


REDUCTIONS: dict[str, Callable[[list[Any]], Any]] = {
    "sum": tree_sum,
    "max": functools.partial(functools.reduce, np.maximum),
    "min": functools.partial(functools.reduce, np.minimum),
}
