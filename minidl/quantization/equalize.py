"""Cross-layer equalisation: channels of a layer get ranges alike, and nothing else changes.

One scale for all channels of a weight is as coarse as its largest channel makes it, and a folded
batch norm makes channels differ a hundredfold. But ReLU is positively homogeneous, relu(s x) =
s relu(x), so between two layers any channel can be scaled down and up again:

    W2 relu(W1 x + b1)  =  (W2 S) relu(S⁻¹ W1 x + S⁻¹ b1),      S = diag(s) > 0

With r1_i = max |row i of W1| and r2_i = max |column i of W2|,

    s_i = √(r1_i r2_i) / r2_i

makes both √(r1_i r2_i): the channel uses its share of one grid as well as of the other (Nagel et
al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.1). A
layer in the middle of three belongs to two pairs, so pairs take turns until nothing changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from minidl.tensor import Tensor
from minidl.trace import Graph, Step

ROUNDS, ENOUGH = 100, 1e-3  # |ln s| that is not worth another round
HOMOGENEOUS = ("relu", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d")


class Pair(NamedTuple):
    """Two products with nothing but homogeneous steps between them.

    Attributes:
        first, second: positions in the graph's steps.
        pixels: how many inputs of `second` come from one channel of `first`.
    """

    first: int
    second: int
    pixels: int


def equalize(graph: Graph, is_product: Callable[[Step], bool]) -> Graph:
    """The same function with other weights. (To the last digits: products are rounded anew.)

    Args:
        graph: folded.
        is_product: whether a step is a product with constant weights that may change.
    """
    graph = graph.copy()
    found = list(pairs(graph, is_product))
    weights = {i: Weights(graph, graph.steps[i]) for pair in found for i in pair[:2]}
    for _ in range(ROUNDS):
        change = 0.0
        for pair in found:
            first, second = weights[pair.first], weights[pair.second]
            r1 = np.abs(first.rows()).max(axis=1)
            r2 = np.abs(second.columns(pair.pixels)).max(axis=(1, 3)).ravel()
            alive = (r1 > 0) & (r2 > 0)
            s = np.sqrt(np.divide(r1, r2, out=np.ones_like(r1), where=alive))
            first.rows()[...] /= s[:, None]
            first.bias /= s
            columns = second.columns(pair.pixels)
            columns *= s.reshape(len(columns), 1, -1, 1)
            change = max(change, float(np.abs(np.log(s)).max()))
        if change < ENOUGH:
            break
    for i, new in weights.items():
        graph.steps[i] = new.put(graph, graph.steps[i])
    return graph


class Weights:
    """A product's weight and bias in float64, seen by output channel and by input channel."""

    def __init__(self, graph: Graph, step: Step) -> None:
        _, w, b = step.inputs
        self.w = np.array(
            graph.constants[w].numpy(), np.float64, order="C"
        )  # own: views write to it
        bias = np.zeros(len(self.w)) if b is None else graph.constants[b].numpy()
        self.bias = bias.astype(np.float64)
        self.groups = step.settings.get("groups", 1)

    def rows(self) -> np.ndarray:
        """(output channels, all else), a view."""
        return self.w.reshape(len(self.w), -1)

    def columns(self, pixels: int) -> np.ndarray:
        """(groups, outputs of each, input channels of each, all else), a view."""
        out, inputs = self.w.shape[:2]
        return self.w.reshape(self.groups, out // self.groups, inputs // pixels, -1)

    def put(self, graph: Graph, step: Step) -> Step:
        x, w, b = step.inputs
        dtype = graph.constants[w].dtype
        weight = graph.constant(Tensor(self.w.astype(dtype)))
        bias = None if b is None else graph.constant(Tensor(self.bias.astype(dtype)))
        return replace(step, inputs=(x, weight, bias))


def pairs(graph: Graph, is_product: Callable[[Step], bool]) -> Iterator[Pair]:
    """Products that follow each other, and whose values and weights nothing else reads."""
    for i, first in enumerate(graph.steps):
        if not is_product(first) or len(graph.users(first.inputs[1])) > 1:
            continue
        last, pixels = first, 1
        while True:
            users = graph.users(last.output)
            step = users[0] if len(users) == 1 else None
            if step is None:
                break
            if is_product(step):
                flat = step.op == "linear"
                fits = flat == (first.op == "linear" or len(last.shape) == 2)
                if fits and step.inputs[0] == last.output and len(graph.users(step.inputs[1])) == 1:
                    yield Pair(i, graph.steps.index(step), pixels)
                break
            if step.op == "reshape" and flattens(last, step):
                pixels *= math.prod(last.shape[2:])
            elif step.op not in HOMOGENEOUS:
                break
            last = step


def flattens(before: Step, step: Step) -> bool:
    """(N, C, H, W) -> (N, C · H · W)."""
    sizes = before.shape[1:]
    return (
        len(before.shape) == 4
        and step.shape == (before.shape[0], math.prod(sizes))
        and all(isinstance(n, int) for n in sizes)
    )
