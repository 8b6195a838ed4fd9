"""NCCL: sums over GPUs that never see the host (through CuPy, `cupy.cuda.nccl`).

Collective calls on arrays of a GPU go to NCCL, all else to MPI. So do messages from one rank to
another: NCCL's hold up all that comes after them on their side until the other side is there, and
two ranks that send to one another first would wait for ever.

- *One queue.* A process's calls, of all its communicators, are put on one stream in the program's
  order. (Kernels of several communicators that wait for one another in different orders hang.)
- *Events.* The queue waits for what the program has asked of the GPU before the call, and what it
  asks after `wait()` waits for the queue. The host waits for neither.
- *Agreement* goes over MPI as ever: before a call; beside one with ``async_op=True``, whose
  `wait()` then raises what the ranks disagree about.

The order in which NCCL adds up is its own: of more than two ranks the last bits are not MPI's.
"""

from __future__ import annotations

import functools
import socket
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

from mpi4py import MPI

from minidl import backend, cuda
from minidl.distributed.communicator import REDUCTIONS, Call, Work, in_place, on_gpu, where
from minidl.distributed.mpi import MPICommunicator, MPIWork, Until

# Dtypes that NCCL adds up. (Its maximum may lose a NaN: that of the ranks' numbers is made here.)
NATIVE = {
    "b": "NCCL_INT8", "B": "NCCL_UINT8", "i": "NCCL_INT32", "I": "NCCL_UINT32", "l": "NCCL_INT64",
    "L": "NCCL_UINT64", "q": "NCCL_INT64", "Q": "NCCL_UINT64", "e": "NCCL_FLOAT16",
    "f": "NCCL_FLOAT32", "d": "NCCL_FLOAT64",
}  # fmt: skip


def library() -> Any:
    from cupy.cuda import nccl

    return nccl


@functools.cache
def queue(device: int) -> Any:
    """The stream of all calls on this GPU."""
    with backend.gpu(device):
        return backend.cupy().cuda.Stream(non_blocking=True)


class NCCLCommunicator(MPICommunicator):
    """An `MPICommunicator` whose collective calls on a GPU's arrays are NCCL's."""

    kind = "nccl"
    nccl: Any = None  # NCCL's communicator, once it is needed
    device = -1  # its GPU

    def _start(
        self, call: Call, array: Any, peer: int, tag: int, result: Any, async_op: bool
    ) -> Work:
        if call.name in ("send", "recv") or not on_gpu(array):
            return super()._start(call, array, peer, tag, result, async_op)
        work = NCCLWork(self, call, array, peer, result)
        self._enter(work, async_op)
        return work

    def _enter(self, work: NCCLWork, async_op: bool) -> None:
        self._announce()
        ahead = async_op and self.nccl is not None
        if ahead:
            work.launch()
        self._begin(work, ahead and self.check)
        if async_op and not ahead:  # the first call: all ranks must be there to make a connection
            work.wait_on_host()
            work.launch()

    def connect(self, device: int) -> Any:
        """NCCL's communicator. All ranks must come, with the same call.

        Raises:
            RuntimeError: ranks share a GPU.
            ValueError: an array on another GPU than at first.
        """
        if self.nccl is None:
            if shared := sharing(self.control.allgather(place(device))):
                raise RuntimeError(f"{shared}. {INSTEAD}")
            unique = self.control.bcast(library().get_unique_id() if self.rank == 0 else None)
            self.nccl = library().NcclCommunicator(self.world_size, unique, self.rank)
            self.device = device
        if device != self.device:
            raise ValueError(
                f"rank {self.rank} has sent from cuda:{self.device} so far, now an array on "
                f"cuda:{device} came: a rank has one GPU (minidl.cuda.set_device)"
            )
        self.nccl.check_async_error()
        return self.nccl

    def broadcast_all(self, arrays: Sequence[Any], root: int = 0) -> None:
        targets = [in_place(x) for x in arrays]
        if not targets or not on_gpu(targets[0]):
            return super().broadcast_all(arrays, root)
        targets = [x for x in targets if x.size] or targets[:1]
        self._check_rank(root)
        self.calls += 1
        size = sum(x.nbytes for x in targets)
        call = Call(self.calls, "broadcast", f"root={root}", (size,), "uint8 on a GPU", where())
        work = NCCLWork(self, call, targets, root, None)
        self._enter(work, async_op=False)
        work.wait()

    def barrier(self) -> None:
        super().barrier()
        if self.nccl is not None:
            queue(self.device).synchronize()

    def close(self) -> None:
        super().close()
        if self.nccl is not None:
            self.nccl.abort() if self.failure else self.nccl.destroy()
            self.nccl = None


class NCCLWork(MPIWork):
    communicator: NCCLCommunicator

    def __init__(
        self, communicator: NCCLCommunicator, call: Call, array: Any, peer: int, result: Any
    ) -> None:
        super().__init__(communicator, call, None, peer, 0, result)
        self.arrays = array if isinstance(array, list) else [array]
        self.done: Any = None  # NCCL's part

    def run(self, until: Until) -> None:
        c = self.communicator
        if c.check and c.world_size > 1:
            self.agree(until, c.status("collective", self.call))

    def launch(self) -> None:
        """Put the call in the queue."""
        c, cp, device = self.communicator, backend.cupy(), self.arrays[0].device.id
        with backend.gpu(device):
            comm, stream = c.connect(device), queue(device)
            self.out = self.place()
            stream.wait_event(cp.cuda.get_current_stream().record())
            if self.arrays[0].size:
                self.enqueue(comm, stream.ptr)
            self.done = stream.record()

    @property
    def native(self) -> bool:
        """Whether NCCL makes the result itself; else it brings the numbers together."""
        return self.call.argument == "sum" and self.arrays[0].dtype.char in NATIVE

    def place(self) -> Any:
        """Where it puts what it makes, if that is new."""
        x, n = self.arrays[0], self.communicator.world_size
        if self.call.name == "reduce_scatter" and self.native:
            return backend.cupy().empty((len(x) // n, *x.shape[1:]), x.dtype)
        if self.call.name == "all_gather" or (self.call.argument in REDUCTIONS and not self.native):
            return backend.cupy().empty((n, *x.shape), x.dtype)
        return None

    def enqueue(self, comm: Any, stream: int) -> None:
        nccl, x = library(), self.arrays[0]
        if self.call.name == "broadcast":
            nccl.groupStart()  # one launch for all
            try:
                for y in self.arrays:
                    at = y.data.ptr
                    comm.broadcast(at, at, y.nbytes, nccl.NCCL_UINT8, self.peer, stream)
            finally:
                nccl.groupEnd()
        elif self.call.name == "all_gather" or not self.native:
            comm.allGather(x.data.ptr, self.out.data.ptr, x.nbytes, nccl.NCCL_UINT8, stream)
        else:
            kind, op = getattr(nccl, NATIVE[x.dtype.char]), nccl.NCCL_SUM
            if self.call.name == "allreduce":
                comm.allReduce(x.data.ptr, x.data.ptr, x.size, kind, op, stream)
            else:
                to, size = self.out.data.ptr, self.out.size
                comm.reduceScatter(x.data.ptr, to, size, kind, op, stream)

    def finish(self) -> Any:
        """Our result, of NCCL's."""
        if self.out is None:
            return self.result
        if self.call.name == "all_gather" or self.native:
            return self.out
        total = REDUCTIONS[self.call.argument](list(self.out))
        if self.call.name == "reduce_scatter":
            k = len(self.out[0]) // len(self.out)
            return total[self.communicator.rank * k :][:k].copy()
        self.arrays[0][...] = total
        return self.result

    def is_completed(self) -> bool:
        return super().is_completed() and self.done is not None and bool(self.done.done)

    def wait(self) -> Any:
        self.wait_on_host()
        if self.done is None:
            self.launch()
        if self.arrays:
            with backend.gpu(self.communicator.device):
                backend.cupy().cuda.get_current_stream().wait_event(self.done)
                self.result = self.finish()
            self.arrays = []
        return self.result


# Whether to take it -------------------------------------------------------------------------------

INSTEAD = (
    "NCCL needs a GPU for each rank: start as many ranks as there are GPUs, or "
    "dist.init(backend='mpi'), by which sums go through the host"
)


class Place(NamedTuple):
    """A rank's GPU."""

    host: str
    bus: str  # where it sits there


def place(device: int) -> Place:
    return Place(socket.gethostname(), backend.cupy().cuda.runtime.deviceGetPCIBusId(device))


def sharing(places: Sequence[Place]) -> str:
    """Which ranks have one GPU together, or nothing."""
    for i, there in enumerate(places):
        if there in places[:i]:
            other = places.index(there)
            return f"ranks {other} and {i} have the same GPU ({there.bus} of {there.host})"
    return ""


def version() -> str:
    """NCCL's, "2.32.3"; or "", where there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CuPy's, that there is none
        nccl = library()
    if not nccl.available:
        return ""
    number = nccl.get_version()  # 23203
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def look() -> tuple[Place | None, str]:
    """This rank's GPU, and the version of NCCL; or None, and why NCCL is not for this rank."""
    try:
        backend.cupy()
    except RuntimeError:
        return None, "has no CuPy"
    if not cuda.is_available():
        return None, "has no GPU"
    here = place(cuda.set_device_by_rank())
    if not (found := version()):
        return None, f"has a GPU, but CuPy finds no NCCL (pip install {package()})"
    return here, found


def package() -> str:
    """What brings NCCL for the CUDA of this CuPy."""
    return f"nvidia-nccl-cu{backend.cupy().cuda.runtime.runtimeGetVersion() // 1000}"


def choose(wish: str | None) -> tuple[type[MPICommunicator], str]:
    """Which communicator, and why: the same on all ranks. Each takes its GPU.

    Raises:
        RuntimeError: it shall be NCCL, and cannot.
    """
    found = MPI.COMM_WORLD.allgather(look())
    places = [p for p, _ in found if p is not None]
    if wish == "mpi":
        return MPICommunicator, "MPI, through the host, as you wish" if places else ""
    versions = {what for p, what in found if p is not None}
    lacking = [f"rank {r} {what}" for r, (p, what) in enumerate(found) if p is None]
    why = lacking[0] if lacking else sharing(places)
    if not why and len(versions) > 1:
        why = f"the ranks' NCCLs differ: {', '.join(sorted(versions))}"
    if why and wish == "nccl":
        raise RuntimeError(f"NCCL is not possible here: {why}. {INSTEAD}")
    if not why:
        return NCCLCommunicator, f"NCCL {versions.pop()}: each rank has a GPU of its own"
    gpus = places or any("a GPU, but" in what for what in lacking)
    return MPICommunicator, f"MPI, through the host: {why}" if gpus else ""
