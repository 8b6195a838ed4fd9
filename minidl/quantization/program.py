"""A network's steps as bare calls: what is the same for every image is looked up once.

`Graph.run` asks each time which kernel runs, and each kernel what its weights, scales and zero
points are. For one small image that takes as long as the integers do. So here each step is a call
that waits for the values alone:

    for call, places, dead in steps:
        values.append(call(*(values[i] for i in places)))

What it gives is what the graph gives, to the bit. It is for arrays of the host, where nobody
watches and nobody has chosen a kernel (`minidl.use`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minidl import autograd
from minidl import op as ops
from minidl.backend.native import native
from minidl.op import registry
from minidl.ops.quantized import BOUND
from minidl.tensor import Tensor
from minidl.trace import Graph, Ref, Step, nested

# Ops that only move values about: on bare arrays they do what they do on Tensors.
MOVES = ("max_pool2d", "reshape", "permute", "getitem", "squeeze", "unsqueeze", "expand")


class Program:
    """The calls of a graph: made at the first use, and again after a constant was changed."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.steps: list[tuple[Callable[..., Any], list[int], list[int]]] = []
        self.place: dict[Ref, int] = {}  # of a value, in the list of them
        self.made_of: tuple[Any, ...] = ()  # the graph's steps and output, how many samples,
        self.arrays: list[Any] = []  # ... and the constants,
        self.time = 0  # ... as they were then
        self.ops = [registry[name].op for name in {step.op for step in graph.steps}]

    def __reduce__(self) -> Any:  # a copied, pickled or saved network makes it anew
        return Program, (self.graph,)

    def takes(self, inputs: Sequence[Any]) -> bool:
        """Whether it can run here; else the graph does."""
        return (
            native is not None
            and ops.on_call is None
            and ops.before_call is None
            and len(inputs) == len(self.graph.inputs)
            and all(type(x) is Tensor and type(x.array) is np.ndarray for x in inputs)
            and not any(op.chosen for op in self.ops)
        )

    def is_of(self, batch: int, arrays: list[Any]) -> bool:
        """Whether the calls are those of the graph and its constants, as they are now."""
        if self.made_of != (self.graph.steps, self.graph.output, batch):
            return False
        if not all(map(operator.is_, arrays, self.arrays)):
            return False
        if autograd.last_write > self.time:  # something was changed in place: one of these?
            for a in arrays:
                if autograd.writes.get(autograd.owner(a), 0) > self.time:
                    return False
            self.time = autograd.tick()
        return True

    def make(self, batch: int, arrays: list[Any], constants: dict[Ref, Any]) -> None:
        """Make the calls.

        Args:
            arrays: of the constants.
            constants: the same, weights in the form in which a kernel reads them.
        """
        steps, forget = self.graph.steps, self.graph.last_uses()
        live = [*self.graph.inputs, *(step.output for step in steps)]
        self.place = place = {ref: i for i, ref in enumerate(live)}
        self.steps = [
            (
                bound(step, batch, constants),
                [place[ref] for ref in step.refs() if ref in place],
                [place[ref] for ref in forget.get(i, ())],
            )
            for i, step in enumerate(steps)
        ]
        self.made_of = [*steps], self.graph.output, batch
        self.arrays, self.time = arrays, autograd.tick()

    def run(self, inputs: Sequence[Tensor]) -> Any:
        """What the network returns."""
        values: list[Any] = [x.array for x in inputs]
        for call, places, dead in self.steps:
            values.append(call(*[values[i] for i in places]))
            for i in dead:
                values[i] = None

        def result(x: Any) -> Any:
            if not isinstance(x, Ref):
                return x
            return Tensor(values[self.place[x]]) if x in self.place else self.graph.constants[x]

        return nested(self.graph.output, result)


def bound(step: Step, batch: int, constants: dict[Ref, Any]) -> Callable[..., Any]:
    """A step as a function of the values, on bare arrays."""
    function = registry[step.op]
    settings = {**function.op.defaults, **step.settings_for(batch)}
    given = [constants.get(x, x) if isinstance(x, Ref) else x for x in step.inputs]
    waits = [isinstance(x, Ref) for x in given]
    first = sum(waits)
    if all(waits[:first]):
        rest = [x.array if isinstance(x, Tensor) else x for x in given[first:]]
        if step.op in BOUND:
            return BOUND[step.op](*rest, **settings)
        if step.op in MOVES and not rest:
            return lambda *values: function(*values, **settings)

    def call(*values: Any) -> Any:  # on Tensors, as the graph does
        coming = map(Tensor, values)
        return function(*(next(coming) if w else x for w, x in zip(waits, given)), **settings).array

    return call
