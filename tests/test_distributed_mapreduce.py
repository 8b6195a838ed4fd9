"""MapReduce: what map tasks do and how their sums are added, in this process; and on Spark.

On Spark everything runs in one other process, in one cluster of two executors (`SCENARIOS`), which
takes long to start and is shared; each scenario is then a test.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import pytest

import minidl
import minidl.nn.functional as F
from minidl import distributed as dist
from minidl import nn, optim
from minidl.backend import random
from minidl.data import Digits
from minidl.distributed import mapreduce
from minidl.distributed.mapreduce import Partial
from tests.test_distributed import mpirun, needs_mpi

ROOT = Path(__file__).parents[1]
PATIENCE = 240  # seconds


class Net(nn.Module):
    """Three layers; what else it has is up to the test."""

    def __init__(self, dropout: float = 0.0, norm: bool = False):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(5) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.scale, self.unused = nn.Parameter(np.ones(())), nn.Parameter(np.ones(2))

    def forward(self, x):
        x = self.dropout(self.norm(self.fc1(x)))
        return self.fc3(F.tanh(self.fc2(x))) * self.scale


def samples(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 6)), rng.integers(0, 3, n)


def network(**settings) -> Net:
    minidl.manual_seed(1)
    return Net(**settings).to(minidl.float64)


def cut(x, y, *ends: int):
    """(x, y) cut at some places."""
    return list(zip(np.split(x, ends), np.split(y, ends)))


def grads(model) -> dict[str, np.ndarray]:
    return {k: p.grad.numpy() for k, p in model.named_parameters() if p.grad is not None}


def in_one_process(model, x, y) -> dict[str, np.ndarray]:
    model.zero_grad()
    F.cross_entropy(model(minidl.tensor(x)), minidl.tensor(y)).backward()
    return grads(model)


def same(ours, theirs, rtol=1e-12):
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        np.testing.assert_allclose(ours[name], x, rtol, rtol * abs(x).max(), err_msg=name)


def tasks(work, partitions) -> Partial:
    """The job that Spark would run, in this process; the parts come in as ever they like."""
    payload = pickle.dumps((random.default_generator.next_key(), work))
    parts = [(i, mapreduce.map_task(payload, i, p)) for i, p in enumerate(partitions)]
    return mapreduce.in_order(parts[::-1])


# Map and reduce, without Spark --------------------------------------------------------------------


def test_sums_of_uneven_batches_give_the_gradient_of_the_whole():
    x, y = samples(53)
    model = network()
    model.fc2.bias.requires_grad_(False)
    expected = in_one_process(model, x, y)
    batches = cut(x, y, 20, 21, 40)
    partitions = [batches[:1], [], batches[1:3], batches[3:]]
    total = tasks(functools.partial(mapreduce.sum_gradients, model, F.cross_entropy), partitions)
    assert total.samples == 53
    same({k: s / 53 for k, s in total.sums.items()}, expected)
    assert total.loss / 53 == pytest.approx(
        F.cross_entropy(model(minidl.tensor(x)), minidl.tensor(y)).item(), rel=1e-12
    )
    assert "fc2.bias" not in total.sums and "unused" not in total.sums
    means = [in_one_process(model, *batch)["fc1.weight"] for batch in batches]
    wrong = np.mean(means, axis=0)  # what one gets who averages averages
    assert abs(wrong - expected["fc1.weight"]).max() > 1e-4


def test_a_parameter_that_only_some_samples_need():
    a, b = Partial({"x": np.ones(2)}, 1.0, 1), Partial({"x": np.ones(2), "y": np.ones(1)}, 2.0, 3)
    for total in (a + b, b + a):
        assert total.sums["x"].tolist() == [2, 2] and total.sums["y"].tolist() == [1]
        assert (total.loss, total.samples) == (3.0, 4)
    assert a.sums["x"].tolist() == [1, 1]  # a Spark task may be asked again for what it gave


def test_the_sum_is_that_of_ranks_bit_for_bit():
    rng = np.random.default_rng(0)
    parts = [(i, Partial({"w": rng.normal(size=100)}, 0.0, 1)) for i in range(4)]

    def rank():
        return dist.init().allreduce(parts[dist.rank()][1].sums["w"].copy())

    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        total = mapreduce.in_order([parts[i] for i in order])
        assert (total.sums["w"] == dist.simulate(rank, 4)[0]).all()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_local_step_on_one_batch_each_is_a_step_of_sgd(momentum):
    x, y = samples(40)
    model = network()
    optimizer = optim.SGD(model.parameters(), 0.3, momentum=momentum)
    work = functools.partial(mapreduce.train_locally, model, F.cross_entropy, optimizer, None)
    total = tasks(work, [[batch] for batch in cut(x, y, 7, 30)] + [[]])
    in_one_process(model, x, y)
    optimizer.step()
    same({k: s / 40 for k, s in total.sums.items()},
         {k: p.numpy() for k, p in model.named_parameters()})  # fmt: skip


def test_local_steps_go_round_their_part_in_a_random_order():
    seen = []

    class Watch(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(np.ones(1))

        def forward(self, x):
            seen.append(int(x.array[0, 0]))
            return x * self.w

    model = Watch()
    batches = [(np.full((1, 1), i, np.float32), np.zeros(1)) for i in range(8)]
    optimizer = optim.SGD(model.parameters(), 0.0)

    def loss(out, _):
        return out.mean()

    total = mapreduce.train_locally(model, loss, optimizer, 20, iter(batches))
    assert sorted(seen[:8]) == sorted(seen[8:16]) == list(range(8))
    assert len(seen) == total.samples == 20
    assert seen[:8] != list(range(8)) != seen[8:16] != seen[:8]


def test_random_numbers_belong_to_job_and_partition():
    x, y = samples(16)
    work = functools.partial(mapreduce.sum_gradients, network(dropout=0.5), F.cross_entropy)
    first = pickle.dumps((random.Key(0, 1), work))
    second = pickle.dumps((random.Key(0, 2), work))

    def weight(payload, partition):
        return mapreduce.map_task(payload, partition, [(x, y)]).sums["fc1.weight"]

    minidl.manual_seed(5)
    before = random.default_generator.state_dict()
    assert (weight(first, 3) == weight(first, 3)).all()
    assert random.default_generator.state_dict() == before
    assert (weight(first, 3) != weight(first, 2)).any()
    assert (weight(first, 3) != weight(second, 3)).any()


def test_running_averages_are_averaged_by_samples():
    x, y = samples(40)
    model = network(norm=True)
    model.register_buffer("mask", minidl.tensor([-np.inf, 0.0]))  # infinite for good reasons
    batches = cut(x, y, 10)
    total = tasks(functools.partial(mapreduce.sum_gradients, model, F.cross_entropy),
                  [[b] for b in batches])  # fmt: skip
    h = [model.fc1(minidl.tensor(bx)).numpy().mean(0) for bx, _ in batches]
    expected = 0.1 * (10 * h[0] + 30 * h[1]) / 40  # momentum .1, from 0
    np.testing.assert_allclose(total.sums["norm.running_mean"] / 40, expected, 1e-12)
    mapreduce.assign_means(total, dict(model.named_buffers()))
    np.testing.assert_allclose(model.norm.running_mean.numpy(), expected, 1e-12)
    assert model.norm.num_batches_tracked.item() == 1
    assert model.mask.tolist() == [-np.inf, 0.0]


def test_half_precision_is_summed_in_single():
    model = nn.Linear(1, 1, bias=False).to(minidl.float16)
    x, y = np.full((64, 1), 200, np.float16), np.zeros((64, 1), np.float16)

    def loss(out, target):
        return (out - out.detach() + target).mean()

    total = mapreduce.sum_gradients(model, loss, [(x, y)] * 100)
    assert total.sums["weight"].dtype == np.float32
    assert total.sums["weight"] == 200 * 6400  # far above float16's 65504


def nan_in(batch, output, target):
    return F.cross_entropy(output, target) * (np.nan if len(target) == batch else 1.0)


def infinite_slope(output, target):
    return F.cross_entropy(output, target) + (output * 0.0).abs().sqrt().sum()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (functools.partial(nan_in, 7), r"partition 2: FloatingPointError: the loss of batch 2 is"),
        (infinite_slope, r"partition \d: FloatingPointError: [\w.]+: infinite or NaN"),
        (F.mse_loss, r"partition 0: ValueError: "),
    ],
)
def test_an_error_names_its_partition(loss, message):
    x, y = samples(40)
    batches = cut(x, y, 10, 20, 33)
    work = functools.partial(mapreduce.sum_gradients, network(), loss)
    with np.errstate(divide="ignore", invalid="ignore"):
        total = tasks(work, [[batches[0]], [], batches[1:]])
    assert re.match(message, total.errors[0])
    assert "tests/test_distributed_mapreduce.py" in total.errors[0] or "minidl" in total.errors[0]


# Data ---------------------------------------------------------------------------------------------


def test_records():
    x, y = samples(5)
    made = mapreduce.records(x.reshape(5, 2, 3), y.astype(np.int16))
    assert made.dtype.itemsize == 6 * 8 + 2
    raw = made.tobytes()
    lines = [raw[i : i + 50] for i in range(0, 250, 50)]
    back = mapreduce.from_records(made.dtype, lines)
    assert (back[0] == x.reshape(5, 2, 3)).all() and (back[1] == y).all()
    with pytest.raises(ValueError, match="one entry a sample, got 5 and 4"):
        mapreduce.records(x, y[:4])
    for dtype in (np.float32, [("x", "f4")]):
        with pytest.raises(ValueError, match="a record has two fields"):
            mapreduce.read(None, "data", dtype)
    with pytest.raises(ValueError, match="batch_size is at least 1, got 0"):
        mapreduce.batched(None, 0)


# What is refused before a job starts ----------------------------------------------------------


def test_no_pyspark(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"PySpark is missing: pip install 'minidl\[spark\]'"):
        mapreduce.context()


def test_no_java(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(RuntimeError, match=r"no java on the PATH: install Java 17"):
        mapreduce.context()
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match=rf"JAVA_HOME={tmp_path} has no bin/java"):
        mapreduce.context()


def test_local_sgd_checks_steps_and_optimizer():
    model = network()
    with pytest.raises(ValueError, match=r"steps is at least 1, .* got 0"):
        mapreduce.local_sgd(model, F.mse_loss, None, optim.SGD(model.parameters(), 0.1), 0)
    with pytest.raises(ValueError, match="parameters that are not the model's"):
        mapreduce.local_sgd(model, F.mse_loss, None, optim.SGD(network().parameters(), 0.1))


# On Spark -----------------------------------------------------------------------------------------


def why_no_spark() -> str:
    if importlib.util.find_spec("pyspark") is None:
        return "no PySpark: pip install 'minidl[spark]'"
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=os.path.join(home, "bin") if home else None)
    if java is None:
        return "no Java: Spark needs Java 17 or later"
    done = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60)
    found = re.search(r'version "(\d+)', done.stderr)
    if found is None or int(found[1]) < 17:
        return f"Spark needs Java 17 or later, here is {done.stderr.splitlines()[:1]}"
    return ""


NO_SPARK = why_no_spark()
needs_spark = pytest.mark.skipif(bool(NO_SPARK), reason=NO_SPARK)


def file_of(folder: Path, n: int, seed: int = 0):
    """A file of n records: (its path, their dtype, x, y)."""
    x, y = samples(n, seed)
    made = mapreduce.records(x, y)
    made.tofile(folder / f"{n}.bin")
    return f"file://{folder}/{n}.bin", made.dtype, x, y


def scenario_gradient(spark, folder):
    """Six partitions and sums of two, so sums of sums are summed; one is smaller, one is empty."""
    path, dtype, x, y = file_of(folder, 43)
    data = spark.union([mapreduce.read(spark, path, dtype, 5, 9), spark.parallelize([], 1)]).cache()
    assert [sum(len(b[1]) for b in part) for part in data.glom().collect()] == [9, 9, 9, 9, 7, 0]
    mapreduce.FAN_IN = 2
    model = network(dropout=0.2)
    model.dropout.p = 0.0
    loss = mapreduce.gradient(model, F.cross_entropy, data)
    found = grads(model)
    same(found, in_one_process(model, x, y))
    assert abs(loss - F.cross_entropy(model(minidl.tensor(x)), minidl.tensor(y)).item()) < 1e-12

    def rank():  # over ranks: each has every third sample
        c = dist.init()
        batches = [(x[c.rank :: 3], y[c.rank :: 3])]
        model = network()
        part = mapreduce.sum_gradients(model, F.cross_entropy, batches)
        n = c.allreduce(np.array(part.samples))
        return {name: c.allreduce(s) / n for name, s in part.sums.items()}

    same(found, dist.simulate(rank, 3)[0])

    model.dropout.p = 0.5  # now at random, but the same again, here as there
    work = functools.partial(mapreduce.sum_gradients, model, F.cross_entropy)
    parts = [cut(x[i : i + 9], y[i : i + 9], 5) for i in range(0, 43, 9)]
    minidl.manual_seed(3)
    payload = pickle.dumps((random.default_generator.next_key(), work))
    sums = [mapreduce.map_task(payload, i, part) for i, part in enumerate([*parts, []])]
    total = mapreduce.tree_sum(sums)
    for _ in range(2):
        minidl.manual_seed(3)
        mapreduce.gradient(model, F.cross_entropy, data)
        assert all((g == total.sums[name] / 43).all() for name, g in grads(model).items())
    mapreduce.FAN_IN = 16


def scenario_local_sgd(spark, folder):
    """A round is what the same tasks do in this process; rounds train."""
    path, dtype, x, y = file_of(folder, 60)
    data = mapreduce.read(spark, path, dtype, 7, 20)
    model = network(dropout=0.3, norm=True)
    optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9)
    work = functools.partial(mapreduce.train_locally, model, F.cross_entropy, optimizer, 5)
    minidl.manual_seed(3)
    parts = [cut(x[i : i + 20], y[i : i + 20], 7, 14) for i in (0, 20, 40)]
    total = tasks(work, parts)
    minidl.manual_seed(3)
    loss = mapreduce.local_sgd(model, F.cross_entropy, data, optimizer, 5)
    assert loss == total.loss / total.samples
    for name, tensor in mapreduce.state(model).items():
        mean = total.sums[name] / total.samples
        assert (tensor.numpy() == (mean if tensor.dtype.kind == "f" else np.rint(mean))).all()

    digits = Digits(train=True)
    images = np.stack([np.asarray(image) for image, _ in digits]).reshape(-1, 64)
    labels = np.array([int(label) for _, label in digits])
    data = mapreduce.batched(spark.parallelize(list(zip(images, labels)), 2), 32).cache()
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9)
    losses = [mapreduce.local_sgd(model, F.cross_entropy, data, optimizer) for _ in range(6)]
    assert losses == sorted(losses, reverse=True)
    right = model(minidl.tensor(images)).array.argmax(1) == labels
    assert right.mean() > 0.93


class Killing:
    """A loss function that kills, the first time that it is called at all."""

    def __init__(self, marker: Path, whom: str):
        self.marker, self.whom = marker, whom

    def __call__(self, output, target):
        try:
            with open(self.marker, "x") as file:
                pid = os.getpid()
                if self.whom == "executor":  # it started the daemon that started this process
                    pid = int(Path(f"/proc/{os.getppid()}/stat").read_text().split()[3])
                    command = Path(f"/proc/{pid}/cmdline").read_text()
                    assert "CoarseGrainedExecutorBackend" in command, command
                file.write(str(pid))
        except FileExistsError:
            return F.cross_entropy(output, target)
        os.kill(pid, signal.SIGKILL)
        time.sleep(60)  # not long: this process goes with its executor
        raise AssertionError("nobody was killed")


def scenario_killed(spark, folder):
    """An executor dies in the middle of a job, with its part of the cached data; a worker dies."""
    path, dtype, x, y = file_of(folder, 41)
    data = mapreduce.read(spark, path, dtype, 4, 11).cache()
    assert [len(part) for part in data.glom().collect()] == [3, 3, 3, 2]
    model = network()
    mapreduce.gradient(model, F.cross_entropy, data)
    bits = grads(model)
    same(bits, in_one_process(model, x, y))
    for whom in ("worker", "executor"):
        marker = folder / whom
        mapreduce.gradient(model, Killing(marker, whom), data)
        pid = int(marker.read_text())
        assert not Path(f"/proc/{pid}/cmdline").exists() or pid_is_zombie(pid)
        again = grads(model)
        assert again.keys() == bits.keys()
        assert all((again[name] == bits[name]).all() for name in bits)
    np.savez(folder / "gradient.npz", **again)  # for the test below


def pid_is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def parse(line: str):
    *x, y = line.split(",")
    return np.array(x, np.float64), int(y)


def unpack(file):
    _, content = file
    return tuple(a[0] for a in mapreduce.from_records(mapreduce.records(*samples(1)).dtype,
                                                     [content]))  # fmt: skip


def scenario_data(spark, folder):
    """The same samples out of text, a sequence file, many files, and records in a folder."""
    n = 23
    x, y = samples(n)
    lines = [",".join(map(repr, [*map(float, row), int(label)])) for row, label in zip(x, y)]
    (folder / "text.csv").write_text("\n".join(lines))
    spark.parallelize(list(enumerate(lines)), 3).saveAsSequenceFile(f"file://{folder}/sequence")
    raw = mapreduce.records(x, y)
    for name in ("files", "records"):
        (folder / name).mkdir()
    for i in range(n):
        raw[i : i + 1].tofile(folder / "files" / f"{i:02}")
    raw[:9].tofile(folder / "records" / "part-0")
    raw[9:].tofile(folder / "records" / "part-1")

    where = f"file://{folder}"
    rdds = {
        "text": mapreduce.batched(spark.textFile(f"{where}/text.csv").map(parse), 4),
        "sequence": mapreduce.batched(
            spark.sequenceFile(f"{where}/sequence").map(lambda pair: parse(pair[1])), 4
        ),
        "files": mapreduce.batched(spark.binaryFiles(f"{where}/files").map(unpack), 4),
        "records": mapreduce.read(spark, f"{where}/records", raw.dtype, 4),
        "pattern": mapreduce.read(spark, f"{where}/records/part-*", raw.dtype, 4, 5),
    }
    model = network()
    expected = in_one_process(model, x, y)
    for name, rdd in rdds.items():
        mapreduce.gradient(model, F.cross_entropy, rdd)
        try:
            same(grads(model), expected)
        except AssertionError as error:
            error.add_note(f"({name})")
            raise
        assert max(len(b[1]) for b in rdd.collect()) == 4
    with pytest.raises(FileNotFoundError, match="there is nothing at file:///not/here"):
        mapreduce.read(spark, "file:///not/here", raw.dtype)
    with pytest.raises(FileNotFoundError, match="there is nothing at"):
        mapreduce.read(spark, f"{where}/no*", raw.dtype)
    odd = np.dtype([("x", "f8", 11), ("y", "i8")])
    with pytest.raises(ValueError, match="a file is no whole number of records"):
        mapreduce.gradient(model, F.cross_entropy, mapreduce.read(spark, f"{where}/records", odd))


def scenario_errors(spark, folder):
    path, dtype, _, _ = file_of(folder, 30)
    data = mapreduce.read(spark, path, dtype, 5, 13)
    model = network()
    with pytest.raises(RuntimeError, match=r"partition 2: Floating.*: the loss of batch 0 is nan"):
        mapreduce.gradient(model, functools.partial(nan_in, 4), data)
    with pytest.raises(ValueError, match="all 3 partitions are empty"):
        mapreduce.gradient(model, F.cross_entropy, data.filter(lambda batch: False))
    with pytest.raises(ValueError, match="all 0 partitions are empty"):
        mapreduce.local_sgd(
            model, F.cross_entropy, spark.emptyRDD(), optim.SGD(model.parameters(), 0.1)
        )
    model.lock = threading.Lock()
    with pytest.raises(TypeError, match=r"cannot be sent to the map tasks: .*must not hold open"):
        mapreduce.gradient(model, F.cross_entropy, data)


SCENARIOS = {
    name.removeprefix("scenario_"): function
    for name, function in list(globals().items())
    if name.startswith("scenario_")
}


def run_scenarios(folder: str) -> None:
    """All of them, in a process of its own: what went wrong goes to FOLDER/results.json."""
    quick = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"  # to start, for Java
    settings = {f"spark.{who}.extraJavaOptions": quick for who in ("driver", "executor")}
    spark = mapreduce.context("local-cluster[2,1,1024]", {"spark.ui.enabled": "false"} | settings)
    spark.setLogLevel("OFF")
    results = {}
    for name, function in SCENARIOS.items():
        place = Path(folder, name)
        place.mkdir()
        start = time.perf_counter()
        try:
            function(spark, place)
            results[name] = ""
        except BaseException:
            results[name] = traceback.format_exc()
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
    spark.stop()
    Path(folder, "results.json").write_text(json.dumps(results))


def session(sid: int) -> list[int]:
    """The processes that a process, its leader, has started, and theirs."""
    done = subprocess.run(["ps", "-eo", "pid,sid,stat"], capture_output=True, text=True, timeout=30)
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    return [int(pid) for pid, of, stat in rows if int(of) == sid and not stat.startswith("Z")]


def python(code: str, folder: Path, timeout: float) -> tuple[int, str]:
    """Run code in a session of its own: (status, output). Whatever happens, no process is left."""
    output = folder / "output"  # not a pipe: it would stay open as long as any of them lives
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)], cwd=folder, stdout=file,
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "SPARK_LOCAL_IP": "127.0.0.1"},
        )  # fmt: skip
    try:
        process.wait(timeout)
        deadline = time.monotonic() + 30
        while (left := session(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not left, f"processes {left} are left:\n{output.read_text()}"
    except subprocess.TimeoutExpired:
        pytest.fail(f"not done after {timeout} s:\n{output.read_text()}")
    finally:
        for pid in session(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait()
    return process.returncode, output.read_text()


@pytest.fixture(scope="module")
def on_spark(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("spark")
    code = f"""
        from tests.test_distributed_mapreduce import run_scenarios
        run_scenarios({str(folder)!r})
    """
    status, output = python(code, folder, PATIENCE)
    print(output)
    assert status == 0, output
    return json.loads((folder / "results.json").read_text()) | {"folder": str(folder)}


@needs_spark
@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_on_spark(on_spark, name):
    assert not on_spark[name], on_spark[name]


@needs_spark
@needs_mpi
@pytest.mark.slow
@pytest.mark.mpi
def test_after_an_executor_was_killed_the_gradient_is_mpis(on_spark, tmp_path):
    assert not on_spark["killed"], on_spark["killed"]
    code = f"""
        import numpy as np
        import minidl.nn.functional as F
        from minidl import distributed as dist
        from minidl.distributed import mapreduce
        from tests.test_distributed_mapreduce import network, samples

        c = dist.init()
        x, y = samples(41)
        mine = [(x[c.rank::2], y[c.rank::2])]
        part = mapreduce.sum_gradients(network(), F.cross_entropy, mine)
        n = c.allreduce(np.array(part.samples))
        mean = {{name: c.allreduce(s) / n for name, s in part.sums.items()}}
        if c.rank == 0:
            np.savez("{tmp_path}/mpi.npz", **mean)
    """
    done = mpirun(2, code, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    same(dict(np.load(Path(on_spark["folder"], "killed", "gradient.npz"))),
         dict(np.load(tmp_path / "mpi.npz")))  # fmt: skip


@needs_spark
@needs_mpi
@pytest.mark.slow
@pytest.mark.mpi
def test_a_script_of_its_own_against_mpi(tmp_path):
    """A network that the script itself defines; on `local[2]`; the gradient is that of MPI."""
    common = """
        import numpy as np
        import minidl, minidl.nn.functional as F
        from minidl import nn, distributed as dist
        from minidl.distributed import mapreduce
        from tests.test_distributed_mapreduce import samples

        class Mine(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(6, 3)
            def forward(self, x):
                return self.fc(x)

        def my_loss(output, target):
            return F.cross_entropy(output, target)

        minidl.manual_seed(0)
        model = Mine().to(minidl.float64)
        x, y = samples(100)
    """
    on_spark = """
        spark = mapreduce.context("local[2]", {"spark.ui.enabled": "false"})
        data = mapreduce.batched(spark.parallelize(list(zip(x, y)), 3), 10)
        mapreduce.gradient(model, my_loss, data)
        np.save("spark.npy", model.fc.weight.grad.numpy())
        spark.stop()
    """
    over_mpi = f"""
        c = dist.init()
        part = mapreduce.sum_gradients(model, my_loss, [(x[c.rank::2], y[c.rank::2])])
        mean = c.allreduce(part.sums["fc.weight"]) / c.allreduce(np.array(part.samples))
        if c.rank == 0:
            np.save("{tmp_path}/mpi.npy", mean)
    """
    status, output = python(common + on_spark, tmp_path, PATIENCE)
    assert status == 0, output
    done = mpirun(2, common + over_mpi, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    spark, mpi = np.load(tmp_path / "spark.npy"), np.load(tmp_path / "mpi.npy")
    assert abs(mpi).max() > 0.01
    np.testing.assert_allclose(spark, mpi, 1e-12, 1e-14)


@needs_spark
@pytest.mark.skipif(shutil.which("javac") is None, reason="no javac: it comes with a JDK")
@pytest.mark.slow
def test_hadoops_own_engine(tmp_path):
    """GradientJob.java, and the process that it starts for each of four parts of a file, the last
    of which is smaller; and what that process refuses."""
    code = f"""
        import sys, subprocess
        from pathlib import Path
        sys.path.insert(0, {str(ROOT / "benchmarks" / "experiments")!r})
        import mapreduce as experiment  # the one beside GradientJob.java
        import numpy as np

        n, width = 66, 8
        data = experiment.samples(n)
        file = Path("samples.bin").resolve()
        data.tofile(file)
        _, expected = experiment.alone(file, n, width, 1)
        _, found = experiment.hadoop(file, n, width, 1)
        assert found.keys() == expected.keys()
        for name, g in expected.items():
            np.testing.assert_allclose(found[name], g, 1e-12, 1e-12 * abs(g).max(), err_msg=name)

        data["x"][20] = np.nan
        data.tofile(file)
        try:
            experiment.hadoop(file, n, width, 0)
        except subprocess.CalledProcessError:
            print("no gradient")
    """
    status, output = python(code, tmp_path, PATIENCE)
    assert status == 0 and "no gradient" in output, output
    assert "partition 1: FloatingPointError: the loss of batch 0 is nan" in output, output
