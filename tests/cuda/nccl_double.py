"""A strict double of ``cupy.cuda.nccl``, beside that of CuPy: each process is a rank under mpirun.

NCCL trusts its caller: where ranks disagree, it hangs or adds up garbage; a stream that has not
been waited for gives half-written sums. Here all of it is an error:

- a unique id that is not bytes(128), ranks on one GPU ("Duplicate GPU detected", as NCCL says);
- pointers that are not a device's memory, unknown datatypes, overlapping buffers;
- ranks whose calls differ in name, count, datatype, reduction or root;
- memory that another stream may still be writing, before the call and after it;
- groups that are not closed, a communicator that was destroyed, another device than its own.

Messages go over MPI. A thread, the "GPU", goes on with what is in the streams.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from tests.cuda import cupy_double as double
from tests.cuda.cupy_double import Refused, here

DTYPES = {0: "i1", 1: "u1", 2: "i4", 3: "u4", 4: "i8", 5: "u8", 6: "f2", 7: "f4", 8: "f8"}
SUM, PROD, MAX, MIN = range(4)
REDUCE = {SUM: np.add, PROD: np.multiply, MAX: np.fmax, MIN: np.fmin}  # which lose NaNs, as NCCL's

transport = MPI.COMM_WORLD.Dup()
mailbox: dict[tuple[bytes, int, int], Any] = {}  # (unique id, number, rank): header and data
sent: list[Any] = []
mail = threading.Lock()
group = threading.local()
calls: list[str] = []  # what was launched, for the tests; a group is one


class NcclError(RuntimeError):
    """``cupy.cuda.nccl.NcclError``."""


def get_unique_id() -> bytes:
    return os.urandom(128)


def get_version() -> int:
    return 23203


def groupStart() -> None:
    group.depth = getattr(group, "depth", 0) + 1
    group.works = getattr(group, "works", [])


def groupEnd() -> None:
    if getattr(group, "depth", 0) == 0:
        raise NcclError("NCCL_ERROR_INVALID_USAGE: groupEnd without groupStart")
    group.depth -= 1
    if group.depth == 0:
        works, group.works = group.works, []
        if works:
            launch(works)


def launch(works: list[Work]) -> None:
    calls.append(" ".join(work.header[0] for work in works))
    for work in works:
        work.take_memory()
    for work in works:
        with work.stream.lock:
            work.stream.pending.append(work)


def memory(pointer: int, size: int) -> np.ndarray:
    """A device's bytes at an address."""
    for start, (_, _, whole) in double.writes.items():
        if start <= pointer and pointer + size <= start + whole:
            return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))
    raise NcclError(
        f"NCCL_ERROR_INVALID_ARGUMENT: {size} bytes at {pointer} are no device's memory"
    )


def whole(part: np.ndarray) -> tuple[int, int]:
    """Where the array that it is a part of begins, and its bytes."""
    at = double.address(part)
    for start, (_, _, size) in double.writes.items():
        if start <= at < start + size:
            return start, size
    raise AssertionError


class Work(double.Pending):
    def __init__(
        self, comm: NcclCommunicator, header: tuple[Any, ...], source: tuple[int, int],
        target: tuple[int, int], stream: int,
    ) -> None:  # fmt: skip
        if comm.destroyed:
            raise NcclError("NCCL_ERROR_INVALID_ARGUMENT: the communicator was destroyed")
        if stream not in double.streams:
            raise NcclError(f"NCCL_ERROR_INVALID_ARGUMENT: there is no stream {stream}")
        self.stream = double.streams[stream]
        if {here.device, self.stream.device_id} != {comm.device}:
            raise NcclError(
                f"NCCL_ERROR_INVALID_USAGE: a communicator of device {comm.device} on a stream of "
                f"device {self.stream.device_id}, while device {here.device} is current"
            )
        if header[2] not in DTYPES:
            raise NcclError(f"NCCL_ERROR_INVALID_ARGUMENT: datatype {header[2]}")
        self.comm, self.header = comm, header
        self.source, self.target = memory(*source), memory(*target)
        self.posted = False
        self.number = comm.number = comm.number + 1

    def __repr__(self) -> str:
        return f"NCCL's call {self.number} {self.header}"

    def take_memory(self) -> None:
        """At the launch: what it reads must be there, and who reads what it writes must wait."""
        for piece in (self.source, self.target):
            start, size = whole(piece)
            by, moment, _ = double.writes[start]
            if by is not self.stream and (
                max(self.stream.knows.get(by, 0), double.HOST.get(by, 0)) < moment
            ):
                raise Refused(f"{by} may still be writing what {self} uses on {self.stream}")
        start, size = whole(self.target)
        double.writes[start] = (self.stream, next(double.clock), size)

    def step(self) -> bool:
        comm = self.comm
        if not self.posted:  # first in its stream: what comes before is done
            self.posted = True
            message = (comm.id, self.number, comm.rank, self.header, self.source.copy())
            with mail:
                for rank, other in enumerate(comm.world):
                    if rank != comm.rank:
                        sent.append(transport.isend(message, other, 0))
                mailbox[comm.id, self.number, comm.rank] = message[3:]
        receive()
        keys = [(comm.id, self.number, rank) for rank in range(len(comm.world))]
        with mail:
            if any(key not in mailbox for key in keys):
                return False
            found = [mailbox.pop(key) for key in keys]
        headers = {header for header, _ in found}
        if len(headers) > 1:
            raise Refused(f"NCCL would hang, or add up garbage: the ranks call {headers}")
        self.target[...] = self.result([data for _, data in found])
        return True

    def result(self, data: list[np.ndarray]) -> np.ndarray:
        name, _, datatype, argument = self.header
        if name == "broadcast":
            return data[argument]
        if name == "allGather":
            return np.concatenate(data)
        numbers = [d.view(DTYPES[datatype]) for d in data]
        total = numbers[-1]  # a ring that ends at the first rank: not the order of MPI's tree
        with np.errstate(all="ignore"):
            for x in numbers[-2::-1]:
                total = REDUCE[argument](total, x)
        if name == "reduceScatter":
            total = np.split(total, len(data))[self.comm.rank]
        return total.view(np.uint8)


def receive() -> None:
    with mail:
        sent[:] = [request for request in sent if not request.Test()]
        while (message := transport.improbe(MPI.ANY_SOURCE, 0)) is not None:
            unique, number, rank, header, data = message.recv()
            mailbox[unique, number, rank] = (header, data)


class NcclCommunicator:
    """``cupy.cuda.nccl.NcclCommunicator``."""

    def __init__(self, ndev: int, commId: bytes, rank: int) -> None:
        if type(commId) is not bytes:
            raise TypeError(f"Argument 'commId' has incorrect type: {type(commId).__name__}")
        if len(commId) != 128:
            raise ValueError(f"commId length {len(commId)} != 128.")
        if not 0 <= rank < ndev:
            raise NcclError("NCCL_ERROR_INVALID_ARGUMENT: invalid argument")
        self.id, self.rank, self.device = commId, rank, here.device
        self.number, self.destroyed = 0, False
        others = self.meet(ndev)
        self.world = [world for world, _ in others]
        for i, (_, device) in enumerate(others):
            if device in (d for _, d in others[:i]):
                raise NcclError(
                    "NCCL_ERROR_INVALID_USAGE: invalid usage (Duplicate GPU detected: rank "
                    f"{i} on CUDA device {device})"
                )

    def meet(self, ndev: int) -> list[tuple[int, int]]:
        """All ranks' places in the world, and their devices: files in a folder named by the id."""
        folder = Path(tempfile.gettempdir()) / f"nccl-{self.id[:16].hex()}"
        folder.mkdir(exist_ok=True)
        (folder / f"{self.rank}.new").write_text(json.dumps([transport.Get_rank(), self.device]))
        (folder / f"{self.rank}.new").rename(folder / f"{self.rank}.json")
        files = [folder / f"{rank}.json" for rank in range(ndev)]
        limit = time.monotonic() + 30
        while not all(file.exists() for file in files):
            if time.monotonic() > limit:
                raise Refused("NCCL would hang: not all ranks have come to this communicator")
            time.sleep(0.01)
        found = [tuple(json.loads(file.read_text())) for file in files]
        (folder / f"{self.rank}.left").touch()
        if len(list(folder.glob("*.left"))) == ndev:
            shutil.rmtree(folder, ignore_errors=True)
        return found  # type: ignore[return-value]

    def call(
        self, name: str, send: int, receive: int, count: int, sizes: tuple[int, int],
        datatype: int, argument: int, stream: int,
    ) -> None:  # fmt: skip
        item = np.dtype(DTYPES.get(datatype, "u1")).itemsize
        source, target = (count * item * k for k in sizes)
        shift = {"allGather": self.rank * source, "reduceScatter": -self.rank * target}
        at = receive + shift.get(name, 0)  # a call in place
        if send < receive + target and receive < send + source and send != at:
            raise Refused(f"{name}: the buffers overlap, and are not NCCL's case of in place")
        header = (name, count, datatype, argument)
        work = Work(self, header, (send, source), (receive, target), stream)
        if getattr(group, "depth", 0):
            group.works.append(work)
        else:
            launch([work])

    def allReduce(
        self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, stream: int
    ) -> None:
        self.call("allReduce", sendbuf, recvbuf, count, (1, 1), datatype, op, stream)

    def broadcast(
        self, sendbuff: int, recvbuff: int, count: int, datatype: int, root: int, stream: int
    ) -> None:
        if not 0 <= root < len(self.world):
            raise NcclError(f"NCCL_ERROR_INVALID_ARGUMENT: root {root}")
        self.call("broadcast", sendbuff, recvbuff, count, (1, 1), datatype, root, stream)

    def reduceScatter(
        self, sendbuf: int, recvbuf: int, recvcount: int, datatype: int, op: int, stream: int
    ) -> None:
        sizes = len(self.world), 1
        self.call("reduceScatter", sendbuf, recvbuf, recvcount, sizes, datatype, op, stream)

    def allGather(self, sendbuf: int, recvbuf: int, count: int, datatype: int, stream: int) -> None:
        self.call("allGather", sendbuf, recvbuf, count, (1, len(self.world)), datatype, 0, stream)

    def check_async_error(self) -> None:
        pass

    def destroy(self) -> None:
        self.destroyed = True

    abort = destroy


def gpu() -> None:
    """Goes on with what is in the streams."""
    while True:
        for stream in list(double.streams.values()):
            with contextlib.suppress(Exception):  # whoever waits for it hears of it
                stream.progress()
        time.sleep(1e-3)


def install() -> None:
    """Give a double of CuPy its NCCL. All ranks of the world must come."""
    api = json.loads(Path(__file__).with_name("cupy_api.json").read_text())["nccl"]
    nccl = sys.modules["cupy.cuda.nccl"]
    own = (NcclCommunicator, NcclError, get_unique_id, get_version, groupStart, groupEnd)
    for name, value in {"available": True, **api["constants"]}.items():
        setattr(nccl, name, value)
    for thing in own:
        setattr(nccl, thing.__name__, thing)
    threading.Thread(target=gpu, name="GPU", daemon=True).start()
