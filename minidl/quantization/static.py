"""Whole networks in int8, from layer to layer (Jacob et al. 2018).

A number q of 8 bits stands for the real number  r = s (q - z).  A layer y = w x + b becomes

    q_y = z_y + round( s_x s_w / s_y · ( Σ (q_x - z_x) q_w + b / (s_x s_w) ) )

where the sum is one of small integers, exact in 32 bits, and b is such an integer too. So between
the layers there are bytes only. It takes five steps, most a function below:

    trace       the network as a list of ops                                   (minidl/trace.py)
    fold        what only scales a layer's output (batch norm) goes into its weights; elsewhere
                it becomes a product of its own
                (then, if wanted: equalize.py and, after calibration, bias_correction.py)
    calibrate   which range does every value have? Some batches are looked at  (observers.py)
    lower       each op becomes the one on integers
    finish      the weights are packed, the list is a module

A network from `qat.convert` has its scales already: those that it was trained with (`learned`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

import minidl
from minidl import nn
from minidl.op import registry
from minidl.ops.quantized import expect_sum_fits, pack_conv_integer, pack_matmul_integer
from minidl.quantization.observers import OBSERVERS
from minidl.quantization.packed import Packed, takes_packed
from minidl.quantization.program import Program
from minidl.quantization.qat import TINY, Grid
from minidl.tensor import Tensor
from minidl.trace import Graph, Ref, Step, refs_in

PRODUCTS = ("conv2d", "linear")  # what has weights
ADDS = ("add",)
MEANS = ("adaptive_avg_pool2d", "avg_pool2d")
# What takes bytes as they are, and gives bytes of the same scale.
SAME = (
    "max_pool2d",
    "reshape",
    "permute",
    "getitem",
    "index_put",
    "squeeze",
    "unsqueeze",
    "expand",
)


# Fold -------------------------------------------------------------------------------------


def fold(graph: Graph, learned: dict[Ref, Learned] | None = None) -> Graph:
    """Scales and shifts of a product's output go into its weights; computed in float64.

    w' = w · scale,  b' = b · scale + shift  (Jacob et al. 2018, equation 14)

    So does a bias that is added in a step of its own, as in networks from elsewhere.

    Args:
        learned: of weights, by their numbers; what is folded gets its new number in it.
    """
    learned = {} if learned is None else learned
    graph = graph.copy()
    for i, step in reversed([*enumerate(graph.steps)]):
        if step.op == "conv2d_relu":  # of `fuse`: two steps again, which may become one
            sums = graph.new_ref()
            relu = replace(step, op="relu", inputs=(sums,), settings={})
            graph.steps[i : i + 1] = [replace(step, op="conv2d", output=sums), relu]
    at = 0
    while at < len(graph.steps):
        step = graph.steps[at]
        following = graph.users(step.output)
        after = following[0] if len(following) == 1 else None
        affine = None if after is None else affine_of(graph, step, after)
        if after is None or affine is None:
            at += 1
            continue
        scale, shift = affine
        w = graph.constants[step.inputs[1]].numpy()
        bias = step.inputs[2]
        b = 0.0 if bias is None else graph.constants[bias].numpy().astype(np.float64)
        folded = (w.astype(np.float64) * scale.reshape(-1, *[1] * (w.ndim - 1))).astype(w.dtype)
        new_b = np.broadcast_to(b * scale + shift, len(w)).astype(w.dtype)
        weight_ref, bias_ref = graph.constant(Tensor(folded)), graph.constant(Tensor(new_b))
        if step.inputs[1] in learned:
            learned[weight_ref] = learned[step.inputs[1]].times(scale)
        graph.steps[at] = replace(
            step, inputs=(step.inputs[0], weight_ref, bias_ref), output=after.output
        )
        graph.steps.remove(after)
    return graph


def depthwise(graph: Graph) -> Graph:
    """A scale and a shift of images that no product has taken in (what precedes is max pooling,
    say) become a product: a convolution with one weight for each channel."""
    graph = graph.copy()
    for i, step in enumerate(graph.steps):
        if step.op != "scale_shift" or len(step.shape) != 4:
            continue
        x, scale, shift = step.inputs
        if scale in graph.constants and shift in graph.constants:
            w = graph.constants[scale].reshape(-1, 1, 1, 1)
            settings = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": len(w)}
            graph.steps[i] = replace(
                step, op="conv2d", inputs=(x, graph.constant(w), shift), settings=settings
            )
    return graph


def affine_of(graph: Graph, step: Step, after: Step) -> tuple[Any, Any] | None:
    """The scale and the shift that a step gives to each channel of a product's output, or None."""
    if step.op not in PRODUCTS or not constant_weights(graph, step):
        return None
    others = [x for x in after.inputs if not isinstance(x, Ref) or x != step.output]
    if not all(isinstance(x, Ref) and x in graph.constants for x in others):
        return None
    given = [graph.constants[x].numpy().astype(np.float64) for x in others]
    if after.op == "scale_shift" and after.inputs[0] == step.output:
        scale, shift = given
        return scale, shift
    if after.op == "add" and len(given) == 1:
        channels = len(graph.constants[step.inputs[1]])
        each = (channels,) if step.op == "linear" else (channels, 1, 1)
        if given[0].shape in (each, (*[1] * (len(step.shape) - len(each)), *each)):
            return np.ones(channels), given[0].reshape(-1)
    return None


def constant_weights(graph: Graph, step: Step) -> bool:
    _, w, b = step.inputs
    return w in graph.constants and (b is None or b in graph.constants)


# Learn ------------------------------------------------------------------------------------


class Learned(NamedTuple):
    """The grids with which a product was trained.

    Attributes:
        q, scale: its weights: int8 (out, ...), and float32 (out,) or (1,), what one unit is worth.
        input: the grid of what it reads; None: that which the value has anyway.
    """

    q: np.ndarray
    scale: np.ndarray
    input: Grid | None

    def times(self, a: Any) -> Learned:
        """Of the weights a_j w_j: the same integers. (Where the scale were negative they change
        their sign, unless one of them is -128, which has no negative.)"""
        axes = tuple(range(1, self.q.ndim))
        scale = self.scale * np.asarray(a, np.float64)
        flip = (scale < 0) & (self.q.min(axis=axes, initial=0) > -128)
        sign = np.where(flip, -1, 1)
        scale = (scale * sign).astype(np.float32)
        scale[np.abs(scale) < TINY] = TINY
        return self._replace(q=self.q * sign.reshape(-1, *[1] * len(axes)).astype(np.int8),
                             scale=scale)  # fmt: skip


def learned(model: nn.Module, graph: Graph) -> dict[Ref, Learned]:
    """What `qat.convert` left with the layers of a model, by the numbers of their weights."""
    found = {}
    for ref, name in graph.names.items():
        path, _, attribute = name.rpartition(".")
        layer: Any = model.get_submodule(path)
        if attribute == "weight" and hasattr(layer, "weight_grid"):
            w, s = layer.weight.numpy(), layer.weight_grid.scale
            scale = np.broadcast_to(s, len(w)).astype(np.float32)
            q = np.rint(w / scale.reshape(-1, *[1] * (w.ndim - 1))).astype(np.int8)
            found[ref] = Learned(q, scale, layer.input_grid).times(1)
    return found


# Calibrate --------------------------------------------------------------------------------


def calibrate(
    graph: Graph, wanted: set[Ref], batches: Iterable[Any], observer: str
) -> dict[Ref, tuple[np.ndarray, np.ndarray]]:
    """(scale, zero point uint8) of each wanted value, by what it was on some batches.

    Raises:
        ValueError: no batches; a value that is not finite: says in which layer.
    """
    observers = {ref: OBSERVERS[observer](bits=8, unsigned=True) for ref in wanted}
    layers: dict[Ref, str] = {step.output: f"{step.op} of {step.layer!r}" for step in graph.steps}

    def look(ref: Ref, value: Tensor) -> None:
        if ref in observers:
            try:
                observers[ref].observe(value.numpy())
            except ValueError as error:
                error.add_note(f"while calibrating {layers.get(ref, 'the input')}")
                raise

    count = 0
    with minidl.no_grad():
        for batch in batches:
            inputs = batch if isinstance(batch, tuple | list) else (batch,)
            for ref, x in zip(graph.inputs, inputs):
                look(ref, x)
            graph.run(inputs[: len(graph.inputs)], lambda step, _, y: look(step.output, y))
            count += 1
    if not count:
        raise ValueError("there are no batches to calibrate with: give at least one")
    return {ref: observers[ref].qparams() for ref in wanted}


# Lower ------------------------------------------------------------------------------------


class Lowering:
    """Rewrites a folded graph, step by step; what it knows of each value.

    Attributes:
        bytes: values that are integers now: (the new value, scale, zero point).
        floats: values that are (also) real numbers now.
        learned: of weights that have their integers already.
    """

    def __init__(
        self,
        graph: Graph,
        skip: Sequence[str],
        per_channel: bool,
        weight_bits: int,
        learned: dict[Ref, Learned] | None = None,
    ) -> None:
        self.graph, self.skip, self.learned = graph, tuple(skip), learned or {}
        self.per_channel, self.weight_bits = per_channel, weight_bits
        self.ranges: dict[Ref, tuple[np.ndarray, np.ndarray]] = {}
        self.most: dict[Ref, int] = {}  # the largest integer of a learned range
        self.bytes: dict[Ref, tuple[Ref, np.ndarray, np.ndarray]] = {}
        self.regridded: dict[tuple[Ref, Any], Ref] = {}
        self.floats: dict[Ref, Ref] = {ref: ref for ref in graph.inputs}
        self.next = graph.new_ref().number
        self.new = Graph([], graph.inputs, None, {})
        self.same: dict[tuple[str, tuple[int, ...], bytes], Ref] = {}  # one constant for equal ones

    # Planning: which values are measured

    def skipped(self, step: Step) -> bool:
        return any(step.layer == name or step.layer.startswith(name + ".") for name in self.skip)

    def relu_after(self, step: Step) -> Step | None:
        """The ReLU that a step can do itself: the only one that reads its output."""
        users = self.graph.users(step.output)
        relu = len(users) == 1 and users[0] is not None and users[0].op == "relu"
        return users[0] if relu and not self.skipped(users[0]) else None

    def absorbed(self, step: Step, kind: str) -> list[Step]:
        """The steps after one that it does itself, once it is of this kind."""
        relu = self.relu_after(step) if kind in ("product", "add") else None
        return [relu] if relu else []

    def kind(self, step: Step) -> str:
        """product, add, mean, same, relu, or float.

        Raises:
            ValueError: no integers can do it.
        """
        live = [ref for ref in step.refs() if ref not in self.graph.constants]
        if self.skipped(step) or not live:
            return "float"
        if step.op in PRODUCTS and constant_weights(self.graph, step):
            return "product"
        if step.op in ADDS and len(live) == 2:
            return "add"
        if step.op in MEANS and self.windows(step):
            return "mean"
        if step.op in SAME and len(live) == len(step.inputs) == 1:
            return "same"
        if step.op == "relu":
            return "relu"
        raise ValueError(
            f"op {step.op} in layer {step.layer or 'the model itself'!r} has no form on integers: "
            f"leave it in float with skip=[{step.layer!r}]"
        )

    def windows(self, step: Step) -> tuple[int, ...] | None:
        """How many windows a mean has in each direction; None: they are not all of the image."""
        how = step.settings
        if step.op == "adaptive_avg_pool2d":
            return tuple(how["output_size"])
        size = next((s.shape[2:] for s in self.graph.steps if s.output == step.inputs[0]), ())
        tiles = tuple(n * k for n, k in zip(step.shape[2:], how["kernel_size"])) == size
        whole = how["kernel_size"] == how["stride"] and not any(how["padding"])
        return step.shape[2:] if tiles and whole and not how["divisor_override"] else None

    def is_product(self, step: Step) -> bool:
        return self.kind(step) == "product"

    def rounded(self, step: Step, w: np.ndarray) -> np.ndarray:
        """What the integers of a product's weights stand for."""
        q, scale = self.integers(step, w)
        return (q * scale.reshape(-1, *[1] * (w.ndim - 1))).astype(w.dtype)

    def integers(self, step: Step, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A product's weights: (int8, the scale of one or of each of out)."""
        if step.inputs[1] in self.learned:
            return self.learned[step.inputs[1]][:2]
        return quantize_weight(w, self.weight_bits, self.per_channel, step.layer)

    def agreed(self, ref: Ref) -> Grid | None:
        """The grid in which all that read a value were trained to see it, or None."""
        grids: list[Grid | None] = []
        for step in self.graph.users(ref):
            kind = "output" if step is None else self.kind(step)
            if kind == "product" and step.inputs[1] in self.learned:
                grids.append(self.learned[step.inputs[1]].input)
            elif kind in ("same", "relu"):
                grids.append(self.agreed(step.output))
            else:
                return None
        return grids[0] if grids and all(grid == grids[0] for grid in grids) else None

    def take_learned(self) -> None:
        """The ranges that need no calibration."""
        for ref in self.wanted():
            if grid := self.agreed(ref):
                self.ranges[ref] = grid.scale, grid.zero_point
                self.most[ref] = grid.quant_max

    def wanted(self) -> set[Ref]:
        """The values whose range is to be measured."""
        found: set[Ref] = set()
        for step in self.graph.steps:
            kind = self.kind(step)
            live = [ref for ref in step.refs() if ref not in self.graph.constants]
            if kind == "float":
                continue
            found.update(live)
            if kind in ("product", "add", "mean"):
                relu = self.relu_after(step) if kind != "mean" else None
                found.add(relu.output if relu else step.output)
        return found - self.ranges.keys()

    # Rewriting

    def emit(self, op: str, inputs: Sequence[Any], settings: Any, like: Step, dtype: str) -> Ref:
        out = Ref(self.next)
        self.next += 1
        given = tuple(
            self.constant(np.asarray(x)) if isinstance(x, np.ndarray | np.generic) else x
            for x in inputs
        )
        self.new.steps.append(Step(op, given, dict(settings), out, like.layer, like.shape, dtype))
        return out

    def constant(self, value: np.ndarray) -> Ref:
        key = value.dtype.str, value.shape, value.tobytes()
        if key not in self.same:
            self.same[key] = Ref(self.next)
            self.next += 1
            self.new.constants[self.same[key]] = Tensor(value.copy())  # not the model's own
        return self.same[key]

    def as_bytes(
        self, ref: Ref, like: Step, grid: Grid | None = None
    ) -> tuple[Ref, np.ndarray, np.ndarray]:
        """A value in its own range; or in a grid, if that is another."""
        scale, zero = self.bytes[ref][1:] if ref in self.bytes else self.ranges[ref]
        own = scale.item(), zero.item(), self.most.get(ref, 255)
        wanted = (grid.scale.item(), grid.zero_point.item(), grid.quant_max) if grid else own
        if grid is None or wanted == own:
            if ref not in self.bytes:
                self.put(ref, self.quantized(ref, scale, zero, like), like)
            return self.bytes[ref]
        if (ref, wanted) not in self.regridded:
            q = self.quantized(ref, grid.scale, grid.zero_point, like)
            self.regridded[ref, wanted] = self.capped(q, grid.scale, grid.quant_max, like)
        return self.regridded[ref, wanted], grid.scale, grid.zero_point

    def quantized(self, ref: Ref, scale: np.ndarray, zero: np.ndarray, like: Step) -> Ref:
        given = self.as_float(ref, like), scale, zero
        return self.emit("quantize_linear", given, {"axis": 1}, like, zero.dtype.name)

    def put(self, ref: Ref, q: Ref, like: Step) -> None:
        """A value is bytes in its own range now."""
        scale, zero = self.ranges[ref]
        self.bytes[ref] = self.capped(q, scale, self.most.get(ref, 255), like), scale, zero

    def capped(self, q: Ref, scale: np.ndarray, most: int, like: Step) -> Ref:
        """At most the largest integer of a grid of fewer than 8 bits."""
        self.new.scales[q] = self.constant(scale)
        if most == 255:
            return q
        out = self.emit("minimum", (q, np.uint8(most)), {}, like, "uint8")
        self.new.scales[out] = self.constant(scale)
        return out

    def as_float(self, ref: Ref, like: Step) -> Ref:
        if ref in self.graph.constants:
            return self.constant(self.graph.constants[ref].numpy())
        if ref not in self.floats:
            q, scale, zero = self.bytes[ref]
            self.floats[ref] = self.emit("dequantize_linear", (q, scale, zero), {"axis": 1}, like,
                                         "float32")  # fmt: skip
        return self.floats[ref]

    def lower(self) -> Graph:
        done: set[Ref] = set()
        for step in self.graph.steps:
            if step.output in done:
                continue
            kind = self.kind(step)
            following = self.absorbed(step, kind)
            done.update(after.output for after in following)
            result = following[-1].output if following else step.output
            relu = any(after.op == "relu" for after in following)
            getattr(self, "lower_" + kind)(step, result, relu)
        last = self.graph.steps[-1]
        output = minidl.trace.nested(
            self.graph.output, lambda x: self.as_float(x, last) if isinstance(x, Ref) else x
        )
        for q, scale, _ in self.bytes.values():
            self.new.scales[q] = self.constant(scale)
        return replace(self.new, output=output)

    def lower_float(self, step: Step, result: Ref, relu: bool) -> None:
        given = [self.as_float(x, step) if isinstance(x, Ref) else x for x in step.inputs]
        self.floats[result] = self.emit(step.op, given, step.settings, step, step.dtype)

    def lower_same(self, step: Step, result: Ref, relu: bool) -> None:
        q, scale, zero = self.as_bytes(step.inputs[0], step)
        if step.op == "index_put" and zero != 0:  # it fills in zeros, which are z here
            return self.lower_float(step, result, relu)
        out = self.emit(step.op, (q,), step.settings, step, zero.dtype.name)
        self.bytes[result], self.most[result] = (out, scale, zero), self.most_of(step)

    def most_of(self, step: Step) -> int:
        return self.most.get(step.inputs[0], 255)

    def lower_relu(self, step: Step, result: Ref, relu: bool) -> None:
        q, scale, zero = self.as_bytes(step.inputs[0], step)
        out = self.emit("maximum", (q, zero), {}, step, zero.dtype.name)
        self.bytes[result], self.most[result] = (out, scale, zero), self.most_of(step)

    def lower_mean(self, step: Step, result: Ref, relu: bool) -> None:
        q, scale, zero = self.as_bytes(step.inputs[0], step)
        new_scale, new_zero = self.ranges[result]
        inputs = (q, scale / new_scale, zero, new_zero)
        op, dtype = "adaptive_avg_pool2d_integer", new_zero.dtype.name
        how = {"output_size": self.windows(step)}
        self.put(result, self.emit(op, inputs, how, step, dtype), step)

    def lower_add(self, step: Step, result: Ref, relu: bool) -> None:
        (a, a_scale, a_zero), (b, b_scale, b_zero) = (self.as_bytes(x, step) for x in step.inputs)
        scale, zero = self.ranges[result]
        inputs = (a, b, a_scale / scale, b_scale / scale, a_zero, b_zero, zero)
        y = self.emit("add_integer", inputs, {"relu": relu}, step, zero.dtype.name)
        self.put(result, y, step)

    def lower_product(self, step: Step, result: Ref, relu: bool) -> None:
        grid = self.learned[step.inputs[1]].input if step.inputs[1] in self.learned else None
        x, x_scale, x_zero = self.as_bytes(step.inputs[0], step, grid)
        q, w_scale = self.integers(step, self.graph.constants[step.inputs[1]].numpy())
        try:
            expect_sum_fits(math.prod(q.shape[1:]), x_zero, x_zero, q, None)
        except ValueError as error:
            error.add_note(f"in layer {step.layer!r}: leave it in float with skip=")
            raise
        scale = (x_scale * w_scale).astype(np.float32)
        b = self.bias(step, scale)
        # What nobody reads as bytes need not be rounded to them: a classifier's scores.
        last = result in refs_in(self.graph.output) and self.graph.users(result) == [None]
        if last or result not in self.ranges:
            y_scale, y_zero = None, None
        else:
            y_scale, y_zero = self.ranges[result]
            scale = (scale / y_scale).astype(np.float32)
        dtype = "float32" if y_zero is None else y_zero.dtype.name
        if step.op == "conv2d":
            inputs = (x, q, x_zero, None, scale, b, y_zero)
            out = self.emit("conv_integer", inputs, {**step.settings, "relu": relu}, step, dtype)
        else:
            q = q.T.copy()
            inputs = (x, q, x_zero, None, scale, b, y_zero)
            out = self.emit("matmul_integer", inputs, {"relu": relu}, step, dtype)
        self.new.scales[self.constant(q)] = self.constant(w_scale)
        if y_zero is None:
            self.floats[result] = out
        else:
            self.put(result, out, step)

    def bias(self, step: Step, scale: np.ndarray) -> np.ndarray | None:
        """A product's bias as integers, by the scale of its sums."""
        b = step.inputs[2]
        return None if b is None else whole_bias(self.graph.constants[b].numpy(), scale, step.layer)


def quantize_weight(
    w: np.ndarray, bits: int, per_channel: bool, layer: str
) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric: q = round(w / s), s = max |w| / (2^(bits-1) - 1); (q int8, s float32).

    Args:
        w: (out, ...).
        per_channel: a scale for each of out (Krishnamoorthi 2018, section 2.2.2), else one.

    Raises:
        ValueError: a weight is not finite.
    """
    if not np.isfinite(w).all():
        raise ValueError(f"layer {layer!r} has weights that are not finite")
    most = 2 ** (bits - 1) - 1
    axes = tuple(range(1, w.ndim)) if per_channel else None
    largest = np.abs(w).max(axis=axes, initial=0)
    s = np.where(largest > 0, largest / np.float32(most), np.float32(1)).astype(np.float32)
    s = np.maximum(s, np.finfo(np.float32).tiny)
    along = s.reshape(-1, *[1] * (w.ndim - 1)) if per_channel else s
    return np.clip(np.rint(w / along), -most, most).astype(np.int8), np.atleast_1d(s)


def whole_bias(b: np.ndarray, scale: np.ndarray, layer: str) -> np.ndarray:
    """round(b / scale), int32.

    Raises:
        ValueError: it does not fit: the scale of a channel is far too small for its bias.
    """
    q = np.rint(b.astype(np.float64) / scale)
    if np.abs(q).max(initial=0) >= 2**30:
        worst = int(np.abs(q).argmax())
        raise ValueError(
            f"channel {worst} of layer {layer!r} has bias {b[worst]:g}, {abs(q[worst]):.2g} times "
            "the scale of its sums: too much for 32 bits. Its weights are nearly zero beside it: "
            "leave the layer in float with skip="
        )
    return q.astype(np.int32)


# The module -------------------------------------------------------------------------------


PACK: dict[str, Any] = {
    "conv_integer": lambda w, how: pack_conv_integer(w, groups=how["groups"]),
    "matmul_integer": lambda w, how: pack_matmul_integer(w.T),
}


class Quantized(nn.Module):
    """A network on integers: the list of its ops, and its constants as buffers.

        quantized.save("m.int8.safetensors")
        Quantized.load("m.int8.safetensors")(images)      # the model is not needed

    Args:
        graph: of ops on integers, as `quantize` makes it.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        self.names = {ref: f"c{ref.number}" for ref in graph.constants}
        for ref, name in self.names.items():
            self.register_buffer(name, graph.constants[ref])
        self.weights = {step.inputs[1]: step for step in graph.steps if step.op in PACK}
        self.packed = {ref: Packed() for ref in self.weights}
        self.program = Program(graph)
        self.eval()

    def constants(self) -> dict[Ref, Any]:
        """What the buffers are now."""
        now = vars(self)
        return {ref: now[name] for ref, name in self.names.items()}

    def forward(self, *inputs: Tensor) -> Any:
        """The steps, with weights that are packed once."""
        program, now = self.program, vars(self)
        with minidl.no_grad():
            if program.takes(inputs):
                arrays = [now[name].array for name in self.names.values()]
                if not program.is_of(len(inputs[0]), arrays):
                    program.make(len(inputs[0]), arrays, self.as_read(inputs[0]))
                try:
                    return program.run(inputs)
                except Exception:
                    pass  # the graph says better what is wrong
            return self.graph.run(inputs, constants=self.as_read(inputs[0]))

    def as_read(self, x: Tensor) -> dict[Ref, Any]:
        """The constants, weights in the form in which the kernels for x read them."""
        constants = self.constants()
        takes = {op for op in PACK if takes_packed(registry[op], x)}
        for ref, step in self.weights.items():
            if step.op in takes:
                constants[ref] = self.packed[ref].of(constants[ref], PACK[step.op], step.settings)
        return constants

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write list and constants as safetensors."""
        graph = replace(self.graph, constants=self.constants())
        minidl.save({"graph": graph.to_dict()}, path, compress=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Quantized:
        """Read what `save` wrote. Loading runs no code.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is something else, or of another version.
        """
        content = minidl.load(path)
        if not isinstance(content, dict) or not isinstance(content.get("graph"), dict):
            raise ValueError(f"{path} is not a network that `Quantized.save` wrote")
        try:
            return cls(Graph.from_dict(content["graph"]))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
