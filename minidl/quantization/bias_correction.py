"""Bias correction: rounded weights shift a layer's mean, and its bias shifts it back.

The errors ε = W̃ - W are small, but they are the same for every input, and inputs after a ReLU are
all of one sign: they do not cancel. The mean of each channel is off by

    E[ỹ] - E[y]  =  ε E[x]   (or more, where x̃ is off already)

which is subtracted from its bias (Nagel et al. 2019, section 4.2; measured on calibration data, as
here, in their appendix D). Layers are corrected in the order in which they run, so that each sees
inputs that are right in the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

import minidl
from minidl.tensor import Tensor
from minidl.trace import Graph, Ref, Step


def correct_biases(
    graph: Graph,
    batches: Sequence[Any],
    is_product: Callable[[Step], bool],
    rounded: Callable[[Step, np.ndarray], np.ndarray],
) -> Graph:
    """A graph whose biases expect rounded weights; the weights are as they were.

    Args:
        graph: folded.
        batches: of inputs, as for `calibrate`. They are run as one batch.
        is_product: whether a step is a product whose weights will be rounded.
        rounded: the weights of such a step as they will be, W̃ (what the integers stand for).
    """
    inputs = [minidl.cat(list(parts)) for parts in zip(*map(as_tuple, batches))]
    products = {step.output: i for i, step in enumerate(graph.steps) if is_product(step)}
    rough, graph = graph.copy(), graph.copy()
    for i in products.values():
        x, w, b = graph.steps[i].inputs
        new = rounded(graph.steps[i], graph.constants[w].numpy())
        rough.steps[i] = replace(graph.steps[i], inputs=(x, rough.constant(Tensor(new)), b))
    exact: dict[Ref, np.ndarray] = {}
    shifts: dict[Ref, np.ndarray] = {}

    def measure(step: Step, _: Any, y: Tensor) -> None:
        if step.output in products:
            exact[step.output] = mean(step, y)

    def correct(step: Step, _: Any, y: Tensor) -> Tensor | None:
        if step.output not in products:
            return None
        shifts[step.output] = shift = mean(step, y) - exact[step.output]
        along = [-1 if axis == channel_axis(step) else 1 for axis in range(y.ndim)]
        return y - Tensor(shift.astype(y.dtype).reshape(along)).to(y.device)

    with minidl.no_grad():
        graph.run(inputs, measure)
        rough.run(inputs, correct)
    for output, i in products.items():
        x, w, b = graph.steps[i].inputs
        old = 0.0 if b is None else graph.constants[b].numpy().astype(np.float64)
        bias = (old - shifts[output]).astype(graph.constants[w].dtype)
        graph.steps[i] = replace(graph.steps[i], inputs=(x, w, graph.constant(Tensor(bias))))
    return graph


def channel_axis(step: Step) -> int:
    return 1 if step.op == "conv2d" else len(step.shape) - 1


def mean(step: Step, y: Tensor) -> np.ndarray:
    """E[y] of each output channel, in float64."""
    axes = tuple(axis for axis in range(y.ndim) if axis != channel_axis(step))
    return np.asarray(y.cpu().numpy().mean(axis=axes, dtype=np.float64))


def as_tuple(batch: Any) -> tuple[Any, ...]:
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)
