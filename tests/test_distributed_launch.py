"""Ranks under `minidl launch` that are killed, stopped, or raise.

Each test starts it on a script, under a hard time limit, and finds no process left.
"""

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
from tests.test_distributed import MPIRUN, is_open_mpi, matches, needs_mpi
from tests.test_distributed_elastic import read_step, run, training

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
