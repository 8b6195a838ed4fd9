"""Checkpoints of many ranks, and training that goes on when ranks die."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

import minidl
from minidl import distributed as dist
from minidl import nn, optim
from minidl.data import BatchSampler, DataLoader, Digits, RandomSampler, Subset
from minidl.distributed import checkpoint
from minidl.distributed.checkpoint import CheckpointError
from minidl.nn import functional as F
from minidl.signals import Interrupted

# Checkpoints ----------------------------------------------------------------------------------


def write(folder, step, ranks=3, keep=2):
    def save():
        r = dist.rank()
        shared = {"w": minidl.tensor(np.full(5, step)), "step": step}
        checkpoint.save(folder, step, shared, {"mine": np.full(3, 10 * step + r)}, keep=keep)

    dist.simulate(save, ranks)


def read(folder, ranks=3, **how):
    """The step of the last checkpoint; its content is checked."""

    def load():
        found = checkpoint.latest(folder, **how)
        if found is None:
            return None
        assert found.shared()["step"] == found.step == found.shared()["w"][0].item()
        for r in range(found.world_size):
            assert (found.own(r)["mine"] == 10 * found.step + r).all()
        return found.step

    steps = dist.simulate(load, ranks)
    assert len(set(steps)) == 1
    return steps[0]


def test_the_last_checkpoint_counts_and_old_ones_go(tmp_path):
    folder = tmp_path / "run"
    assert read(folder) is None
    for step in (0, 5, 5, 12, 100):
        write(folder, step)
        assert read(folder) == step
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000012", "step-00000100"]
    names = ["manifest.json", *(f"rank-{r}.safetensors" for r in range(3)), "shared.safetensors"]
    assert sorted(p.name for p in (folder / "step-00000100").iterdir()) == names
    write(folder, 101, keep=1)
    assert [p.name for p in folder.iterdir()] == ["step-00000101"]


def test_a_save_that_breaks_off_anywhere_leaves_the_one_before(tmp_path, monkeypatch):
    """As if the process were killed before each of the renames, and after the last."""
    write(tmp_path, 1)
    replace, left = os.replace, 0

    class Killed(BaseException):
        pass

    def until(a, b):
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        replace(a, b)

    monkeypatch.setattr(os, "replace", until)
    for renames in range(5):  # shared, three ranks, the manifest
        left = renames
        with pytest.raises(Killed):
            write(tmp_path, 2)
        assert read(tmp_path) == 1
    left = 5
    write(tmp_path, 2)
    assert read(tmp_path) == 2


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [cut, flip, Path.unlink, lambda p: p.write_text("")])
@pytest.mark.parametrize("name", ["rank-2.safetensors", "shared.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path, harm, name):
    write(tmp_path, 1)
    write(tmp_path, 2)
    harm(tmp_path / "step-00000002" / name)
    if harm is Path.unlink and name == "manifest.json":  # it was never finished
        assert read(tmp_path) == 1
        return
    with pytest.warns(UserWarning, match=f"going on from .*00000001, since .*00000002/{name} "):
        assert read(tmp_path) == 1
    harm(tmp_path / "step-00000001" / name)
    with pytest.raises(
        CheckpointError, match=f"no checkpoint .*1/{name} .*delete it to start anew"
    ):
        read(tmp_path)


def test_checkpoints_of_another_number_of_ranks(tmp_path):
    write(tmp_path, 1, ranks=4)
    with pytest.raises(CheckpointError, match=r"00000001 was written by 4 .* are 2: .*\(-n 4\)"):
        read(tmp_path, ranks=2)
    assert read(tmp_path, ranks=2, any_ranks=True) == 1
    assert read(tmp_path, ranks=6, any_ranks=True) == 1


def test_what_one_rank_cannot_write_is_raised_on_all(tmp_path):
    write(tmp_path, 1)

    def save():
        own = {"x": object() if dist.rank() == 1 else 1}
        with pytest.raises(TypeError, match=r"state\['x'\]: a object cannot be saved"):
            checkpoint.save(tmp_path, 2, {}, own)
        return True

    assert all(dist.simulate(save, 3))
    assert read(tmp_path) == 1
    for wrong in ({"step": -1}, {"step": 1, "keep": 0}):
        with pytest.raises(ValueError, match="step is at least 0 and keep at least 1"):
            checkpoint.save(tmp_path, shared={}, **wrong)


# A job that is resumed, on threads ----------------------------------------------------------------


class Broken(Exception):
    """What stops a run in the tests."""


def training(steps, losses, at=None, zero=False, drop=0.3, nan=None, names=("net", "optimizer")):
    """A function for `dist.elastic.run`: it puts the loss of each step into a dict.

    Before step `at` it is broken off; in step `nan` a gradient of rank 1 is not finite.
    """

    def train(job):
        dist.init()
        minidl.manual_seed(job.attempt)  # whatever it begins with, it goes on where it was
        net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.Dropout(drop), nn.Linear(12, 10)
        )
        net = dist.DataParallel(dist.SyncBatchNorm.convert_sync_batchnorm(net))
        data = Subset(Digits(), range(50))  # 5 batches of 8, and one of 2
        batches = BatchSampler(RandomSampler(data, seed=3), 8)
        loader = DataLoader(data, batch_sampler=dist.DistributedBatchSampler(batches))
        if zero:
            optimizer = dist.ZeroRedundancyOptimizer(net.parameters(), optim.Adam, lr=0.01)
        else:
            optimizer = optim.Adam(net.parameters(), lr=0.01)
        scheduler = optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
        things = {names[0]: net, names[1]: optimizer, "scheduler": scheduler, "loader": loader}
        job.keep(**things)
        for x, y in job.batches(loader, steps):
            if job.step == at:
                raise Broken
            n = len(y)
            with np.errstate(invalid="ignore"):
                loss = F.cross_entropy(net(x), y)
            if job.step == nan and dist.rank() == 1:
                loss = loss + (net.module[-1].bias * np.nan).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            parts = dist.communicator().all_gather(np.array([n * loss.item() if n else 0.0, n]))
            losses[job.step] = float.hex(parts[:, 0].sum() / parts[:, 1].sum())
        return job.step

    return train


def run(train, folder, ranks, seconds=0.0):
    return dist.simulate(lambda: dist.elastic.run(train, folder, checkpoint_seconds=seconds), ranks)


@pytest.mark.parametrize(("ranks", "zero"), [(1, False), (2, False), (2, True), (3, True)])
def test_a_resumed_job_has_the_same_bits(tmp_path, ranks, zero):
    """Stopped after a step within an epoch, at its end, and between two checkpoints."""
    whole, parts = {}, {}
    assert run(training(15, whole, zero=zero), tmp_path / "whole", ranks) == [15] * ranks
    for at in (2, 6, 9):
        with pytest.raises(Broken):
            run(training(15, parts, at, zero), tmp_path / "parts", ranks)
    assert run(training(15, parts, zero=zero), tmp_path / "parts", ranks) == [15] * ranks
    assert parts == whole and len(whole) == 15
    a, b = (read_all(tmp_path / name / "step-00000015") for name in ("whole", "parts"))
    assert a == b

    again = {}
    assert run(training(15, again, zero=zero), tmp_path / "parts", ranks) == [15] * ranks
    assert again == {}


def read_all(path):
    return {p.name: p.read_bytes() for p in path.iterdir()}


def test_a_job_goes_on_on_another_number_of_ranks(tmp_path, capsys):
    """And the sharded state of the optimizer is dealt out anew."""
    whole, parts = {}, {}
    run(training(12, whole, zero=True, drop=0.0), tmp_path / "whole", 1)
    for ranks, at in ((3, 4), (2, 8)):
        with pytest.raises(Broken):
            run(training(12, parts, at, True, 0.0), tmp_path / "parts", ranks)
    assert "of 3 ranks, and these are 2" in capsys.readouterr().err
    run(training(12, parts, None, True, 0.0), tmp_path / "parts", 4)
    for step in range(12):
        assert float.fromhex(parts[step]) == pytest.approx(float.fromhex(whole[step]), rel=1e-4)


class Own:
    """Something that differs from rank to rank."""

    def __init__(self):
        self.value = dist.rank()

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def test_what_is_each_ranks_own(tmp_path):
    def train(job):
        own = Own()
        own.value = -1 if job_ranks["resumed"] else 7 * dist.rank()
        job.keep({"own": own})
        return own.value

    job_ranks = {"resumed": False}
    run(train, tmp_path, 3)
    job_ranks["resumed"] = True
    assert run(train, tmp_path, 3) == [0, 7, 14]
    with pytest.raises(CheckpointError, match=r"by 3 ranks, each with a own .* are 2:"):
        run(train, tmp_path, 2)


def test_ctrl_c_on_one_rank_stops_all_with_a_checkpoint(tmp_path):
    """(The signal itself can come only to a main thread.)"""
    losses, whole = {}, {}
    run(training(9, whole), tmp_path / "whole", 2)
    inner = training(9, losses)

    def train(job):
        if dist.rank() == 1:
            job.signals = [int(signal.SIGINT)]
        return inner(job)

    def stopped():
        with pytest.raises(SystemExit) as caught:
            dist.elastic.run(train, tmp_path / "run", checkpoint_seconds=1000)
        return caught.value.code

    assert dist.simulate(stopped, 2) == [130, 130]
    assert read_step(tmp_path / "run") == len(losses) == 1
    run(inner, tmp_path / "run", 2)
    assert losses == whole
    assert issubclass(Interrupted, KeyboardInterrupt)


def read_step(folder):
    return int(max(folder.glob("step-*/manifest.json")).parent.name[5:])


def test_jobs_that_are_refused(tmp_path):
    run(training(1, {}), tmp_path, 1)
    with pytest.raises(
        CheckpointError, match=r"holds .*net, .* to be restored are .*, model, .*same"
    ):
        run(training(2, {}, names=("model", "optimizer")), tmp_path, 1)
    with pytest.raises(ValueError, match="need a folder"):
        dist.elastic.run(lambda job: job.keep())
    with pytest.raises(RuntimeError, match=r"keep\(\) comes first"):
        dist.elastic.run(lambda job: job.commit(), tmp_path)
    for wrong in ({"keep": 0}, {"checkpoint_seconds": -1}):
        with pytest.raises(ValueError, match="not negative and keep is positive"):
            dist.elastic.run(lambda job: None, tmp_path, **wrong)

    def uneven(job):
        job.keep(own={"own": Own()})
        job.step = dist.rank()
        job.commit()

    with pytest.raises(dist.CommunicationError, match="they have done 1, 2 steps"):
        run(uneven, tmp_path / "uneven", 2)

    def empty(job):
        job.keep(own={"own": Own()})
        return list(job.batches([], 3))

    with pytest.raises(ValueError, match="the loader gave no batch"):
        run(empty, tmp_path / "empty", 1)
