"""Ranks as threads of one process: to learn, to debug, and to test without MPI.

Exactly one rank runs at a time. It passes the turn on when it has to wait, to the next rank that
need not. So a run is deterministic, a breakpoint stops everything, random numbers are each rank's
own, and when nobody can go on, that is known at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from minidl import backend
from minidl.backend.random import default_generator
from minidl.distributed.communicator import (
    REDUCTIONS,
    Call,
    CommunicationError,
    Communicator,
    Work,
    disagreement,
)

T = TypeVar("T")
here = threading.local()  # .communicator: of the rank that runs in this thread


class Message(NamedTuple):
    """One `send`, or one rank's part in a collective call, as `simulate` records it.

    Attributes:
        source, dest: from which rank to which; dest is None where all ranks take part.
        array: what it said (of a barrier nothing).
        where: file:line of the call.
        step: how many messages had to arrive one after the other before this one could be sent
            (Lamport 1978, "Time, clocks, and the ordering of events in a distributed system").
        call: "send", "allreduce", ...
    """

    source: int
    dest: int | None
    array: np.ndarray
    where: str
    step: int = 0
    call: str = "send"


def simulate(
    function: Callable[[], T], world_size: int = 4, trace: list[Message] | None = None
) -> list[T]:
    """Run a function as every rank of a world of threads.

    Inside it, `dist.init()`, `dist.rank()` and all else are as under mpirun. What ranks share that
    processes would not is Python's own: global variables, and objects from outside the function.

    Args:
        function: what each rank runs.
        world_size: how many ranks.
        trace: a list that takes every message, in order (`drawing.py` draws it).

    Returns:
        What the function returned on each rank.

    Raises:
        CommunicationError: the ranks disagree, or wait for one another: which, and where.
        Exception: what one rank raised ends all ranks, and comes out with a note which it was.
    """
    if world_size < 1:
        raise ValueError(f"world_size is at least 1, got {world_size}")
    simulation = Simulation(world_size, trace)
    results: list[Any] = [None] * world_size
    before = default_generator.state_dict()

    def run(rank: int) -> None:
        here.communicator = SimulatedCommunicator(simulation, range(world_size), rank, ())
        try:
            simulation.take_turn(rank)
            results[rank] = function()
        except Cancelled:
            pass
        except BaseException as error:
            simulation.fail(rank, error)
        simulation.end(rank)

    threads = [
        threading.Thread(target=run, args=(r,), name=f"rank {r}", daemon=True)
        for r in range(world_size)
    ]
    for thread in threads:
        thread.start()
    simulation.turns[0].release()
    for thread in threads:
        thread.join()
    default_generator.load_state_dict(before)
    if simulation.error is not None:
        raise simulation.error
    return results


def copy_on_host(array: Any) -> np.ndarray:
    return np.array(backend.to_device(array, "cpu"))


def to_where(array: Any, values: np.ndarray) -> Any:
    """Values from the host, where an array is."""
    return backend.to_device(values, backend.device_name(array))


class Cancelled(BaseException):
    """Raised in ranks that wait, after another one failed."""


class Meeting:
    """One collective call: who is there, with what."""

    def __init__(self) -> None:
        self.calls: dict[int, Call] = {}
        self.arrays: dict[int, Any] = {}
        self.left = 0
        self.step = 0  # of the last to come
        self.total: np.ndarray | None = None

    def reduced(self, op: str) -> np.ndarray:
        if self.total is None:
            self.total = REDUCTIONS[op]([self.arrays[r] for r in sorted(self.arrays)])
        return self.total


class Mailbox:
    """What one rank sent another under one tag. Messages and receivers are numbered, and meet."""

    def __init__(self) -> None:
        self.sent: list[tuple[Call, np.ndarray, int] | None] = []
        self.receivers = 0


class Simulation:
    """Whose turn it is, and what lies between the ranks."""

    def __init__(self, world_size: int, trace: list[Message] | None = None) -> None:
        self.turns = [threading.Semaphore(0) for _ in range(world_size)]
        self.waits: list[tuple[Callable[[], bool], str] | None] = [None] * world_size
        self.ended = [False] * world_size
        self.random = [default_generator.state_dict() for _ in range(world_size)]
        self.clocks = [0] * world_size  # see `Message.step`
        self.error: BaseException | None = None
        self.meetings: dict[Any, Meeting] = {}
        self.mailboxes: dict[Any, Mailbox] = {}
        self.trace = trace

    def take_turn(self, rank: int) -> None:
        self.turns[rank].acquire()
        if self.error is not None:
            raise Cancelled
        default_generator.load_state_dict(self.random[rank])

    def wait(self, rank: int, ready: Callable[[], bool], what: str) -> None:
        """Let the others go on until ready() is true."""
        if ready():
            return
        self.waits[rank] = (ready, what)
        self.random[rank] = default_generator.state_dict()
        if not self.pass_on(rank):
            raise self.deadlock()
        self.take_turn(rank)
        self.waits[rank] = None

    def yield_turn(self, rank: int) -> None:
        """Let the others come to their turns first, for a loop that asks whether work is done."""
        self.random[rank] = default_generator.state_dict()
        self.pass_on(rank)
        self.take_turn(rank)

    def pass_on(self, rank: int) -> bool:
        """Give the turn to the next rank that can go on; False: there is none."""
        n = len(self.turns)
        for other in [(rank + i) % n for i in range(1, n + 1)]:
            wait = self.waits[other]
            if not self.ended[other] and (wait is None or self.error or wait[0]()):
                self.turns[other].release()
                return True
        return False

    def deadlock(self) -> CommunicationError:
        states = [
            f"rank {r} " + ("has ended" if self.ended[r] else f"waits in {wait[1] if wait else ''}")
            for r, wait in enumerate(self.waits)
        ]
        return CommunicationError("no rank can go on: " + "; ".join(states))

    def fail(self, rank: int, error: BaseException) -> None:
        if self.error is None:
            error.add_note(f"(on rank {rank} of {len(self.turns)})")
            self.error = error

    def end(self, rank: int) -> None:
        self.ended[rank] = True
        if not self.pass_on(rank) and not all(self.ended):
            self.error = self.deadlock()
            self.pass_on(rank)  # now they can: to end


class SimulatedWork(Work):
    def __init__(
        self, communicator: SimulatedCommunicator, call: Call,
        ready: Callable[[], bool], finish: Callable[[], Any],
    ) -> None:  # fmt: skip
        self.communicator, self.call = communicator, call
        self.ready, self.finish = ready, finish
        self.done = False
        self.result: Any = None

    def is_completed(self) -> bool:
        if not self.ready():
            self.communicator.simulation.yield_turn(self.communicator.id)
        return self.ready()

    def wait(self) -> Any:
        if not self.done:
            self.communicator.simulation.wait(self.communicator.id, self.ready, str(self.call))
            self.result, self.done = self.finish(), True
        return self.result


class SimulatedCommunicator(Communicator):
    """Some ranks of a `Simulation`; `name` tells it from the others of the same ranks.

    The communicator of a program that runs alone is one of these too, of one rank.
    """

    def __init__(
        self, simulation: Simulation, members: Sequence[int], rank: int, name: tuple[Any, ...]
    ) -> None:
        self.simulation, self.members, self.name = simulation, members, name
        self.rank, self.world_size = rank, len(members)
        self.id = members[rank]  # in the whole simulation

    def _start(
        self, call: Call, array: Any, peer: int, tag: int, result: Any, async_op: bool
    ) -> Work:
        if call.name == "send":
            return self._send(call, array, peer, tag, result)
        if call.name == "recv":
            return self._recv(call, array, peer, tag, result)
        return self._meet(call, array, peer, result)

    def _meet(self, call: Call, array: Any, root: int, result: Any) -> Work:
        key = (self.name, call.number)
        meeting = self.simulation.meetings.setdefault(key, Meeting())
        for other, theirs in meeting.calls.items():
            if not call.agrees(theirs):
                raise disagreement(other, theirs, self.rank, call)
        meeting.calls[self.rank] = call
        meeting.arrays[self.rank] = copy_on_host(
            np.zeros(0) if array is None else array
        )  # it goes on
        meeting.step = max(meeting.step, self._say(call, meeting.arrays[self.rank], None))

        def finish() -> Any:
            made = result
            if call.name == "allreduce":
                array[...] = to_where(array, meeting.reduced(call.argument))
            elif call.name == "broadcast":
                array[...] = to_where(array, meeting.arrays[root])
            elif call.name == "reduce_scatter":
                parts = np.split(meeting.reduced(call.argument), self.world_size)
                made = to_where(array, parts[self.rank].copy())
            elif call.name == "all_gather":
                rows = np.stack([meeting.arrays[r] for r in range(self.world_size)])
                made = to_where(array, rows)
            self._hear(meeting.step)
            meeting.left += 1
            if meeting.left == self.world_size:
                del self.simulation.meetings[key]
            return made

        return SimulatedWork(self, call, lambda: len(meeting.calls) == self.world_size, finish)

    def _mailbox(self, source: int, dest: int, tag: int) -> Mailbox:
        return self.simulation.mailboxes.setdefault((self.name, source, dest, tag), Mailbox())

    def _send(self, call: Call, array: Any, dest: int, tag: int, result: Any) -> Work:
        values = copy_on_host(array)
        step = self._say(call, values, self.members[dest])
        self._mailbox(self.rank, dest, tag).sent.append((call, values, step))
        return SimulatedWork(self, call, lambda: True, lambda: result)

    def _recv(self, call: Call, array: Any, source: int, tag: int, result: Any) -> Work:
        box = self._mailbox(source, self.rank, tag)
        number, box.receivers = box.receivers, box.receivers + 1

        def finish() -> Any:
            message = box.sent[number]
            assert message is not None
            theirs, values, step = message
            if (call.shape, call.dtype) != (theirs.shape, theirs.dtype):
                raise disagreement(self.rank, call, source, theirs)
            array[...] = to_where(array, values)
            box.sent[number] = None
            self._hear(step)
            return result

        return SimulatedWork(self, call, lambda: len(box.sent) > number, finish)

    def _say(self, call: Call, array: Any, dest: int | None) -> int:
        """Record a message. Returns its step."""
        step = self.simulation.clocks[self.id]
        if self.simulation.trace is not None:
            said = Message(self.id, dest, array.copy(), call.where, step, call.name)
            self.simulation.trace.append(said)
        return step

    def _hear(self, step: int) -> None:
        """A message of that step has arrived."""
        clocks = self.simulation.clocks
        clocks[self.id] = max(clocks[self.id], step + 1)

    def split(self, color: int, key: int | None = None) -> Communicator:
        wishes = self.all_gather_object((color, self.rank if key is None else key))
        group = sorted((k, r) for r, (c, k) in enumerate(wishes) if c == color)
        ranks = [r for _, r in group]
        members = [self.members[r] for r in ranks]
        name = (*self.name, self.calls, color)
        return SimulatedCommunicator(self.simulation, members, ranks.index(self.rank), name)

    def abort(self, code: int = 1) -> None:
        raise SystemExit(code)
