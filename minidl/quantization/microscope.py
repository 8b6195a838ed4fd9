"""The precision microscope: where the error of fewer bits comes from, and where it goes.

    view = look(model, calibration, images)
    print(view.worst().name)                   # the layer to leave in float, if one must be
    page(view, "microscope.html", "cnn on digits")

A network runs on the same images several times, layer beside layer: in float64, which counts as
exact, and with float32, float16 (`minidl.amp.autocast`) and integers (`static.py`). What differs is
noise, and is told in decibels below the signal: for a layer's exact outputs x and others x',

    SNR = 10 log10( Σ x² / Σ (x' - x)² )            6 dB more: half the error, one bit

Noise adds up from layer to layer, so a second look quantizes one layer at a time, all others exact:
how much noise reaches the scores from there, and which predictions it alone turns over. Beside it
is noise from outside, on the pixels, as strong as rounding them to the input's grid would be:
random signs, and signs that are aimed (FGSM; Goodfellow et al. 2015). Of the integers it also shows
how well the grid covers the values, and how much room their sums leave in 32 bits.
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any

import numpy as np

import minidl
from minidl import nn
from minidl.amp import autocast
from minidl.attack import deployed, fgsm
from minidl.op import registry
from minidl.quantization.observers import OBSERVERS
from minidl.quantization.static import Lowering, calibrate, depthwise, fold
from minidl.serialization import atomic_path
from minidl.tensor import Tensor
from minidl.trace import Graph, Ref, Step, trace

RUNS = ("float32", "float16", "int8", "random signs", "FGSM")
BATCH = 32
BINS = 96
SUMS = ("conv_integer", "matmul_integer")


@dataclass
class Noise:
    """Sums of squares: of the exact values, and of what differs."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, exact: np.ndarray, other: np.ndarray) -> None:
        self.signal += float(np.square(exact).sum())
        self.noise += float(np.square(other - exact).sum())

    @property
    def decibels(self) -> float:
        """The SNR; infinite where nothing differs."""
        if not self.noise:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf


@dataclass
class Layer:
    """What is seen of one layer (or of the input).

    Attributes:
        name: the module's; "input" for the images.
        op: what it computes, with the ReLU that is computed with it.
        noise: by the names in `RUNS`, on this layer's outputs.
        alone: on the scores, if only this layer computes in integers.
        flips: the images whose prediction that changes.
        scale, zero_point: the grid of its outputs (of a classifier's scores: as it would be).
        rounded: whether the outputs are rounded to the grid; the scores are not.
        clipped: share of the exact outputs that lie outside of it.
        counts, edges: their histogram; what lies outside is in the first and the last bin.
        largest: of the magnitudes of its integer sums; None: it has none.
        bound: what these cannot exceed with these weights, whatever comes.
    """

    name: str
    op: str
    scale: float
    zero_point: int
    rounded: bool
    noise: dict[str, Noise] = field(default_factory=lambda: {run: Noise() for run in RUNS})
    alone: Noise = field(default_factory=Noise)
    flips: list[int] = field(default_factory=list)
    outside: int = 0
    seen: int = 0
    largest: int | None = None
    bound: int | None = None

    def __post_init__(self) -> None:
        low, high = self.limits
        margin = 0.15 * (high - low)
        self.edges = np.linspace(low - margin, high + margin, BINS + 1)
        self.counts = np.zeros(BINS, np.int64)

    @property
    def limits(self) -> tuple[float, float]:
        """The smallest and the largest number of the grid."""
        return -self.zero_point * self.scale, (255 - self.zero_point) * self.scale

    @property
    def clipped(self) -> float:
        return self.outside / max(self.seen, 1)

    @property
    def headroom(self) -> float | None:
        """How many bits are left of the 31 of an int32 sum."""
        return None if self.largest is None else 31 - math.log2(max(self.largest, 1))

    def see(self, exact: np.ndarray) -> None:
        low, high = self.limits
        half = self.scale / 2
        self.seen += exact.size
        self.outside += int(((exact < low - half) | (exact > high + half)).sum())
        inside = np.clip(exact.ravel(), self.edges[0], self.edges[-1])
        self.counts += np.histogram(inside, self.edges)[0]

    def see_sums(self, sums: np.ndarray, bound: int) -> None:
        self.largest = max(self.largest or 0, int(np.abs(sums.astype(np.int64)).max(initial=0)))
        self.bound = bound


@dataclass
class View:
    """What `look` saw.

    Attributes:
        layers: the input first, then in the order in which they run.
        exact: predictions in float64, (N,).
        predictions: by the names in `RUNS`, (N,).
        epsilon: of the noise on the pixels.
        images: those that were looked at.
    """

    layers: list[Layer]
    exact: np.ndarray
    predictions: dict[str, np.ndarray]
    epsilon: float
    images: np.ndarray

    def worst(self) -> Layer:
        """The layer whose rounding alone makes the most noise on the scores."""
        return min(self.layers, key=lambda layer: layer.alone.decibels)

    def flipped(self, run: str) -> list[int]:
        """The images that a run sees otherwise than float64 does."""
        return np.flatnonzero(self.predictions[run] != self.exact).tolist()


class Only(Lowering):
    """Integers for some steps, floats for all others."""

    chosen: set[Ref]

    def skipped(self, step: Step) -> bool:
        return step.output not in self.chosen


def look(
    model: nn.Module,
    calibration: Iterable[Any],
    images: Tensor,
    *,
    per_channel: bool = True,
    observer: str = "minmax",
    skip: Sequence[str] = (),
    weight_bits: int = 8,
    epsilon: float | None = None,
) -> View:
    """Run a classifier in float64, and beside it in other ways.

    Args:
        calibration: batches of images, from which the integers' ranges come.
        images: (N, ...), to be looked at; float32.
        per_channel, observer, skip, weight_bits: as in `quantize`.
        epsilon: of the noise on the pixels; by default that which has the power of rounding to the
            input's grid, s/√12 (where the first layer is in float, s = 1/255).

    Raises:
        ValueError: no images or batches; not one output of shape (N, classes); as `quantize`.
        RuntimeError: the model cannot be traced.
    """
    batches = list(calibration)
    if not len(images) or not batches:
        raise ValueError("the microscope needs images to look at, and batches to calibrate with")
    if observer not in OBSERVERS:
        raise ValueError(f"observer {observer!r}: expected one of {', '.join(OBSERVERS)}")
    graph = depthwise(fold(trace(model, batches[0])))
    shapes = [step.shape for step in graph.steps if step.output == graph.output]
    if not shapes or len(shapes[0]) != 2:
        raise ValueError("the microscope takes a classifier: images -> scores (N, classes)")
    lowering = Lowering(graph, skip, per_channel, weight_bits)
    ranges = lowering.ranges = calibrate(graph, lowering.wanted(), batches, observer)
    low = lowering.lower()

    layers: dict[Ref, Layer] = {}  # by the value in `graph` that they make
    only: dict[Ref, Graph] = {}
    for ref, name, op, steps in places(lowering):
        scale, zero = ranges[ref]
        layers[ref] = Layer(name, op, float(scale), int(zero), rounded=ref in lowering.bytes)
        one = Only(graph, (), per_channel, weight_bits)
        one.ranges, one.chosen = ranges, steps
        only[ref] = one.lower() if steps else rounding_input(graph, ranges[ref])

    origin: dict[Ref, Ref] = {}  # of a value of `low`: which one of `graph` it stands for
    grids: dict[Ref, tuple[Any, Any]] = {}  # and how
    for ref in layers:
        if ref in lowering.bytes:
            q, scale, zero = lowering.bytes[ref]
            grids[q] = scale.astype(np.float64), zero.astype(np.float64)
        else:
            q = lowering.floats[ref]
            grids[q] = 1.0, 0.0
        origin[q] = ref

    step = float(ranges[graph.inputs[0]][0]) if graph.inputs[0] in ranges else 1 / 255
    eps = step / math.sqrt(12) if epsilon is None else epsilon
    precise = replace(graph, constants={r: double(v) for r, v in graph.constants.items()})
    signs = np.random.default_rng(0)
    said: dict[str, list[np.ndarray]] = {run: [] for run in ("exact", *RUNS)}

    def shadow(run: str, graph: Graph, x: Tensor, exact: dict[Ref, np.ndarray]) -> None:
        """Run, and note what differs from the exact values, layer by layer."""

        def compare(step: Step, given: list[Any], y: Any) -> None:
            ref = origin.get(step.output) if graph is low else step.output
            if ref in layers:
                scale, zero = grids[step.output] if graph is low else (1.0, 0.0)
                layers[ref].noise[run].add(exact[ref], (as_double(y) - zero) * scale)
                if step.op in SUMS:
                    layers[ref].see_sums(*sums_of(step, given))

        if graph is not low and graph.inputs[0] in layers:
            layers[graph.inputs[0]].noise[run].add(exact[graph.inputs[0]], as_double(x))
        said[run].append(graph.run((x,), compare).numpy().argmax(axis=1))

    with deployed(model):
        for start in range(0, len(images), BATCH):
            x = images[start : start + BATCH].detach()
            exact = {graph.inputs[0]: as_double(x)}

            def keep(step: Step, _: Any, y: Any, exact: dict[Ref, np.ndarray] = exact) -> None:
                if step.output in layers:
                    exact[step.output] = as_double(y)

            with minidl.no_grad():
                scores = precise.run((double(x),), keep)
            predicted = scores.numpy().argmax(axis=1)
            said["exact"].append(predicted)
            random = eps * signs.choice((-1.0, 1.0), x.shape)
            aimed = fgsm(model, x, minidl.tensor(predicted), eps, clip=None)
            with minidl.no_grad():
                shadow("float32", graph, x, exact)
                with autocast(dtype="float16"):
                    shadow("float16", graph, x, exact)
                shadow("int8", low, x, exact)
                shadow("random signs", precise, double(x) + minidl.tensor(random), exact)
                shadow("FGSM", precise, double(aimed), exact)
                for ref, layer in layers.items():
                    layer.see(exact[ref])
                    y = only[ref].run((x,)).numpy()
                    layer.alone.add(scores.numpy(), y.astype(np.float64))
                    changed = np.flatnonzero(y.argmax(axis=1) != predicted)
                    layer.flips.extend((start + changed).tolist())
    predictions = {run: np.concatenate(found) for run, found in said.items()}
    return View([*layers.values()], predictions.pop("exact"), predictions, eps, images.numpy())


def places(lowering: Lowering) -> Iterable[tuple[Ref, str, str, set[Ref]]]:
    """Where integers are made: the value, its layer, the op, and the steps that are in it."""
    graph = lowering.graph
    if graph.inputs[0] in lowering.bytes:
        yield graph.inputs[0], "input", "rounding", set()
    for step in graph.steps:
        kind = lowering.kind(step)
        if kind in ("product", "add", "mean"):
            relu = lowering.relu_after(step) if kind != "mean" else None
            ref = relu.output if relu else step.output
            yield ref, step.layer, step.op + ", relu" * bool(relu), {step.output, ref}


def rounding_input(graph: Graph, grid: tuple[np.ndarray, np.ndarray]) -> Graph:
    """The graph in floats, behind the rounding of its input."""
    graph = graph.copy()
    scale, zero = (graph.constant(Tensor(np.asarray(v))) for v in grid)
    raw = graph.new_ref()
    q = Ref(raw.number + 1)
    there = graph.inputs[0]
    graph.steps[:0] = [
        Step("quantize_linear", (raw, scale, zero), {"axis": 1}, q, "input", (), "uint8"),
        Step("dequantize_linear", (q, scale, zero), {"axis": 1}, there, "input", (), "float32"),
    ]
    return replace(graph, inputs=[raw])


def sums_of(step: Step, given: list[Any]) -> tuple[np.ndarray, int]:
    """An integer product's sums, and what they cannot exceed: Σ |w| max |x - z| + |b|."""
    x, w, zero, _, _, bias, _ = given
    settings = {**step.settings, "relu": False}
    sums = registry[step.op](x, w, zero, None, None, bias, None, **settings)
    weights = np.abs(w.numpy().astype(np.int64))
    total = weights.sum(axis=(1, 2, 3) if step.op == "conv_integer" else 0)
    farthest = max(int(zero.item()), 255 - int(zero.item()))
    b = 0 if bias is None else np.abs(bias.numpy().astype(np.int64))
    return sums.numpy(), int((total * farthest + b).max())


def double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def as_double(x: Tensor) -> np.ndarray:
    return x.numpy().astype(np.float64)


# The page ---------------------------------------------------------------------------------


def page(view: View, path: str | os.PathLike[str], title: str, count: int = 24) -> None:
    """Write what was seen as a page: one file, no requests.

    Args:
        title: its headline.
        count: how many turned predictions to show.
    """
    from jinja2 import Environment, StrictUndefined

    turned = view.flipped("int8")
    cards = [
        {
            "png": thumbnail(view.images[i]),
            "exact": int(view.exact[i]),
            "int8": int(view.predictions["int8"][i]),
            "by": [layer.name for layer in view.layers if i in layer.flips],
        }
        for i in turned[:count]
    ]
    source = resources.files("minidl").joinpath("templates/microscope.html").read_text("utf-8")
    environment = Environment(undefined=StrictUndefined, autoescape=True)
    environment.filters["db"] = lambda v: "exact" if v == math.inf else f"{v:.1f}"
    text = environment.from_string(source).render(
        title=title, view=view, runs=RUNS, cards=cards, turned=len(turned), curves=curves(view),
        histograms=[histogram(layer) for layer in view.layers],
    )  # fmt: skip
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


GREY = "#8a8f98"  # seen on light and on dark


def inline(figure: Any) -> str:
    """A picture as the address of itself."""
    file = io.BytesIO()
    figure.savefig(file, dpi=110, transparent=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def plain(axes: Any) -> None:
    """In colours that are seen on light and on dark."""
    axes.tick_params(colors=GREY, labelsize=8)
    for part in (axes.xaxis.label, axes.yaxis.label):
        part.set(color=GREY, size=8)
    axes.spines[:].set_color(GREY)
    axes.spines[["top", "right"]].set_visible(False)


def curves(view: View) -> str:
    """The SNR from layer to layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots()
    for run in RUNS:
        heights = [layer.noise[run].decibels for layer in view.layers]
        axes.plot([h if math.isfinite(h) else math.nan for h in heights], "o-", ms=3, label=run)
    names = [layer.name or layer.op for layer in view.layers]
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right")
    axes.set_ylabel("signal above noise (dB)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8, labelcolor=GREY)
    plain(axes)
    return inline(figure)


def histogram(layer: Layer) -> str:
    """A layer's exact outputs, and the grid over them: its range, and every one of its levels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 2), layout="constrained")
    axes = figure.subplots()
    axes.stairs(layer.counts, layer.edges, fill=True, color="#4c8dd6", alpha=0.8)
    axes.set_yscale("symlog")
    low, high = layer.limits
    levels = low + layer.scale * np.arange(256)
    axes.vlines(levels, 0, 0.06, transform=axes.get_xaxis_transform(), color="#d9480f", lw=0.4)
    for edge, start in ((low, layer.edges[0]), (high, layer.edges[-1])):
        axes.axvline(edge, color="#d9480f", lw=1)
        axes.axvspan(start, edge, color="#d9480f", alpha=0.12, lw=0)
    axes.set_xlim(layer.edges[0], layer.edges[-1])
    plain(axes)
    return inline(figure)


def thumbnail(image: np.ndarray) -> str:
    """(C, H, W)."""
    from PIL import Image

    pixels = np.clip(np.rint(255 * image.transpose(1, 2, 0)), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
