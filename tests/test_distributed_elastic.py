"""Checkpoints of many ranks, and training that goes on when ranks die."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
from tests.test_distributed import MPIRUN, is_open_mpi, matches, needs_mpi

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


# Processes that are killed ------------------------------------------------------------------------
#
# Each test starts `minidl launch` on a script, under a hard time limit, and finds no process left.

SCRIPT = """
import json, os, signal, sys, threading, time
from pathlib import Path
import numpy as np
from minidl import distributed as dist
from minidl.backend.threads import local_rank, local_ranks
from tests.test_distributed_elastic import training

folder, steps, trouble = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])

class Losses(dict):
    '''Written down by each rank as they come, with all that is done twice. (By rank 0 alone would
    not do: it may die between a step and its line, and the others go on from that step.)'''
    def __setitem__(self, step, loss):
        with open(folder / "losses", "a") as file:
            file.write(f"{step} {loss}\\n")

def once(number):
    '''Whether this trouble has not been made before.'''
    try:
        (folder / f"trouble-{number}").touch(exist_ok=False)
        return True
    except FileExistsError:
        return False

def watched(job):
    '''The job, with trouble at some of its steps.'''
    batches = job.batches
    def with_trouble(loader, steps):
        for batch in batches(loader, steps):
            for number, (what, step, rank, delay) in enumerate(trouble):
                if job.step == step and dist.rank() == rank % dist.world_size() and once(number):
                    make(what, delay)
            yield batch
    job.batches = with_trouble
    return inner(job)

def make(what, delay):
    if what == "raise":
        raise ZeroDivisionError("on purpose")
    if what == "exit":
        os._exit(0)
    number = signal.SIGKILL if what == "kill" else signal.SIGSTOP
    def strike():  # wherever the program is by then
        time.sleep(delay)
        os.kill(os.getpid(), number)
    threading.Thread(target=strike, daemon=True).start()

drop, nan = float(os.environ.get("DROP", "0.3")), int(os.environ.get("NAN", "-1"))
seconds = float(os.environ.get("CHECKPOINT_SECONDS", "0.05"))
inner = training(steps, Losses(), drop=drop, nan=nan)
done = dist.elastic.run(watched, folder, checkpoint_seconds=seconds)
print(f"rank {dist.rank()} of {dist.world_size()} has done {done} steps")
if os.environ["MINIDL_ON_FAILURE"] == "respawn":  # one that was spawned knows of the others
    assert (local_rank(), local_ranks()) == (dist.rank(), dist.world_size())
"""

ROOT = Path(__file__).parents[1]
modes = pytest.mark.parametrize(
    "mode",
    [
        "restart",
        *(pytest.param(mode, marks=pytest.mark.skipif(
            not (MPIRUN and is_open_mpi()), reason="ULFM is Open MPI's"
        )) for mode in ("shrink", "respawn")),
    ],
)  # fmt: skip
KILLS = int(os.environ.get("MINIDL_TEST_KILLS", "0"))  # in all, for each mode (.ci/run: 20)


class Launched:
    """`minidl launch`, running SCRIPT (or another program) in a folder of its own."""

    def __init__(self, folder, *arguments, program=(), n=2, options=(), host=list, **environment):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        if not program:
            (folder / "script.py").write_text(SCRIPT)
            program = [str(folder / "script.py"), str(folder)]
        if os.environ.get("MINIDL_MPIRUN"):
            environment["MPI4PY_LIBMPI"] = str(Path(MPIRUN).parents[1] / "lib")
        command = [sys.executable, "-m", "minidl", "launch", "--mpirun", MPIRUN]
        command += ["-n", str(n), *options]
        command += ["--elastic", "--backoff", "0.1", *program, *map(str, arguments)]
        self.process = subprocess.Popen(
            host(command),
            env={**os.environ, "PYTHONPATH": str(ROOT), "MINIDL_NUM_THREADS": "1",
                 "PYTHONUNBUFFERED": "", **environment},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def ended(self, timeout=150):
        """The exit code, and what was said."""
        try:
            out, err = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            for pid in [self.process.pid, *self.left()]:
                os.kill(pid, signal.SIGKILL)
            out, err = self.process.communicate()
            pytest.fail(f"no end after {timeout} s:\n{out}\n{err}")
        left = self.left()
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert not left, f"processes are left:\n{out}\n{err}"
        return self.process.returncode, out, err

    def left(self):
        """Processes with this test's folder on their command line, but for the launcher."""
        pids = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                here = str(self.folder).encode() in path.read_bytes()
            except OSError:
                continue
            if here and int(path.parent.name) != self.process.pid:
                pids.append(int(path.parent.name))
        return pids

    def until(self, condition, timeout=60):
        limit = time.monotonic() + timeout
        while not condition() and self.process.poll() is None and time.monotonic() < limit:
            time.sleep(0.02)

    def losses(self):
        """What the ranks wrote: the losses of each step."""
        found = {}
        path = self.folder / "losses"
        for line in path.read_text().splitlines() if path.exists() else []:
            step, loss = line.split()
            found.setdefault(int(step), set()).add(loss)
        return found


@contextmanager
def launched(folder, *arguments, **how) -> Iterator[Launched]:
    """Whatever happens, no process is left."""
    job = Launched(folder, *arguments, **how)
    try:
        yield job
    finally:
        if job.process.poll() is None:
            job.process.kill()
            job.process.wait()
        for pid in job.left():
            os.kill(pid, signal.SIGKILL)


def uninterrupted(tmp_path, steps, ranks, drop=0.3):
    """The losses of a run that nothing happens to (as threads: of 2 and 4 ranks the same bits)."""
    losses = {}
    run(training(steps, losses, drop=drop), tmp_path / "uninterrupted", ranks, seconds=1000)
    return losses


def survives(tmp_path, mode, n, kills, seed):
    """Train, kill so many ranks at random moments, and compare the losses."""
    rng = random.Random(seed)
    steps = 15 + 15 * kills
    drop = 0.0 if mode == "shrink" else 0.3
    trouble = [
        ("kill", rng.randrange(steps * i // kills, steps * (i + 1) // kills), rng.randrange(n),
         rng.random() * 0.01)
        for i in range(kills)
    ]  # fmt: skip
    options = ["--on-failure", mode, "--max-restarts", str(2 * kills)]
    arguments = steps, json.dumps(trouble)
    with launched(tmp_path / "run", *arguments, n=n, options=options, DROP=str(drop)) as job:
        code, out, err = job.ended(120 + 15 * kills)
        assert code == 0, err
        made = len(list(job.folder.glob("trouble-*")))
        assert made == err.count("is gone without a word") == kills, err
        left = n - kills if mode == "shrink" else n
        assert out.count(f"of {left} has done {steps} steps") == left, out + err
        restarts = err.count("restart ")
        assert restarts == (kills if mode == "restart" else 0), err
        expected = uninterrupted(tmp_path, steps, n, drop)
        losses = job.losses()
        assert losses.keys() == expected.keys()
        if mode == "shrink":
            for step, found in losses.items():
                for loss in found:
                    a, b = float.fromhex(loss), float.fromhex(expected[step])
                    assert a == pytest.approx(b, rel=1e-3)
        else:
            assert losses == {step: {loss} for step, loss in expected.items()}


@needs_mpi
@pytest.mark.mpi
@modes
def test_a_killed_rank(tmp_path, mode):
    """The others go on, and all losses are those of an uninterrupted run: to the bit, where there
    are as many ranks as before."""
    survives(tmp_path, mode, n=3 if mode == "shrink" else 2, kills=1, seed=time.time_ns())


@needs_mpi
@pytest.mark.mpi
@modes
@pytest.mark.timeout(900)
@pytest.mark.skipif(not KILLS, reason="MINIDL_TEST_KILLS=20 kills so many ranks")
def test_many_killed_ranks(tmp_path, mode):
    most = {"restart": 10, "shrink": 3, "respawn": 10}[mode]
    n = 4 if mode == "shrink" else 2
    for number in range(-(-KILLS // most)):
        kills = min(most, KILLS - number * most)
        (tmp_path / str(number)).mkdir()
        survives(tmp_path / str(number), mode, n, kills, seed=number)


def train(folder, epochs, killed, **how):
    """`minidl train` on two ranks; its log, and the network that it has learned."""
    command = f"-m minidl train --model mlp --checkpoint-seconds 0.1 --epochs {epochs} --out"
    program = [sys.executable, *command.split(), str(folder)]
    with launched(folder, program=program, **how) as job:
        if killed:
            log = folder / "log.jsonl"
            job.until(lambda: log.exists() and log.read_text())  # an epoch is done
            ranks = [
                p for p in job.left() if b"mpirun" not in Path(f"/proc/{p}/cmdline").read_bytes()
            ]
            os.kill(ranks[-1], signal.SIGKILL)
        code, out, err = job.ended()
    assert code == 0 and out.count("written to") == 1, out + err
    assert err.count("is gone without a word") == killed, err
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return log, minidl.load(folder / "last.safetensors")["model"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"), epochs=12, killed=False)


@needs_mpi
@pytest.mark.mpi
@modes
def test_minidl_train_survives(tmp_path, trained, mode):
    """It keeps checkpoints of its own; on as many ranks as before it ends with the same bits."""
    log, model = train(tmp_path / "run", 12, killed=True, options=["--on-failure", mode])
    ours, theirs = ([r["train_loss"] for r in run] for run in (log, trained[0]))
    if mode == "shrink":
        np.testing.assert_allclose(ours, theirs, rtol=0.02)
    else:
        assert ours == theirs
        assert all((model[name].array == value.array).all() for name, value in trained[1].items())


@needs_mpi
@pytest.mark.mpi
def test_a_stopped_rank_is_named_and_ended(tmp_path):
    options = ["--stall", "2", "--give-up", "4"]
    with launched(tmp_path / "run", 30, '[["stop", 10, 1, 0]]', options=options) as job:
        code, _, err = job.ended()
        assert code == 0, err
        said = r"rank 1 \(process \d+ on .*\) has been silent for \d+ s: it is stopped "
        matches(err, [said + r"\(kill -CONT", r"silent for \d+ s: killed", "restart 1 of 10"])
        expected = uninterrupted(tmp_path, 30, 2)
        assert job.losses() == {step: {loss} for step, loss in expected.items()}


@needs_mpi
@pytest.mark.mpi
@pytest.mark.parametrize("what", ["exception", "nan"])
def test_an_exception_on_a_rank_ends_all(tmp_path, what):
    trouble, nan = ('[["raise", 10, 1, 0]]', -1) if what == "exception" else ("[]", 10)
    with launched(tmp_path / "run", 10**6, trouble, NAN=str(nan)) as job:
        code, _, err = job.ended()
        assert code == 1
        said = {
            "exception": [r"rank 1 \(.*: ZeroDivisionError: on purpose. \(It would come again"],
            "nan": ["FloatingPointError: the gradient is not finite on rank 1, of 4.bias. No"],
        }
        matches(err, said[what])
        assert len(job.losses()) == 10
        assert "restart 1" not in err


@needs_mpi
@pytest.mark.mpi
def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(tmp_path):
    with launched(tmp_path / "run", 10**6, "[]", CHECKPOINT_SECONDS="1000") as job:
        job.until(lambda: len(job.losses()) > 10)
        job.process.send_signal(signal.SIGINT)
        code, _, err = job.ended()
    assert code == 130, err
    stopped = read_step(job.folder)
    assert 10 < stopped == len(job.losses()) and f"step-{stopped:08d} is written" in err
    more = {}
    run(training(stopped + 5, more), job.folder, 2)
    expected = uninterrupted(tmp_path, stopped + 5, 2)
    assert {**{step: min(found) for step, found in job.losses().items()}, **more} == expected


@needs_mpi
@pytest.mark.mpi
def test_without_the_launcher_the_ranks_stop_by_themselves(tmp_path):
    with launched(tmp_path / "run", 10**6, "[]", CHECKPOINT_SECONDS="1000") as job:
        job.until(lambda: len(job.losses()) > 10)
        job.process.kill()
        job.process.wait()
        limit = time.monotonic() + 30
        while job.left() and time.monotonic() < limit:
            time.sleep(0.1)
        assert not job.left()
        assert read_step(job.folder) == len(job.losses()) > 10
