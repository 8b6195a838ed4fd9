"""A training run on several ranks: one run, as of one process."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

import minidl
from minidl import distributed as dist
from minidl import nn, optim
from minidl.cli import share_of_batches
from minidl.data import Digits, Subset
from minidl.data.augment import RandomCrop
from minidl.train import NonFiniteError, RunError, train
from tests.test_distributed import matches, mpirun, needs_mpi, start
from tests.test_train import final, read_log


def parts(drop=0.0, lr=0.02, sharded=False, norm=True):
    """What `train` takes, on any number of ranks."""
    ranks = dist.init()
    minidl.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4) if norm else nn.Identity(), nn.ReLU(), nn.Flatten(),
        nn.Dropout(drop), nn.Linear(144, 10),
    )  # fmt: skip
    if ranks.world_size > 1:
        model = dist.DataParallel(dist.SyncBatchNorm.convert_sync_batchnorm(model))
    images = Subset(Digits(transform=RandomCrop(8, padding=1)), range(97))  # the last batch has one
    loader = share_of_batches(images, 16, shuffle=True, prefetch_thread=True)
    if sharded:
        optimizer = dist.ZeroRedundancyOptimizer(model.parameters(), optim.Adam, lr=1e-3)
    else:
        optimizer = optim.SGD(model.parameters(), lr, momentum=0.9)
    scheduler = optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    return model, loader, share_of_batches(Digits(train=False), 50), optimizer, scheduler


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_run_of_one_process(tmp_path, ranks):
    """Losses to 1e-4, accuracies, and files that one process can go on with."""
    train(*parts(), epochs=3, out=tmp_path / "alone")
    logs = dist.simulate(lambda: train(*parts(), epochs=3, out=tmp_path / "ranks"), ranks)
    assert all(log[-1]["train_loss"] == logs[0][-1]["train_loss"] for log in logs)
    alone, together = read_log(tmp_path / "alone"), read_log(tmp_path / "ranks")
    for a, b in zip(alone, together, strict=True):
        for key in ("epoch", "steps", "lr"):
            assert a[key] == b[key]
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-4)
        assert b["test_loss"] == pytest.approx(a["test_loss"], rel=1e-3)
        assert b["test_accuracy"] == pytest.approx(a["test_accuracy"], abs=0.01)
    names = ["best.safetensors", "curves.png", "last.safetensors", "log.jsonl"]
    assert sorted(p.name for p in (tmp_path / "ranks").iterdir()) == names
    a, b = (minidl.load(tmp_path / x / "last.safetensors") for x in ("alone", "ranks"))
    assert a["model"].keys() == b["model"].keys() and a["loader"] == b["loader"]
    assert a["random"] == b["random"]
    for name, value in a["model"].items():
        np.testing.assert_allclose(value.array, b["model"][name].array, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("sharded", [False, True])
def test_resumed_gives_the_same_bits(tmp_path, sharded):
    """With dropout, whose random numbers are each rank's own."""

    def run(epochs, out, resume=False):
        model, *rest = parts(drop=0.3, sharded=sharded)
        train(model, *rest, epochs=epochs, out=tmp_path / out, resume=resume)
        return minidl.rand(1).item()

    drawn = dist.simulate(lambda: run(3, "whole"), 2)
    assert drawn[0] != drawn[1]
    dist.simulate(lambda: run(1, "parts"), 2)
    assert dist.simulate(lambda: run(3, "parts", resume=True), 2) == drawn
    assert final(tmp_path / "whole") == final(tmp_path / "parts")


def test_refused_on_all_ranks(tmp_path, monkeypatch):
    def run(resume=False, lr=0.02):
        train(*parts(lr=lr), epochs=1, out=tmp_path, resume=resume)

    def refused(error, message, function):
        def caught():
            with pytest.raises(error, match=message):
                function()
            return dist.rank()

        assert dist.simulate(caught, 2) == [0, 1]

    dist.simulate(run, 2)
    refused(RunError, "holds a run already", run)
    refused(RunError, "lr=", lambda: run(True, 0.5))

    def elsewhere():
        train(*parts(), epochs=2, out=tmp_path / "ab"[dist.rank()], resume=True)

    (tmp_path / "a").mkdir()
    (tmp_path / "a/last.safetensors").write_bytes((tmp_path / "last.safetensors").read_bytes())
    refused(RunError, "ranks find different runs", elsewhere)

    def full(state, path):
        raise OSError("disk full")

    monkeypatch.setattr(minidl, "save", full)
    refused(OSError, "disk full", lambda: train(*parts(), epochs=1, out=tmp_path / "new"))


def test_a_loss_that_is_not_finite_on_one_rank(tmp_path):
    def run():
        model, *rest = parts(norm=False)
        if dist.rank() == 1:
            model.register_forward_hook(lambda module, x, y: y * np.inf)
        with np.errstate(invalid="ignore"):
            train(model, *rest, epochs=1, out=tmp_path)

    with pytest.raises(NonFiniteError, match=r"step 1 of epoch 1.* not finite on rank 1"):
        dist.simulate(run, 2)


# The command line under mpirun --------------------------------------------------------------

COMMAND = """
import sys
sys.argv = ["minidl", *{arguments!r}]
from minidl.cli import main
main()
"""


@needs_mpi
@pytest.mark.mpi
def test_minidl_train_under_mpirun(tmp_path):
    arguments = ["train", "--model", "mlp", "--epochs", "2", "--out", str(tmp_path / "run")]
    done = mpirun(2, COMMAND.format(arguments=arguments), timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("on each of 2 ranks") == done.stdout.count("written to") == 1
    assert len(read_log(tmp_path / "run")) == 2
    done = mpirun(2, COMMAND.format(arguments=arguments), timeout=60)
    assert done.returncode != 0
    assert done.stderr.count("holds a run already") == 1  # all ranks say so, one is heard


@needs_mpi
@pytest.mark.mpi
def test_one_rank_cannot_start(tmp_path):
    code = f"""
import os
rank = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["PMI_RANK"]
rank == "1" and os.environ.update(MINIDL_DATA="{tmp_path}/nowhere")
""" + COMMAND.format(arguments=["train", "--data", "mnist", "--out", str(tmp_path / "run")])
    done = mpirun(2, code, timeout=60, MINIDL_DATA=str(tmp_path))
    assert done.returncode != 0
    matches(done.stderr, ["minidl(, rank 1 of 2)?: .*--download"])


@needs_mpi
@pytest.mark.mpi
def test_ctrl_c_leaves_a_checkpoint(tmp_path):
    """Open MPI passes it on as SIGTERM, and a second later as SIGKILL; MPICH as what it is."""
    arguments = ["train", "--model", "mlp", "--epochs", "1000", "--out", str(tmp_path)]
    arguments += ["--checkpoint-seconds", "1000"]
    process = start(
        2, "-c", COMMAND.format(arguments=arguments),
        PYTHONPATH=str(Path(__file__).parents[1]), PRTE_MCA_odls_base_sigkill_timeout="50",
    )  # fmt: skip
    try:
        log, limit = tmp_path / "log.jsonl", time.monotonic() + 60
        while not (log.exists() and log.stat().st_size) and time.monotonic() < limit:
            time.sleep(0.05)
        time.sleep(0.2 + read_log(tmp_path)[0]["seconds"] / 2)  # into an epoch
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    stopped = minidl.load(tmp_path / "last.safetensors")["progress"]
    assert stopped["epoch"] == len(read_log(tmp_path)) + 1 and stopped["step"] > 0, err
