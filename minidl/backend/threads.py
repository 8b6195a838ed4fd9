"""How many threads compute: the C++ kernels' pool, and NumPy's BLAS beside it.

By default as many as this process may have to itself. More only wait for one another: a rank whose
threads share their cores with those of the other ranks is slower than a rank of one thread.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from minidl.backend.native import native

MOST = 1024

# How many ranks a launcher has started on this machine: Open MPI; MPICH and Intel MPI; MVAPICH;
# torchrun; Slurm's srun, which gives a list over the machines.
LOCAL_RANKS = (
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MPI_LOCALNRANKS",
    "MV2_COMM_WORLD_LOCAL_SIZE",
    "LOCAL_WORLD_SIZE",
    "SLURM_STEP_TASKS_PER_NODE",
)
# Which of them this process is.
LOCAL_RANK = (
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "LOCAL_RANK",
    "SLURM_LOCALID",
)
OF_BLAS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")


def get_num_threads() -> int:
    """How many threads an op runs on."""
    return native.get_num_threads() if native else _number


def set_num_threads(n: int) -> None:
    """Run ops on n threads: the C++ kernels' pool (the caller is one of them), and NumPy's BLAS.

    Results do not depend on it: the kernels cut a sum by its shape alone.

    Raises:
        ValueError: n is not an integer from 1 on.
    """
    from threadpoolctl import threadpool_limits  # slow to import, and seldom needed

    global _number
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"set_num_threads: expected an integer of at least 1, got {n!r}")
    _number = min(n, MOST)
    if native:
        native.set_num_threads(_number)
    threadpool_limits(_number, "blas")


def default_num_threads() -> int:
    """MINIDL_NUM_THREADS, or this rank's share of the cores.

    The share: what the launcher, our parent, may use, divided by the ranks on this machine; but no
    more than the cores that this process is bound to. So four ranks on 16 cores get four threads
    each, be they bound to four cores each, to a socket two by two, or not at all.

    Raises:
        ValueError: MINIDL_NUM_THREADS is not a number from 1 on.
    """
    wish = os.environ.get("MINIDL_NUM_THREADS", "")
    if wish:
        if not wish.isdecimal() or int(wish) < 1:
            raise ValueError(f"MINIDL_NUM_THREADS={wish}: expected a number from 1 on, or nothing")
        return min(int(wish), MOST)
    ours = cores()
    ranks = local_ranks()
    if ranks == 1:
        return min(ours, MOST)
    try:
        all_ranks = cores(os.getppid())
    except OSError:  # the parent is not ours to look at
        all_ranks = ours
    return max(1, min(ours, all_ranks // ranks, MOST))


def local_ranks(environ: Mapping[str, str] = os.environ) -> int:
    """How many ranks of this job run on this machine; 1 without a launcher."""
    for name in LOCAL_RANKS:
        value = environ.get(name, "")
        if name.startswith("SLURM"):  # "4(x2),3": two machines with four ranks, one with three
            counts: list[str] = []
            for part in value.split(","):
                count, _, times = part.rstrip(")").partition("(x")
                counts += [count] * int(times or 1)
            here = environ.get("SLURM_NODEID", "0")
            value = counts[int(here)] if here.isdecimal() and int(here) < len(counts) else ""
        if value.isdecimal() and int(value) > 0:
            return int(value)
    return 1


def local_rank(environ: Mapping[str, str] = os.environ) -> int:
    """Which of this machine's ranks this process is, from 0; 0 without a launcher."""
    for name in LOCAL_RANK:
        if (value := environ.get(name, "")).isdecimal():
            return int(value)
    return 0


def cores(process: int = 0) -> int:
    """The cores that a process (0: this one) may use: its affinity mask, its container's quota."""
    if not hasattr(os, "sched_getaffinity"):  # not Linux
        return os.cpu_count() or 1
    return min(len(os.sched_getaffinity(process)), cgroup_quota())


def cgroup_quota(root: Path = Path("/")) -> int:
    """The cores that the control group's quota comes to, rounded up; a large number if it has none.

    (Linux, `cgroups(7)`: cpu.max of the group and of those above it; cpu.cfs_* in version 1.)
    """

    def words(file: Path) -> list[str]:
        try:
            return file.read_text().split()
        except OSError:
            return []

    top = root / "sys/fs/cgroup"
    own = [line[3:] for line in words(root / "proc/self/cgroup") if line.startswith("0::")]
    group = top / "".join(own).strip("/")
    limits = [words(folder / "cpu.max") for folder in (group, *group.parents)]
    limits.append([w for x in ("quota", "period") for w in words(top / f"cpu/cpu.cfs_{x}_us")])
    found = [
        -(-int(limit[0]) // int(limit[1]))  # quota and period, in microseconds
        for limit in limits
        if len(limit) == 2 and all(w.isdecimal() and int(w) > 0 for w in limit)  # not "max", "-1"
    ]
    return min(found, default=MOST)


_number = default_num_threads()
if local_ranks() > 1 and not any(os.environ.get(name) for name in OF_BLAS):
    set_num_threads(_number)
elif native:  # BLAS has its own default, all cores; here nobody else wants them
    native.set_num_threads(_number)
