"""The tape and the walk back along it (reverse-mode differentiation).

Every recorded op leaves a `Node`: which op, where the gradients of its inputs go (`edges`: an
earlier node, a leaf tensor, or None), and the arrays that its gradient rule asked for (`saved`).
Nodes point only backwards, and never to the tensor that they made: drop the tensor and the tape
behind it is gone.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from contextlib import ContextDecorator
from operator import attrgetter
from types import FunctionType
from typing import TYPE_CHECKING, Any

import numpy as np

from minidl.backend import array_module
from minidl.tensor import Tensor

if TYPE_CHECKING:
    from minidl.op import Op


class Node:
    """One step on the tape.

    Attributes:
        op: what was computed.
        edges: for each input, where its gradient goes: a Node, a leaf Tensor, or None.
        saved: what the gradient rule needs of the call; None once the tape is freed.
        kwargs: the op's settings.
        shape: the output's shape.
        number: steps are numbered in the order of their making.
        hooks: see `Tensor.register_hook`.
        source: (file, line, code) of the user's call, if `explain` was told to note it.
    """

    __slots__ = (
        "__weakref__",
        "edges",
        "hooks",
        "kwargs",
        "number",
        "op",
        "saved",
        "shape",
        "source",
    )

    op: Op
    edges: Sequence[Any]
    saved: Any
    kwargs: dict[str, Any]
    shape: tuple[int, ...]
    number: int
    hooks: dict[str, list[Callable[[Any], Any]]] | None
    source: tuple[str, int, str]

    def __repr__(self) -> str:
        return f"<{self.op.name}>"


tick = itertools.count(1).__next__  # numbers nodes and in-place writes in one order


class Mode(threading.local):
    """Whether ops are recorded, what follows the walk under way, and the blocks of `amp` around;
    each thread has its own."""

    enabled = True
    afterwards: list[Callable[[], None]] | None = None
    autocast: tuple[Any, ...] = ()  # the innermost last


mode = Mode()


class set_grad_enabled:
    """Switch recording on or off, from here on or for a ``with`` block."""

    def __init__(self, enabled: bool) -> None:
        self.before, mode.enabled = mode.enabled, enabled

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        mode.enabled = self.before


class _Switch(ContextDecorator):
    enabled: bool

    def __new__(cls, function: Any = None) -> Any:
        switch = super().__new__(cls)
        if function is None:
            return switch
        switch.__init__()  # type: ignore[misc]
        return switch(function)  # @no_grad, without ()

    def __init__(self) -> None:
        self.before: list[bool] = []

    def _recreate_cm(self) -> _Switch:
        return type(self)()  # a decorated function may run in several threads at once

    def __enter__(self) -> None:
        self.before.append(mode.enabled)
        mode.enabled = self.enabled

    def __exit__(self, *_: object) -> None:
        mode.enabled = self.before.pop()


class no_grad(_Switch):
    """Do not record: in a ``with`` block or as a decorator ``@minidl.no_grad()``."""

    enabled = False


class enable_grad(_Switch):
    """Record again, inside a `no_grad` block."""

    enabled = True


def is_grad_enabled() -> bool:
    """Whether ops are being recorded."""
    return mode.enabled


# Arrays changed in place ------------------------------------------------------------------
#
# A node must not be differentiated with arrays that changed since. So each in-place write notes
# its number under the memory's owner (views share one), and the walk compares: ops pay nothing.

last_write = 0
writes: dict[int, int] = {}


def owner(array: Any) -> int:
    """Identifies the memory of an array and of all its views."""
    while isinstance(array.base, type(array)):
        array = array.base
    return id(array)


def written(array: Any) -> None:
    """Note that an array was changed in place."""
    global last_write
    last_write = writes[owner(array)] = tick()


def check_unchanged(node: Node) -> None:
    for value in node.saved:
        # (A dtype that the tape keeps has a base as well: itself.)
        if hasattr(value, "strides") and writes.get(owner(value), 0) > node.number:
            raise RuntimeError(
                f"an array of shape {value.shape} that the gradient of {node.op.name!r} needs was "
                "changed in place after it was computed. Call backward() before you change it, "
                "or change a copy (x.clone())"
            )


# The walk ---------------------------------------------------------------------------------


def backward(
    tensor: Tensor,
    gradient: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
) -> None:
    """See `Tensor.backward`."""
    retain = create_graph if retain_graph is None else retain_graph
    walk([tensor], [gradient], None, retain, create_graph)


def grad(
    outputs: Tensor | Sequence[Tensor],
    inputs: Tensor | Sequence[Tensor],
    grad_outputs: Tensor | Sequence[Tensor | None] | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    allow_unused: bool = False,
) -> tuple[Tensor | None, ...]:
    """Gradients of the sum of outputs with respect to inputs; no `.grad` is touched.

    Only what lies between inputs and outputs is computed: the gradient of an image under a
    network costs nothing for the network's weights.

    Args:
        outputs: one tensor or several.
        inputs: tensors that require gradients, leaves or not.
        grad_outputs: the gradients of the outputs; may be left out for outputs of one element.
        retain_graph: keep the tape for another pass (default: `create_graph`).
        create_graph: record the pass, so that the result can be differentiated.
        allow_unused: None for an input that the outputs do not depend on, instead of an error.

    Returns:
        One gradient per input, with the input's shape.

    Raises:
        RuntimeError: as `Tensor.backward`, or an input is not used.
    """
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    if grad_outputs is None or isinstance(grad_outputs, Tensor):
        grad_outputs = [grad_outputs] * len(outputs)
    for i, x in enumerate(inputs):
        if not x.requires_grad:
            raise RuntimeError(f"inputs[{i}] does not require a gradient: x.requires_grad_() first")
    targets = [x.node or x for x in inputs]
    retain = create_graph if retain_graph is None else retain_graph
    found = walk(outputs, list(grad_outputs), targets, retain, create_graph)
    result = [found[target] for target in targets]
    for i, g in enumerate(result):
        if g is None and not allow_unused:
            raise RuntimeError(
                f"inputs[{i}] was not used to compute the outputs; allow_unused=True gives None"
            )
    return tuple(g if g is None or isinstance(g, Tensor) else Tensor(g) for g in result)


def walk(
    outputs: Sequence[Tensor],
    gradients: Sequence[Any],
    targets: Sequence[Any] | None,
    retain_graph: bool,
    create_graph: bool,
) -> dict[Any, Any]:
    """Walk the tape back from outputs, from the youngest node to the oldest.

    A node is younger than its inputs, so it comes after all that use it, and its gradient is
    complete. A leaf is done when the last of its uses is: its gradient goes to `.grad` at once,
    while the walk goes on. There is no recursion, so depth is no matter.

    With targets (edges), only the way to them is walked, and their gradients are returned.
    """
    total: dict[Any, Any] = {}  # edge -> the gradient that has arrived so far
    sums: set[Any] = set()  # edges whose total is a sum made here: more is added to it in place
    for output, gradient in zip(outputs, gradients, strict=True):
        if not output.requires_grad:
            raise RuntimeError(
                "nothing to differentiate: this tensor does not require a gradient. Set "
                "requires_grad on what it is computed from, and compute it outside no_grad()"
            )
        edge = output.node or output
        g = first_gradient(output, gradient, create_graph)
        if output.node is None:  # it will be the leaf's `.grad`
            g = copy(g)
        total[edge] = total[edge] + g if edge in total else g

    nodes, uses = explore(total)
    useful: set[Any] | None = None  # None: all edges
    if targets is not None:
        useful = on_the_way(nodes, targets)
        nodes = [node for node in nodes if node in useful]
    found: dict[Any, Any] = dict.fromkeys(targets or ())

    def add(edge: Any, gx: Any) -> None:
        if edge in sums:
            total[edge] += gx
        else:
            total[edge] = total[edge] + gx
            if not create_graph:
                sums.add(edge)

    def complete(leaf: Tensor) -> None:
        if leaf in total:
            g = total.pop(leaf)
            if leaf.hooks:
                g = call_hooks(leaf, g)
            if targets is None:
                accumulate(leaf, g)
            elif leaf in found:
                found[leaf] = g

    recording, mode.enabled = mode.enabled, create_graph
    outer, mode.afterwards = mode.afterwards, []
    try:
        for leaf in [leaf for leaf, n in uses.items() if n == 0]:
            complete(leaf)
        for node in nodes:
            g = total.pop(node, None)
            edges = node.edges
            if g is not None and node.hooks:
                g = call_hooks(node, g)
            if node in found:
                found[node] = g
                if useful is not None and useful.isdisjoint(edges):
                    continue  # nothing of interest behind it
            if g is None:
                arrived: Any = [None] * len(edges)
            else:
                op = node.op
                if create_graph:
                    arrived = op.rule(g, *op.arguments(node), **node.kwargs)  # type: ignore[misc]
                elif op.gradient_kernels:
                    arrived = op.array_rule(g)(g, *node.saved, **node.kwargs)
                else:
                    arrived = op.rule(g, *node.saved, **node.kwargs)  # type: ignore[misc]

            for edge, gx in zip(edges, arrived):
                if edge is None or (useful is not None and edge not in useful):
                    continue
                if type(gx) is FunctionType:
                    gx = gx()
                if type(edge) is Node:
                    if gx is not None:
                        if gx.shape != edge.shape:
                            gx = unbroadcast(gx, edge.shape)
                        if edge in total:
                            add(edge, gx)
                        else:
                            total[edge] = gx
                    continue
                if gx is not None:
                    if gx.shape != edge.array.shape:
                        gx = unbroadcast(gx, edge.shape)
                    if edge in total:
                        add(edge, gx)
                    else:
                        total[edge] = gx if gx is not g and is_own(gx) else copy(gx)
                uses[edge] -= 1
                if not uses[edge]:
                    complete(edge)
            if not retain_graph:
                node.saved, node.edges = None, ()
        afterwards = mode.afterwards
    finally:
        mode.enabled, mode.afterwards = recording, outer
    for callback in afterwards:
        callback()
    return found


def after_backward(callback: Callable[[], None]) -> None:
    """Call back at the end of the walk under way, unless it fails: for hooks that it runs."""
    if mode.afterwards is None:
        raise RuntimeError("after_backward is for hooks: no backward pass is under way")
    mode.afterwards.append(callback)


def first_gradient(output: Tensor, gradient: Any, create_graph: bool) -> Any:
    """The gradient that a walk starts with: an array, or a Tensor if the walk is recorded."""
    if gradient is None:
        if output.numel() != 1:
            raise RuntimeError(
                f"backward() of a tensor of shape {output.shape} needs its gradient: "
                "x.backward(gradient), or reduce it to one number first (x.sum(), x.mean())"
            )
        gradient = array_module(output.array).ones_like(output.array)
    if isinstance(gradient, Tensor) and not create_graph:
        gradient = gradient.array
    if not hasattr(gradient, "shape"):
        raise TypeError(f"a gradient is a Tensor or an array, got {type(gradient).__name__}")
    if gradient.shape != output.shape:
        raise RuntimeError(f"the tensor has shape {output.shape}, its gradient {gradient.shape}")
    if gradient.dtype != output.dtype:
        gradient = gradient.astype(output.dtype)
    return Tensor(gradient) if create_graph and not isinstance(gradient, Tensor) else gradient


def explore(roots: dict[Any, Any]) -> tuple[list[Node], dict[Tensor, int]]:
    """All nodes behind some edges, the youngest first, and how often each leaf there is used.

    Everything that can be refused is refused here, before anything is lost.
    """
    nodes = [edge for edge in roots if type(edge) is Node]
    uses = {edge: 0 for edge in roots if type(edge) is not Node}
    seen = set(nodes)
    for node in nodes:  # grows as we go
        if node.saved is None:
            raise RuntimeError(
                f"the tape behind {node.op.name!r} was freed by an earlier backward(): compute the "
                "tensor again, or pass retain_graph=True to the first backward()"
            )
        if node.op.rule is None:
            raise RuntimeError(f"op {node.op.name!r} has no gradient rule: use x.detach()")
        if node.number < last_write and type(node.saved) is list:
            check_unchanged(node)
        for edge in node.edges:
            if type(edge) is Node:
                if edge not in seen:
                    seen.add(edge)
                    nodes.append(edge)
            elif edge is not None:
                uses[edge] = uses.get(edge, 0) + 1
    nodes.sort(key=attrgetter("number"), reverse=True)
    return nodes, uses


def on_the_way(nodes: list[Node], targets: Sequence[Any]) -> set[Any]:
    """The targets, and those of the nodes (the youngest first) that lead to them."""
    useful = set(targets)
    for node in reversed(nodes):  # inputs come before their users
        if not useful.isdisjoint(node.edges):
            useful.add(node)
    return useful


def unbroadcast(g: Any, shape: tuple[int, ...]) -> Any:
    """Sum a gradient over the axes along which its input, of a given shape, was broadcast."""
    if g.dtype.itemsize == 2:  # sums are kept in float32
        return unbroadcast(g.astype(np.float32), shape).astype(g.dtype)
    added = g.ndim - len(shape)
    stretched = [i + added for i, n in enumerate(shape) if n == 1 and g.shape[i + added] != 1]
    axes = (*range(added), *stretched)
    return g.sum(axis=axes, keepdims=True).reshape(shape)


def is_own(array: Any) -> bool:
    """Whether an array owns its memory: a leaf's `.grad` must not share it with anything."""
    return isinstance(array, Tensor) or array.base is None


def copy(g: Any) -> Any:
    return g.clone() if isinstance(g, Tensor) else np.array(g) if np.isscalar(g) else g.copy()


def call_hooks(edge: Any, g: Any) -> Any:
    """Run the hooks of a node or leaf over its gradient."""
    for hook in list(edge.hooks.get("grad", ())):
        as_tensor = g if isinstance(g, Tensor) else Tensor(g)
        replaced = hook(as_tensor)
        if replaced is not None:
            if replaced.shape != as_tensor.shape:
                raise RuntimeError(
                    f"a hook returned a gradient of shape {replaced.shape} for {as_tensor.shape}"
                )
            g = replaced if isinstance(g, Tensor) else replaced.array
    return g


def accumulate(leaf: Tensor, g: Any) -> None:
    """Give a complete gradient to whoever has claimed the leaf's, or else to `.grad`."""
    if g.dtype != leaf.dtype:
        g = g.astype(leaf.dtype)
    if leaf.hooks and leaf.hooks.get("claim"):
        leaf.hooks["claim"][-1](g)
    else:
        add_to_grad(leaf, g)


def add_to_grad(leaf: Tensor, g: Any) -> None:
    """Add a gradient of the leaf's dtype to its `.grad`, and run the hooks that wait for it."""
    if leaf.grad is None:
        leaf.grad = g if isinstance(g, Tensor) else Tensor(g)
    elif isinstance(g, Tensor) or leaf.grad.requires_grad:
        leaf.grad = leaf.grad + g
    else:
        leaf.grad.array += g
        written(leaf.grad.array)
    if leaf.hooks:
        for hook in list(leaf.hooks.get("accumulated", ())):
            hook(leaf)


# Checking gradients -----------------------------------------------------------------------


def gradcheck(
    function: Callable[..., Any],
    inputs: Tensor | Sequence[Tensor],
    *,
    eps: float = 1e-5,
    atol: float = 1e-8,
    rtol: float = 1e-5,
    order: int = 1,
    directions: int = 3,
    raise_exception: bool = True,
) -> bool:
    """Compare a function's gradients with finite differences along random directions.

    For y = f(x), any u shaped like y and v shaped like x:
    ``<grad of <u, f(x)>, v> = <u, (f(x + eps v) - f(x - eps v)) / (2 eps)>``. One such number
    tests all entries of a gradient at once, so it stays quick and strict on large inputs.

    Args:
        function: of Tensors, returns a Tensor; deterministic.
        inputs: float64 tensors; those that require gradients are checked.
        eps: length of the step; x must be a few of them away from any kink.
        atol, rtol: may differ by ``atol + rtol * sum |u (f(x + eps v) - f(x - eps v))| / 2eps``.
        order: 2 checks the gradient's own gradients as well, 3 theirs, ...
        directions: how many random directions to try for each input.
        raise_exception: False: return False where the check fails.

    Returns:
        True if every gradient is right.

    Raises:
        RuntimeError: a gradient is wrong: which input, what was expected, what came.
        TypeError: an input to be checked is not float64 (finite differences need the digits).
        ValueError: no input requires a gradient.
    """
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    checked = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.requires_grad]
    if not checked:
        raise ValueError("gradcheck: no input requires a gradient")
    for i in checked:
        if inputs[i].dtype != np.float64:
            raise TypeError(f"gradcheck needs float64, inputs[{i}] is {inputs[i].dtype}")
    rng = np.random.default_rng(0)

    def normal(shape: tuple[int, ...]) -> np.ndarray:
        return np.asarray(rng.standard_normal(shape))

    def leaves(moved: int | None = None, step: Any = 0.0) -> list[Any]:
        """The inputs as fresh leaves, one of them moved by a step."""
        xs = [Tensor(x.array, x.requires_grad) if isinstance(x, Tensor) else x for x in inputs]
        if moved is not None:
            xs[moved] = Tensor(xs[moved].array + step, requires_grad=True)
        return xs

    for i in checked * directions:
        xs = leaves()
        y = function(*xs)
        u, v = normal(y.shape), normal(xs[i].shape)
        change = function(*leaves(i, eps * v)).array - function(*leaves(i, -eps * v)).array
        terms = u * change / (2 * eps)
        (g,) = grad(y, xs[i], Tensor(u), allow_unused=True) if y.requires_grad else (None,)
        ours = 0.0 if g is None else float((g.array * v).sum())
        if not abs(ours - terms.sum()) <= atol + rtol * np.abs(terms).sum():  # NaN fails too
            if not raise_exception:
                return False
            raise RuntimeError(
                f"gradcheck: the gradient of inputs[{i}] along a random direction is {ours:.8g}, "
                f"finite differences give {terms.sum():.8g}"
            )
    if order == 1:
        return True

    # The gradient is a function like any other, of u and the inputs, and is checked like one:
    # its projection on random weights is a Tensor of one element.
    u = normal(y.shape)
    weights = [Tensor(normal(inputs[i].shape)) for i in checked]

    def gradient(u: Tensor, *xs: Any) -> Tensor:
        y = function(*xs)
        gs: Sequence[Any] = [None] * len(checked)
        if y.requires_grad:
            gs = grad(y, [xs[i] for i in checked], u, create_graph=True, allow_unused=True)
        parts = [(w * g).sum() for w, g in zip(weights, gs, strict=True) if g is not None]
        return sum(parts, start=Tensor(np.zeros(())))

    return gradcheck(
        gradient,
        [Tensor(u, requires_grad=True), *inputs],
        eps=eps,
        atol=atol,
        rtol=rtol,
        order=order - 1,
        directions=directions,
        raise_exception=raise_exception,
    )
