"""Recompute instead of keep: memory for time in the backward pass (Chen et al. 2016).

A `checkpoint` runs its function as usual, and then makes the nodes that came of it forget what
they saved. The tape itself stays: gradients go where they always went. When the walk unpacks the
first of these nodes, the function runs again, and what its new nodes saved serves the old ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from operator import attrgetter
from typing import Any, TypeVar

from minidl.autograd import Node, enable_grad, mode, owner, tick, writes
from minidl.backend.random import default_generator
from minidl.tensor import Tensor

T = TypeVar("T")


class Forgotten:
    """Stands in for what a node saved, and computes it again when the walk unpacks it."""

    def __init__(self, segment: Segment, index: int) -> None:
        self.segment, self.index = segment, index

    def __iter__(self) -> Iterator[Any]:
        return iter(self.segment.recompute()[self.index])

    def __len__(self) -> int:
        return len(self.segment.recompute()[self.index])


class Segment:
    """A part of the tape that keeps its inputs only (Chen et al. 2016, section 3)."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.function, self.args = function, args
        self.calls = default_generator.state_dict()
        self.autocast = mode.autocast[-1] if mode.autocast else nullcontext()
        self.saved: list[Any] | None = None
        self.start = tick()
        self.output = function(*args)
        self.output_nodes = nodes_since(self.start, self.output)
        self.ops = [node.op for node in self.output_nodes]

    def recompute(self) -> list[Any]:
        """Run the function again, with the same random numbers; what its nodes saved, in order."""
        if self.saved is None:
            now = default_generator.state_dict()
            default_generator.load_state_dict(self.calls)
            start = tick()
            try:
                with enable_grad(), self.autocast:
                    nodes = nodes_since(start, self.function(*self.args))
            finally:
                default_generator.load_state_dict(now)
            if [node.op for node in nodes] != self.ops:
                raise RuntimeError(
                    "checkpoint: the function did other ops when it ran again: it must depend on "
                    "its arguments only"
                )
            for leaf in {edge for node in nodes for edge in node.edges if type(edge) is not Node}:
                if leaf is not None and writes.get(owner(leaf.array), 0) > self.start:
                    raise RuntimeError(
                        f"checkpoint: a leaf of shape {leaf.shape} was changed in place after the "
                        "function ran with it: call backward() before you change it"
                    )
            self.saved = [node.saved for node in nodes]
        return self.saved


def nodes_since(start: int, output: Any) -> list[Node]:
    """The nodes behind an output (a Tensor, or several) younger than a number, in order."""
    outputs = output if isinstance(output, tuple | list) else [output]
    edges: list[Any] = [t.node for t in outputs if isinstance(t, Tensor)]
    found: dict[Node, None] = {}
    while edges:
        edge = edges.pop()
        if type(edge) is Node and edge.number > start and edge not in found:
            found[edge] = None
            edges.extend(edge.edges)
    return sorted(found, key=attrgetter("number"))


def checkpoint(function: Callable[..., T], *args: Any) -> T:
    """``function(*args)``, keeping nothing between its inputs and outputs for the backward pass.

    The backward pass runs the function once more to get back what it needs: less memory for
    more time (Chen et al. 2016, "Training deep nets with sublinear memory cost"). The gradients
    are the same to the bit.

    Args:
        function: depends on nothing but its arguments, parameters and minidl's random numbers.
        args: Tensors and whatever else the function takes.
    """
    if not mode.enabled:
        return function(*args)
    segment = Segment(function, args)
    for index, node in enumerate(segment.output_nodes):
        node.saved = Forgotten(segment, index)
    output = segment.output
    del segment.output, segment.output_nodes
    return output
