"""What MapReduce costs and buys: one gradient on Spark, on Hadoop and over MPI.

    python benchmarks/experiments/mapreduce.py          # needs PySpark, mpi4py, a JDK

The same map function (`mapreduce.sum_gradients`) runs

- in this process, on the whole data: what is to be got;
- over MPI, on two ranks: each has its half in memory, one all-reduce;
- on Spark: threads of one Java (`local[2]`), and two executors as of a cluster (`local-cluster`);
- on Hadoop's own MapReduce, from the jars that come with PySpark, in one Java (its LocalJobRunner):
  GradientJob.java reads the same file, and pipes each part to a process that is started for it.

Then: an executor killed in the middle of a job; and what local SGD makes of a job.
"""

from __future__ import annotations

import functools
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import arguments, table, write

import minidl
import minidl.nn.functional as F
from minidl import distributed as dist
from minidl import nn, optim
from minidl.backend.threads import set_num_threads
from minidl.data import Digits
from minidl.distributed import mapreduce
from minidl.distributed.launch import find_mpirun

PARTITIONS, BATCH = 4, 256
Gradient = dict[str, np.ndarray]


def network(width: int) -> nn.Module:
    """About 800 * width parameters, in float64, so that engines can be compared to 1e-12."""
    minidl.manual_seed(0)
    layers = nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10)
    return nn.Sequential(*layers).to(minidl.float64)


def samples(n: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return mapreduce.records(rng.normal(size=(n, 784)), rng.integers(0, 10, n))


def batches(data: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for i in range(0, len(data), BATCH):
        yield data["x"][i : i + BATCH], data["y"][i : i + BATCH]


def seconds(call: Callable[[], Any], times: int) -> float:
    """The median, after a first call that does not count."""
    found = []
    for _ in range(times + 1):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return float(np.median(found[1:]))


# The engines: seconds, and the gradient ------------------------------------------------------


def alone(file: Path, n: int, width: int, times: int) -> tuple[float, Gradient]:
    model, data = network(width), samples(n)

    def call() -> None:
        total = mapreduce.sum_gradients(model, F.cross_entropy, batches(data))
        found.update({k: s / total.samples for k, s in total.sums.items()})

    found: Gradient = {}
    return seconds(call, times), found


def rank(n: int, width: int, times: int, out: str) -> None:
    """One of the ranks that `mpi` starts."""
    c = dist.init()
    model, data = network(width), np.array_split(samples(n), c.world_size)[c.rank]
    found: Gradient = {}

    def call() -> None:
        total = mapreduce.sum_gradients(model, F.cross_entropy, batches(data))
        flat = np.concatenate([[total.samples], *(s.ravel() for s in total.sums.values())])
        c.allreduce(flat)
        mean = flat[1:] / flat[0]
        ends = np.cumsum([s.size for s in total.sums.values()])
        for (name, s), part in zip(total.sums.items(), np.split(mean, ends[:-1])):
            found[name] = part.reshape(s.shape)

    took = seconds(call, times)
    if c.rank == 0:
        Path(out).write_bytes(pickle.dumps((took, found)))


def mpi(file: Path, n: int, width: int, times: int) -> tuple[float, Gradient]:
    out = file.with_suffix(".mpi")
    command = [find_mpirun()[0], "-n", "2", sys.executable, __file__, "--rank", str(n), str(width),
               str(times), str(out)]  # fmt: skip
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    subprocess.run(command, check=True, timeout=300, env={**os.environ, **allowed})
    return pickle.loads(out.read_bytes())


def spark(sc: Any, file: Path, n: int, width: int, times: int) -> tuple[float, Gradient]:
    model, dtype = network(width), samples(0).dtype
    data = mapreduce.read(sc, f"file://{file}", dtype, BATCH, -(-n // PARTITIONS)).cache()
    took = seconds(lambda: mapreduce.gradient(model, F.cross_entropy, data), times)
    data.unpersist()
    return took, {k: p.grad.numpy() for k, p in model.named_parameters()}


def map_records(payload: str, partition: str) -> None:
    """The process that GradientJob.java starts for a map task: records in, sums out."""
    dtype = samples(0).dtype
    chunks = iter(lambda: sys.stdin.buffer.read(BATCH * dtype.itemsize), b"")
    parts = (mapreduce.from_records(dtype, [chunk]) for chunk in chunks)
    total = mapreduce.map_task(Path(payload).read_bytes(), int(partition), parts)
    if total.errors:
        raise SystemExit(total.errors[0])
    vector = [[total.samples], *(s.ravel() for s in total.sums.values())]
    sys.stdout.buffer.write(np.concatenate(vector).astype("<f8").tobytes())


def hadoop(file: Path, n: int, width: int, times: int) -> tuple[float, Gradient]:
    import pyspark

    jars = f"{Path(pyspark.__file__).parent}/jars/*"
    classes, payload, output = (file.with_suffix(x) for x in (".classes", ".payload", ".output"))
    source = Path(__file__).with_name("GradientJob.java")
    subprocess.run(["javac", "-cp", jars, "-d", classes, source], check=True, timeout=300)
    model, size = network(width), samples(0).dtype.itemsize
    payload.write_bytes(mapreduce.pack(functools.partial(
        mapreduce.sum_gradients, model, F.cross_entropy)))  # fmt: skip
    command = ["java", "-cp", f"{classes}:{jars}", "GradientJob", file, size,
               size * -(-n // PARTITIONS), output, times + 1,
               sys.executable, __file__, "--map", payload]  # fmt: skip
    done = subprocess.run(
        list(map(str, command)), check=True, timeout=600, text=True, stdout=subprocess.PIPE,
        env={**os.environ, "MINIDL_NUM_THREADS": "1"},
    )  # fmt: skip
    jobs = [line.split() for line in done.stdout.splitlines()]
    if any(int(maps) != PARTITIONS for _, maps in jobs):
        raise AssertionError(f"{PARTITIONS} map tasks a job were to be, these were: {jobs}")
    flat = np.fromfile(output / "sums", "<f8")
    shapes = {name: p.shape for name, p in model.named_parameters()}
    parts = np.split(flat[1:] / flat[0], np.cumsum([*map(np.prod, shapes.values())])[:-1])
    took = float(np.median([float(took) for took, _ in jobs[1:]]))
    return took, {name: x.reshape(shapes[name]) for name, x in zip(shapes, parts)}


# What is measured ------------------------------------------------------------------------------


def costs(args: Any, folder: Path) -> dict[str, dict[int, float]]:
    """Seconds for a gradient, by engine and number of samples. All gradients must be equal."""
    width, times = (32, 1) if args.quick else (1200, 3)
    sizes = [64, 512] if args.quick else [1024, 8192]
    found: dict[str, dict[int, float]] = {}
    expected: dict[int, Gradient] = {}
    for n in sizes:
        samples(n).tofile(folder / f"{n}.bin")

    def measure(name: str, engine: Callable[..., tuple[float, Gradient]]) -> None:
        for n in sizes:
            took, gradient = engine(folder / f"{n}.bin", n, width, times)
            for key, g in expected.setdefault(n, gradient).items():
                error = abs(gradient[key] - g).max() / abs(g).max()
                if not error < 1e-12:
                    raise AssertionError(f"{name}: the gradient of {key} is off by {error:.1e}")
            found.setdefault(name, {})[n] = took
            print(f"{name}, {n} samples: {took:.3f} s", flush=True)

    measure("one process", alone)
    measure("MPI, 2 ranks", mpi)
    for master in ("local[2]", "local-cluster[2,1,1024]"):
        sc = start(master)
        measure(f"Spark, {master}", functools.partial(spark, sc))
        sc.stop()
    measure("Hadoop, LocalJobRunner", hadoop)
    return found


def start(master: str) -> Any:
    sc = mapreduce.context(master, {"spark.ui.enabled": "false"})
    sc.setLogLevel("OFF")
    return sc


class Killing:
    """A loss function that kills the executor it runs on, once."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __call__(self, output: Any, target: Any) -> Any:
        try:
            self.marker.touch(exist_ok=False)
        except FileExistsError:
            return F.cross_entropy(output, target)
        daemon = Path(f"/proc/{os.getppid()}/stat").read_text()  # it has started this process
        os.kill(int(daemon.split()[3]), signal.SIGKILL)
        time.sleep(60)


def killed(args: Any, folder: Path) -> tuple[float, float]:
    """Seconds of a job, and of one in which an executor dies; the gradients are the same bits."""
    n, width = (64, 32) if args.quick else (1024, 1200)
    file = folder / f"{n}.bin"
    sc, model = start("local-cluster[2,1,1024]"), network(width)
    data = mapreduce.read(sc, f"file://{file}", samples(0).dtype, BATCH, n // PARTITIONS).cache()
    took = seconds(lambda: mapreduce.gradient(model, F.cross_entropy, data), 3)
    before = [p.grad.numpy() for p in model.parameters()]
    begin = time.perf_counter()
    mapreduce.gradient(model, Killing(folder / "killed"), data)
    took_killed = time.perf_counter() - begin
    assert (folder / "killed").exists()
    assert all((p.grad.numpy() == g).all() for p, g in zip(model.parameters(), before))
    sc.stop()
    return took, took_killed


def learning(args: Any) -> dict[str, list[tuple[float, float]]]:
    """Digits, after each job: (seconds so far, test accuracy in %)."""
    jobs = 2 if args.quick else 20
    sets = [Digits(train=True), Digits(train=False)]
    x, test_x = (np.stack([np.ravel(image) for image, _ in s]) for s in sets)
    y, test_y = (np.array([int(label) for _, label in s]) for s in sets)
    order = np.random.default_rng(0).permutation(len(x))
    found: dict[str, list[tuple[float, float]]] = {}
    sc = start("local[2]")
    pairs = [(x[i], y[i]) for i in order]
    data = mapreduce.batched(sc.parallelize(pairs, PARTITIONS), 32).cache()
    data.count()
    for name in ("a gradient, lr 0.3", "local SGD, lr 0.1"):
        minidl.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = optim.SGD(model.parameters(), float(name.split()[-1]), momentum=0.9)
        begin = time.perf_counter()
        for _ in range(jobs):
            if "local" in name:
                mapreduce.local_sgd(model, F.cross_entropy, data, optimizer)
            else:
                mapreduce.gradient(model, F.cross_entropy, data)
                optimizer.step()
            right = model(minidl.tensor(test_x)).array.argmax(1) == test_y
            found.setdefault(name, []).append((time.perf_counter() - begin, 100 * right.mean()))
    sc.stop()
    return found


def report(args: Any, cost: Any, kill: tuple[float, float], learnt: Any) -> None:
    from matplotlib.figure import Figure

    sizes = list(cost["one process"])
    rows = [[name, *(f"{t:.3f}" for t in times.values())] for name, times in cost.items()]
    jobs = [1, 2, 5, 10, 20] if not args.quick else [1, 2]
    learnt_rows = [[name, *(f"{points[k - 1][1]:.1f}" for k in jobs), f"{points[-1][0]:.1f}"]
                   for name, points in learnt.items()]  # fmt: skip
    parameters = sum(p.numel() for p in network(32 if args.quick else 1200).parameters())
    text = f"""# What MapReduce costs and buys

Written by `benchmarks/experiments/mapreduce.py`, which says how it measures, on a machine of
{os.cpu_count()} cores: good for orders of magnitude.

Seconds for a gradient of {parameters:,} parameters (float64, {PARTITIONS} partitions, one thread a
task), the median of some. All gradients are equal to 1e-12.

{table(["engine", *(f"{n:,} samples" for n in sizes)], rows)}

*It costs* the start of tasks, the weights to every task and the sums back, a job after the other.
Where the samples of a job take much longer than that, the engine hardly matters; a job for each
mini-batch is out of the question. Hadoop also starts Python for every map task, and its data and
result go through files.

*It buys* that nobody has to care where the data lies, and whether machines die. A gradient on
`local-cluster[2,1,1024]` took {kill[0]:.2f} s; with an executor killed in the middle,
{kill[1]:.2f} s, to the same bits.

*Local SGD* makes a job worth its cost. Test accuracy (%) on digits after so many jobs, on
`local[2]`, a job being one gradient of the whole data and a step, or one epoch in every partition
and the mean of the weights (which is {-(-1437 // PARTITIONS) // 32 + 1} steps in each):

{table(["a job is", *map(str, jobs), f"seconds for {jobs[-1]}"], learnt_rows)}
"""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    places = np.arange(len(cost))
    for i, n in enumerate(sizes):
        left.barh(places + 0.4 * i, [times[n] for times in cost.values()], 0.4,
                  label=f"{n:,} samples")  # fmt: skip
    left.set_yticks(places + 0.2, list(cost), fontsize=8)
    left.set(xscale="log", xlabel="seconds for a gradient")
    left.invert_yaxis()
    for name, points in learnt.items():
        right.plot(range(1, len(points) + 1), [a for _, a in points], "o-", ms=3, label=name)
    right.set(xlabel="jobs", ylabel="test accuracy (%)")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.3)
    numbers = {"seconds": cost, "killed": kill, "learning": learnt}
    write(args.out, "mapreduce", text, numbers, figure)


def main() -> None:
    args = arguments(__doc__ or "")
    set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cost = costs(args, folder)
        kill = killed(args, folder)
    report(args, cost, kill, learning(args))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--map"]:
        map_records(*sys.argv[2:])
    elif sys.argv[1:2] == ["--rank"]:
        rank(*map(int, sys.argv[2:5]), sys.argv[5])
    else:
        main()
