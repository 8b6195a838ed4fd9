"""The network on integers that a file with QuantizeLinear and DequantizeLinear stands for.

    DequantizeLinear, Conv, Relu, QuantizeLinear      conv_integer(relu=True)
    DequantizeLinear, Add, QuantizeLinear             add_integer
    DequantizeLinear, MaxPool                         max_pool2d of bytes

An imported network is real numbers with rounding in between. Traced, it is a list of ops, in which
`quantize` would have to find ranges; here they are given. So the rewriting is that of `quantize`
(`Lowering`), and of a file that minidl wrote comes the network that was written, to the bit. What
has no form on integers, or no rounding around it, stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from minidl import nn
from minidl.quantization.static import Learned, Lowering, Quantized, fold
from minidl.tensor import Tensor
from minidl.trace import Graph, Ref, Step, trace

PRODUCTS = ("conv_integer", "matmul_integer")


def on_integers(
    model: nn.Module, inputs: list[Tensor], dequantized: Mapping[str, Any]
) -> Quantized | None:
    """A network with rounding, on integers; None if there is no product of integers in it.

    Args:
        inputs: as it takes them, two samples.
        dequantized: parameters that stand for integers, by their names: (integers, scale, axis).

    Raises:
        RuntimeError: the model cannot be traced (see `minidl.trace`).
        ValueError: sums that may not fit in 32 bits.
    """
    graph = trace(model, *inputs)
    weights: dict[Ref, Learned] = {}
    biases: dict[Ref, tuple[np.ndarray, np.ndarray]] = {}
    for ref, name in graph.names.items():
        q, scale, axis = dequantized.get(name, (np.empty(0), None, 0))
        if q.dtype == np.int32:
            biases[ref] = q, scale
        elif q.dtype == np.int8 and (row := by_row(graph.constants[ref].numpy(), q, scale, axis)):
            weights[ref] = row
    found = Rounded(fold(graph, weights), weights, biases).lower()
    return Quantized(found) if any(step.op in PRODUCTS for step in found.steps) else None


def by_row(w: np.ndarray, q: np.ndarray, scale: np.ndarray, axis: int) -> Learned | None:
    """Integers as a layer has its weights w, (out, ...), with a scale for each row or one for all.

    ONNX may have them transposed. None: w is not what they stand for.
    """
    for given, along in ((q, axis % q.ndim), *([(q.T, 1 - axis % 2)] if q.ndim == 2 else [])):
        if scale.size == 1 or (along == 0 and scale.shape == (len(w),)):
            s = scale.reshape(-1)
            if np.array_equal(given * s.reshape(-1, *[1] * (q.ndim - 1)), w):
                return Learned(np.ascontiguousarray(given), s, None)
    return None


class Rounded(Lowering):
    """Lowers a list with quantize_linear and dequantize_linear in it.

    What a quantize_linear makes is integers, and known as they are (`floats`); what a
    dequantize_linear makes of them is a real number in bytes (`bytes`).

    Attributes:
        biases: int32, and what one unit is worth.
        made: of values that were rounded to a grid: the quantize_linear's output.
    """

    def __init__(
        self,
        graph: Graph,
        weights: dict[Ref, Learned],
        biases: dict[Ref, tuple[np.ndarray, np.ndarray]],
    ) -> None:
        super().__init__(graph, (), True, 8, weights)
        self.biases = biases
        self.made: dict[tuple[Ref, Any], Ref] = {}

    # Patterns

    def grid(self, step: Step | None) -> tuple[np.ndarray, np.ndarray] | None:
        """(scale, zero point) of a quantize_linear or dequantize_linear, if it has one of each, of
        8 bits."""
        if step is None or step.op not in ("quantize_linear", "dequantize_linear"):
            return None
        found = [self.graph.constants.get(x) for x in step.inputs[1:]]
        scale, zero = (x.numpy() if x is not None else np.empty(0) for x in found)
        fits = scale.dtype == np.float32 and zero.dtype.name in ("int8", "uint8")
        one = scale.size == zero.size == 1
        return (scale.reshape(()), zero.reshape(())) if fits and one else None

    def rounding(self, ref: Ref) -> Step | None:
        """The quantize_linear that reads a value, if nothing else does (but others like it)."""
        users = self.graph.users(ref)
        grids = [self.grid(user) for user in users]
        if any(user is None or user.op != "quantize_linear" for user in users) or None in grids:
            return None
        return users[0] if len({*map(key, grids)}) == 1 else None

    def absorbed(self, step: Step, kind: str) -> list[Step]:
        following = super().absorbed(step, kind)
        if kind in ("product", "add", "mean"):
            result = following[-1].output if following else step.output
            if after := self.rounding(result):
                grid: Any = self.grid(after)
                self.made[result, key(grid)] = after.output
                self.ranges[after.output] = grid
                return [*following, after]
        return following

    def kind(self, step: Step) -> str:
        if self.grid(step):
            return step.op
        if any(x not in self.bytes for x in step.refs() if x not in self.graph.constants):
            return "float"
        if self.most_at(step) is not None:
            return "minimum"
        try:
            kind = super().kind(step)
        except ValueError:
            return "float"
        if kind == "product":
            return kind if step.inputs[1] in self.learned else "float"
        if kind in ("add", "mean"):
            following = self.absorbed(step, kind)
            return kind if following and following[-1].output in self.ranges else "float"
        return kind

    def most_at(self, step: Step) -> int | None:
        """The integer at which numbers of a grid are made to end, or None."""
        if step.op != "minimum" or step.inputs[0] not in self.bytes:
            return None
        _, scale, zero = self.bytes[step.inputs[0]]
        top = self.graph.constants.get(step.inputs[1])
        if top is None or top.numel() != 1:
            return None
        most = int(np.rint(top.item() / scale)) + int(zero)
        exact = np.float32(most - int(zero)) * scale == top.item()
        return most if exact and int(zero) <= most <= np.iinfo(zero.dtype).max else None

    # Rewriting

    def put(self, ref: Ref, q: Ref, like: Step) -> None:
        self.floats[ref] = q
        self.new.scales[q] = self.constant(self.ranges[ref][0])

    def lower_quantize_linear(self, step: Step, result: Ref, relu: bool) -> None:
        x = step.inputs[0]
        grid: Any = self.grid(step)
        if (x, key(grid)) in self.made:
            self.floats[result] = self.floats[self.made[x, key(grid)]]
        elif x in self.bytes and key(self.bytes[x][1:]) == key(grid):
            self.floats[result] = self.bytes[x][0]
        else:
            self.made[x, key(grid)], self.ranges[result] = result, grid
            self.put(result, self.quantized(x, grid[0], grid[1], step), step)

    def lower_dequantize_linear(self, step: Step, result: Ref, relu: bool) -> None:
        grid: Any = self.grid(step)
        self.bytes[result] = self.as_float(step.inputs[0], step), *grid

    def lower_minimum(self, step: Step, result: Ref, relu: bool) -> None:
        q, scale, zero = self.bytes[step.inputs[0]]
        most = np.asarray(self.most_at(step), zero.dtype)
        out = self.emit("minimum", (q, most), {}, step, zero.dtype.name)
        self.bytes[result] = out, scale, zero

    def bias(self, step: Step, scale: np.ndarray) -> np.ndarray | None:
        """As the file has it, if in the units of the sums."""
        q, unit = self.biases.get(step.inputs[2], (None, None))
        return q if q is not None and np.all(unit == scale) else super().bias(step, scale)


def key(grid: Any) -> tuple[Any, ...]:
    """A grid's numbers: equal for equal grids."""
    scale, zero = grid
    return scale.item(), zero.item(), zero.dtype.name
