"""An op is a pair: a formula, and the rule for its gradient.

    @op
    def mul(x, y):
        return x * y

    @mul.gradient
    def _(g, x, y):
        return lambda: g * y, lambda: g * x

Called with bare arrays an op *is* its formula. Called with any Tensor it computes the same
thing on the arrays inside and, where a gradient is wanted, leaves a `Node` on the tape.

The rule is written once and runs in two ways: on bare arrays during an ordinary backward pass,
and on Tensors under ``create_graph=True``, where it is recorded and can itself be differentiated.
It sees only what its signature names: ``g`` (the gradient of the output), ``out``, the formula's
inputs (or only their ``x_shape``, ``x_dtype``, ``x_device``) and all of its keyword arguments.
What it does not name, the tape does not keep: ``add`` needs only ``g``, so no array stays alive
for its sake.

A rule returns one entry per input: an array, ``None`` (no gradient), or a thunk that is called
only if that input wants its gradient. A rule of one input is only called if its gradient is
wanted, so it needs no thunk. Undoing a broadcast is not its business: the backward walk does
that, in one place.

A *kernel* is an override with the formula's signature, for one device and some dtypes:

    @conv2d.kernel("native", device="cpu", dtypes=("float32",))
    def _(x, w, *, stride, padding, dilation, groups): ...

``minidl.use("conv2d", "loops")`` picks among them inside a running program. A *gradient kernel*
overrides the rule in the same way where it runs on bare arrays; it comes and goes with the kernel
of its name. Under ``create_graph=True`` it is always the rule that runs.

    @lstm.gradient_kernel("native", device="cpu", dtypes=("float32",))
    def _(g, out, x, ...): ...
"""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, overload

import numpy as np

from minidl import backend
from minidl.autograd import Node, mode, tick
from minidl.tensor import Tensor, float32, float64

Formula = Callable[..., Any]


class Sample(NamedTuple):
    """One call of an op: what the tests derive everything from."""

    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]


def sample(*inputs: Any, **kwargs: Any) -> Sample:
    """The call ``op(*inputs, **kwargs)``; inputs to be differentiated are float64 arrays."""
    return Sample(inputs, kwargs)


@dataclass(frozen=True)
class Kernel:
    """An implementation of an op's formula, or of its gradient rule.

    Attributes:
        name: what `use` calls it.
        device: "cpu" or "cuda".
        function: has the formula's (or the rule's) signature.
        dtypes: dtypes of the first input (or of g) that it takes; None: all.
        missing: None, or why it cannot run here.
        default: whether it runs when nobody chose.
    """

    name: str
    device: str
    function: Formula
    dtypes: tuple[str, ...] | None
    missing: str | None
    default: bool


OUT = -1  # "the output", where an input would have its position

# What a rule can ask of an input without keeping it alive: x_shape, x_dtype, x_device.
FACTS: dict[str, Callable[[Any], Any]] = {
    "shape": np.shape,
    "dtype": lambda x: x.dtype,
    "device": backend.device_name,
}


@dataclass(eq=False)
class Op:
    """What is known of an op. (The op itself is the function that `op` returns.)"""

    name: str
    formula: Formula
    constant: bool
    defaults: dict[str, Any]
    rule: Formula | None = None
    sources: list[int | None] | None = None  # what the tape keeps, by position; None: all inputs
    draw_samples: Callable[[np.random.Generator], Iterator[Sample]] | None = None
    kernels: list[Kernel] = field(default_factory=list)  # the last one is preferred
    gradient_kernels: list[Kernel] = field(default_factory=list)
    chosen: dict[str, str] = field(default_factory=dict)  # device -> name, set by `use`
    table: dict[Any, Formula] = field(default_factory=dict)  # what runs, by array type and dtype

    def select(self, device: str, dtype: str) -> tuple[str, Formula, str]:
        """Which implementation runs for a device and a dtype: its name, itself, and why."""
        wanted = self.chosen.get(device)
        if wanted == "formula":
            return wanted, self.formula, "chosen by minidl.use"
        reason = f"no kernel for {device}"
        for kernel in reversed(self.kernels):
            if kernel.device != device or (kernel.name != wanted if wanted else not kernel.default):
                continue
            if kernel.missing:
                reason = kernel.missing
            elif kernel.dtypes and dtype not in kernel.dtypes:
                reason = f"{kernel.name!r} takes {', '.join(kernel.dtypes)}, not {dtype}"
            else:
                return kernel.name, kernel.function, "chosen by minidl.use" if wanted else "fastest"
        return "formula", self.formula, reason

    def implementation(self, array: Any) -> Formula:
        """The function to run for an array, decided once per array type and dtype."""
        device, dtype = backend.device_type(array), array.dtype.name
        name, function, reason = self.select(device, dtype)
        if name != self.chosen.get(device, name):
            warnings.warn(f"{self.name}: the formula runs, since {reason}", stacklevel=4)
        self.table[type(array), array.dtype] = function
        return function

    def array_rule(self, g: Any) -> Formula:
        """The gradient rule to run for an array, or the kernel in its place; decided once."""
        key = type(g), g.dtype, "gradient"
        if key not in self.table:
            device, dtype = backend.device_type(g), g.dtype.name
            kernel = self.gradient_kernel(device, dtype, self.select(device, dtype)[0])
            self.table[key] = kernel.function if kernel else self.rule  # type: ignore[assignment]
        return self.table[key]

    def gradient_kernel(self, device: str, dtype: str, name: str) -> Kernel | None:
        """The gradient kernel that goes with the implementation `name`, if there is one."""
        for kernel in self.gradient_kernels:
            if (kernel.name, kernel.device) == (name, device) and (
                not kernel.dtypes or dtype in kernel.dtypes
            ):
                return kernel
        return None

    def at_home(self, out: Any, arrays: list[Any]) -> Any:
        """A result on a GPU, unless CuPy made it on another one than where the inputs are."""
        for a in arrays:
            if type(a) is type(out) and a.device != out.device and self.name != "to_device":
                raise RuntimeError(
                    f"{self.name} of a tensor on {backend.device_name(a)} ran on "
                    f"{backend.device_name(out)}, the current GPU: compute inside "
                    f'`with minidl.device("{backend.device_name(a)}"):`'
                )
        return out

    def arguments(self, node: Node) -> list[Any]:
        """What a node saved, as Tensors on the tape: the rule called with them is recorded."""
        sources = range(len(node.edges)) if self.sources is None else self.sources
        arguments = []
        for value, source in zip(node.saved, sources, strict=True):
            edge = None if source is None else node if source == OUT else node.edges[source]
            if isinstance(edge, Node):
                value = Tensor.on_tape(value, edge)
            elif edge is not None:
                if edge.array is not value:
                    raise RuntimeError(
                        f"a leaf of shape {edge.shape} got another array (x.data = ...) after "
                        f"{self.name!r} used it: the gradient of a gradient needs the first one"
                    )
                value = edge
            arguments.append(value)
        return arguments


class OpFunction(Protocol):
    """What `op` returns: the op as a function, with the decorators that complete it."""

    op: Op
    __name__: str

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any: ...

    def gradient(self, rule: Formula) -> Formula: ...

    def samples(self, draw: Callable[[np.random.Generator], Iterator[Sample]]) -> Any: ...

    def kernel(
        self,
        name: str,
        *,
        device: str = "cpu",
        dtypes: tuple[str, ...] | None = None,
        missing: str | None = None,
        default: bool = True,
    ) -> Callable[[Formula], Formula]: ...

    def gradient_kernel(
        self,
        name: str,
        *,
        device: str = "cpu",
        dtypes: tuple[str, ...] | None = None,
        missing: str | None = None,
    ) -> Callable[[Formula], Formula]: ...


registry: dict[str, OpFunction] = {}

# Called with each op and its inputs before it runs, when set: returns the inputs (`amp` casts).
before_call: Callable[[Op, tuple[Any, ...]], tuple[Any, ...]] | None = None
# Called with each new node when set; `explain` uses it to note the user's source line.
on_record: Callable[[Node], None] | None = None
# Called with each op on Tensors that ran, when set: the op, its inputs, its settings, the result.
on_call: Callable[[Op, tuple[Any, ...], dict[str, Any], Tensor], None] | None = None


@overload
def op(formula: Formula) -> OpFunction: ...
@overload
def op(*, constant: bool) -> Callable[[Formula], OpFunction]: ...
def op(formula: Formula | None = None, *, constant: bool = False) -> Any:
    """Make an op of a formula, and register it under the formula's name.

    Args:
        formula: its positional parameters are the inputs, its keyword-only ones the settings.
        constant: the result is never differentiated (comparisons, argmax, ...).
    """
    if formula is None:
        return lambda f: make_op(f, constant)
    return make_op(formula, constant)


def make_op(formula: Formula, constant: bool) -> OpFunction:
    parameters = inspect.signature(formula).parameters.values()
    inputs_ = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    settings = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    defaults = {name: value for name, value in settings.items() if value is not inspect._empty}
    name = formula.__name__.rstrip("_")
    if name in registry:
        raise ValueError(f"two ops are called {name!r}: give one of them another name")
    this = Op(name, formula, constant, defaults)

    # `call` is the hottest code of the library, hence: local names, no helper functions, and
    # Tensors and Nodes filled in place of a constructor call.
    new, table, kernels = object.__new__, this.table, this.kernels
    ndarray, generic = np.ndarray, np.generic
    keeps_inputs = False
    picks: list[Callable[[Any, list[Any]], Any]] = []  # what the tape keeps of a call

    def call(*inputs: Any, **kwargs: Any) -> Any:
        if before_call is not None:
            inputs = before_call(this, inputs)
        arrays: list[Any] = []
        edges: list[Any] = []  # where the gradient of each input goes: a Node, a leaf, or None
        traced = wanted = scalars = False
        for x in inputs:
            if isinstance(x, Tensor):
                traced = True
                arrays.append(x.array)
                if x._requires_grad:
                    wanted = True
                    edges.append(x.node or x)
                    continue
            else:
                scalars = True
                arrays.append(x)
            edges.append(None)

        if traced:
            if scalars:  # np.float64(2) * float32 stays float32, as 2.0 * float32 does
                arrays = [a.item() if isinstance(a, generic) else a for a in arrays]
            kwargs = {**defaults, **kwargs} if kwargs else defaults
        function = formula
        if kernels:
            a = arrays[0]
            function = table.get((type(a), a.dtype)) or this.implementation(a)
        try:
            out = function(*arrays, **kwargs)
        except Exception as error:
            error.add_note(f"in op {this.name}({', '.join(map(describe, arrays))}) {kwargs or ''}")
            raise
        if not traced:
            return out

        if type(out) is not ndarray:
            out = np.asarray(out) if isinstance(out, generic) else this.at_home(out, arrays)
        if out.dtype is float64:  # as PyTorch: int64 * float32 and int64 / int64 are float32
            out = not_widened(out, arrays, kwargs)
        y = new(Tensor)
        y.array = out
        y.grad = y.hooks = None
        if wanted and mode.enabled and not constant:
            y._requires_grad = True
            y.node = node = new(Node)
            node.op = this
            node.edges = edges
            node.kwargs = kwargs
            node.shape = out.shape
            node.hooks = None
            node.number = tick()
            if keeps_inputs:
                node.saved = arrays
            else:
                node.saved = [pick(out, arrays) for pick in picks] if picks else ()
            if on_record is not None:
                on_record(node)
        else:
            y._requires_grad = False
            y.node = None
        if on_call is not None:
            on_call(this, inputs, kwargs, y)
        return y

    def gradient(rule: Formula) -> Formula:
        """Set the gradient rule; read off its signature what the tape has to keep."""
        nonlocal keeps_inputs
        if this.rule is not None:
            raise ValueError(f"op {name!r} has a gradient rule already")
        parameters = inspect.signature(rule).parameters.values()
        if {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} != set(settings):
            raise TypeError(f"the gradient rule of {name!r} must take the settings {set(settings)}")
        named = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
        if named[:1] != ["g"]:
            raise TypeError(f"the gradient rule of {name!r} must take g first, not {named[:1]}")
        this.rule = rule
        if named[1:] == inputs_:  # also the only way to name the inputs of f(*xs)
            keeps_inputs = True
            return rule
        this.sources = []
        for wanted in named[1:]:
            if wanted == "out":
                this.sources.append(OUT)
                picks.append(lambda out, arrays: out)
            elif wanted in inputs_:
                i = inputs_.index(wanted)
                this.sources.append(i)
                picks.append(lambda out, arrays, i=i: arrays[i])  # type: ignore[misc]
            elif wanted == "xs_shape":
                this.sources.append(None)
                picks.append(lambda out, arrays: [a.shape for a in arrays])
            elif (part := wanted.rpartition("_"))[2] in FACTS and part[0] in inputs_:
                this.sources.append(None)
                fact, i = FACTS[part[2]], inputs_.index(part[0])
                picks.append(lambda out, arrays, f=fact, i=i: f(arrays[i]))  # type: ignore[misc]
            else:
                raise TypeError(
                    f"the gradient rule of {name!r} names {wanted!r}: expected 'out', one of "
                    f"{inputs_}, or one of them followed by '_shape', '_dtype' or '_device'"
                )
        return rule

    def samples(draw: Callable[[np.random.Generator], Iterator[Sample]]) -> Any:
        this.draw_samples = draw
        return draw

    def kernel(
        kernel_name: str,
        *,
        device: str = "cpu",
        dtypes: tuple[str, ...] | None = None,
        missing: str | None = None,
        default: bool = True,
    ) -> Callable[[Formula], Formula]:
        def register(function: Formula) -> Formula:
            kernels.append(Kernel(kernel_name, device, function, dtypes, missing, default))
            table.clear()
            return function

        return register

    def gradient_kernel(
        kernel_name: str,
        *,
        device: str = "cpu",
        dtypes: tuple[str, ...] | None = None,
        missing: str | None = None,
    ) -> Callable[[Formula], Formula]:
        if not any((k.name, k.device) == (kernel_name, device) for k in kernels):
            raise ValueError(f"op {name!r} has no kernel {kernel_name!r} for {device} to go with")

        def register(function: Formula) -> Formula:
            this.gradient_kernels.append(
                Kernel(kernel_name, device, function, dtypes, missing, default=True)
            )
            table.clear()
            return function

        return register

    call.__name__ = call.__qualname__ = formula.__name__
    call.__module__ = formula.__module__
    call.__doc__ = formula.__doc__
    call.__signature__ = inspect.signature(formula)  # type: ignore[attr-defined]
    call.op, call.gradient, call.samples = this, gradient, samples  # type: ignore[attr-defined]
    call.kernel, call.gradient_kernel = kernel, gradient_kernel  # type: ignore[attr-defined]
    registry[name] = call  # type: ignore[assignment]
    return call  # type: ignore[return-value]


def not_widened(out: Any, arrays: list[Any], kwargs: dict[str, Any]) -> Any:
    """A float64 result in the inputs' own floating dtype, float32 if they have none."""
    floats = [a.dtype for a in arrays if hasattr(a, "dtype") and a.dtype.kind == "f"]
    if "dtype" in kwargs:  # asked for
        return out
    return out.astype(np.result_type(*floats) if floats else float32, copy=False)


def describe(x: Any) -> str:
    """Short text for an argument: "float32(3, 4)"."""
    return f"{x.dtype}{x.shape}" if hasattr(x, "shape") else repr(x)


class use:
    """Choose the implementation of an op: for good, or inside a ``with`` block.

        minidl.use("conv2d", "loops")          # from now on
        with minidl.use("conv2d", "im2col"):   # only here
            ...

    Args:
        name: the op.
        implementation: a kernel's name (`minidl.kernels` lists them), "formula" for the plain
            formula, or None for the default.

    Raises:
        ValueError: there is no such op or implementation, or it cannot run here.
    """

    def __init__(self, name: str, implementation: str | None) -> None:
        if name not in registry:
            close = difflib.get_close_matches(name, registry)
            hint = f"; did you mean {close}?" if close else ""
            raise ValueError(f"no op is called {name!r}{hint}")
        self.op = registry[name].op
        self.before = dict(self.op.chosen)
        named = [k for k in self.op.kernels if k.name == implementation]
        if implementation not in (None, "formula") and not named:
            names = ["formula", *(k.name for k in self.op.kernels)]
            raise ValueError(f"{name} has no implementation {implementation!r}; it has {names}")
        if named and all(k.missing for k in named):
            raise ValueError(f"{name}: {implementation!r} cannot run here: {named[0].missing}")
        devices = {k.device for k in named} or {"cpu", "cuda"}
        if implementation is None:
            self.op.chosen.clear()
        else:
            self.op.chosen.update(dict.fromkeys(devices, implementation))
        self.op.table.clear()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.op.chosen.clear()
        self.op.chosen.update(self.before)
        self.op.table.clear()


def kernels() -> Table:
    """Which implementations each op has, which runs, and why; prints as a table."""
    rows = []
    for name, function in sorted(registry.items()):
        for device in sorted({k.device for k in function.op.kernels}):
            names = [k.name for k in function.op.kernels if k.device == device]
            for dtype in ("float32", "float64"):
                used, _, reason = function.op.select(device, dtype)
                if function.op.gradient_kernel(device, dtype, used):
                    reason += ", gradient too"
                rows.append((name, device, dtype, " ".join(["formula", *names]), used, reason))
    return Table(rows)


class Table(list[tuple[str, ...]]):
    """Rows that print as an aligned table."""

    header = ("op", "device", "dtype", "implementations", "in use", "why")

    def __repr__(self) -> str:
        rows = [self.header, *self]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self.header))]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )
