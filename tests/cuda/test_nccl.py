"""Arrays of GPUs between ranks: through the host over MPI, and over NCCL (here: its double).

With several GPUs the same is run on NCCL itself: MINIDL_GPU=1 (`make gpu`).
"""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path

import pytest

import minidl
from minidl import distributed as dist
from tests.cuda.ranks import all_calls
from tests.test_distributed import matches, mpirun, needs_mpi

ON_GPU = os.environ.get("MINIDL_GPU", "0") not in ("", "0")
pytestmark = [needs_mpi, pytest.mark.mpi]
ROOT = str(Path(__file__).parents[2])

HEAD = """
import numpy as np
from minidl import backend
import minidl
from minidl import distributed as dist
from tests.cuda.ranks import all_calls, learn
"""
DOUBLE = """
from tests.cuda import cupy_double as double, nccl_double
installed = double.installed(GPUS)
installed.__enter__()
nccl_double.install()
"""


def gpus(n: int, code: str, there: int = 4, **environment: str):
    """Run code on n ranks of a machine with so many GPUs."""
    if ON_GPU and minidl.cuda.device_count() < there:
        pytest.skip(f"needs {there} GPUs")
    double = "" if ON_GPU else DOUBLE.replace("GPUS", str(there))
    lines = inspect.cleandoc("\n" + code)
    return mpirun(n, double + HEAD + lines, timeout=100, PYTHONPATH=ROOT, **environment)


def good(n: int, code: str, there: int = 4, **environment: str):
    done = gpus(n, code + "\nprint('done')", there, **environment)
    assert done.returncode == 0 and done.stdout.count("done") == n, done.stderr
    return done


# Every call -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "kind", "environment"),
    [
        (2, "nccl", {}),
        (3, "nccl", {}),
        (3, "nccl", {"MINIDL_DIST_CHECK": "0"}),
        (3, "mpi", {"MINIDL_DIST_BACKEND": "mpi"}),
        # What an MPI that sees a GPU's memory would do (the double's is the host's, in truth):
        (2, "mpi", {"MINIDL_DIST_BACKEND": "mpi", "MINIDL_CUDA_AWARE": "1"}),
    ],
)
def test_all_calls(n, kind, environment):
    if ON_GPU and "MINIDL_CUDA_AWARE" in environment:
        pytest.skip("MPI says itself whether it is")
    done = good(n, f"all_calls({kind!r})", **environment)
    said = done.stderr.count("minidl: arrays of GPUs are added up by NCCL 2.")
    assert said == (kind == "nccl")  # by rank 0


def test_all_calls_simulated():
    from tests.cuda import cupy_double

    if not ON_GPU:
        with cupy_double.installed():
            dist.simulate(lambda: all_calls("threads"), 3)


# Data parallel --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["nccl", "mpi"])
def test_data_parallel_learns_what_the_cpu_learns(backend):
    code = """
        for ours, theirs in zip(learn("cuda"), learn("cpu"), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
        """
    good(2, inspect.cleandoc(code), MINIDL_DIST_BACKEND=backend)


def test_sums_begin_during_the_backward_pass():
    """The first bucket is in NCCL's queue before the last layer's gradient is computed."""
    if ON_GPU:
        pytest.skip("the double tells when calls were made")
    code = """
        from minidl import nn
        dist.init()
        net = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)]).to("cuda")
        model = dist.DataParallel(net, bucket_cap_mb=1e-4)
        for step in range(2):
            seen = []
            net[0].weight.register_hook(lambda g: seen.append(len(nccl_double.calls)))
            nccl_double.calls.clear()
            (model(minidl.ones(4, 8).to("cuda")) ** 2).mean().backward()
        assert nccl_double.calls == ["allReduce"] * len(model.buckets), nccl_double.calls
        assert seen[-1] >= len(model.buckets) // 2 > 1, seen
        dist.communicator().broadcast_all([p.array for p in net.parameters()])
        assert nccl_double.calls[-1] == " ".join(["broadcast"] * 8)  # one group
        """
    good(2, inspect.cleandoc(code))


def test_a_gradient_that_is_not_finite_is_found_on_its_rank():
    code = """
        from minidl import nn
        model = dist.DataParallel(nn.Linear(2, 1).to("cuda")) if dist.init() else None
        x = minidl.tensor([[1.0, np.nan if dist.rank() else 1.0]]).to("cuda")
        model(x).mean().backward()
        """
    done = gpus(2, inspect.cleandoc(code))
    assert done.returncode != 0
    matches(done.stderr, ["not finite on rank 1, of weight. No .grad was changed"])


# What must be refused --------------------------------------------------------------------------

WRONG = {
    "another shape": (
        "c.allreduce(cupy.ones(3 + c.rank))",
        [r"ranks disagree: rank \d calls allreduce\(sum\) of float64 on a GPU \(3,\)"],
    ),
    "another shape, asynchronous": (
        """
        c.allreduce(cupy.ones(1))
        work = c.allreduce(cupy.ones(3 + c.rank), async_op=True)
        work.wait()
        """,
        [r"ranks disagree: rank \d calls allreduce\(sum\) of float64 on a GPU \(3,\)"],
    ),
    "one in the host's memory": (
        "c.allreduce((np if c.rank else cupy).ones(3))",
        [r"of float64 on a GPU \(3,\)", r"of float64 \(3,\)"],
    ),
    "a missing call": (
        """
        c.allreduce(cupy.ones(1))
        if c.rank == 0:
            c.allreduce(cupy.ones(3), async_op=True).wait()
        """,
        ["no rank can go on: rank 0 waits in allreduce", "rank 1 has ended"],
    ),
    "another GPU than before": (
        """
        c.allreduce(cupy.ones(1))
        with minidl.device("cuda:3"):
            c.allreduce(cupy.ones(1))
        """,
        ["rank . has sent from cuda:. so far, now an array on cuda:3 came"],
    ),
    "one GPU for two": (
        """
        minidl.cuda.set_device(1)
        c.allreduce(cupy.ones(1))
        """,
        [r"ranks 0 and 1 have the same GPU \(0000:01:00.0 of .*\). NCCL needs a GPU for each rank"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_refused(case):
    body, patterns = WRONG[case]
    head = "import cupy\nc = dist.init(patience=0.4)\n"
    done = gpus(2, head + inspect.cleandoc(body))
    assert done.returncode != 0
    matches(done.stderr, patterns)


def test_ranks_that_share_a_gpu_go_through_the_host():
    done = good(2, "all_calls('mpi')", there=1)
    why = r"are added up by MPI, through the host: ranks 0 and 1 have the same GPU \(0000:00:00.0"
    matches(done.stderr, [why])
    done = gpus(2, "dist.init('nccl')", there=1)
    assert done.returncode != 0
    matches(done.stderr, ["NCCL is not possible here: ranks 0 and 1 have the same GPU"])


def test_no_gpu_nothing_said():
    if not ON_GPU:
        done = good(2, "assert dist.init().kind == 'mpi'", there=0)
        assert "minidl" not in done.stderr
        done = gpus(2, "dist.init('nccl')", there=0)
        matches(done.stderr, ["NCCL is not possible here: rank 0 has no GPU"])


@pytest.mark.parametrize("backend", [None, "mpi", "cpu"])
def test_each_rank_takes_a_gpu(backend):
    """(But not where none is needed: that costs some of its memory.)"""
    own = 0 if backend == "cpu" else "dist.rank()"
    good(2, f"dist.init({backend!r}); assert minidl.cuda.current_device() == {own}")


def test_nccl_does_not_survive_a_rank():
    done = gpus(2, "dist.init('nccl')", there=0, MINIDL_ON_FAILURE="shrink")
    matches(done.stderr, ["RuntimeError: MPI's communicators can .* minidl launch --on-failure"])


def test_an_unknown_backend():
    with pytest.raises(ValueError, match="'nccl', 'mpi', 'cpu' or None, got 'gloo'"):
        dist.init("gloo")


# The double ------------------------------------------------------------------------------------

pointers = """
import cupy
from cupy.cuda import nccl
from mpi4py import MPI
w = MPI.COMM_WORLD
def connect(device):
    cupy.cuda.Device(device).use()
    return nccl.NcclCommunicator(w.size, w.bcast(nccl.get_unique_id()), w.rank)
"""
FAULTS = {
    "a datatype": ("comm.allReduce(at, at, 4, 23, 0, s)", "INVALID_ARGUMENT: datatype 23"),
    "a pointer": ("comm.allReduce(at, at, 400, 7, 0, s)", "no device's memory"),
    "another count": (
        "comm.allReduce(at, at, 4 - w.rank, 7, 0, s); stream.synchronize()",
        "NCCL would hang, or add up garbage: the ranks call",
    ),
    "another root": (
        "comm.broadcast(at, at, 4, 7, w.rank, s); stream.synchronize()", "the ranks call"
    ),
    "overlapping": ("comm.allGather(at, at + 4 * (1 - w.rank), 1, 7, s)", "overlap"),
    "a group that was never opened": ("nccl.groupEnd()", "groupEnd without groupStart"),
    "destroyed": ("comm.destroy(); comm.allReduce(at, at, 4, 7, 0, s)", "was destroyed"),
    "another device": ("cupy.cuda.Device(3).use(); comm.allReduce(at, at, 4, 7, 0, s)", "device 3"),
    "an id that is a tuple": ("nccl.NcclCommunicator(2, tuple(b'x' * 128), 0)", "incorrect type"),
    "an id that is short": ("nccl.NcclCommunicator(2, b'x', 0)", "commId length 1 != 128"),
    "one GPU for two": ("connect(0)", "Duplicate GPU detected"),
    "before it is computed": (
        "x += 1; comm.allReduce(at, at, 4, 7, 0, s)", "may still be writing what NCCL's call"
    ),
    "before it has come": (
        "stream.wait_event(cupy.cuda.get_current_stream().record())\n"
        "comm.allReduce(at, at, 4, 7, 0, s); x + 1",
        "may still be writing this memory",
    ),
}  # fmt: skip


@pytest.mark.skipif(ON_GPU, reason="of the double")
@pytest.mark.parametrize("fault", FAULTS)
def test_the_double_refuses(fault):
    code, message = FAULTS[fault]
    setup = """
comm = connect(w.rank)
x = cupy.ones(4, "f4")
stream = cupy.cuda.Stream(non_blocking=True)
at, s = x.data.ptr, stream.ptr
cupy.cuda.get_current_stream().synchronize()
try:
    BODY
except Exception as error:
    print(type(error).__name__, error)
w.Barrier()
""".replace("BODY", code.replace("\n", "\n    "))
    done = gpus(2, pointers + setup)
    assert done.stdout.count(message) >= 1, done.stdout + done.stderr


@pytest.mark.skipif(ON_GPU, reason="of the double")
@pytest.mark.parametrize("forgotten", ["before", "after"])
def test_a_forgotten_event_is_found(forgotten):
    code = """
        import cupy
        c = dist.init(check=False)
        c.allreduce(cupy.ones(3))
        waits = cupy.cuda.Stream.wait_event
        def forget(stream, event):
            if (stream.ptr == 0) != (FORGOTTEN == "after"):
                waits(stream, event)
        cupy.cuda.Stream.wait_event = forget
        x = cupy.ones(3)
        print(c.allreduce(x) + 1)
        """
    done = gpus(2, inspect.cleandoc(code).replace("FORGOTTEN", repr(forgotten)))
    assert done.returncode != 0
    matches(done.stderr, ["may still be writing"])


def test_the_doubles_methods_are_cupys():
    from tests.cuda import nccl_double

    api = json.loads(Path(__file__).with_name("cupy_api.json").read_text())["nccl"]["methods"]
    for name, method in vars(nccl_double.NcclCommunicator).items():
        if name in api or name[0].isupper():
            assert list(inspect.signature(method).parameters)[1:] == api[name], name
