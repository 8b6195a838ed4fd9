"""What float16 does to training: gradients flushed to zero, updates lost, and what helps.

Micikevicius et al. 2018: scale the loss, and keep the weights in float32 too. The default CNN on
Fashion-MNIST, stochastic gradient descent with momentum:

    python benchmarks/experiments/mixed_precision.py --root DIR --threads 1   # 10 minutes

writes benchmarks/results/mixed_precision.md, .json and .png.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from common import accuracy, arguments, mean_std, some, table, write
from matplotlib.figure import Figure

import minidl
import minidl.nn.functional as F
from minidl import data, models, nn, optim
from minidl.amp import GradScaler, MasterWeights, autocast
from minidl.cli import kernels_in_words
from minidl.data import DataLoader
from minidl.optim.lr_scheduler import OneCycleLR

STEPS, EVERY = 500, 50  # looked at every so many
SCALE = 2**13  # of the loss, where gradients are looked at
SMALLEST = -24  # float16's smallest number is 2^-24, and half of it is rounded to 0
EXPONENTS = np.arange(-48, 1)


class Way(NamedTuple):
    """How a network is trained."""

    dtype: str | None = None
    scaled: bool = False
    half_weights: bool = False
    masters: bool = False


WAYS = {
    "float32": Way(),
    "float16": Way("float16"),
    "float16, loss scaled": Way("float16", scaled=True),
    "bfloat16": Way("bfloat16"),
    "float16 weights": Way("float16", half_weights=True),
    "float16 weights, loss scaled, masters": Way("float16", True, True, True),
}


def batches(dataset: Any, steps: int, seed: int) -> Iterator[Any]:
    loader = DataLoader(dataset, 64, shuffle=True, drop_last=True, seed=seed)
    done = 0
    while done < steps:
        for batch in loader:
            yield batch
            done += 1
            if done == steps:
                return


def loss_of(model: nn.Module, x: Any, y: Any, dtype: str | None) -> Any:
    with autocast(dtype=dtype or "float16", enabled=dtype is not None):
        return F.cross_entropy(model(x), y)


def train(model: nn.Module, way: Way, dataset: Any, steps: int, seed: int, look: Any) -> None:
    """`look` is called every so often before a step, and after it."""
    if way.half_weights:
        model.half()
    optimizer: optim.Optimizer = optim.SGD(model.parameters(), 0.05, momentum=0.9)
    optimizer = MasterWeights(optimizer) if way.masters else optimizer
    scheduler = OneCycleLR(optimizer, 0.05, total_steps=steps + 1, cycle_momentum=False)
    scaler = GradScaler(enabled=way.scaled, growth_interval=100)
    model.train()
    for step, (x, y) in enumerate(batches(dataset, steps, seed)):
        watched = look and step % EVERY == EVERY // 2
        after = look(model, x, y) if watched else None
        optimizer.zero_grad()
        scaler.scale(loss_of(model, x, y, way.dtype)).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        if after:
            after()


class Watch:
    """Looks at a float32 run: at its gradients as float16 would have them, and at its updates.

    Attributes:
        flushed: by factor of the loss and step, the share of gradients other than 0 that float16
            rounds to 0: of weights, and of the outputs of layers.
        counts: of the outputs' gradients, by exponent.
        lost: by step, the share of updates other than 0 that float16 weights would not notice.
    """

    def __init__(self) -> None:
        self.flushed: dict[str, list[tuple[float, ...]]] = {"1": [], str(SCALE): []}
        self.counts = np.zeros(len(EXPONENTS))
        self.lost: list[float] = []

    def gradients(self, model: Any, x: Any, y: Any) -> list[np.ndarray]:
        """Of all weights, and of the outputs of all layers with weights; those other than 0."""
        outputs: list[Any] = []
        layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        hooks = [m.register_forward_hook(lambda m, a, out: outputs.append(out)) for m in layers]
        state = minidl.get_rng_state()
        loss = F.cross_entropy(model(x), y)
        minidl.set_rng_state(state)  # the step itself has the same dropout
        for hook in hooks:
            hook.remove()
        found = [g.numpy().ravel() for g in minidl.grad(loss, [*model.parameters(), *outputs])]
        count = len(found) - len(outputs)
        return [g[g != 0] for g in map(np.concatenate, (found[:count], found[count:]))]

    def __call__(self, model: Any, x: Any, y: Any) -> Any:
        exact = self.gradients(model, x, y)
        for factor, shares in self.flushed.items():
            low = [(g * np.float32(factor)).astype(np.float16) for g in exact]
            shares.append(tuple(float((g == 0).mean()) for g in low))
            assert all(np.isfinite(g).all() for g in low)
        exponents = np.frexp(exact[1])[1] - 1
        self.counts += np.bincount(np.clip(exponents - EXPONENTS[0], 0, len(EXPONENTS) - 1),
                                   minlength=len(EXPONENTS))  # fmt: skip
        before = [p.numpy().copy() for p in model.parameters()]

        def after() -> None:
            w = np.concatenate([b.ravel() for b in before])
            update = np.concatenate([p.numpy().ravel() for p in model.parameters()]) - w
            low = w.astype(np.float16)
            unchanged = (low.astype(np.float32) + update).astype(np.float16) == low
            self.lost.append(float(unchanged[update != 0].mean()))

        return after


def run(pair: Any, seed: int, quick: bool) -> dict[str, Any]:
    few, test_set = some(pair[0], 50 if quick else 2000, seed), pair[1]
    found: dict[str, Any] = {"accuracy": {}}
    watch = Watch()
    for name, way in WAYS.items():
        minidl.manual_seed(seed)
        model = models.get("cnn")
        look = watch if name == "float32" else None
        train(model, way, few, 30 if quick else STEPS, seed, look)
        with np.errstate(all="ignore"):
            found["accuracy"][name] = accuracy(model.float(), test_set)
    found.update(flushed=watch.flushed, counts=watch.counts.tolist(), lost=watch.lost)
    return found


def main() -> None:
    args = arguments(__doc__)
    start = time.perf_counter()
    pair = [data.FashionMNIST(args.root, train=t) for t in (True, False)]
    if args.quick:
        pair[1] = some(pair[1], 20, 0)
    runs = []
    for seed in range(args.seeds):
        runs.append(run(pair, seed, args.quick))
        print(f"seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    text = [
        "# What does float16 do to training?",
        f"The default CNN on 20,000 images of Fashion-MNIST, {STEPS} steps of 64, SGD with "
        f"momentum 0.9, one cycle up to 0.05; {args.seeds} seeds (mean ± standard deviation), "
        f"tested on {len(pair[1]):,} images.",
        "## Accuracy",
        "*float16*, *bfloat16*: weights in float32, products in 16 bits (`autocast`). *Loss "
        "scaled*: `GradScaler`. *float16 weights*: nothing is kept in 32 bits but sums; *masters*: "
        "copies of the weights are (`MasterWeights`).",
        table(["", "test accuracy (%)"],
              [[name, mean_std(column(runs, name))] for name in WAYS]),
        "## What float16 loses",
        f"Looked at every {EVERY} steps of the float32 runs, at the same weights and batches. "
        "*Flushed*: gradients that are not 0, and that float16 rounds to 0. *Lost*: SGD's updates "
        "that are not 0, and after which float16 weights are what they were.",
        table(["share (%)", "as they are", f"loss times {SCALE}"], [
            ["gradients of weights flushed", *(shares(runs, name, 0) for name in
                                               ("1", str(SCALE)))],
            ["gradients of layers' outputs flushed", *(shares(runs, name, 1) for name in
                                                       ("1", str(SCALE)))],
        ]),
        f"Updates lost with float16 weights: {100 * lost(runs).mean():.0f} % (by seed "
        f"{', '.join(f'{100 * v:.0f}' for v in lost(runs))}); with float32 masters "
        "none of these.",
        "![gradients by size, updates lost by step](mixed_precision.png)",
        verdict(runs),
        f"{kernels_in_words()}; {(time.perf_counter() - start) / 60:.1f} minutes in all. (16 bits "
        "are slower here: a CPU widens and rounds them one by one.)",
    ]  # fmt: skip
    write(args.out, "mixed_precision", "\n\n".join(text) + "\n", runs, draw(runs))


def column(runs: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([found["accuracy"][name] for found in runs])


def flushed(runs: list[dict[str, Any]], name: str, which: int) -> np.ndarray:
    """Mean over the steps, for each seed."""
    return np.array([np.mean(found["flushed"][name], axis=0)[which] for found in runs])


def shares(runs: list[dict[str, Any]], name: str, which: int) -> str:
    return f"{100 * flushed(runs, name, which).mean():.2f}"


def lost(runs: list[dict[str, Any]]) -> np.ndarray:
    return np.array([np.mean(found["lost"]) for found in runs])


def draw(runs: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    counts = np.sum([found["counts"] for found in runs], axis=0)
    left.bar(EXPONENTS, 100 * counts / counts.sum(), width=1.0, color="C0")
    left.axvspan(EXPONENTS[0], SMALLEST - 1, color="C3", alpha=0.15, label="0 in float16")
    left.axvspan(SMALLEST - 1, -14.5, color="C1", alpha=0.15, label="fewer than 11 bits")
    left.set(title="gradients of layers' outputs, by size", xlabel="exponent (base 2)",
             ylabel="share (%)", xlim=(EXPONENTS[0], 0))  # fmt: skip
    left.annotate(f"loss times {SCALE}\nmoves all 13 to the right", (0.62, 0.8),
                  xycoords="axes fraction", fontsize=8)  # fmt: skip
    left.legend(frameon=False, fontsize=8, loc="upper left")
    steps = EVERY // 2 + EVERY * np.arange(len(runs[0]["lost"]))
    for seed, found in enumerate(runs):
        right.plot(steps, 100 * np.array(found["lost"]), marker="o", ms=3, label=f"seed {seed}")
    right.set(title="updates that float16 weights lose", xlabel="step", ylabel="share (%)",
              ylim=(0, 100))  # fmt: skip
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def verdict(runs: list[dict[str, Any]]) -> str:
    """The claims, each beside what was measured."""
    lines = []

    def claim(what: str, measured: str, holds: bool) -> None:
        lines.append(f"- {what}: {measured} ({'holds' if holds else 'DOES NOT HOLD'})")

    for name in ("float16, loss scaled", "bfloat16", "float16 weights, loss scaled, masters"):
        gap = column(runs, name) - column(runs, "float32")
        by_seed = ", ".join(f"{g:+.2f}" for g in gap)
        claim(f"{name}: within 0.3 points of float32", f"{gap.mean():+.2f} points, by seed "
              f"{by_seed}", abs(gap.mean()) <= 0.3)  # fmt: skip
    gap = column(runs, "float16 weights") - column(runs, "float32")
    claim("float16 weights without masters are worse by 0.5", f"{gap.mean():+.2f} points",
          gap.mean() <= -0.5)  # fmt: skip
    plain, scaled = (flushed(runs, name, 1).mean() for name in ("1", str(SCALE)))
    claim("scaling saves nine in ten of the flushed gradients of layers' outputs",
          f"{100 * plain:.2f} % before, {100 * scaled:.3f} % after",
          scaled <= plain / 10)  # fmt: skip
    share = lost(runs).mean()
    claim("half of the updates are lost with float16 weights", f"{100 * share:.0f} %", share >= 0.5)
    return "\n".join(["## Claims\n", *lines])


if __name__ == "__main__":
    main()
