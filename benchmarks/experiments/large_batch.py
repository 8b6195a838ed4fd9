"""How large may a batch be? Linear scaling and warm-up (Goyal et al. 2017), on Fashion-MNIST.

    python benchmarks/experiments/large_batch.py --root FOLDER
    mpirun -n 4 python benchmarks/experiments/large_batch.py --root FOLDER      # the same, on ranks

k workers of 64 images each make a step of 64 k images (`DataParallel`), so an epoch has k times
fewer steps. What must become of the learning rate η that is right for 64 images? As in the paper
("Accurate, large minibatch SGD"): SGD with momentum 0.9, weight decay 1e-4, η divided by 10 after a
third, two thirds and eight ninths of all epochs (of 90 there, of 9 here). There the warm-up takes 5
of the 90, 780 steps; here half an epoch would be 58. All ways of one seed see the same images in
the same order, and begin with the same weights. Without mpirun the workers are threads
(`dist.simulate`). Writes results/large_batch.md, .json and .png.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from common import accuracy, arguments, mean_std, some, table, write
from matplotlib.figure import Figure

import minidl
import minidl.nn.functional as F
from minidl import data, nn, optim
from minidl import distributed as dist
from minidl.cli import kernels_in_words
from minidl.data import BatchSampler, DataLoader, RandomSampler
from minidl.distributed import DistributedBatchSampler
from minidl.optim.lr_scheduler import LRScheduler, MultiStepLR, warm_up

LR, SHARE, EPOCHS = 0.04, 64, 9  # η, and how many images a worker has of each batch


class Way(NamedTuple):
    """How to learn: k workers, the factor of η, and the epochs of its warm-up."""

    name: str
    workers: int
    scale: int
    warm: float = 0


SMALL = Way("64", 1, 1)
UNSCALED = Way("512, η as it was", 8, 1)
SUDDEN = Way("512, 8 η", 8, 8)
WARM = Way("512, 8 η, warm-up over 2 epochs", 8, 8, 2)
HUGE = Way("2,048, 32 η, warm-up over 2 epochs", 32, 32, 2)
SHORT = Way("512, 8 η, warm-up over half an epoch", 8, 8, 0.5)
WAYS = (SMALL, UNSCALED, SUDDEN, SHORT, WARM, HUGE)


def learn(way: Way, train_set: Any, test_set: Any, epochs: int, seed: int) -> list[list[float]]:
    """What every rank runs: (training loss, test accuracy in %) of each epoch."""
    dist.init()
    minidl.manual_seed(seed)
    layers = [nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
    net = dist.DataParallel(nn.Sequential(*layers, nn.Linear(128, 10)), check_finite=False)
    order = BatchSampler(RandomSampler(train_set, seed=seed), SHARE * way.workers, drop_last=True)
    loader = DataLoader(train_set, batch_sampler=DistributedBatchSampler(order))
    # η stands outside of the momentum, v ← μ v + ∇, w ← w - η v: when it changes, v needs no
    # correction (section 3 of the paper).
    optimizer = optim.SGD(net.parameters(), way.scale * LR, momentum=0.9, weight_decay=1e-4)
    steps = epochs * len(loader)
    scheduler: LRScheduler = MultiStepLR(optimizer, [steps // 3, 2 * steps // 3, 8 * steps // 9])
    if way.warm:
        scheduler = warm_up(optimizer, round(way.warm * len(loader)), scheduler)
    curve = []
    for _ in range(epochs):
        losses = []
        for x, y in loader:
            loss = F.cross_entropy(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        mean = np.array(np.mean(losses))  # of this rank's images: all have equally many
        dist.communicator().allreduce(mean)
        right = accuracy(net.module, test_set) if dist.rank() == 0 else 0.0
        curve.append([float(mean) / dist.world_size(), right])
    return curve


def main() -> None:
    args = arguments(__doc__ or "")
    start = time.perf_counter()
    ranks = dist.init()
    sets: list[Any] = [data.FashionMNIST(args.root, train=t) for t in (True, False)]
    if args.quick:
        sets = [some(s, n, 0) for s, n in zip(sets, (410, 20))]
    epochs = 1 if args.quick else EPOCHS
    runs: dict[str, list[list[list[float]]]] = {way.name: [] for way in WAYS}
    for seed in range(args.seeds):
        for way in WAYS:
            job = partial(learn, way, *sets, epochs, seed)
            with np.errstate(over="ignore", invalid="ignore"):  # a way may diverge
                curve = job() if ranks.world_size > 1 else dist.simulate(job, way.workers)[0]
            runs[way.name].append(curve)
            if ranks.rank == 0:
                print(f"seed {seed}, {way.name}: {curve[-1][1]:.2f} %, "
                      f"{time.perf_counter() - start:.0f} s so far", flush=True)  # fmt: skip
        if ranks.rank == 0:  # a record after each seed: it takes long, and may be interrupted
            report(args, runs, len(sets[0]), len(sets[1]), time.perf_counter() - start)


def report(args: Any, runs: dict[str, Any], images: int, tests: int, took: float) -> None:
    final = {name: np.array([curve[-1][1] for curve in curves]) for name, curves in runs.items()}
    rows = []
    for way in WAYS:
        found, lost = final[way.name], final[SMALL.name] - final[way.name]
        rows.append([
            way.name, f"{way.scale * LR:g}", f"{images // (SHARE * way.workers):,}",
            mean_std(found), f"{found.min():.1f}", "" if way is SMALL else mean_std(lost),
            f"{np.mean([curve[0][0] for curve in runs[way.name]]):.2f}",
        ])  # fmt: skip
    text = [
        "# How large may a batch be?",
        f"Fashion-MNIST, {images:,} images, 784-128-128-10, {EPOCHS if not args.quick else 1} "
        f"epochs of SGD with momentum 0.9; {len(final[SMALL.name])} seeds (mean ± standard "
        "deviation). A batch is cut into shares of 64, one a worker; their gradients are summed by "
        f"`DataParallel`. η = {LR} is right for 64 images. Accuracy in % on {tests:,} test images. "
        "See `benchmarks/experiments/large_batch.py` for the schedule.",
        table(
            ["batch", "learning rate", "steps an epoch", "accuracy", "worst seed", "lost to 64",
             "training loss, epoch 1"],
            rows,
        ),
        "![training loss and accuracy by epoch](large_batch.png)",
        "A step with k times the images has a gradient of k times less variance and is made k "
        "times less often. The *linear scaling rule* (section 2.1) makes up for it: k small steps "
        "with η go about as far as one with kη, *if the gradient hardly changes on the way*. In "
        "the beginning it does change, and so η begins small and grows to kη (section 2.2). "
        "Beyond some size no gradient stays the same for so long.",
        verdict(final),
        f"{kernels_in_words()}; {took / 60:.1f} minutes in all, on a machine that had other work.",
    ]  # fmt: skip
    numbers = {name: [[[x if np.isfinite(x) else None for x in epoch] for epoch in curve]
                      for curve in curves] for name, curves in runs.items()}  # fmt: skip
    write(args.out, "large_batch", "\n\n".join(text) + "\n", numbers, draw(runs))


def verdict(final: dict[str, np.ndarray]) -> str:
    """What the paper says, each beside what was measured."""
    lines = []

    def claim(what: str, holds: bool, lost: np.ndarray) -> None:
        points = ", ".join(f"{x:.2f}" for x in lost)
        lines.append(f"- {what}: {lost.mean():.2f} points, by seed {points} "
                     f"({'holds' if holds else 'DOES NOT HOLD'})")  # fmt: skip

    small, unscaled, sudden, short, warm, huge = (final[way.name] for way in WAYS)
    lost = small - warm
    claim("512 with linear scaling and warm-up is within 1.2 points of 64", lost.mean() < 1.2, lost)
    lost = warm - unscaled
    claim("without scaling it is worse in every seed", bool((lost > 0).all()), lost)
    lost = warm - sudden
    claim("without warm-up it is worse in every seed", bool((lost > 0).all()), lost)
    lines.append(f"- a warm-up of half an epoch loses {(small - short).mean():.2f} points to 64")
    lines.append(f"- 2,048 loses {(small - huge).mean():.2f} points to 64")
    return "## What was claimed\n\n" + "\n".join(lines)


def draw(runs: dict[str, Any]) -> Figure:
    """A line a seed."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for i, (name, curves) in enumerate(runs.items()):
        for seed, curve in enumerate(curves):
            epochs = range(1, len(curve) + 1)
            for axes, values in zip(panels, zip(*curve)):
                axes.plot(epochs, values, ".-", color=f"C{i}", lw=1, ms=4,
                          label=None if seed else name)  # fmt: skip
    panels[0].set(xlabel="epoch", ylabel="training loss (nats)", yscale="log")
    panels[1].set(xlabel="epoch", ylabel="test accuracy (%)")
    panels[1].legend(frameon=False, fontsize=8)
    for axes in panels:
        axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    main()
