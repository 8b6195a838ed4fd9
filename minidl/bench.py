"""Measuring minidl on this machine: a ladder of implementations under its roof, a training step.

The roofline (S. Williams, A. Waterman, D. Patterson, 2009): a program that does I operations for
each byte it moves cannot do more of them per second than I · (bytes per second of memory), nor more
than the processor's peak. Where a rung stands below that roof, it wastes something.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minidl.backend.native import native, why_missing
from minidl.op import registry, use

if TYPE_CHECKING:
    from rich.console import Console

SIZES = {"matmul": 512, "conv2d": 56, "matmul_integer": 512}  # what `ladder` measures: op -> size
PAUSE = 0.25  # seconds; NumPy's BLAS threads spin that long, and would slow whatever comes next


@dataclass(frozen=True)
class Problem:
    """A call of an op.

    Attributes:
        op: its name.
        title: in words.
        inputs, settings: its arguments.
        flops: multiplications and additions of the definition.
        bytes: of the inputs and of the result.
    """

    op: str
    title: str
    inputs: tuple[Any, ...]
    settings: dict[str, Any]
    flops: int
    bytes: int


def problem(op: str, size: int) -> Problem:
    """The square product of that size; the 3×3 convolution, 64 → 64 channels, of such images."""
    rng = np.random.default_rng(0)
    if op == "matmul_integer":
        a, b = (rng.integers(-128, 128, (size, size)).astype(np.int8) for _ in range(2))
        return Problem(
            op, f"{size}×{size} · {size}×{size}", (a, b, *[None] * 5), {"relu": False},
            2 * size**3, 2 * size**2 + 4 * size**2,
        )  # fmt: skip
    if op == "matmul":
        x, y = (rng.standard_normal((size, size), np.float32) for _ in range(2))
        return Problem(op, f"{size}×{size} · {size}×{size}", (x, y), {}, 2 * size**3, 12 * size**2)
    n, channels = 8, 64
    x = rng.standard_normal((n, channels, size, size), np.float32)
    w = rng.standard_normal((channels, channels, 3, 3), np.float32)
    return Problem(
        op, f"{n}×{channels}×{size}×{size} * {channels}×{channels}×3×3", (x, w, None),
        registry[op].op.defaults | {"padding": (1, 1)}, 2 * x.size * w[0].size,
        2 * x.nbytes + w.nbytes,
    )  # fmt: skip


def traffic(rung: str, call: Problem) -> int:
    """Bytes that a rung cannot but move: the arrays that it is given and makes, each once."""
    if rung == "im2col":  # its matrix of patches is written, and read
        return call.bytes + 2 * 9 * call.inputs[0].nbytes
    if rung == "winograd":  # 6×6 numbers for each 4×4 pixels, of the input and of the output
        return call.bytes + 2 * 2 * 36 * call.inputs[0].nbytes // 16
    return call.bytes


@dataclass(frozen=True)
class Rung:
    """An implementation's result.

    Attributes:
        op, name, problem: what ran on what.
        seconds: of one call, the median.
        gflops: operations of the definition (10⁹) a second; Winograd does fewer than that.
        share: of the peak; None if that is unknown.
        intensity: operations for each byte that has to move.
        smaller: it would take too long on the size that was asked for.
    """

    op: str
    name: str
    problem: str
    seconds: float
    gflops: float
    share: float | None
    intensity: float
    smaller: bool


@dataclass(frozen=True)
class Roofs:
    """What the machine does at most (measured).

    Attributes:
        gflops: 10⁹ operations on float32 a second.
        gbytes: 10⁹ bytes from and to memory a second.
        gops: 10⁹ operations on int8 a second, added up in int32.
    """

    gflops: float
    gbytes: float
    gops: float

    def peak(self, op: str) -> float:
        """10⁹ operations a second, of the kind that an op does."""
        return self.gops if dtype_of(op) == "int8" else self.gflops


def dtype_of(op: str) -> str:
    """What the problems of an op are made of."""
    return "int8" if op.endswith("_integer") else "float32"


def measure_roofs() -> Roofs | None:
    """The roofs on all threads; None without the C++ kernels."""
    if native is None:
        return None
    flops, ops = native.peak_flops("float32"), native.peak_flops("int8")
    return Roofs(flops / 1e9, native.memory_bandwidth() / 1e9, ops / 1e9)


def times_of(call: Callable[[], Any], seconds: float) -> list[float]:
    """Seconds of each call: of three or more, for about so long; of one if that takes longer."""
    times: list[float] = []
    while (len(times) < 3 or sum(times) < seconds) and (not times or times[0] < seconds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def implementations(op: str) -> dict[str, Callable[..., Any]]:
    """What can run here on float32, by name; the formula, if it is not one of the kernels."""
    this = registry[op].op
    found = {
        k.name: k.function
        for k in this.kernels
        if k.device == "cpu" and not k.missing and (k.dtypes is None or "float32" in k.dtypes)
    }
    return found if this.formula in found.values() else {"formula": this.formula, **found}


def climb(op: str, size: int, peak: float | None, seconds: float) -> Iterator[Rung]:
    """Measure each implementation of an op, on the largest size that it masters in that time.

    Raises:
        RuntimeError: an implementation's result is not the formula's.
    """
    sizes = [size // 8, size // 4, size // 2, size]
    for name, function in implementations(op).items():
        time.sleep(PAUSE)
        for i, s in enumerate(sizes):
            call = problem(op, s)
            if i == 0:
                expected = registry[op].op.formula(*call.inputs, **call.settings)
                result = function(*call.inputs, **call.settings)
                if not abs(result - expected).max() <= 1e-3 * abs(expected).max():
                    raise RuntimeError(f"{op}: {name!r} does not give what the formula gives")
            times = times_of(lambda: function(*call.inputs, **call.settings), seconds)  # noqa: B023
            if s == size or min(times) * problem(op, sizes[i + 1]).flops > 2 * seconds * call.flops:
                break
        taken = float(np.median(times))
        gflops = call.flops / taken / 1e9
        yield Rung(
            op, name, call.title, taken, gflops, gflops / peak if peak else None,
            call.flops / traffic(name, call), s < size,
        )  # fmt: skip


def ladder(
    screen: Console, ops: list[str], sizes: dict[str, int], seconds: float, out: Path
) -> list[Rung]:
    """Measure, print a table, and write ladder.json and ladder.png."""
    from rich.table import Table

    from minidl.cli import kernels_in_words

    roofs = measure_roofs()
    screen.print(
        f"{kernels_in_words()}; peak {roofs.gflops:.0f} GFLOP/s, int8 {roofs.gops:.0f} GOP/s, "
        f"memory {roofs.gbytes:.0f} GB/s"
        if roofs
        else f"No roofs, and the Python rungs only: {why_missing}",
        markup=False,
    )
    rungs = []
    for op in ops:
        found = list(climb(op, sizes[op], roofs.peak(op) if roofs else None, seconds))
        found.sort(key=lambda rung: rung.gflops)
        table = Table(
            title=f"{op}, {dtype_of(op)}", title_style="bold", title_justify="left", box=None
        )
        for title in ("rung", "problem", "ms", "GFLOP/s", "of the peak", "FLOP/byte"):
            table.add_column(title, justify="left" if title in ("rung", "problem") else "right")
        for rung in found:
            table.add_row(
                rung.name, rung.problem + " (smaller)" * rung.smaller,
                f"{1e3 * rung.seconds:.2f}", f"{rung.gflops:.3g}",
                "" if rung.share is None else f"{100 * rung.share:.3g} %", f"{rung.intensity:.0f}",
            )  # fmt: skip
        screen.print()
        screen.print(table)
        rungs += found
    if any(rung.smaller for rung in rungs):
        screen.print("\n(smaller): the size that was asked for would take too long.")

    out.mkdir(parents=True, exist_ok=True)
    record = {"roofs": asdict(roofs) if roofs else None, "rungs": [asdict(r) for r in rungs]}
    (out / "ladder.json").write_text(json.dumps(record, indent=2) + "\n")
    draw(rungs, roofs).savefig(out / "ladder.png", dpi=120)
    screen.print(f"\nWritten: {out}/ladder.json, {out}/ladder.png (the roofline)", markup=False)
    return rungs


def draw(rungs: list[Rung], roofs: Roofs | None) -> Any:
    """The roofline plot: each rung under the roof of the machine. A matplotlib figure."""
    from matplotlib.figure import Figure

    ops = list(dict.fromkeys(rung.op for rung in rungs))
    figure = Figure(figsize=(5 * len(ops), 4.5), layout="constrained")
    x = np.geomspace(0.25, 4 * max(rung.intensity for rung in rungs), 200)
    for axes, op in zip(np.ravel(figure.subplots(1, len(ops), sharey=True)), ops, strict=True):
        axes.set(xscale="log", yscale="log", title=f"{op}, {dtype_of(op)}")
        axes.set(xlabel="operations for each byte moved (FLOP/byte)", ylabel="GFLOP/s")
        axes.grid(alpha=0.3)
        if roofs:
            peak = roofs.peak(op)
            axes.plot(x, np.minimum(peak, roofs.gbytes * x), color="black")
            words = {
                f"peak {peak:.0f} GFLOP/s": (2 * peak / roofs.gbytes, peak),
                f"memory {roofs.gbytes:.0f} GB/s": (0.5, 0.5 * roofs.gbytes),
            }
            for text, point in words.items():
                axes.annotate(text, point, xytext=(6, -6), textcoords="offset points", va="top")
        for i, rung in enumerate(r for r in rungs if r.op == op):
            axes.plot(rung.intensity, rung.gflops, "o", color="C0")
            axes.annotate(  # names in turn on the left and on the right
                rung.name, (rung.intensity, rung.gflops), xytext=(7 - 14 * (i % 2), 0),
                textcoords="offset points", ha=("left", "right")[i % 2], va="center",
            )  # fmt: skip
    return figure


def step(screen: Console, model: str, batch_size: int, steps: int, conv2d: str | None) -> None:
    """Measure the parts of a training step of a model on random images, and print them."""
    import resource

    from rich.table import Table

    import minidl
    import minidl.nn.functional as F
    from minidl import models, optim
    from minidl.cli import kernels_in_words

    shape = (3, 32, 32) if model.startswith("resnet") else (1, 28, 28)
    network = models.get(model, num_classes=10, in_channels=shape[0])
    optimizer = optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    images, labels = minidl.randn(batch_size, *shape), minidl.arange(batch_size) % 10
    parts: dict[str, list[float]] = {"forward": [], "backward": [], "optimizer": [], "step": []}
    with use("conv2d", conv2d):
        for _ in range(steps + 2):
            times = [time.perf_counter()]
            loss = F.cross_entropy(network(images), labels)
            times.append(time.perf_counter())
            loss.backward()
            times.append(time.perf_counter())
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.perf_counter())
            for part, seconds in zip(parts, [*np.diff(times), times[-1] - times[0]], strict=True):
                parts[part].append(float(seconds))
    table = Table(box=None)
    for title in ("", "ms (median)"):
        table.add_column(title, justify="right" if title else "left")
    medians = {part: float(np.median(seconds[2:])) for part, seconds in parts.items()}
    for part, seconds in medians.items():
        table.add_row(part, f"{1e3 * seconds:.2f}")
    screen.print(f"{model}, {batch_size} images of {shape}, {kernels_in_words()}", markup=False)
    screen.print(table)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    screen.print(
        f"{batch_size / medians['step']:.0f} images a second; at most {peak:.0f} MiB of memory"
    )
