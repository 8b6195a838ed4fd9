"""Losing a rank without losing the others: MPI's User-Level Failure Mitigation.

Bland et al. 2013, "Post-failure recovery of MPI communication capability". Under
``mpirun --with-ft ulfm`` (Open MPI 5) a call that needs a dead rank raises an error on those that
wait for it, and on them only. What they make of it is up to them. Here:

1. whoever sees the error *revokes* every communicator: now all see it, wherever they wait;
2. those that live *shrink* the world to themselves, or
3. *spawn* the missing, merge with them, and give each the number of one that was lost;
4. they *agree* that all of them have come this far; if not, they begin again.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

from mpi4py import MPI

from minidl.backend import threads
from minidl.distributed import mpi

LOSSES = (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED)


def is_loss(error: BaseException) -> bool:
    """Whether an error says that a rank was lost, or that another has seen so."""
    return isinstance(error, MPI.Exception) and error.Get_error_class() in LOSSES


def rebuild(respawn: bool) -> mpi.MPICommunicator:
    """The communicator of all ranks, after one or several were lost. All that live call it.

    Args:
        respawn: start others in the place of those that were lost; they run the same command.

    Raises:
        MPI.Exception: another one was lost meanwhile: call it again.
    """
    for communicator in list(mpi.opened):
        communicator.data.Revoke()
        communicator.control.Revoke()
        communicator.close()
    mpi.watch().control.Revoke()
    mpi.base.Revoke()
    mpi.opened.clear()

    before, comm = mpi.base, mpi.base
    while True:
        survivors = comm.Shrink()
        whole, arrived = survivors, True
        try:
            if respawn:
                whole = fill(before, survivors)
        except MPI.Exception:
            arrived = False
        with contextlib.suppress(MPI.Exception):  # it raises where one more was lost
            if survivors.Agree(int(arrived)):
                break
        survivors.Revoke()
        comm = survivors
    mpi.base = whole
    mpi.watch.cache_clear()
    mpi.watch()
    return mpi.MPICommunicator(whole, *mpi.settings)


def fill(before: MPI.Comm, survivors: Any) -> MPI.Comm:
    """A communicator as large as the one before, where everyone has the number that it had."""
    old, new = before.Get_group(), survivors.Get_group()
    numbers = old.Translate_ranks(list(range(before.Get_size())), new)
    missing = [rank for rank, number in enumerate(numbers) if number == MPI.UNDEFINED]
    info = MPI.Info.Create({"wdir": os.getcwd()})
    children = survivors.Spawn(sys.executable, sys.orig_argv[1:], len(missing), info)
    try:
        return number(children.Merge(high=False), missing, before.Get_rank())
    except MPI.Exception:
        children.Revoke()
        raise


def join(parent: Any) -> MPI.Comm:
    """What a spawned rank does while the others `fill`: the communicator that it belongs to."""
    try:
        return number(parent.Merge(high=True), None, None)
    except MPI.Exception:
        os._exit(0)  # another was lost: they will begin again, with others


def number(merged: MPI.Comm, missing: list[int] | None, mine: int | None) -> MPI.Comm:
    """Sort a communicator of survivors, and behind them the new ones, by the old numbers."""
    found: list[int] = merged.bcast(missing, root=0)
    is_new = mine is None
    whole = merged.Split(0, found[merged.Get_rank() - merged.Get_size()] if mine is None else mine)
    here = whole.Split_type(MPI.COMM_TYPE_SHARED)
    if is_new:  # what mpirun tells it is of the new ones alone: it would take all cores, and GPU 0
        os.environ[threads.LOCAL_RANKS[0]] = str(here.Get_size())
        os.environ[threads.LOCAL_RANK[0]] = str(here.Get_rank())
        threads.set_num_threads(threads.default_num_threads())
    here.Free()
    return whole
