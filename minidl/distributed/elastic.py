"""Training that goes on when ranks die.

    from minidl import distributed as dist

    def train(job):                     # called at the start, and again after a rank was lost
        net = dist.DataParallel(network())
        optimizer = optim.Adam(net.parameters())
        loader = ...                    # this rank's share: `dist.DistributedBatchSampler`
        job.keep(model=net, optimizer=optimizer, loader=loader)       # restores them, too
        for x, y in job.batches(loader, steps=1000):
            loss = F.cross_entropy(net(x), y)
            optimizer.zero_grad(); loss.backward(); optimizer.step()

    dist.elastic.run(train, "runs/mine")

It runs alone, under mpirun, and under ``minidl launch -n 4 --elastic script.py``, which does as its
``--on-failure`` says when a rank is lost:

- *restart*: all ranks are started again, and go on from the last complete checkpoint;
- *shrink*: those that live close ranks, and go on from the last step, which is in their memory;
- *respawn*: they start another in its place, and tell it where they stand.

The last two need Open MPI's ULFM (Bland et al. 2013, "Post-failure recovery of MPI communication
capability"), see `ulfm.py`.
"""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

import minidl.distributed as dist
from minidl.backend.random import default_generator
from minidl.distributed import checkpoint, launch
from minidl.distributed.checkpoint import Checkpoint, CheckpointError
from minidl.distributed.communicator import CommunicationError
from minidl.distributed.data_parallel import DataParallel, own_random_numbers
from minidl.distributed.zero import ZeroRedundancyOptimizer
from minidl.signals import Interrupted, signals_noted

T = TypeVar("T")


def run(
    function: Callable[[Job], T],
    folder: str | os.PathLike[str] | None = None,
    *,
    checkpoint_seconds: float = 30.0,
    keep: int = 2,
) -> T:
    """Call a function that trains, and call it again whenever a rank was lost.

    It builds everything anew for the ranks that there are then, and `Job.keep` puts it in the state
    of the last step that all have done (shrink, respawn) or of the last checkpoint.

    Args:
        function: takes a `Job`; the same on all ranks.
        folder: for the checkpoints; on a file system that all ranks share. None: the function
            keeps its own, and cannot call `Job.keep`.
        checkpoint_seconds: write one after so many seconds, and at the end.
        keep: so many of the last are kept.

    Returns:
        What the function returned, on this rank.

    Raises:
        SystemExit: Ctrl-C or SIGTERM stopped it; there is a checkpoint, and the same command goes
            on from it. (With no folder the function's own exception comes through.)
        CheckpointError: there is a checkpoint that cannot be used.
    """
    dist.init()
    job = Job(folder, checkpoint_seconds, keep)
    lost = False
    while True:
        try:
            if lost:
                job.regroup()
            job.meet()
            noting: AbstractContextManager[list[int]] = nullcontext([])
            if folder is not None:  # else the function sees to Ctrl-C
                noting = signals_noted()
            with noting as job.signals:
                result = function(job)
                job.finish()
            return result
        except Interrupted as stop:
            launch.tell(event="stopped", text=str(stop))
            if folder is None:
                raise
            if dist.rank() == 0:
                print(f"stopped {stop}: the same command goes on from it", file=sys.stderr)
            raise SystemExit(128 + stop.signum) from None
        except Exception as error:
            if not survivable(error):
                raise
            lost = True


def survivable(error: Exception) -> bool:
    """Whether this is the loss of another rank, and the others are to go on without it."""
    if on_failure() == "restart":
        return False
    from minidl.distributed import ulfm

    return ulfm.is_loss(error)


def on_failure() -> str:
    return os.environ.get("MINIDL_ON_FAILURE", "restart")


class Job:
    """A training that survives: what `run` gives to the function.

    Attributes:
        step: so many steps are done. Part of every checkpoint.
        attempt: how often training was begun before, here or by the launcher.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None, checkpoint_seconds: float, keep: int
    ) -> None:
        if checkpoint_seconds < 0 or keep < 1:
            raise ValueError(
                "checkpoint_seconds is not negative and keep is positive, got "
                f"{checkpoint_seconds} and {keep}"
            )
        self.folder = None if folder is None else Path(folder)
        self.checkpoint_seconds, self.keep_last = checkpoint_seconds, keep
        self.step = 0
        self.attempt = launch.attempt()
        self.signals: list[int] = []
        self.shared: dict[str, Any] = {}
        self.own: dict[str, Any] = {}
        self.memory: dict[str, Any] | None = None  # the state after the last step
        self.saved = -1  # the step of the last checkpoint ...
        self.saved_at = 0.0  # ... and when that was

    # For the function -----------------------------------------------------------------------------

    def keep(self, own: Mapping[str, Any] | None = None, **shared: Any) -> None:
        """Name all that a step changes, and bring it to where training stands.

        Each has `state_dict` and `load_state_dict`: networks, optimizers, schedules, scalers,
        loaders. (minidl's random numbers are kept in any case.)

        Args:
            own: what is not the same on all ranks, such as the stages of a `Pipeline`. Its loss
                with a rank cannot be made up for from memory: all go back to the last checkpoint.
            shared: what is the same on all ranks. (A `ZeroRedundancyOptimizer` may stand here: it
                is each rank's own, but can be dealt out anew to another number of ranks.)

        Raises:
            CheckpointError: the checkpoint is damaged, or holds something else.
        """
        if self.folder is None:
            raise ValueError("checkpoints need a folder: dist.elastic.run(function, FOLDER)")
        things = {
            name: thing.module if isinstance(thing, DataParallel) else thing
            for name, thing in shared.items()
        }
        sharded = {n: t for n, t in things.items() if isinstance(t, ZeroRedundancyOptimizer)}
        self.shared = {n: t for n, t in things.items() if n not in sharded}
        self.own = {**sharded, **(own or {})}
        self.saved_at = time.monotonic()

        ranks = dist.communicator()
        steps = ranks.all_gather(np.array(-1 if self.memory is None else self.memory["step"]))
        if steps.max() >= 0:
            newest = int(steps.argmax())
            self.memory = ranks.broadcast_object(self.memory, newest)
            assert self.memory is not None
            self.load(self.memory, "what the others remember")
        elif (found := checkpoint.latest(self.folder, ranks, any_ranks=True)) is not None:
            self.load_from(found)
        else:
            self.save()  # a full disk shows now, not after an hour
        if self.remembers():
            self.memory = copy.deepcopy(self.state())
        launch.beat(self.step)

    def batches(self, loader: Iterable[T], steps: int) -> Iterator[T]:
        """A loader's batches, epoch after epoch, until so many steps are done: one for each, which
        is done when the next is asked for."""
        empty = 0
        while self.step < steps:
            before = self.step
            for batch in loader:
                yield batch
                self.commit()
                if self.step == steps:
                    return
            empty = empty + 1 if self.step == before else 0
            if empty == 2:  # once may be: the checkpoint was of the end of an epoch
                raise ValueError("the loader gave no batch")

    def commit(self) -> None:
        """Say that a step is done. All ranks do so together.

        Raises:
            Interrupted: Ctrl-C or SIGTERM came, on any rank; a checkpoint is written.
            CommunicationError: the others have done another number of steps.
        """
        if not self.shared and not self.own:
            raise RuntimeError("keep() comes first: it restores what a step changes")
        self.step += 1
        if self.remembers():
            self.memory = copy.deepcopy(self.state())
        # Whoever gets past this knows that all remember this step, or the one before at least.
        due = time.monotonic() - self.saved_at >= self.checkpoint_seconds
        word = np.array([self.step, due, *(self.signals[:1] or [0])], np.float64)
        steps, due_there, signum = dist.communicator().all_gather(word).T
        if (steps != self.step).any():
            raise CommunicationError(
                f"ranks disagree: they have done {', '.join(f'{s:g}' for s in steps)} steps"
            )
        launch.beat(self.step)
        stop = int(signum.max())
        if stop or due_there[0]:
            self.save()
        if stop:
            raise Interrupted(stop, self.path())

    # State ----------------------------------------------------------------------------------------

    def remembers(self) -> bool:
        """Whether the state is kept in memory: where it would survive, and is whole."""
        return on_failure() != "restart" and not self.own

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "things": {name: thing.state_dict() for name, thing in self.shared.items()},
            "random": default_generator.state_dict(),
        }

    def save(self) -> None:
        if self.saved != self.step:
            own = {
                "things": {name: own_state(thing) for name, thing in self.own.items()},
                "random": default_generator.state_dict(),
            }
            assert self.folder is not None
            checkpoint.save(self.folder, self.step, self.state(), own, keep=self.keep_last)
        self.saved, self.saved_at = self.step, time.monotonic()

    def path(self) -> Path:
        return (self.folder or Path()) / f"step-{self.saved:08d}"

    def load(self, state: dict[str, Any], where: Any) -> None:
        """Go on from a state that is the same on all ranks."""
        check_names(state["things"], self.shared, where)
        for name, thing in self.shared.items():
            thing.load_state_dict(state["things"][name])
        # Of whichever rank it is: ranks draw other numbers, but equally many.
        random = {**state["random"], "calls": state["random"]["calls"] % 2**40}
        default_generator.load_state_dict(random)
        own_random_numbers(dist.communicator())
        self.step = state["step"]

    def load_from(self, found: Checkpoint) -> None:
        ranks = dist.communicator()
        self.load(found.shared(), found.path)
        if found.world_size == ranks.world_size:
            own = found.own(ranks.rank)
            default_generator.load_state_dict(own["random"])
            parts = [own["things"]]
        else:
            if ranks.rank == 0:
                launch.say(
                    f"{found.path} is of {found.world_size} ranks, and these are "
                    f"{ranks.world_size}: numbers will differ from here on, by rounding"
                )
            parts = [found.own(r)["things"] for r in range(found.world_size)]
        for part in parts:
            check_names(part, self.own, found.path)
        for name, thing in self.own.items():
            if isinstance(thing, ZeroRedundancyOptimizer):
                whole = dict(parts[0][name])
                whole["state"] = {n: s for part in parts for n, s in part[name]["state"].items()}
                thing.load_state_dict(whole)
            elif len(parts) > 1 or found.world_size != ranks.world_size:
                raise CheckpointError(
                    f"{found.path} was written by {found.world_size} ranks, each with a {name} of "
                    f"its own, and these are {ranks.world_size}: start {found.world_size}, or take "
                    "another folder to start anew"
                )
            else:
                thing.load_state_dict(parts[0][name])
        self.saved = found.step

    # Beginning and end ----------------------------------------------------------------------------

    def regroup(self) -> None:
        """Find the ranks that are left, or start others for those that are not."""
        from minidl.distributed import ulfm

        self.shared, self.own = {}, {}  # memory for what is to be built
        dist._world = ulfm.rebuild(respawn=on_failure() == "respawn")
        self.attempt += 1
        self.step, self.saved = 0, -1

    def meet(self) -> None:
        """Tell a rank that was spawned how many attempts there were, and the launcher that all are
        here."""
        ranks = dist.communicator()
        self.attempt = int(ranks.all_gather(np.array(self.attempt)).max())
        launch.report(ranks.rank, ranks.world_size, self.attempt)

    def finish(self) -> None:
        if self.shared or self.own:
            self.save()
        dist.communicator().barrier()
        launch.tell(event="done")


def own_state(thing: Any) -> Any:
    zero = isinstance(thing, ZeroRedundancyOptimizer)
    return thing.own_state_dict() if zero else thing.state_dict()


def check_names(then: Mapping[str, Any], now: Mapping[str, Any], where: Any) -> None:
    if then.keys() != now.keys():
        raise CheckpointError(
            f"{where} holds {', '.join(sorted(then)) or 'nothing'}, and to be restored are "
            f"{', '.join(sorted(now)) or 'none'}: keep() the same, or take another folder"
        )
