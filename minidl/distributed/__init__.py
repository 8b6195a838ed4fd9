"""Many processes that train one network.

    from minidl import distributed as dist

    dist.init()                          # alone, or one rank of many: mpirun -n 4 python script.py
    dist.communicator().allreduce(x)     # the sum over all ranks, in place

A script runs unchanged alone, under mpirun, and as threads (`dist.simulate`). From top to bottom:
`communicator.py` (what ranks say to one another), `simulation.py` and `mpi.py` (over which engine),
`drawing.py` (a picture of what they said), `aggregation.py` (sums over ranks, written out),
`data_parallel.py` (a part of the batch for each rank; with it `sampler.py`, `sync_batch_norm.py`,
`zero.py`), `schedules.py`, `timeline.py`, `pipeline.py` (layers split over ranks),
`tensor_parallel.py` (one layer split), `mesh.py` (all of it together), `elastic.py` (ranks may die;
with it `checkpoint.py`, `launch.py`, `ulfm.py`). `mapreduce.py` is apart: a gradient as a job on
Spark, where data lies in Hadoop.
"""

from __future__ import annotations

import importlib.util
import os
import sys

from minidl import cuda
from minidl.distributed import launch
from minidl.distributed.communicator import CommunicationError, Communicator, Work
from minidl.distributed.data_parallel import DataParallel
from minidl.distributed.mesh import Mesh, init_mesh
from minidl.distributed.pipeline import Pipeline, split_sequential
from minidl.distributed.sampler import DistributedBatchSampler, DistributedSampler
from minidl.distributed.simulation import (
    Message,
    SimulatedCommunicator,
    Simulation,
    here,
    simulate,
)
from minidl.distributed.sync_batch_norm import SyncBatchNorm
from minidl.distributed.tensor_parallel import (
    ColumnParallelConv2d,
    ColumnParallelLinear,
    RowParallelConv2d,
    RowParallelLinear,
    VocabParallelEmbedding,
    full_state_dict,
    load_full_state_dict,
)
from minidl.distributed.zero import ZeroRedundancyOptimizer

# isort: split
from minidl.distributed import checkpoint, elastic

__all__ = [
    "ColumnParallelConv2d", "ColumnParallelLinear", "CommunicationError", "Communicator",
    "DataParallel", "DistributedBatchSampler", "DistributedSampler", "Mesh", "Message", "Pipeline",
    "RowParallelConv2d", "RowParallelLinear", "SyncBatchNorm", "VocabParallelEmbedding", "Work",
    "ZeroRedundancyOptimizer", "checkpoint", "communicator", "elastic", "full_state_dict",
    "init", "init_mesh", "is_initialized", "load_full_state_dict", "rank", "simulate",
    "split_sequential", "world_size",
]  # fmt: skip

# How many ranks there are: Open MPI; MPICH and Intel MPI; MVAPICH; Slurm's srun.
SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")

_world: Communicator | None = None


def init(
    backend: str | None = None,
    check: bool | None = None,
    timeout: float = 1800,
    patience: float = 2.0,
) -> Communicator:
    """Join the other ranks: those that mpirun started, or none. Once is enough, more do no harm.

    Under mpirun, an exception that nobody catches ends all ranks from here on. Where there are
    GPUs, each rank takes one (`minidl.cuda.set_device_by_rank`), and rank 0 says by what their
    arrays will be added up.

    Args:
        backend: "nccl" or "mpi": how sums over arrays of GPUs are made, directly or through the
            host's memory. None: NCCL, where each rank has a GPU of its own. "cpu": there are none,
            and GPUs are left alone. (``MINIDL_DIST_BACKEND`` chooses from outside.) Arrays of the
            host go by MPI always.
        check: compare the calls of all ranks, and find ranks that wait for one another. False (or
            ``MINIDL_DIST_CHECK=0``) saves two small messages a call.
        timeout: seconds that a call may wait for other ranks.
        patience: seconds of waiting after which a rank asks where the others are.

    Returns:
        The communicator of all ranks.

    Raises:
        RuntimeError: mpirun started several ranks, but mpi4py is not installed, or belongs to
            another MPI; there shall be NCCL, and cannot.
        ValueError: an unknown backend.
    """
    global _world
    backend = backend or os.environ.get("MINIDL_DIST_BACKEND") or None
    if backend not in (None, "nccl", "mpi", "cpu"):
        raise ValueError(f"backend is 'nccl', 'mpi', 'cpu' or None, got {backend!r}")
    if (simulated := getattr(here, "communicator", None)) is not None:
        return simulated
    if _world is None:
        several = any(os.environ.get(name, "1") not in ("", "1") for name in SIZES)
        rebuilt = os.environ.get("MINIDL_ON_FAILURE") in ("shrink", "respawn")
        several |= os.environ.get("MINIDL_ON_FAILURE") == "respawn"  # one may be spawned by others
        if not several:
            _world = SimulatedCommunicator(Simulation(1), [0], 0, ())
        elif importlib.util.find_spec("mpi4py") is None:
            raise RuntimeError(
                "several ranks were started, but mpi4py is missing, by which they would find one "
                "another: pip install 'minidl[mpi]' (or mpi4py for the MPI that you have)"
            )
        else:
            from minidl.distributed.mpi import MPI, world

            if MPI.COMM_WORLD.Get_size() == 1 and not rebuilt:
                raise RuntimeError(
                    f"several ranks were started, but {' '.join(map(str, MPI.get_vendor()))} "
                    "sees this one alone: mpirun belongs to another MPI than the library that "
                    "mpi4py has loaded. `minidl doctor` says which is which"
                )
            if check is None:
                check = os.environ.get("MINIDL_DIST_CHECK", "1") != "0"
            if rebuilt and backend == "nccl":  # after the loss of a rank, by `ulfm.py`
                raise RuntimeError(
                    "MPI's communicators can do without a rank that was lost, NCCL's cannot: "
                    "minidl launch --on-failure restart, or leave the backend out"
                )
            if rebuilt or backend == "cpu":
                _world, why = world(check, timeout, patience), ""
                if backend != "cpu" and cuda.is_available():
                    cuda.set_device_by_rank()
            else:
                from minidl.distributed.nccl import choose

                kind, why = choose(backend)
                _world = world(check, timeout, patience, kind)
            if why and _world.rank == 0:
                print(f"minidl: arrays of GPUs are added up by {why}", file=sys.stderr)
        launch.report(_world.rank, _world.world_size)
    return _world


def is_initialized() -> bool:
    """Whether `init` was called."""
    return _world is not None or getattr(here, "communicator", None) is not None


def communicator() -> Communicator:
    """The communicator of all ranks.

    Raises:
        RuntimeError: `init` was not called.
    """
    found = getattr(here, "communicator", None) or _world
    if found is None:
        raise RuntimeError("minidl.distributed.init() comes first: it finds the other ranks")
    return found


def rank() -> int:
    """Which rank this is, from 0."""
    return communicator().rank


def world_size() -> int:
    """How many ranks there are."""
    return communicator().world_size
