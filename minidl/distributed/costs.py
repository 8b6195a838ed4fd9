"""What training on many GPUs costs, on paper: α-β-γ models, and the timeline of one step.

    layers = profile(models.get("resnet50"), minidl.zeros(1, 3, 224, 224))
    for p in predict(layers, CLUSTERS["p100"], [8, 64, 256, 1024], batch=32):
        print(p.gpus, p.images_per_second, p.efficiency, p.bound)

From bottom to top: a message of S bytes takes α + Sβ (Hockney 1994), an all-reduce so many of them
(Thakur et al. 2005); the all-reduces of a step run beside the backward pass, a bucket of gradients
at a time (Li et al. 2020, "PyTorch distributed"); and a step is over when the slowest of p GPUs is.
α and β of a network at hand come from `measure_link`; of a pipeline's stages, see `timeline.play`.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from minidl.autograd import no_grad
from minidl.distributed.aggregation import exchange
from minidl.distributed.communicator import Communicator
from minidl.nn import Module, Sequential
from minidl.tensor import Tensor

# Messages ---------------------------------------------------------------------------------------


class Link(NamedTuple):
    """What joins two ranks; both directions at once, one message at a time in each.

    Attributes:
        alpha: α, seconds until the first byte of a message arrives.
        beta: β, seconds for each byte.
        gamma: γ, seconds to add a received byte to one's own.
    """

    alpha: float
    beta: float
    gamma: float = 0.0


def gigabits(rate: float, alpha: float, gamma: float = 0.0) -> Link:
    """A link of so many 10⁹ bits a second."""
    return Link(alpha, 8e-9 / rate, gamma)


# The all-reduces of `aggregation.py`: seconds for p ranks and S bytes. Not all ranks are alike; it
# is the time of the one that has most to do.

AllReduce = Callable[[int, float, Link], float]


def parameter_server(p: int, size: float, link: Link) -> float:
    """2α + 2(p-1) Sβ + (p-1) Sγ: all of it at the server, whose messages overlap but for α."""
    if p == 1:
        return 0.0
    return 2 * link.alpha + (p - 1) * size * (2 * link.beta + link.gamma)


def tree(p: int, size: float, link: Link) -> float:
    """2 lg p (α + Sβ) + lg p Sγ, at the root."""
    return rounds(p) * (2 * link.alpha + size * (2 * link.beta + link.gamma))


def ring(p: int, size: float, link: Link) -> float:
    """2(p-1) α + 2(p-1)/p Sβ + (p-1)/p Sγ (Patarasuk & Yuan 2009)."""
    return 2 * (p - 1) * link.alpha + (p - 1) / p * size * (2 * link.beta + link.gamma)


def halving_doubling(p: int, size: float, link: Link) -> float:
    """2 lg p α + 2(p-1)/p Sβ + (p-1)/p Sγ (Rabenseifner 2004).

    For p not a power of two, as many pairs as there are ranks too many begin and end as one, with
    messages of S: 2α + 2Sβ + Sγ more.
    """
    power = 1 << (p.bit_length() - 1)
    seconds = 2 * rounds(power) * link.alpha
    seconds += (power - 1) / power * size * (2 * link.beta + link.gamma)
    if power < p:
        seconds += 2 * link.alpha + size * (2 * link.beta + link.gamma)
    return seconds


def recursive_doubling(p: int, size: float, link: Link) -> float:
    """lg p (α + Sβ + Sγ): all of it to a partner in each round; what MPI does with few bytes."""
    return rounds(p) * (link.alpha + size * (link.beta + link.gamma))


def rounds(p: int) -> int:
    """lg p, rounded up."""
    return (p - 1).bit_length()


ALLREDUCE: dict[str, AllReduce] = {
    f.__name__: f for f in (parameter_server, tree, ring, halving_doubling, recursive_doubling)
}


# Calibration ------------------------------------------------------------------------------------


def measure_link(
    communicator: Communicator,
    sizes: Sequence[int] = (8, 1 << 10, 1 << 14, 1 << 18, 1 << 20, 1 << 23),
    repeats: int = 5,
) -> Link:
    """α, β and γ between ranks 0 and 1, which send to one another at the same time, as in a ring.
    All ranks call it.

    Args:
        communicator: of two ranks or more, on the hosts whose link is of interest.
        sizes: of the messages, in bytes.
        repeats: of each, of which the median counts.

    Raises:
        ValueError: there is only one rank.
    """
    c = communicator
    if c.world_size < 2:
        raise ValueError("a link is between two ranks, there is one: mpirun -n 2 ...")
    seconds = np.zeros(len(sizes) + 1)  # the last: of a byte that is added
    c.barrier()
    if c.rank < 2:
        other = 1 - c.rank
        for i, size in enumerate(sizes):
            array, taken = np.zeros(size, np.uint8), []
            for _ in range(repeats + 1):
                start = time.perf_counter()
                exchange(c, array, other, other, array)
                taken.append(time.perf_counter() - start)
            seconds[i] = np.median(taken[1:])
        a, b = np.ones((2, 1 << 20), np.float32)
        taken = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            a += b
            taken.append(time.perf_counter() - start)
        seconds[-1] = np.median(taken[1:]) / a.nbytes
    c.broadcast(seconds)
    return fit_link(sizes, seconds[:-1].tolist())._replace(gamma=float(seconds[-1]))


def fit_link(sizes: Sequence[float], seconds: Sequence[float]) -> Link:
    """α and β of times of messages: the line with the least squared *relative* errors, so that
    short messages count as much as long ones.

    Raises:
        ValueError: fewer than two sizes, or a time that is not positive.
    """
    s, t = np.asarray(sizes, float), np.asarray(seconds, float)
    if len(set(sizes)) < 2 or not (t > 0).all():
        raise ValueError(f"α and β need two sizes and positive times, got {sizes} and {seconds}")
    rows = np.stack([1 / t, s / t], axis=1)
    (alpha, beta), *_ = np.linalg.lstsq(rows, np.ones(len(t)), rcond=None)
    return Link(max(float(alpha), 0.0), max(float(beta), 0.0))


# Clusters ---------------------------------------------------------------------------------------


class Cluster(NamedTuple):
    """Machines of some GPUs each.

    Attributes:
        gpus_per_node: in one machine.
        inside: the link from GPU to GPU in a machine.
        between: the link from machine to machine, which its GPUs share.
        flops: operations a second that one GPU reaches in training.
        about: what this is, and where the numbers come from.
    """

    gpus_per_node: int
    inside: Link
    between: Link
    flops: float
    about: str = ""


# β is the vendors' bandwidth; α (of a message through NCCL) and the H100's flops are assumed.
# 195 images/s of ResNet-50 on a P100 (batch 32, tensorflow.org/performance/benchmarks, 2017) are
# 195 · 3 · 8.2·10⁹ = 4.8·10¹² operations a second.
CLUSTERS = {
    "p100": Cluster(
        8, gigabits(256, 1e-5), gigabits(50, 2e-5), 4.8e12,
        "8 P100 with NVLink a machine, 50 Gbit/s Ethernet (Goyal et al. 2017)",
    ),
    "p100-pcie": Cluster(
        4, gigabits(80, 1e-5), gigabits(25, 2e-5), 4.8e12,
        "4 P100 a machine, 25 Gbit/s RoCE (Sergeev & Del Balso 2018, Horovod)",
    ),
    "titanx": Cluster(
        4, gigabits(80, 1e-5), gigabits(56, 1e-5), 2.8e12,
        "4 TITAN X a machine, 56 Gbit/s InfiniBand (Akiba et al. 2017, ChainerMN)",
    ),
    "h100": Cluster(
        8, gigabits(3600, 5e-6), gigabits(3200, 1e-5), 7e13,
        "8 H100 with NVLink a machine, 8 × 400 Gbit/s InfiniBand; float16",
    ),
}  # fmt: skip


def allreduce_seconds(cluster: Cluster, gpus: int, size: float, algorithm: str = "ring") -> float:
    """An all-reduce in two levels (Goyal et al. 2017, section 4): a reduce-scatter and afterwards
    an all-gather inside each machine, which together are a ring, and between them all-reduces
    among machines, which share the machine's link.

    Args:
        cluster, gpus: on how many of which.
        size: S, bytes on each GPU.
        algorithm: between machines, one of `ALLREDUCE`.
    """
    inside = min(gpus, cluster.gpus_per_node)
    nodes = math.ceil(gpus / cluster.gpus_per_node)
    return ring(inside, size, cluster.inside) + ALLREDUCE[algorithm](nodes, size, cluster.between)


# A network --------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """A module that computes, or has parameters.

    Attributes:
        name: its dotted path.
        parameters: how many of its own.
        operations: of a forward pass of one sample; a multiplication and an addition are two.
    """

    name: str
    parameters: int
    operations: float


def profile(model: Module, sample: Tensor) -> list[Layer]:
    """Run a model once and count, for each of its modules in the order of their first call.

    Products and convolutions are counted as defined, other ops as one operation a number that
    comes out. (A recurrent op's products are not seen.)

    Args:
        sample: an input; the batch may be of one.
    """
    ops: Any = importlib.import_module("minidl.op")  # (minidl.op is the decorator)
    counts: dict[str, float] = {}
    path: list[str] = []
    names = {module: name for name, module in model.named_modules()}

    def note(op: Any, inputs: tuple[Any, ...], settings: dict[str, Any], out: Tensor) -> None:
        each = 1.0
        if op.name.startswith("conv2d"):
            each = 2.0 * math.prod(inputs[1].shape[1:])
        elif op.name in ("linear", "matmul"):
            each = 2.0 * inputs[0].shape[-1]
        counts[path[-1]] += each * out.numel() / len(sample)

    def enter(module: Module, args: tuple[Any, ...]) -> None:
        path.append(names[module])
        counts.setdefault(path[-1], 0.0)

    def leave(module: Module, args: tuple[Any, ...], output: Any) -> None:
        path.pop()

    hooks = [m.register_forward_pre_hook(enter) for m in names]
    hooks += [m.register_forward_hook(leave) for m in names]
    training = [module for module in names if module.training]
    before, ops.on_call = ops.on_call, note
    try:
        with no_grad():
            model.eval()(sample)
    finally:
        ops.on_call = before
        for module in training:
            module.training = True
        for hook in hooks:
            hook.remove()
    own = {
        name: sum(p.numel() for p in module.parameters(recurse=False))
        for module, name in names.items()
    }
    return [Layer(n, own[n], count) for n, count in counts.items() if own[n] or count]


def layer_costs(model: Sequential, sample: Tensor) -> list[float]:
    """Operations of each layer of a Sequential, for `split_sequential`."""
    layers = profile(model, sample)
    return [
        sum(x.operations for x in layers if x.name.split(".")[0] == name)
        for name, _ in model.named_children()
    ]


# A step -----------------------------------------------------------------------------------------


class Bucket(NamedTuple):
    """Gradients that are summed over ranks together.

    Attributes:
        size: bytes.
        ready: when the backward pass has made the last of them; seconds into the step.
        start, end: of the all-reduce.
    """

    size: float
    ready: float
    start: float
    end: float


class Step(NamedTuple):
    """A step of data parallel training, on paper.

    Attributes:
        compute: seconds of forward and backward pass.
        total: until gradients are summed; what is more than `compute` is not hidden behind it.
        buckets: in the order in which they become ready.
    """

    compute: float
    total: float
    buckets: list[Bucket]


def step_timeline(
    layers: Sequence[Layer],
    compute: float,
    allreduce: Callable[[float], float],
    bucket: float = 25e6,
    bytes_per_parameter: int = 4,
    overlap: bool = True,
) -> Step:
    """One step: the backward pass fills buckets from the last layer to the first; one all-reduce
    at a time takes them in that order, while the backward pass goes on.

    Args:
        layers: of `profile`. They share the time as they share the operations.
        compute: seconds of forward and backward pass, of which backward takes 2/3.
        allreduce: seconds that the sum of so many bytes takes.
        bucket: bytes from which on a bucket is full.
        overlap: False: wait for the end of the backward pass.
    """
    work = [layer.operations for layer in layers]
    each = 2 / 3 * compute / (sum(work) or len(layers) or 1)
    now, free, size = compute / 3, 0.0, 0.0
    full: list[tuple[float, float]] = []
    for i in reversed(range(len(layers))):
        now += each * (work[i] if sum(work) else 1)
        size += layers[i].parameters * bytes_per_parameter
        if size and (size >= bucket or i == 0):
            full.append((size, now))
            size = 0.0
    buckets = []
    for size, ready in full:
        start = max(free, ready if overlap else compute)
        free = start + allreduce(size)
        buckets.append(Bucket(size, ready, start, free))
    return Step(compute, max(compute, free), buckets)


def slowest(gpus: int, jitter: float) -> float:
    """How much longer than one GPU the slowest of p takes, if their times are normal around 1 with
    a standard deviation of `jitter`: 1 + jitter Φ⁻¹((p - π/8) / (p + 1 - π/4)) (Blom 1958)."""
    share = (gpus - math.pi / 8) / (gpus + 1 - math.pi / 4)
    return 1 + jitter * NormalDist().inv_cdf(share)


# Scaling ----------------------------------------------------------------------------------------

# The standard deviation of a step's time, as a share of it: with this number the models here are
# closest to what Goyal, Horovod and ChainerMN published (tests/test_distributed_costs.py).
JITTER = 0.03


class Prediction(NamedTuple):
    """Data parallel training on some GPUs, each with its own samples.

    Attributes:
        gpus: p.
        batch: samples a step, on all GPUs together.
        seconds: a step.
        images_per_second: of all GPUs together.
        efficiency: images_per_second / (p · images_per_second of one GPU).
        lost: the share of a step that would be saved if there were no "latency" (α = 0), infinite
            "bandwidth" (β = γ = 0), no "stragglers" (jitter = 0).
        bound: the largest of these; "computing" if none is 1 %.
        step: the timeline.
    """

    gpus: int
    batch: int
    seconds: float
    images_per_second: float
    efficiency: float
    lost: dict[str, float]
    bound: str
    step: Step


def predict(
    layers: Sequence[Layer],
    cluster: Cluster,
    gpus: Sequence[int],
    batch: int = 32,
    images_per_second: float | None = None,
    algorithm: str = "ring",
    bucket: float = 25e6,
    bytes_per_parameter: int = 4,
    jitter: float = JITTER,
    overlap: bool = True,
) -> list[Prediction]:
    """How training scales if each GPU keeps its batch.

    Args:
        layers: of `profile`.
        cluster: one of `CLUSTERS`, or another.
        gpus: how many, in ascending order.
        batch: samples a step on each GPU.
        images_per_second: of one GPU alone; None: from the operations (backward is twice forward)
            and `cluster.flops`.
        algorithm: of `ALLREDUCE`, between machines.
        bucket, bytes_per_parameter, overlap: see `step_timeline`.
        jitter: see `slowest`.

    Raises:
        ValueError: a number of GPUs below 1, an unknown algorithm, a speed that is not positive.
    """
    if algorithm not in ALLREDUCE:
        raise ValueError(f"algorithm {algorithm!r}: choose one of {', '.join(ALLREDUCE)}")
    if images_per_second is None:
        images_per_second = cluster.flops / (3 * sum(layer.operations for layer in layers))
    if not images_per_second > 0 or batch < 1 or min(gpus) < 1:
        raise ValueError(
            f"GPUs, batch and images a second are positive, got {list(gpus)}, {batch} and "
            f"{images_per_second}"
        )
    alone = batch / images_per_second

    def step(p: int, cluster: Cluster, jitter: float) -> Step:
        return step_timeline(
            layers, alone * slowest(p, jitter),
            lambda size: allreduce_seconds(cluster, p, size, algorithm), bucket,
            bytes_per_parameter, overlap,
        )  # fmt: skip

    def without(**changes: float) -> Cluster:
        inside, between = cluster.inside._replace(**changes), cluster.between._replace(**changes)
        return cluster._replace(inside=inside, between=between)

    found = []
    for p in gpus:
        real = step(p, cluster, jitter)
        better = {
            "latency": step(p, without(alpha=0.0), jitter),
            "bandwidth": step(p, without(beta=0.0, gamma=0.0), jitter),
            "stragglers": step(p, cluster, 0.0),
        }
        lost = {name: 1 - ideal.total / real.total for name, ideal in better.items()}
        worst = max(lost, key=lambda name: lost[name])
        found.append(Prediction(
            p, p * batch, real.total, p * batch / real.total, alone / real.total, lost,
            worst if lost[worst] >= 0.01 else "computing", real,
        ))  # fmt: skip
    return found


def advice(prediction: Prediction) -> str:
    """In a sentence: what bounds training on so many GPUs, and what would help."""
    p = prediction
    helps = {
        "bandwidth": "faster links, fewer bytes (float16), a larger batch on each GPU",
        "latency": "larger buckets, or halving_doubling instead of ring",
        "stragglers": "data that is ready in time, machines that are alike, a larger batch",
        "computing": "nothing but faster GPUs",
    }
    text = (
        f"{p.gpus:,} GPUs are bound by {p.bound} ({100 * p.efficiency:.0f} % of {p.gpus:,} times "
        f"one). What helps: {helps[p.bound]}."
    )
    if p.batch > 8192:
        text += (
            f" A step takes {p.batch:,} samples: beyond 8,192 Goyal et al. (2017, figure 1) found "
            "that ResNet-50 ends less accurate on ImageNet."
        )
    return text


def doubling(text: str) -> list[int]:
    """Numbers of GPUs: "8:1024" is 8, 16, ... 1024; "1,8,64" is as it says.

    Raises:
        ValueError: neither of these.
    """
    try:
        if ":" in text:
            first, last = map(int, text.split(":"))
            numbers = [first << i for i in range((last // first).bit_length())] if first > 0 else []
        else:
            numbers = sorted(map(int, text.split(",")))
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 1:
        raise ValueError(f"GPUs are given as 8:1024 or 1,8,64, got {text!r}")
    return numbers


def plot_scaling(predictions: Sequence[Prediction], title: str, path: Path) -> None:
    """Images a second against GPUs, beside what would be ideal; and where a step's time goes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    gpus = [p.gpus for p in predictions]
    one = predictions[0].images_per_second / predictions[0].efficiency / gpus[0]
    left.plot(gpus, [one * n for n in gpus], "--", color="0.6", label="ideal")
    left.plot(gpus, [p.images_per_second for p in predictions], "o-", ms=4, label="predicted")
    for p in predictions:
        left.annotate(
            f"{100 * p.efficiency:.0f} %", (p.gpus, p.images_per_second), fontsize=8,
            textcoords="offset points", xytext=(4, -12),
        )  # fmt: skip
    left.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="images/s", title=title)
    left.set_xticks(gpus, [f"{n:,}" for n in gpus], rotation=45)
    left.minorticks_off()
    left.legend(frameon=False)
    alone = [1000 * p.seconds * p.efficiency for p in predictions]
    compute = [1000 * p.step.compute for p in predictions]
    places = range(len(gpus))
    parts = {
        "computing": (np.zeros(len(gpus)), np.array(alone)),
        "waiting for the slowest": (np.array(alone), np.array(compute) - alone),
        "communication not hidden": (
            np.array(compute), 1000 * np.array([p.seconds for p in predictions]) - compute,
        ),
    }  # fmt: skip
    for (name, (bottom, height)), color in zip(parts.items(), ("#4c9be8", "#f2a65a", "#d1495b")):
        right.bar(places, height, bottom=bottom, label=name, color=color)
    right.set_xticks(places, [f"{n:,}" for n in gpus], rotation=45)
    right.set(xlabel="GPUs", ylabel="a step (ms)")
    right.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
