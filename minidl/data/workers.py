"""Worker processes that load batches, through the standard library's `multiprocessing`.

One pipe a worker. The parent hands batch k to worker k mod n and reads the answers in the same
order, so batches come in order without sorting. A dead worker closes its end of the pipe, which
the parent sees at once: an error that names it, never a hang.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import pickle
import queue
import random
import signal
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from typing import Any, NoReturn

import numpy as np

from minidl.backend import random as rng
from minidl.backend.threads import set_num_threads
from minidl.data.fetch import Collate, fetch, fetch_stream
from minidl.data.randomness import WORKER, stream

# The parent's ends of all pipes. A forked worker inherits them and must close them: as long as
# anybody holds one, the worker at its other end cannot see that the parent has died.
_parent_ends: weakref.WeakSet[Connection] = weakref.WeakSet()


@dataclass(frozen=True)
class WorkerInfo:
    """What `get_worker_info` tells (PyTorch's names)."""

    id: int
    num_workers: int
    seed: int
    dataset: Any


_info: WorkerInfo | None = None


def get_worker_info() -> WorkerInfo | None:
    """In a worker process: which one it is, of how many; None elsewhere."""
    return _info


class WorkerTraceback(Exception):
    """The cause of an exception that was raised in a worker: the traceback it had there."""

    def __str__(self) -> str:
        return f"\n\n{self.args[0]}"


# Messages ---------------------------------------------------------------------------------------


def send(connection: Connection, message: Any) -> None:
    """Send an object; its arrays travel beside the pickle, without being copied into it."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    views = [b.raw() for b in buffers]
    connection.send_bytes(pickle.dumps((head, [v.nbytes for v in views])))
    for view in views:
        if view.nbytes:
            connection.send_bytes(view)


def receive(connection: Connection) -> Any:
    """Receive what `send` sent; arrays come out writable.

    Raises:
        EOFError, OSError: the other end is closed.
    """
    head, sizes = pickle.loads(connection.recv_bytes())
    buffers = [np.empty(size, dtype=np.uint8) for size in sizes]
    for buffer in buffers:
        if buffer.nbytes:
            connection.recv_bytes_into(buffer.data)
    return pickle.loads(head, buffers=buffers)


# In the worker ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """All that a worker must know, sent once."""

    dataset: Any
    collate: Collate
    batching: tuple[int, bool] | None  # of an IterableDataset: batch_size, drop_last
    init: Callable[[int], None] | None
    num_workers: int


def work(id: int, connection: Connection, job: Work) -> None:
    """A worker's life: ("epoch", seed, epoch) and ("batch", indices) come in, batches go out."""
    for end in list(_parent_ends):
        end.close()
    # Ctrl-C and a scheduler's SIGTERM go to all processes at once, but are the parent's business:
    # it may want to finish its step, and it ends us by closing the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    set_num_threads(1)  # the workers together have the cores to themselves

    # A thread empties the pipe, so that the parent never waits for us to read a request while we
    # wait for it to read an answer.
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen() -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                requests.put(receive(connection))
        requests.put(None)

    threading.Thread(target=listen, daemon=True).start()

    seed = epoch = 0
    batches: Iterator[Any] | None = None
    started = False
    while (request := requests.get()) is not None:
        try:
            if request[0] == "epoch":
                _, seed, epoch = request
                _seed_worker(id, job, seed, epoch)
                if job.init and not started:
                    job.init(id)
                started = True
                batches = None
                continue
            if job.batching is None:
                answer = ("batch", fetch(job.dataset, request[1], job.collate, seed, epoch))
            else:
                if batches is None:
                    numbers = itertools.count(id, job.num_workers)
                    batches = fetch_stream(
                        job.dataset, job.collate, *job.batching, seed, epoch, numbers
                    )
                batch = next(batches, None)
                answer = ("end", None) if batch is None else ("batch", batch)
        except BaseException as error:
            answer = ("error", _pack_error(error, id))
            # Nobody waits for an answer to "epoch": give it to the request that follows.
            if request[0] == "epoch" and requests.get() is None:
                return
        try:
            send(connection, answer)
        except (BrokenPipeError, ConnectionResetError):
            return
        except Exception as error:  # a batch that cannot be pickled
            send(connection, ("error", _pack_error(error, id)))


def _seed_worker(id: int, job: Work, seed: int, epoch: int) -> None:
    """Different random numbers in each worker and epoch, for code that draws its own."""
    global _info
    own = int(stream(seed, epoch, WORKER, id).integers(2**32))
    _info = WorkerInfo(id, job.num_workers, own, job.dataset)
    random.seed(own)
    np.random.seed(own)
    rng.manual_seed(own)


def _pack_error(error: BaseException, id: int) -> tuple[BaseException, str]:
    """The exception, if it survives pickling, and its traceback as text."""
    text = "".join(traceback.format_exception(error))
    text = f"Traceback in DataLoader worker {id} (pid {os.getpid()}):\n{text}"
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return error, text


# In the parent ----------------------------------------------------------------------------------


class WorkerPool:
    """Worker processes, and the batches that they load."""

    def __init__(self, job: Work, context: Any = None, timeout: float = 0) -> None:
        """Start `job.num_workers` processes.

        Args:
            job: what they do.
            context: a `multiprocessing` context, the name of a start method ("fork", "spawn",
                "forkserver"), or None: the platform's default.
            timeout: seconds to wait for a batch; 0: as long as it takes.
        """
        if context is None or isinstance(context, str):
            context = multiprocessing.get_context(context)
        self.timeout, self.is_stream = timeout, job.batching is not None
        self.processes: list[Any] = []
        self.connections: list[Connection] = []
        self.unread = [0] * job.num_workers  # requests whose answer was not read
        self.run_id = 0
        # Unlike weakref.finalize, this one comes before `multiprocessing` joins its children at
        # exit, and does nothing in a forked copy of this process.
        self._finalizer = Finalize(
            self, _stop, args=(self.processes, self.connections), exitpriority=10
        )
        try:
            for id in range(job.num_workers):
                ours, theirs = context.Pipe()
                _parent_ends.add(ours)
                self.connections.append(ours)
                process = context.Process(
                    target=work, args=(id, theirs, job), name=f"DataLoader worker {id}", daemon=True
                )
                process.start()
                self.processes.append(process)
                theirs.close()
        except BaseException:
            self.close()
            raise

    @property
    def closed(self) -> bool:
        return not self._finalizer.still_active()

    def close(self) -> None:
        """Stop the processes; also done when the pool is garbage, and at exit."""
        self._finalizer()

    def run(self, tasks: Iterator[Any], seed: int, epoch: int, prefetch: int) -> Iterator[Any]:
        """The batches of an epoch, in the order of `tasks` (lists of indices).

        Every worker has up to `prefetch` batches ahead. For a stream, `tasks` is endless and says
        nothing; the workers take turns until all of them are at their end.
        """
        self.run_id += 1
        run_id = self.run_id
        for id, unread in enumerate(self.unread):  # of an epoch that was left in the middle
            for _ in range(unread):
                self._receive(id)
        for id in range(len(self.processes)):
            self._send(id, ("epoch", seed, epoch))

        turn = deque(range(len(self.processes)))  # the workers that are not at their stream's end
        pending: deque[int] = deque()

        def hand_out() -> None:
            if turn and (task := next(tasks, None)) is not None:
                id = turn[0]
                turn.rotate(-1)
                self._send(id, ("batch", task))
                self.unread[id] += 1
                pending.append(id)

        for _ in range(prefetch * len(self.processes)):
            hand_out()
        while pending:
            id = pending.popleft()
            kind, value = self._receive(id)
            if kind == "error":
                error, text = value
                raise error from WorkerTraceback(text)
            if kind == "end":
                if id in turn:
                    turn.remove(id)
                hand_out()
                continue
            hand_out()
            yield value
            if self.run_id != run_id:
                raise RuntimeError(
                    "this iterator ended when a newer one started on the same DataLoader: with "
                    "persistent_workers=True it has one at a time"
                )

    def _send(self, id: int, message: Any) -> None:
        try:
            send(self.connections[id], message)
        except (BrokenPipeError, ConnectionResetError):
            self._raise_dead(id)

    def _receive(self, id: int) -> Any:
        connection = self.connections[id]
        try:
            if self.timeout and not connection.poll(self.timeout):
                self.close()
                raise TimeoutError(f"DataLoader worker {id} gave no batch in {self.timeout} s")
            message = receive(connection)
        except (EOFError, ConnectionResetError):
            self._raise_dead(id)
        self.unread[id] -= 1
        return message

    def _raise_dead(self, id: int) -> NoReturn:
        process = self.processes[id]
        process.join(5)
        code, pid = process.exitcode, process.pid
        if code is None:
            how = "closed its pipe"
        elif code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
            if code == -signal.SIGKILL:
                how += " (out of memory?)"
        else:
            how = f"ended with exit code {code}"
        self.close()
        raise RuntimeError(
            f"DataLoader worker {id} (pid {pid}) {how} while it was loading data; "
            "num_workers=0 loads in this process and shows where"
        ) from None


def _stop(processes: list[Any], connections: list[Connection]) -> None:
    """Close the pipes, on which the workers end; kill those that do not within a second."""
    for connection in connections:
        connection.close()
    deadline = time.monotonic() + 1
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        process.kill()
        process.join()
        process.close()
    processes.clear()
    connections.clear()
