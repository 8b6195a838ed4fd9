"""What a network computes, as a list: every op that ran, in order, on which values.

    graph = trace(model, images)          # runs the model twice, in eval mode
    for step in graph.steps:
        print(step.layer, step.op, step.inputs, step.settings)
    graph(images)                         # the same result, without the model

A list can be looked through and rewritten, which a model's Python cannot: quantization replaces its
steps by integer ones, and export writes it as a file. What does not depend on the input is computed
once: of a batch norm remains a scale and a shift.

The batch size must not stay in the list, though reshapes name it. The model therefore runs on two
batches of different size: where a setting differs as they do, it is a multiple of the batch size;
if anything else differs, the model depends on its input in a way that a list cannot have.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

import minidl
from minidl.attack import deployed
from minidl.nn import Module
from minidl.op import Op, registry
from minidl.tensor import Tensor

__all__ = ["Graph", "PerSample", "Ref", "Step", "trace"]

FORMAT = 2  # of `Graph.to_dict`


class Ref(NamedTuple):
    """A value by its number: an input, a constant or a step's output."""

    number: int


class PerSample(NamedTuple):
    """A number of a setting that is so many times the batch size."""

    times: int


@dataclass(frozen=True)
class Step:
    """An op that ran.

    Attributes:
        op: its name in the registry.
        inputs: a `Ref` for each tensor or array; numbers and None as they are.
        settings: keyword arguments, with `PerSample` where a number depends on the batch size.
        output: which value it made.
        layer: dotted name of the innermost module that ran it.
        shape, dtype: of the output; shape[0] is `PerSample` where it is the batch size.
    """

    op: str
    inputs: tuple[Any, ...]
    settings: dict[str, Any]
    output: Ref
    layer: str
    shape: tuple[Any, ...]
    dtype: str

    def refs(self) -> Iterator[Ref]:
        """The values that it reads."""
        return (x for x in self.inputs if isinstance(x, Ref))

    @cached_property
    def varies(self) -> bool:
        """Whether a setting depends on the batch size."""
        found: list[Any] = []
        nested(self.settings, lambda x: found.append(x) if isinstance(x, PerSample) else None)
        return bool(found)

    @cached_property
    def resolved(self) -> dict[int, dict[str, Any]]:
        """The settings for the batch size that was last asked for."""
        return {}

    def settings_for(self, n: int) -> dict[str, Any]:
        """The settings, for a batch of n."""
        if not self.varies:
            return self.settings
        if n not in self.resolved:
            self.resolved.clear()
            self.resolved[n] = resolve(self.settings, n)
        return self.resolved[n]


@dataclass
class Graph:
    """Steps, and what they compute with. Call it with inputs as the model was.

    Attributes:
        steps: in the order in which they run.
        inputs: numbers of the inputs.
        output: `Ref`, or a tuple, list or dict of them, as the model returned.
        constants: values that do not depend on the inputs: parameters, and what is made of them.
        names: of constants that are the model's parameters and buffers.
        scales: of integers that stand for real numbers: the constant that says what one is worth.
    """

    steps: list[Step]
    inputs: list[Ref]
    output: Any
    constants: dict[Ref, Tensor]
    names: dict[Ref, str] = field(default_factory=dict)
    scales: dict[Ref, Ref] = field(default_factory=dict)
    last: tuple[Any, dict[int, list[Ref]]] = field(default=(None, {}), init=False, repr=False)

    def __call__(self, *inputs: Tensor) -> Any:
        return self.run(inputs)

    def run(
        self,
        inputs: Any,
        watch: Callable[[Step, list[Any], Any], Any] | None = None,
        constants: dict[Ref, Any] | None = None,
    ) -> Any:
        """Compute.

        Args:
            inputs: as the model takes them; any batch size.
            watch: called after each step with (step, its inputs, its output); what it returns, if
                it is not None, replaces the output.
            constants: in place of the graph's: weights in another form (packed).

        Raises:
            ValueError: another number of inputs than were traced.
        """
        if len(inputs) != len(self.inputs):
            raise ValueError(f"expected {len(self.inputs)} inputs, got {len(inputs)}")
        values: dict[Ref, Any] = {**(constants or self.constants), **dict(zip(self.inputs, inputs))}
        done = self.last_uses()
        n = len(inputs[0])
        for i, step in enumerate(self.steps):
            given = [values[x] if isinstance(x, Ref) else x for x in step.inputs]
            y = registry[step.op](*given, **step.settings_for(n))
            changed = None if watch is None else watch(step, given, y)
            values[step.output] = y if changed is None else changed
            for ref in done.get(i, ()):
                del values[ref]
        return nested(self.output, lambda x: values[x] if isinstance(x, Ref) else x)

    def last_uses(self) -> dict[int, list[Ref]]:
        """What can be forgotten after each step: found once, and again when the steps changed."""
        if self.last[0] == (self.steps, self.output):
            return self.last[1]
        last: dict[Ref, int] = {}
        for i, step in enumerate(self.steps):
            last[step.output] = i
            last.update((ref, i) for ref in step.refs() if ref not in self.constants)
        for ref in refs_in(self.output):
            last.pop(ref, None)
        done: dict[int, list[Ref]] = {}
        for ref, i in last.items():
            done.setdefault(i, []).append(ref)
        self.last = ([*self.steps], self.output), done
        return done

    def users(self, ref: Ref) -> list[Step]:
        """The steps that read a value; the model's output counts as one that is None."""
        found: list[Any] = [step for step in self.steps if ref in step.inputs]
        return found + [None] * (ref in refs_in(self.output))

    def new_ref(self) -> Ref:
        used = [*self.inputs, *self.constants, *(step.output for step in self.steps)]
        return Ref(1 + max(ref.number for ref in used))

    def constant(self, value: Tensor) -> Ref:
        """Add a constant."""
        ref = self.new_ref()
        self.constants[ref] = value
        return ref

    def to_dict(self) -> dict[str, Any]:
        """What `minidl.save` takes. The constants, many and most of them small, are joined into
        one tensor of each dtype."""
        steps = [
            {"op": s.op, "inputs": coded(s.inputs), "settings": coded(s.settings),
             "output": s.output.number, "layer": s.layer, "shape": coded(s.shape),
             "dtype": s.dtype}
            for s in self.steps
        ]  # fmt: skip
        listed: list[Any] = []
        parts: dict[str, list[Tensor]] = {}
        for ref, value in self.constants.items():
            listed.append([ref.number, value.dtype.name, list(value.shape)])
            parts.setdefault(value.dtype.name, []).append(value.detach().reshape(-1))
        return {
            "format": FORMAT,
            "steps": steps,
            "inputs": [ref.number for ref in self.inputs],
            "output": coded(self.output),
            "constants": listed,
            "scales": [[ref.number, scale.number] for ref, scale in self.scales.items()],
            "values": {dtype: minidl.cat(some) for dtype, some in parts.items()},
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Graph:
        """What `to_dict` gave.

        Raises:
            ValueError: another format; constants are missing; an op that this minidl does not have.
        """
        if content.get("format") != FORMAT:
            raise ValueError(
                f"a list of ops in format {content.get('format')}, where this minidl reads "
                f"{FORMAT}: make the file anew from its float network"
            )
        constants, used = {}, dict.fromkeys(content["values"], 0)
        for number, dtype, shape in content["constants"]:
            start, count = used.get(dtype, 0), math.prod(shape)
            found = content["values"].get(dtype, ())[start : start + count]
            if len(found) != count:
                raise ValueError(f"constant {number}, {dtype} of shape {tuple(shape)}, is missing")
            constants[Ref(number)] = Tensor(found.array.reshape(shape).copy())
            used[dtype] = start + count
        steps = []
        for s in content["steps"]:
            if s["op"] not in registry:
                raise ValueError(f"this minidl has no op {s['op']!r}")
            given, settings, shape = (decoded(s[k]) for k in ("inputs", "settings", "shape"))
            steps.append(
                Step(s["op"], given, settings, Ref(s["output"]), s["layer"], shape, s["dtype"])
            )
        inputs = [Ref(n) for n in content["inputs"]]
        scales = {Ref(n): Ref(scale) for n, scale in content["scales"]}
        return cls(steps, inputs, decoded(content["output"]), constants, scales=scales)

    def copy(self) -> Graph:
        return replace(
            self, steps=[*self.steps], constants={**self.constants}, names={**self.names},
            scales={**self.scales},
        )  # fmt: skip


def trace(model: Module, *inputs: Tensor) -> Graph:
    """Run a model, in eval mode, and write down what it computes.

    Args:
        inputs: as it takes them, batches: their first dimension is the batch size, at least 1.

    Raises:
        ValueError: no inputs, or without a batch dimension.
        RuntimeError: what it computes depends on its input (an `if`, a loop as long as a sentence)
            or on more than ops on tensors.
    """
    if not inputs or any(x.ndim == 0 or len(x) != len(inputs[0]) or not len(x) for x in inputs):
        raise ValueError(
            f"trace needs batches of equal size, got shapes {[tuple(x.shape) for x in inputs]}"
        )
    more = [minidl.cat([x, x[:1]]).detach() for x in inputs]
    one, two = Recorder(model).record(inputs), Recorder(model).record(more)
    sizes = len(inputs[0]), len(more[0])

    def why(what: str) -> RuntimeError:
        return RuntimeError(f"{type(model).__name__} cannot be traced: {what}")

    if [step.op for step in one.steps] != [step.op for step in two.steps]:
        raise why("it computes something else for another batch")
    steps = []
    for a, b in zip(one.steps, two.steps):
        one_, two_ = ((s.settings, s.inputs, s.shape) for s in (a, b))
        try:
            settings, given, shape = merged(one_, two_, sizes)
        except ValueError as error:
            raise why(f"{error}, in op {a.op} of layer {a.layer!r}") from None
        steps.append(replace(a, settings=settings, inputs=given, shape=shape))
    graph = replace(one, steps=steps)
    for ref, value in [*graph.constants.items()]:
        ours, other = value.numpy(), two.constants[ref].numpy()
        if np.array_equal(ours, other, equal_nan=True):
            continue
        once = repeated(ours, other, sizes)
        if once is None:
            raise why(
                f"a constant of shape {ours.shape} depends on the input: it was computed outside "
                "minidl's ops, or it is random"
            )
        given, shape = graph.constant(once.to(value.device)), merged(ours.shape, other.shape, sizes)
        del graph.constants[ref]
        first = Step("expand", (given,), {"shape": shape}, ref, "", shape, ours.dtype.name)
        steps.insert(0, first)
    if not any(ref in {step.output for step in steps} for ref in refs_in(graph.output)):
        raise why("its output does not come from ops on its input")
    return graph


class Recorder:
    """Notes the ops of one run."""

    def __init__(self, model: Module) -> None:
        self.model = model
        self.graph = Graph([], [], None, {})
        self.refs: dict[int, Ref] = {}  # id of an array -> its value
        self.kept: list[Any] = []  # so that no id is used twice
        self.live: set[Ref] = set()  # what depends on the inputs
        self.count = 0
        self.where = [""]
        named = [*model.named_parameters(), *model.named_buffers()]
        self.names = {id(tensor.array): name for name, tensor in named}

    def ref(self, tensor: Tensor) -> Ref:
        """The value's number; of a tensor that no op made: a new constant's."""
        found = self.refs.get(id(tensor.array))
        if found is None:
            found = self.number(tensor)
            self.graph.constants[found] = tensor.detach()
            if id(tensor.array) in self.names:
                self.graph.names[found] = self.names[id(tensor.array)]
        return found

    def number(self, tensor: Tensor) -> Ref:
        ref = self.refs[id(tensor.array)] = Ref(self.count)
        self.kept.append(tensor.array)
        self.count += 1
        return ref

    def note(self, op: Op, inputs: tuple[Any, ...], settings: dict[str, Any], y: Tensor) -> None:
        given = tuple(
            self.ref(Tensor(x)) if isinstance(x, Tensor) or (hasattr(x, "ndim") and x.ndim) else x
            for x in inputs
        )
        out = self.number(y)
        if self.live.isdisjoint(x for x in given if isinstance(x, Ref)):
            self.graph.constants[out] = y.detach()
            return
        self.live.add(out)
        self.graph.steps.append(
            Step(op.name, given, {**op.defaults, **settings}, out, self.where[-1], y.shape,
                 y.dtype.name)
        )  # fmt: skip

    def leave(self, module: Module, args: Any, out: Any) -> None:
        self.where.pop()

    def record(self, inputs: Any) -> Graph:
        self.graph.inputs = [self.number(x) for x in inputs]
        self.live.update(self.graph.inputs)
        hooks = []
        for name, module in self.model.named_modules():
            enter: Any = lambda module, args, name=name: self.where.append(name)  # noqa: E731
            hooks.append(module.register_forward_pre_hook(enter))
            hooks.append(module.register_forward_hook(self.leave))
        ops: Any = importlib.import_module("minidl.op")  # the name `op` in minidl is the decorator
        before, ops.on_call = ops.on_call, self.note
        try:
            with minidl.no_grad(), deployed(self.model):
                out = self.model(*inputs)
        finally:
            ops.on_call = before
            for hook in hooks:
                hook.remove()
        self.graph.output = nested(out, lambda x: self.ref(x) if isinstance(x, Tensor) else x)
        used = set(refs_in(self.graph.output)).union(*(step.refs() for step in self.graph.steps))
        self.graph.constants = {r: v for r, v in self.graph.constants.items() if r in used}
        self.graph.names = {r: name for r, name in self.graph.names.items() if r in used}
        return self.graph


def repeated(a: np.ndarray, b: np.ndarray, sizes: tuple[int, int]) -> Tensor | None:
    """What a constant has for each sample alike, of length 1 in place of the batch size; or None.

    So are the zeros from which a recurrent layer starts.
    """
    differ = [d for d, (n, m) in enumerate(zip(a.shape, b.shape)) if n != m]
    if a.ndim != b.ndim or [(a.shape[d], b.shape[d]) for d in differ] != [sizes]:
        return None
    once = a.take([0], differ[0])
    alike = all(np.array_equal(x, np.broadcast_to(once, x.shape), equal_nan=True) for x in (a, b))
    return Tensor(once) if alike else None


def merged(a: Any, b: Any, sizes: tuple[int, int]) -> Any:
    """What two runs had; `PerSample` where numbers differ as the batch sizes do."""
    if type(a) is type(b) and isinstance(a, int) and a != b:
        if a % sizes[0] == 0 and b % sizes[1] == 0 and a // sizes[0] == b // sizes[1]:
            return PerSample(a // sizes[0])
        raise ValueError(f"{a} and {b} for batches of {sizes[0]} and {sizes[1]}")
    if type(a) is not type(b) or (isinstance(a, Ref) and a != b):
        raise ValueError(f"{a!r} and {b!r} for batches of {sizes[0]} and {sizes[1]}")
    if isinstance(a, slice):
        return slice(*merged((a.start, a.stop, a.step), (b.start, b.stop, b.step), sizes))
    if isinstance(a, dict) and a.keys() == b.keys():
        return {key: merged(a[key], b[key], sizes) for key in a}
    if type(a) in (tuple, list) and len(a) == len(b):
        return type(a)(merged(x, y, sizes) for x, y in zip(a, b))
    if isinstance(a, np.ndarray) and np.array_equal(a, b):
        return a
    if a is b is Ellipsis:
        return a
    if isinstance(a, float | str | bool | int | Ref | np.generic | None) and a == b:
        return a
    a, b = (f"an array of shape {x.shape}" if hasattr(x, "shape") else repr(x) for x in (a, b))
    raise ValueError(f"{a} and {b}")


def resolve(setting: Any, n: int) -> Any:
    """A setting for a batch of n."""
    return nested(setting, lambda x: x.times * n if isinstance(x, PerSample) else x)


def nested(x: Any, change: Callable[[Any], Any]) -> Any:
    """x with its leaves changed: dicts, lists, plain tuples and slices are gone through."""
    if isinstance(x, dict):
        return {key: nested(value, change) for key, value in x.items()}
    if type(x) in (tuple, list):
        return type(x)(nested(value, change) for value in x)
    if isinstance(x, slice):
        return slice(*(nested(v, change) for v in (x.start, x.stop, x.step)))
    return change(x)


def refs_in(x: Any) -> list[Ref]:
    found: list[Ref] = []
    nested(x, lambda leaf: found.append(leaf) if isinstance(leaf, Ref) else None)
    return found


def coded(x: Any) -> Any:
    """With plain values in place of `Ref`, `PerSample`, slices and ..., which no file has."""
    if x is Ellipsis:
        return {"dots": None}
    if isinstance(x, slice):
        return {"slice": coded((x.start, x.stop, x.step))}
    if isinstance(x, Ref | PerSample):
        return {type(x).__name__: x[0]}
    if isinstance(x, dict):
        return {"dict": {key: coded(value) for key, value in x.items()}}
    return type(x)(coded(v) for v in x) if type(x) in (tuple, list) else x


def decoded(x: Any) -> Any:
    if isinstance(x, dict):
        ((kind, value),) = x.items()
        if kind == "dict":
            return {key: decoded(v) for key, v in value.items()}
        if kind == "dots":
            return Ellipsis
        if kind == "slice":
            return slice(*decoded(value))
        return {"Ref": Ref, "PerSample": PerSample}[kind](value)
    return type(x)(decoded(v) for v in x) if type(x) in (tuple, list) else x
