"""The training loop, and runs that can be killed.

A *run* is a folder:

    OUT/log.jsonl          a line an epoch: losses, accuracy, seconds, ...
    OUT/last.safetensors   where the run stands: weights, optimizer, schedule, random numbers, ...
    OUT/best.safetensors   where it stood after its best epoch
    OUT/curves.png         the log as a picture

``last.safetensors`` is written every so many seconds and after every epoch, each time as a new file
that takes the old one's place: whenever the process dies, there is a whole checkpoint. It holds
everything that the rest of the run depends on, so a resumed run ends with the same bits as one
that was never stopped.

Under mpirun, with a `distributed.DataParallel`, all ranks train and rank 0 keeps the run.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import minidl
from minidl import nn
from minidl.amp import GradScaler, autocast
from minidl.backend import random
from minidl.distributed import Communicator, DataParallel, ZeroRedundancyOptimizer
from minidl.distributed.checkpoint import together
from minidl.distributed.data_parallel import own_random_numbers
from minidl.nn import functional as F
from minidl.serialization import atomic_path
from minidl.signals import Interrupted, signals_noted
from minidl.tensor import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Progress:
    """Where a run stands. Part of every checkpoint.

    Attributes:
        epoch: the epoch under way, from 1.
        step: batches of this epoch that are done.
        samples, loss_sum, seconds: of this epoch so far; the seconds are those of training.
        best_accuracy: of the epochs so far.
        log: a record for each finished epoch; ``log.jsonl`` is its copy.
    """

    epoch: int = 1
    step: int = 0
    samples: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    best_accuracy: float = -1.0
    log: list[dict[str, Any]] = field(default_factory=list)

    def next_epoch(self) -> None:
        self.epoch += 1
        self.step = self.samples = 0
        self.loss_sum = self.seconds = 0.0


class Evaluation(NamedTuple):
    """What `evaluate` found: the mean loss, and the share of right answers in [0, 1]."""

    loss: float
    accuracy: float

    @staticmethod
    def of(counts: Iterable[float]) -> Evaluation:
        """From the numbers of samples, the sum of their losses and the number of right answers."""
        samples, loss_sum, right = map(float, counts)
        if samples == 0:
            raise ValueError("nothing to evaluate: the loader gave no batch")
        return Evaluation(loss_sum / samples, right / samples)


class NonFiniteError(ArithmeticError):
    """The loss or a weight became infinite or NaN."""


class RunError(ValueError):
    """A run cannot be started or resumed in this folder as it was asked to."""


def train(
    model: nn.Module,
    train_loader: Any,
    test_loader: Any,
    optimizer: Any,
    scheduler: Any = None,
    *,
    epochs: int,
    out: str | os.PathLike[str],
    loss_function: Loss = F.cross_entropy,
    max_grad_norm: float | None = None,
    amp: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    config: dict[str, Any] | None = None,
    checkpoint_seconds: float = 30.0,
    on_step: Callable[[Progress, float], None] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Train a classifier, and leave a run in the folder `out`.

    Args:
        model: on its device; batches are moved there. In a `DataParallel`, all its ranks call this
            together, and have `out` in common; what the run's files hold is the network inside.
        train_loader: a `DataLoader` (or what has its `state_dict`) of (images, labels); of several
            ranks each has its own share of every batch (`DistributedBatchSampler`).
        test_loader: what to evaluate on after each epoch; of several ranks, each its share.
        optimizer: over the model's parameters.
        scheduler: of the learning rate; stepped after every *batch*.
        epochs: in all, also where the run is resumed.
        loss_function: of (logits, labels): the mean over the batch.
        max_grad_norm: clip the norm of the gradient to this.
        amp: "float16" or "bfloat16": mixed precision while training, see `minidl.amp`.
        resume: go on where the run in `out` stopped; with no run there, start one.
        overwrite: start anew though there is a run in `out`, which is deleted.
        config: whatever describes the run (numbers, strings): kept in the checkpoints, and
            compared when the run is resumed.
        checkpoint_seconds: write ``last.safetensors`` within an epoch after so many seconds.
        on_step: called after each batch with the progress and the learning rate.
        on_epoch: called after each epoch with its record. (Both on every rank, if not None.)

    Returns:
        The log: a record for each epoch, also of those before the run was resumed.

    Raises:
        RunError: `out` holds a run, and neither `resume` nor `overwrite` is given; or the run
            that it holds is not this one; or ranks find different runs there.
        NonFiniteError: the loss or a weight is infinite or NaN; the checkpoints stay as they were.
        Interrupted: by Ctrl-C or SIGTERM (a `KeyboardInterrupt`); there is a checkpoint.
    """
    folder = Path(out)
    ranks: Communicator | None = None
    network = model
    if isinstance(model, DataParallel):
        network = model.module
        ranks = model.communicator if model.communicator.world_size > 1 else None
    seen = describe(network, train_loader, test_loader, optimizer, scheduler)
    config = {**seen, "amp": amp, **(config or {})}
    device = next(iter(model.parameters())).device
    progress = Progress()
    casting = autocast(dtype=amp or "float16", enabled=amp is not None)
    scaler = GradScaler(enabled=amp == "float16")  # bfloat16 reaches as far down as float32

    def test(batches: int | None = None) -> Evaluation:
        counts = count(network, test_loader, loss_function, batches)
        return Evaluation.of(gather(ranks, *counts).sum(axis=0))

    def checkpoint(*names: str) -> None:
        if isinstance(optimizer, ZeroRedundancyOptimizer):
            optimizer.consolidate_state_dict()
        on_first(ranks, lambda: save(names))

    def save(names: tuple[str, ...]) -> None:
        check_weights(network, progress)
        state = {
            "config": config,
            "progress": asdict(progress),
            "model": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict() if scheduler else {},
            "scaler": scaler.state_dict(),
            "random": random.default_generator.state_dict(),
            "loader": train_loader.state_dict(),
        }
        for name in names:
            minidl.save(state, folder / name)

    # Everything that can be refused is refused before anything is deleted.
    state = None
    on_first(ranks, lambda: open_run(folder, config, resume, overwrite))
    if resume:
        state = open_run(folder, config, resume, overwrite)
    if not same_run(ranks, state):
        raise RunError(
            f"ranks find different runs in {folder}: it must be one folder, on a file system that "
            "all of them share"
        )
    test(batches=1)
    if state is not None:
        network.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if scheduler:
            scheduler.load_state_dict(state["scheduler"])
        scaler.load_state_dict(state.get("scaler", {}))
        random.default_generator.load_state_dict(state["random"])
        if ranks:
            own_random_numbers(ranks)
        train_loader.load_state_dict(state["loader"])
        progress = Progress(**state["progress"])
    else:
        on_first(ranks, lambda: clear_run(folder))
        checkpoint("last.safetensors")  # a full disk shows now, not after an hour
    on_first(ranks, lambda: clear_parts(folder))
    on_first(ranks, lambda: write_log(folder, progress.log))

    with signals_noted() as stopped:
        while progress.epoch <= epochs:
            model.train()
            started = saved = time.perf_counter()
            for images, labels in train_loader:
                images, labels = images.to(device), labels.to(device)
                n = len(labels)  # 0: there are more ranks than images
                with casting, np.errstate(invalid="warn" if n else "ignore"):
                    loss = loss_function(model(images), labels)
                value = loss.item() if n else 0.0
                if ranks is None:
                    check_loss(value, progress, optimizer)

                optimizer.zero_grad()
                try:
                    scaler.scale(loss).backward()
                except FloatingPointError as error:  # `DataParallel`, which knows the rank
                    check_loss(math.nan, progress, optimizer, f": {error}")
                if max_grad_norm is not None:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
                scaler.step(optimizer)
                scaler.update()
                lr = learning_rate(optimizer)
                if scheduler:
                    scheduler.step()

                now = time.perf_counter()
                due = now - saved >= checkpoint_seconds
                rows = gather(ranks, value * n, n, due, *stopped[:1] or [0])
                samples, due = int(rows[:, 1].sum()), bool(rows[0, 2])
                signum, loss_sum = int(rows[:, 3].max()), float(rows[:, 0].sum())
                check_loss(loss_sum, progress, optimizer)
                progress.step += 1
                progress.samples += samples
                progress.loss_sum += loss_sum
                progress.seconds += now - started
                started = now
                if on_step:
                    on_step(progress, lr)
                if ranks is None and stopped:
                    signum = stopped[0]
                if signum or due:
                    checkpoint("last.safetensors")
                    saved = now
                if signum:
                    raise Interrupted(signum, folder / "last.safetensors")

            started = time.perf_counter()
            found = test()
            if not math.isfinite(found.loss):
                raise NonFiniteError(f"the test loss is {found.loss} after epoch {progress.epoch}")
            record = {
                "epoch": progress.epoch,
                "train_loss": progress.loss_sum / max(progress.samples, 1),
                "test_loss": found.loss,
                "test_accuracy": found.accuracy,
                "seconds": round(progress.seconds + time.perf_counter() - started, 3),
                "lr": lr if progress.samples else learning_rate(optimizer),
                "steps": progress.step,
                "images_per_second": round(progress.samples / max(progress.seconds, 1e-9), 1),
            }
            progress.log.append(record)
            best = found.accuracy > progress.best_accuracy
            progress.best_accuracy = max(found.accuracy, progress.best_accuracy)
            progress.next_epoch()
            # "last" comes last: if killed before it, the epoch's end is done again, to the same.
            checkpoint(*["best.safetensors"] * best, "last.safetensors")
            on_first(ranks, lambda: write_log(folder, progress.log))
            if on_epoch:
                on_epoch(record)
            signum = int(gather(ranks, *stopped[:1] or [0]).max())
            if signum and progress.epoch <= epochs:
                raise Interrupted(signum, folder / "last.safetensors")
    on_first(ranks, lambda: plot(progress.log, folder / "curves.png"))
    return progress.log


def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    loss_function: Loss = F.cross_entropy,
    batches: int | None = None,
) -> Evaluation:
    """Mean loss and accuracy of a classifier over a loader of (images, labels).

    Args:
        batches: look at so many only.

    Raises:
        ValueError: the loader gave nothing.
    """
    return Evaluation.of(count(model, loader, loss_function, batches))


@minidl.no_grad()
def count(
    model: nn.Module, loader: Iterable[Any], loss_function: Loss, batches: int | None
) -> tuple[int, float, int]:
    """What `evaluate` divides: samples, the sum of their losses, right answers."""
    was_training = model.training
    model.eval()
    device = next(iter(model.parameters())).device
    samples, loss_sum, right = 0, 0.0, 0
    try:
        for images, labels in itertools.islice(loader, batches):
            if not len(labels):
                continue  # of several ranks
            labels = labels.to(device)
            logits = model(images.to(device))
            loss_sum += loss_function(logits, labels).item() * len(labels)
            right += int((logits.array.argmax(axis=1) == labels.array).sum())
            samples += len(labels)
    finally:
        model.train(was_training)
    return samples, loss_sum, right


# Several ranks ----------------------------------------------------------------------------


def gather(ranks: Communicator | None, *numbers: float) -> np.ndarray:
    """A row of numbers from each rank: (ranks, numbers); without ranks just this one."""
    row = np.array(numbers, np.float64)
    return row[None] if ranks is None else np.asarray(ranks.all_gather(row))


def on_first(ranks: Communicator | None, action: Callable[[], Any]) -> None:
    """Do something on rank 0, while the others wait. What it raises there is raised on all."""
    if ranks is None:
        action()
    else:
        together(ranks, lambda: action() if ranks.rank == 0 else None)


def same_run(ranks: Communicator | None, state: dict[str, Any] | None) -> bool:
    """Whether all ranks go on from the same checkpoint, or all from none."""
    progress = {"epoch": 0, "step": 0} if state is None else state["progress"]
    rows = gather(ranks, progress["epoch"], progress["step"])
    return bool((rows == rows[0]).all())


# A run's folder ---------------------------------------------------------------------------


def open_run(
    folder: Path, config: dict[str, Any], resume: bool, overwrite: bool
) -> dict[str, Any] | None:
    """The checkpoint to go on from, or None: start from the beginning. Changes nothing."""
    last = folder / "last.safetensors"
    found = [name for name in ("last.safetensors", "log.jsonl") if (folder / name).exists()]
    if resume and overwrite:
        raise RunError("resume and overwrite exclude each other: go on, or start anew?")
    if resume and last.exists():
        state = minidl.load(last)
        if not isinstance(state, dict) or not {"config", "progress"} <= state.keys():
            raise RunError(f"{last} is not a checkpoint of a training run")
        compare(state["config"], config, folder)
        return state
    if found and not resume and not overwrite:
        raise RunError(
            f"{folder} holds a run already ({' and '.join(found)}). Go on with it (--resume), "
            "delete it and start anew (--overwrite), or choose another folder (--out)"
        )
    return None


def compare(then: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Refuse to resume a run as another one."""
    different = [
        f"{key} was {then.get(key)!r}, now it is {now.get(key)!r}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    ]
    if different:
        raise RunError(
            f"the run in {folder} is not the one to be resumed: {'; '.join(different)}. Resume it "
            "with the settings that it was started with, or start another one in another folder"
        )


FILES = ("last.safetensors", "best.safetensors", "log.jsonl", "curves.png")


def clear_run(folder: Path) -> None:
    """Delete what an earlier run left in the folder, nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)


def clear_parts(folder: Path) -> None:
    """Delete files that a killed process was writing (see `minidl.serialization.atomic_path`)."""
    for name in FILES:
        for part in folder.glob(f".{name}.*.tmp"):
            part.unlink(missing_ok=True)


def write_log(folder: Path, log: list[dict[str, Any]]) -> None:
    """Write ``log.jsonl``, whole: whatever a killed process left there is mended by it."""
    with atomic_path(folder / "log.jsonl") as part:
        part.write_text("".join(json.dumps(record) + "\n" for record in log), encoding="utf-8")


def describe(
    model: nn.Module, train_loader: Any, test_loader: Any, optimizer: Any, scheduler: Any
) -> dict[str, Any]:
    """What `train` can see of a run's identity: a resumed run must have the same."""
    parameters = sum(p.numel() for p in model.parameters())
    shapes = [(k, v.shape, str(v.dtype)) for k, v in model.state_dict().items()]
    settings = ", ".join(f"{k}={v}" for k, v in sorted(optimizer.defaults.items()))
    test_set = test_loader.dataset
    images = [np.asarray(test_set[i][0]) for i in (0, len(test_set) // 2, len(test_set) - 1)]
    return {
        "network": f"{parameters} parameters, {zlib.crc32(repr((model, shapes)).encode()):08x}",
        "optimizer_settings": f"{type(optimizer).__name__}({settings})",
        "scheduler_type": type(scheduler).__name__ if scheduler else None,
        "batches": len(train_loader),
        "training_images": len(train_loader.dataset),
        "test_images": f"{len(test_set)}, {zlib.crc32(np.stack(images).tobytes()):08x}",
    }


def plot(log: list[dict[str, Any]], path: Path) -> None:
    """Draw the losses and the accuracy of a log."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [r["epoch"] for r in log]
    for key, style in (("train_loss", ":"), ("test_loss", "-")):
        left.plot(epochs, [r[key] for r in log], style, marker="o", ms=3, label=key.split("_")[0])
    left.set(title="loss", xlabel="epoch", yscale="log")
    left.legend(frameon=False)
    right.plot(epochs, [100 * r["test_accuracy"] for r in log], marker="o", ms=3, color="C1")
    right.set(title="test accuracy (%)", xlabel="epoch")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=150)


# Trouble ----------------------------------------------------------------------------------


def learning_rate(optimizer: Any) -> float:
    """Of the first group of parameters."""
    return float(optimizer.param_groups[0]["lr"])


def check_loss(value: float, progress: Progress, optimizer: Any, reason: str = "") -> None:
    if not math.isfinite(value):
        raise NonFiniteError(
            f"the loss is {value} at step {progress.step + 1} of epoch {progress.epoch}, learning "
            f"rate {learning_rate(optimizer):.3g}{reason}. The steps were probably too long: start "
            "again with a lower learning rate (--lr) or clipped gradients (--max-grad-norm 1), and "
            "check that the data are finite. The checkpoints are as they were before"
        )


def check_weights(model: nn.Module, progress: Progress) -> None:
    """A checkpoint of NaNs must not take a good one's place."""
    for name, parameter in model.named_parameters():
        if not np.isfinite(parameter.array).all():
            raise NonFiniteError(
                f"{name} is not finite after step {progress.step} of epoch {progress.epoch}: start "
                "again with a lower learning rate (--lr) or clipped gradients (--max-grad-norm 1). "
                "The checkpoints are as they were before"
            )
