"""Ranks as processes that `mpirun` has started, over MPI (mpi4py).

Three things are added to MPI:

- *Progress.* MPI's own `Iallreduce` hardly moves until somebody asks for it. So asynchronous calls
  are handed to one polite thread, which runs them one after the other and sleeps between two looks.
- *Agreement.* Before a collective call each rank tells its right neighbour what it is about to do.
  If every rank agrees with its left neighbour, all agree. A message has its description sent ahead.
- *Watching.* A rank that waits long says so to all, and hears who else waits. A circle of ranks
  that wait for one another, or for one that has ended, is an error with every rank's place in it;
  also where they wait in calls of different communicators.

Arrays of a GPU go through the host (`staging.py`); messages from one rank to another directly,
where MPI says that it sees a GPU's memory. (Its asynchronous sums do not on Open MPI, be it
CUDA-aware or not.)
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from minidl import backend

# Open MPI's own choice for Iallreduce sends 2 lg p S bytes (a binomial tree) where ranks are fewer
# than 4 or the sum is made in place; Rabenseifner's sends 2(p-1)/p S, and adds in the same order.
os.environ.setdefault("OMPI_MCA_coll_libnbc_iallreduce_algorithm", "3")

from mpi4py import MPI

from minidl.distributed.communicator import (
    REDUCTIONS,
    Call,
    CommunicationError,
    Communicator,
    Work,
    as_bytes,
    disagreement,
    on_gpu,
)
from minidl.distributed.staging import Staged

AGREE, NOTE, HEADER = 1, 2, 16  # tags of control messages; a message's header adds its own tag
NATIVE = "bBhHiIlLqQfd"  # dtypes that MPI adds up; the sum of others is made by each rank
POLITE = 2e-4  # seconds that the thread sleeps between two looks

Name = tuple[int, ...]  # of a communicator: the same on all its ranks
Until = Callable[[Callable[[], bool], "Status"], None]


class Status(NamedTuple):
    """What a rank that waits tells the others. Ranks are those of the world."""

    kind: str  # "collective", "recv", "send", "transfer"; "goes on", "ended"
    call: str = ""
    of: int = 0  # of recv and send: the other rank; of a collective call: its number
    name: Name = ()  # of a collective call: its communicator, and ...
    members: tuple[int, ...] = ()  # ... the ranks of that
    number: int = 0  # counts this rank's waits
    posted: Mapping[Name, int] = MappingProxyType(
        {}
    )  # collective calls made by communicator, be they over or not


def stuck(me: int, states: dict[int, Status]) -> list[int]:
    """The ranks through which `me` waits for one that never comes, or [] while there is hope.

    Each waits for *all* it waits for, so one way into a circle, or to a rank that has ended, is
    enough.
    """

    def waits_for(rank: int) -> list[int]:
        state = states.get(rank)
        if state is None:  # it computes
            return []
        if state.kind == "collective":
            others = [r for r in state.members if r in states and r != rank]
            return [r for r in others if states[r].posted.get(state.name, 0) < state.of]
        return [state.of] if state.kind in ("recv", "send") else []

    def search(path: list[int]) -> list[int]:
        for other in waits_for(path[-1]):
            if other in path or (other in states and states[other].kind == "ended"):
                return path if other in path else [*path, other]
            if found := search([*path, other]):
                return found
        return []

    return search([me])


class Watch:
    """What this process tells and hears while it waits, whatever the communicator."""

    def __init__(self) -> None:
        self.control = base.Dup()
        self.rank, self.world_size = self.control.Get_rank(), self.control.Get_size()
        self.states: dict[int, Status] = {}  # of the ranks that wait, as far as they have said so
        self.posted: dict[Name, int] = {}
        self.waits = 0
        self.notes: list[Any] = []  # requests of notes on their way

    def tell(self, status: Status) -> None:
        status = status._replace(number=self.waits, posted=dict(self.posted))
        self.notes = [request for request in self.notes if not request.Test()]
        for other in range(self.world_size):
            if other != self.rank:
                self.notes.append(self.control.isend((self.rank, status), other, NOTE))
        self.states[self.rank] = status

    def hear(self) -> None:
        while (message := self.control.improbe(MPI.ANY_SOURCE, NOTE)) is not None:
            rank, status = message.recv()
            self.states[rank] = status
        self.states = {r: s for r, s in self.states.items() if s.kind != "goes on"}

    def story(self, ranks: Iterable[int]) -> str:
        """Where some ranks are."""
        parts = []
        for rank in ranks:
            state = self.states.get(rank)
            if state is None:
                parts.append(f"rank {rank} computes, or is stopped")
            elif state.kind == "ended":
                calls = sum(state.posted.values())
                parts.append(f"rank {rank} has ended after {calls} collective calls")
            else:
                parts.append(f"rank {rank} waits in {state.call}")
        return "; ".join(parts)

    def end(self, patience: float) -> None:
        """Tell the others that no more will come."""
        self.waits += 1
        self.tell(Status("ended"))
        limit = time.perf_counter() + patience
        while self.notes and time.perf_counter() < limit:
            self.notes = [request for request in self.notes if not request.Test()]


class MPICommunicator(Communicator):
    """
    Attributes:
        kind: by what sums of a GPU's arrays go: "mpi", or "nccl".

    Args:
        comm: mpi4py's communicator; its duplicates are used, so what you do with it is apart.
        name: tells it from the others of this process, on all its ranks alike.
        check: exchange descriptions of calls, and watch.
        timeout: seconds that a call may wait, whatever the reason.
        patience: seconds of waiting after which a rank tells the others.
    """

    kind = "mpi"

    def __init__(
        self, comm: MPI.Comm, check: bool = True, timeout: float = 1800, patience: float = 2.0,
        name: Name = (),
    ) -> None:  # fmt: skip
        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            raise RuntimeError(
                "this MPI was started without MPI_THREAD_MULTIPLE, which the thread that sends "
                "gradients needs: leave mpi4py.rc.thread_level at its default"
            )
        self.data, self.control = comm.Dup(), comm.Dup()
        self.rank, self.world_size = comm.Get_rank(), comm.Get_size()
        self.name = name
        here, world = comm.Get_group(), base.Get_group()
        self.members = tuple(here.Translate_ranks(list(range(self.world_size)), world))
        self.check, self.timeout, self.patience = check, timeout, patience
        self.failure: BaseException | None = None  # of the thread
        self.works: queue.SimpleQueue[MPIWork | None] = queue.SimpleQueue()
        self.last: MPIWork | None = None  # of the works given to the thread
        self.thread: threading.Thread | None = None
        self.hurry = False  # the program does nothing but wait for the thread
        self.headers: dict[tuple[int, int], list[Call]] = {}  # (source, tag): those that came
        self.receivers: dict[tuple[int, int], int] = {}
        opened.add(self)

    # Calls ----------------------------------------------------------------------------------------

    def _start(
        self, call: Call, array: Any, peer: int, tag: int, result: Any, async_op: bool
    ) -> Work:
        self._announce()
        work = MPIWork(self, call, array, peer, tag, result)
        if call.name == "send":
            work.post_send()
        elif call.name == "recv":
            work.post_recv()
        else:
            self._begin(work, async_op)
        return work

    def _announce(self) -> None:
        """Before every call."""
        if self.failure is not None:
            raise self.failure
        watch().posted[self.name] = self.calls

    def _begin(self, work: MPIWork, async_op: bool) -> None:
        """A collective call: at once, or by the thread."""
        if async_op or (self.last is not None and not self.last.over.is_set()):
            self.last = work  # to the thread, behind those that it has
            if self.thread is None:
                self.thread = threading.Thread(target=self._progress, name="MPI", daemon=True)
                self.thread.start()
            self.works.put(work)
        else:
            work.run(self.until)
            work.over.set()

    def _progress(self) -> None:
        """The polite thread: one collective call at a time, in order."""

        def until(ready: Callable[[], bool], status: Status) -> None:
            started = time.monotonic()
            while not ready():
                time.sleep(0 if self.hurry else POLITE)
                if time.monotonic() - started > self.timeout:
                    raise self.late(status)

        while (work := self.works.get()) is not None:
            try:
                if self.failure is None:
                    work.run(until)
            except BaseException as error:
                self.failure = error
            work.over.set()

    def split(self, color: int, key: int | None = None) -> Communicator:
        self.barrier()  # behind all works of the thread; and all ranks are here
        comm = self.data.Split(color, self.rank if key is None else key)
        name = (*self.name, self.calls, color)
        return type(self)(comm, self.check, self.timeout, self.patience, name)

    def abort(self, code: int = 1) -> None:
        last_words()
        self.data.Abort(code)

    # Waiting ------------------------------------------------------------------------------------

    def status(self, kind: str, call: Call, peer: int = -1) -> Status:
        if kind == "collective":
            return Status(kind, str(call), call.number, self.name, self.members)
        return Status(kind, str(call), self.members[peer])

    def until(self, ready: Callable[[], bool], status: Status) -> None:
        """Wait for ready(), in the program's own thread, with an eye on the others."""
        others = watch()
        others.waits += 1
        started = time.perf_counter()
        look, told, suspects = started + self.patience, False, None
        try:
            while not ready():
                if self.failure is not None:
                    raise self.failure
                now = time.perf_counter()
                time.sleep(0 if now - started < 1e-3 else 1e-4)
                if now - started > self.timeout:
                    raise self.late(status)
                if not self.check or now < look or self.world_size == 1:
                    continue
                look = now + self.patience / 4
                if not told:
                    others.tell(status)
                    told = True
                others.hear()
                path = stuck(others.rank, others.states)
                seen = [(rank, others.states.get(rank)) for rank in path]
                if path and seen == suspects:  # and so it was at the last look
                    raise CommunicationError("no rank can go on: " + others.story(path))
                suspects = seen
        finally:
            if told:
                others.tell(Status("goes on"))

    def late(self, status: Status) -> CommunicationError:
        others = watch()
        others.hear()
        return CommunicationError(
            f"rank {others.rank} has waited {self.timeout:g} s in {status.call}. As far as it "
            "knows: " + others.story(r for r in self.members if r != others.rank)
        )

    def close(self) -> None:
        """Finish what the thread has."""
        if self.thread is not None:
            self.works.put(None)
            self.thread.join(self.patience)


class MPIWork(Work):
    def __init__(
        self, communicator: MPICommunicator, call: Call,
        array: Any, peer: int, tag: int, result: Any,
    ) -> None:  # fmt: skip
        self.communicator, self.call, self.array = communicator, call, array
        self.peer, self.tag, self.result = peer, tag, result
        self.over = threading.Event()
        self.requests: list[Any] = []
        self.staged: Staged | None = None
        writes = call.name in ("allreduce", "recv") or (
            call.name == "broadcast" and peer != communicator.rank
        )
        self.comes_back = writes  # to the GPU, once it is over
        if on_gpu(array):
            if call.name in ("send", "recv") and cuda_aware():
                backend.cupy().cuda.get_current_stream().synchronize()  # of which MPI knows nothing
            else:
                self.staged = Staged(array, down=not writes or call.name == "allreduce")
                self.array = self.staged.host

    def is_completed(self) -> bool:
        if self.requests:
            return all(request.Test() for request in self.requests)
        return self.over.is_set()

    def wait(self) -> Any:
        self.wait_on_host()
        if self.staged is not None:
            self.staged.wait()
            if isinstance(self.result, np.ndarray):  # a new one
                self.result = backend.to_device(self.result, f"cuda:{self.staged.device}")
        return self.result

    def wait_on_host(self) -> None:
        c = self.communicator
        if not self.over.is_set():
            if self.call.name == "recv":
                self.check_header()
                c.until(self.is_completed, c.status("transfer", self.call))
                self.copy_back()
            elif self.call.name == "send":
                c.until(self.is_completed, c.status("send", self.call, self.peer))
            else:
                c.hurry = True
                try:
                    c.until(self.over.is_set, c.status("collective", self.call))
                finally:
                    c.hurry = False
            self.over.set()
        if c.failure is not None:
            raise c.failure

    def copy_back(self) -> None:
        if self.staged is not None and self.comes_back:
            self.staged.up()

    # From one rank to another -----------------------------------------------------------------

    def post_send(self) -> None:
        c = self.communicator
        if self.staged is not None:
            c.until(self.staged.is_copied, c.status("transfer", self.call))
        if c.check:
            self.requests.append(c.control.isend(self.call, self.peer, HEADER + self.tag))
        self.requests.append(c.data.Isend(as_bytes(self.array), self.peer, self.tag))

    def post_recv(self) -> None:
        c = self.communicator
        key = (self.peer, self.tag)
        self.receiver = c.receivers[key] = c.receivers.get(key, 0) + 1
        self.requests = [c.data.Irecv(as_bytes(self.array), self.peer, self.tag)]

    def check_header(self) -> None:
        """Wait for the description of the message, which comes first, and compare."""
        c = self.communicator
        if not c.check:
            return
        headers = c.headers.setdefault((self.peer, self.tag), [])

        def came() -> bool:
            message = c.control.improbe(self.peer, HEADER + self.tag)
            if message is not None:
                headers.append(message.recv())
            return len(headers) >= self.receiver

        if len(headers) < self.receiver:
            c.until(came, c.status("recv", self.call, self.peer))
        theirs = headers[self.receiver - 1]
        if (theirs.shape, theirs.dtype) != (self.call.shape, self.call.dtype):
            raise disagreement(c.rank, self.call, self.peer, theirs)

    # Collective calls ---------------------------------------------------------------------------

    def run(self, until: Until) -> None:
        c = self.communicator
        status = c.status("collective", self.call)
        if c.check and c.world_size > 1:
            self.agree(until, status)
        if self.staged is not None:
            until(self.staged.is_copied, status)
        request, finish = self.begin()
        until(request.Test, status)
        self.result = finish()
        self.copy_back()

    def agree(self, until: Until, status: Status) -> None:
        c = self.communicator
        left, right = (c.rank - 1) % c.world_size, (c.rank + 1) % c.world_size
        sent = c.control.isend(self.call, right, AGREE)
        came: list[Call] = []

        def heard() -> bool:
            message = c.control.improbe(left, AGREE)
            if message is not None:
                came.append(message.recv())
            return bool(came)

        until(heard, status)
        if not self.call.agrees(came[0]):
            raise disagreement(c.rank, self.call, left, came[0])
        until(sent.Test, status)

    def begin(self) -> tuple[Any, Callable[[], Any]]:
        """Start MPI's own call: its request, and what makes our result afterwards."""
        comm, x, n = self.communicator.data, self.array, self.communicator.world_size
        name, argument = self.call.name, self.call.argument
        if name == "barrier":
            return comm.Ibarrier(), lambda: None
        if name == "broadcast":
            return comm.Ibcast(as_bytes(x), self.peer), lambda: self.result
        native = argument == "sum" and x.dtype.char in NATIVE
        if name != "all_gather" and native and x.size >= n:  # (fewer are added in another order)
            if name == "allreduce":
                return comm.Iallreduce(MPI.IN_PLACE, x), lambda: self.result
            part = np.empty((len(x) // n, *x.shape[1:]), x.dtype)
            return comm.Ireduce_scatter_block(x, part), lambda: part

        everything = np.empty((n, *x.shape), x.dtype)
        request = comm.Iallgather(as_bytes(x), as_bytes(everything))
        if name == "all_gather":
            return request, lambda: everything

        def reduce() -> Any:  # MPI has no float16, and its maximum may lose a NaN
            total = REDUCTIONS[argument](list(everything))
            if name == "reduce_scatter":
                return np.split(total, n)[self.communicator.rank].copy()
            x[...] = total
            return self.result

        return request, reduce


@functools.cache
def cuda_aware() -> bool:
    """Whether MPI reads and writes a GPU's memory by itself, as it says.

    (``MPIX_Query_cuda_support`` of Open MPI and MPICH; MINIDL_CUDA_AWARE=0 or 1 contradicts it.)
    """
    wish = os.environ.get("MINIDL_CUDA_AWARE", "")
    if wish in ("0", "1"):
        return wish == "1"
    try:
        return bool(ctypes.CDLL(MPI.__file__).MPIX_Query_cuda_support())
    except (OSError, AttributeError):
        return False


# The program's end ----------------------------------------------------------------------------

opened: set[MPICommunicator] = set()
base: MPI.Comm = MPI.COMM_WORLD  # of all ranks; of those that are left, after a loss: `ulfm.py`
settings: tuple[bool, float, float] = (True, 1800, 2.0)  # check, timeout, patience


@functools.cache
def watch() -> Watch:
    """This process's. (Opened by all ranks together, with the world.)"""
    return Watch()


def world(
    check: bool, timeout: float, patience: float, kind: type[MPICommunicator] = MPICommunicator
) -> MPICommunicator:
    """All ranks that mpirun started. From here on, an uncaught exception on one ends all."""
    global base, settings
    settings = check, timeout, patience
    if (parent := MPI.Comm.Get_parent()) != MPI.COMM_NULL:  # in the place of one that was lost
        from minidl.distributed import ulfm

        base = ulfm.join(parent)
    watch()
    communicator = kind(base, *settings)
    before = sys.excepthook

    def end_all(kind: Any, error: Any, traceback: Any) -> None:
        sys.stdout.flush()
        print(f"rank {base.Get_rank()} of {base.Get_size()}:", file=sys.stderr)
        before(kind, error, traceback)
        last_words()
        base.Abort(1)

    def end_all_of_thread(args: threading.ExceptHookArgs) -> None:
        end_all(args.exc_type, args.exc_value, args.exc_traceback)

    sys.excepthook = end_all
    threading.excepthook = end_all_of_thread
    atexit.register(close_all)
    return communicator


def last_words() -> None:
    """Before all is ended: what mpirun has not read by then (MPICH's) nobody reads."""
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(0.2)


def close_all() -> None:
    every = list(opened)
    for communicator in every:
        communicator.close()
    if any(communicator.check for communicator in every):
        watch().end(max(communicator.patience for communicator in every))
