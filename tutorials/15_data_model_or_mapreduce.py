# %% [markdown]
# # 15. Data, model or MapReduce
#
# Four machines and one network. You can cut the *batch* (each machine has the whole network), the
# *network* (each has some of the layers), every *layer* (each has a part of all of them), or hand
# the question to a system that runs *jobs*. The gradient is the same. What differs is what a
# machine must hold, what it must say, when it waits, and what happens if it dies. You measure it.

# %%
import functools
import importlib.util
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import minidl
import minidl.nn.functional as F
from minidl import distributed as dist
from minidl import models, nn
from minidl.backend.random import default_generator
from minidl.data import Digits
from minidl.distributed import costs, mapreduce, timeline

FIGURES = Path("runs/tutorials")
FIGURES.mkdir(parents=True, exist_ok=True)
RANKS = 4

# %% [markdown]
# ## One network, one batch, one gradient
#
# In float64, so that equal can be told from nearly equal. This gradient is what all ways must give:

# %%
digits = Digits()
images = np.stack([digits[i][0] for i in range(1024)]).reshape(-1, 64).astype(np.float64)
labels = np.array([digits[i][1] for i in range(1024)])


def network(first=nn.Linear, second=nn.Linear, width=512):
    """64-width-width-width-10; which layers it has is for later, when they are cut."""
    minidl.manual_seed(0)
    return nn.Sequential(
        first(64, width), nn.ReLU(), second(width, width), nn.ReLU(),
        first(width, width), nn.ReLU(), second(width, 10),
    ).to(minidl.float64)  # fmt: skip


def backward(net, x, y):
    F.cross_entropy(net(minidl.tensor(x)), minidl.tensor(y)).backward()


model = network()
backward(model, images, labels)
truth = {name: p.grad.numpy() for name, p in model.named_parameters()}
everything = sum(p.numel() for p in model.parameters())
print(f"{everything:,} parameters")


def agrees(gradient):
    return all(abs(gradient[name] - g).max() < 1e-12 * abs(g).max() for name, g in truth.items())


# %% [markdown]
# ## What a rank says
#
# `dist.simulate` runs the ranks as threads, in turn, and writes down what each of them says
# (tutorial 14). A sum over all ranks counts as what a ring sends for it.

# %%
trace = []


def said(rank):
    """Bytes that a rank has sent so far."""
    p = RANKS
    shares = {"send": 1, "broadcast": 1, "allreduce": 2 * (p - 1) / p, "all_gather": p - 1}
    return sum(shares.get(m.call, 0) * m.array.nbytes for m in trace if m.source == rank)


def measured(way, batch):
    """What one step costs. (gradient, parameters a rank holds, bytes that a rank says), the most
    of any rank."""

    def run():
        ranks = dist.init()
        net, step, whole_gradient = way(ranks)
        before = said(ranks.rank)
        step(images[:batch], labels[:batch])
        bytes_said = said(ranks.rank) - before
        held = sum(p.numel() for p in net.parameters())
        for p in net.parameters():  # put it where the whole network's numbers are looked for
            p.array[...] = p.grad.array
        return whole_gradient(), held, bytes_said

    trace.clear()
    gradients, held, bytes_said = zip(*dist.simulate(run, RANKS, trace))
    return gradients[0], max(held), max(bytes_said)


# %% [markdown]
# ## The batch is cut: data parallel
#
# Each rank has all of the network and a fourth of the batch; afterwards gradients are summed.


# %%
def data_parallel(ranks):
    net = dist.DataParallel(network())

    def step(x, y):
        mine = slice(ranks.rank, None, ranks.world_size)
        backward(net, x[mine], y[mine])

    return net, step, lambda: {k: t.numpy() for k, t in net.module.state_dict().items()}


# %% [markdown]
# ## The network is cut: a pipeline
#
# Each rank has some of the layers, a *stage*. Activations go to the next rank, their gradients come
# back. While one stage works the others would wait; so the batch is cut into *micro-batches*, and
# a schedule says who takes which when. A schedule is nothing but a row of instructions:

# %%
print(minidl.source(dist.schedules.one_forward_one_backward))
for name in ("naive", "gpipe", "1f1b"):
    events = timeline.play(name, stages=4, micro_batches=8)
    print(f"\n{name}: the stages are idle {100 * timeline.idle(events):.0f} % of the time")
    print(timeline.draw(events))
timeline.plot({name: timeline.play(name, 4, 8) for name in ("naive", "gpipe", "1f1b")},
              FIGURES / "15_pipeline.png", unit="a forward pass")  # fmt: skip
for M in (1, 4, 8, 32):
    idle = timeline.idle(timeline.play("1f1b", 4, M))
    print(f"{M:2} micro-batches: idle {100 * idle:.0f} %")
    assert abs(idle - (4 - 1) / (M + 4 - 1)) < 1e-9  # Huang et al. 2019

# %% [markdown]
# ![three schedules](../runs/tutorials/15_pipeline.png)
#
# GPipe and 1F1B wait equally long. 1F1B keeps less: a stage holds a micro-batch's activations from
# its forward to its backward pass, and the sooner that comes the better.

# %%
held_at_once = {}


def pipeline_parallel(ranks, schedule="1f1b"):
    stages = dist.split_sequential(network(), ranks.world_size)
    net = dist.Pipeline(stages, schedule, micro_batches=8)

    def step(x, y):
        net.step(minidl.tensor(x), minidl.tensor(y), F.cross_entropy)
        held_at_once[schedule, ranks.rank] = net.most_held

    return net, step, net.full_state_dict


for schedule in ("gpipe", "1f1b"):
    gradient, *_ = measured(functools.partial(pipeline_parallel, schedule=schedule), 64)
    print(schedule, "micro-batches held by each stage:",
          [held_at_once[schedule, r] for r in range(RANKS)])  # fmt: skip
assert held_at_once["gpipe", 0] == 8 and held_at_once["1f1b", 0] == RANKS

# %% [markdown]
# ## Each layer is cut: tensor parallel
#
# The first layer of a pair is cut by its outputs, the second by its inputs. What lies between stays
# where it is, and only the second one's results are summed. On the way back it is the other way
# round. Two ops say all of it, each the gradient of the other:

# %%
print(minidl.source(dist.tensor_parallel.copy_to_ranks))
print(minidl.source(dist.tensor_parallel.reduce_from_ranks))
print(minidl.source(dist.RowParallelLinear.forward))
column = functools.partial(dist.ColumnParallelLinear, gather_output=False)
row = functools.partial(dist.RowParallelLinear, input_is_parallel=True)


def tensor_parallel(ranks):
    net = network(column, row)
    return net, functools.partial(backward, net), lambda: dist.full_state_dict(net)


# %% [markdown]
# ## What it takes
#
# The same gradient three times. Data parallel says as much as the network is large, however few
# images there are. The other two say activations: the more, the more images.

# %%
WAYS = {"data": data_parallel, "pipeline": pipeline_parallel, "tensor": tensor_parallel}
batches = [32, 128, 512, 1024]
spoken = {}
for name, way in WAYS.items():
    for batch in batches:
        gradient, held, spoken[name, batch] = measured(way, batch)
    assert agrees(gradient), name  # of the last, the whole batch
    sizes = "  ".join(f"{spoken[name, batch] / 1e6:7.2f}" for batch in batches)
    print(f"{name:9} holds {held / everything:4.0%} of the parameters, says (MB a step) {sizes}")
print(f"{'for images':>49}", "  ".join(f"{batch:7}" for batch in batches))

figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
for name in WAYS:
    axes.plot(batches, [spoken[name, b] / 1e6 for b in batches], "o-", label=name)
axes.set(xscale="log", yscale="log", xlabel="images a step", ylabel="MB that a rank says")
axes.set_xticks(batches, list(map(str, batches)))
axes.minorticks_off()
axes.legend(frameon=False)
figure.savefig(FIGURES / "15_said.png", dpi=120)
assert spoken["data", 1024] == spoken["data", 32]
assert spoken["tensor", 32] < spoken["data", 32] and spoken["tensor", 1024] > spoken["data", 1024]

# %% [markdown]
# ![bytes against batch size](../runs/tutorials/15_said.png)
#
# So it depends on the layer. Of the network of tutorial 04, with 64 images a step:

# %%
cnn = models.get("cnn")
one_image = minidl.zeros(1, 1, 28, 28)
shapes = {}
for name, layer in cnn.named_children():
    one_image = layer(one_image)
    shapes[name] = one_image.numel()
for layer in costs.profile(cnn, minidl.zeros(1, 1, 28, 28)):
    if layer.parameters:
        activations = 64 * shapes[layer.name]
        better = "the batch" if layer.parameters < activations else "the layer"
        print(f"layer {layer.name}: {layer.parameters:8,} parameters, {activations:9,} activations:"
              f" cut {better}")  # fmt: skip
conv, *_, linear, last = [x for x in costs.profile(cnn, minidl.zeros(1, 1, 28, 28)) if x.parameters]
assert conv.parameters < 64 * shapes[conv.name] and linear.parameters > 64 * shapes[linear.name]

# %% [markdown]
# Convolutions have few weights and many activations, linear layers the opposite: cut the batch for
# the former, the layer for the latter (Krizhevsky 2014, "One weird trick for parallelizing
# convolutional neural networks"). And a network that does not fit into one machine must be cut,
# whatever it costs. `dist.init_mesh(data=..., pipeline=..., tensor=...)` does all three at once.
#
# ## MapReduce
#
# Cut the data, *map* a function over the parts, *reduce* what comes out by adding. That is data
# parallelism again, and `mapreduce` says it in Dean and Ghemawat's words (2004):

# %%
print(minidl.source(mapreduce.sum_gradients))
print(minidl.source(mapreduce.Partial.__add__))


def job(work, partitions):
    """What Spark does with it, in this process: the parts may be computed anywhere, any time."""
    payload = pickle.dumps((default_generator.next_key(), work))
    return payload, [(i, mapreduce.map_task(payload, i, part)) for i, part in enumerate(partitions)]


partitions = [[(images[i : i + 256], labels[i : i + 256])] for i in range(0, 1024, 256)]
work = functools.partial(mapreduce.sum_gradients, network(), F.cross_entropy)
payload, results = job(work, partitions)
total = mapreduce.in_order(results[::-1])  # in whatever order they came
assert agrees({name: s / total.samples for name, s in total.sums.items()})

# %% [markdown]
# What is new is not the sum. It is that a map task is a *function of its part of the data*, and of
# nothing else. So whoever has it may die: another one does it again, to the same bits. Ranks, on
# the contrary, wait for one another, and if one fails all end.

# %%
again = mapreduce.map_task(payload, 2, partitions[2])  # the machine that had part 2 is gone
assert all((again.sums[name] == s).all() for name, s in results[2][1].sums.items())


def one_dies():
    ranks = dist.init()
    if ranks.rank == 2:
        raise MemoryError("no more")
    ranks.allreduce(np.ones(3))


try:
    dist.simulate(one_dies, RANKS)
except MemoryError as error:
    print("all ranks have ended:", error, *error.__notes__)
else:
    raise AssertionError("rank 2 died, and nobody noticed")

# %% [markdown]
# ## What a step takes
#
# Now in earnest: two processes under `mpirun`, one thread each, a network of 2.2 million parameters
# and 64 images; and the same gradient as a job on Spark, if that is installed
# (`pip install 'minidl[spark]'`, and Java). Only the functions' own source is given to them.


# %%
def over_mpi():
    ranks = dist.init()
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 64)).astype(np.float32), rng.integers(0, 10, 64)
    mine = slice(ranks.rank, None, ranks.world_size)
    alone, data, cut = (network(*layers, width=1024).to(minidl.float32)
                        for layers in ((), (), (column, row)))  # fmt: skip
    data = dist.DataParallel(data)
    stages = dist.split_sequential(network(width=1024).to(minidl.float32), ranks.world_size)
    pipeline = dist.Pipeline(stages, micro_batches=4)
    ways = {
        "each rank does all of it": lambda: backward(alone, x, y),
        "data": lambda: backward(data, x[mine], y[mine]),
        "pipeline": lambda: pipeline.step(minidl.tensor(x), minidl.tensor(y), F.cross_entropy),
        "tensor": lambda: backward(cut, x, y),
    }
    found = {name: [] for name in ways}
    for _ in range(12):
        for name, step in ways.items():
            ranks.barrier()
            start = time.perf_counter()
            step()
            ranks.barrier()
            found[name].append(time.perf_counter() - start)
    if ranks.rank == 0:
        print(json.dumps({name: float(np.median(times[2:])) for name, times in found.items()}))


def on_spark():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 64)).astype(np.float32), rng.integers(0, 10, 64)
    spark = mapreduce.context("local[2]", {"spark.ui.enabled": "false"})
    spark.setLogLevel("OFF")
    data = mapreduce.batched(spark.parallelize(list(zip(x, y)), 2), 32).cache()
    net, times = network(width=1024).to(minidl.float32), []
    for _ in range(4):
        start = time.perf_counter()
        mapreduce.gradient(net, F.cross_entropy, data)
        times.append(time.perf_counter() - start)
    spark.stop()
    print(json.dumps({"a job on Spark": float(np.median(times[1:]))}))


def run(function, launcher, seconds):
    """What a function prints, run by another process with a time limit; {} if it does not."""
    program = "\n".join([
        "import functools, json, time", "import numpy as np", "import minidl",
        "import minidl.nn.functional as F", "from minidl import distributed as dist, nn",
        "from minidl.distributed import mapreduce",
        minidl.source(network), minidl.source(backward),
        "column = functools.partial(dist.ColumnParallelLinear, gather_output=False)",
        "row = functools.partial(dist.RowParallelLinear, input_is_parallel=True)",
        minidl.source(function), f"{function.__name__}()",
    ])  # fmt: skip
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    process = subprocess.Popen(
        [*launcher, sys.executable, "-c", program], stdout=subprocess.PIPE, text=True,
        stderr=subprocess.DEVNULL, start_new_session=True,
        env={**os.environ, **root, "MINIDL_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        lines = process.communicate(timeout=seconds)[0].splitlines()
    except subprocess.TimeoutExpired:
        lines = []
    if process.poll() is None:
        process.terminate()  # mpirun ends its ranks
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return json.loads(lines[-1]) if lines and process.returncode == 0 else {}


mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
seconds = run(over_mpi, [mpirun, "-n", "2"], 60) if mpirun else {}
if importlib.util.find_spec("pyspark") and shutil.which("java"):
    seconds |= run(on_spark, [], 100)
for name, time_taken in seconds.items():
    print(f"{name:25} {1e3 * time_taken:8.1f} ms")
if {"data", "a job on Spark"} <= seconds.keys():
    print(f"a job takes {seconds['a job on Spark'] / seconds['data']:.0f} times a step over MPI")
    assert seconds["a job on Spark"] > 5 * seconds["data"]
else:
    print("(what is missing is not installed here, or took too long)")

# %% [markdown]
# A step takes some milliseconds. A job takes ten to a hundred times as long, for it ships the
# weights, starts tasks, and collects. It is worth that only if it does the work of as many steps
# (`mapreduce.local_sgd` trains on every part and averages the weights), or if there is so much data
# that the computation must go where it lies. `python benchmarks/experiments/mapreduce.py` also runs
# it on Hadoop's own engine, and kills an executor on the way.
#
# | | data | pipeline | tensor | MapReduce |
# |---|---|---|---|---|
# | a machine holds | all | some layers | some of each layer | all, and its data |
# | it says | the gradient | activations at a cut | activations in layers | weights and sums |
# | how often | a step | a micro-batch | a layer | a job |
# | it waits | for the slowest | (K-1)/(M+K-1) | in each layer | for tasks to start |
# | if one dies | all end | all end | all end | its part is done again |
# | take it | if the network fits | across machines | within a machine | where machines die |
#
# ## Try this
#
# 1. Which way says least for `width=2048`, and which for 1,024 images on 8 ranks?
# 2. Cut the network by hand: three layers in the first stage. What does `timeline.play` say about
#    waiting, with `forward=[3, 1, 1, 1]` and twice that for `backward`?
# 3. Let `network` have dropout between the layers. Is a map task still the same when done again?
# 4. Draw what a pipeline of real ranks did: `timeline.draw(pipeline.timeline())` in `over_mpi`.
# 5. On a machine with more cores: `mpirun -n 4`. Which of the ways gains?
#
# Read on in `minidl/distributed/pipeline.py`, `minidl/distributed/tensor_parallel.py` and
# `minidl/distributed/mapreduce.py`; what many machines cost on paper is in
# `minidl/distributed/costs.py`.
