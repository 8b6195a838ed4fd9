"""A network as an ONNX file.

    minidl.onnx.export(model, images, "m.onnx")
    onnxruntime.InferenceSession("m.onnx").run(None, {"input": images.numpy()})

`minidl.trace` writes down which ops the model runs in eval mode, and a rule below writes each as
one node of ONNX or as a few. Parameters keep their names, and the size of the batch stays open.

What `quantize` made is a list of ops on integers. Each is written as the op on real numbers that
it stands for, between a DequantizeLinear for each input and a QuantizeLinear for the output: the
form ("QDQ") that ONNX Runtime and others look for, to compute what lies between on integers again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from minidl import nn
from minidl.quantization.static import Quantized
from minidl.serialization import atomic_path
from minidl.tensor import Tensor
from minidl.trace import Graph, PerSample, Ref, Step, trace

OPSET = 18  # of December 2022
FAR = 2**63 - 1  # "to the end", for Slice

Rule = Callable[..., str]  # (writer, step, names of the step's inputs) -> name of its output
RULES: dict[str, Rule] = {}  # of ops on real numbers, by their name
REALS: dict[str, Rule] = {}  # of ops on integers: (writer, step) -> name of the real output


def rule(*ops: str, table: dict[str, Rule] = RULES) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        table.update(dict.fromkeys(ops, function))
        return function

    return register


def library() -> Any:
    """The package `onnx`.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise ImportError("ONNX files need the package onnx: pip install onnx") from None
    return onnx


def export(
    model: nn.Module,
    args: Tensor | tuple[Tensor, ...],
    f: str | os.PathLike[str],
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> None:
    """Write a model as an ONNX file, for any batch size.

    Args:
        model: float, or what `quantization.quantize` made; it is run in eval mode.
        args: a batch of inputs as the model takes them; several as a tuple.
        f: the file.
        input_names: by default "input", or "input0", "input1", ...
        output_names: by default "output", or "output0", "output1", ..., or a dict's keys.

    Raises:
        ImportError: the package onnx is not installed.
        RuntimeError: the model cannot be traced (see `minidl.trace`).
        ValueError: an op that cannot be written: says in which layer, and what to do; not as many
            names as inputs or outputs.
    """
    inputs = args if isinstance(args, tuple) else (args,)
    if isinstance(model, Quantized):
        graph = replace(model.graph, constants=model.constants())
    else:
        graph = trace(model, *inputs)
    content = Writer(model, graph, inputs).write(input_names, output_names)
    library().checker.check_model(content, full_check=True)
    with atomic_path(Path(f)) as part:
        part.write_bytes(content.SerializeToString())


class Writer:
    """Makes nodes of steps.

    Attributes:
        names: of the values that were written.
        shapes, dtypes: of all values; the batch size is `PerSample(1)`.
        zeros: of values that are integers: the zero point.
        states: of an LSTM's output, whose parts only are written: that of all steps, and the last.
        where: the layer that is being written.
    """

    def __init__(self, model: nn.Module, graph: Graph, inputs: Sequence[Tensor]) -> None:
        if len(inputs) != len(graph.inputs):
            raise ValueError(f"the model takes {len(graph.inputs)} inputs, got {len(inputs)}")
        self.onnx, self.model, self.graph, self.inputs = library(), model, graph, inputs
        self.modules = dict(model.named_modules())
        self.parameters = {name for name, _ in model.named_parameters()}
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}
        self.names: dict[Ref, str] = {}
        self.reals: dict[Ref, str] = {}
        self.zeros: dict[Ref, Ref] = {}
        self.states: dict[Ref, tuple[str, str]] = {}
        self.taken: dict[str, int] = {}
        self.where = ""
        self.shapes: dict[Any, tuple[Any, ...]] = {
            **{ref: (PerSample(1), *x.shape[1:]) for ref, x in zip(graph.inputs, inputs)},
            **{ref: x.shape for ref, x in graph.constants.items()},
            **{step.output: step.shape for step in graph.steps},
        }
        self.dtypes: dict[Any, np.dtype] = {
            **{ref: x.dtype for ref, x in zip(graph.inputs, inputs)},
            **{ref: x.dtype for ref, x in graph.constants.items()},
            **{step.output: np.dtype(step.dtype) for step in graph.steps},
        }

    # What the rules write with

    def free(self, name: str) -> str:
        """A name that is not taken: this one, with a number if it must be."""
        count = self.taken[name] = self.taken.get(name, -1) + 1
        return self.free(f"{name}_{count}") if count else name

    def node(self, op: str, *inputs: str, more: Sequence[str] = (), **attributes: Any) -> str:
        """Write a node; returns the name of its output, the first if there are more."""
        name = self.free(f"{self.where}.{op}".lstrip("."))
        while inputs and not inputs[-1]:  # optional, and absent
            inputs = inputs[:-1]
        made = self.onnx.helper.make_node(op, inputs, [name, *more], name, **attributes)
        self.nodes.append(made)
        return name

    def constant(self, value: Any, dtype: Any = None, parameter: str = "") -> str:
        """Write a number, a list or an array; a parameter, which has a name, as an initializer."""
        if parameter in self.initializers:
            return parameter
        name = self.free(parameter or f"{self.where}.constant".lstrip("."))
        tensor = self.onnx.numpy_helper.from_array(np.array(value, dtype, order="C"), name)
        if parameter:
            self.initializers[name] = tensor
        else:
            self.nodes.append(self.onnx.helper.make_node("Constant", [], [name], value=tensor))
        return name

    def ints(self, values: Any) -> str:
        return self.constant(list(values), np.int64)

    def array(self, ref: Ref) -> np.ndarray:
        """A constant."""
        return self.graph.constants[ref].numpy()

    def name(self, x: Any, dtype: Any = None) -> str:
        """The name of a step's input: of a value, of a number (of this dtype) or, "", of None."""
        if not isinstance(x, Ref):
            return "" if x is None else self.constant(x, dtype)
        if x not in self.names:
            known = self.graph.names.get(x, "")
            parameter = known if known in self.parameters else ""
            self.names[x] = self.constant(self.array(x), parameter=parameter)
        return self.names[x]

    def alike(self, step: Step, dtype: Any = None) -> list[str]:
        """The names of a step's inputs, cast to one type: that in which they are computed with."""
        given = step.inputs
        kinds = [np.dtype(np.float32) if x in self.zeros else self.dtypes.get(x, x) for x in given]
        dtype = np.dtype(dtype or np.result_type(*kinds))
        if dtype == np.float64 and dtype not in kinds:
            dtype = np.dtype(np.float32)  # as PyTorch, of int64 and float32
        names = [self.real(x) if x in self.zeros else self.name(x, dtype) for x in given]
        return [
            self.node("Cast", name, to=self.kind(dtype))
            if x in self.dtypes and kind != dtype
            else name
            for name, x, kind in zip(names, given, kinds)
        ]

    def kind(self, dtype: Any) -> int:
        return int(self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def refuse(self, step: Step, why: str) -> ValueError:
        return ValueError(
            f"op {step.op} in layer {step.layer or 'the model itself'!r} cannot be written in ONNX "
            f"here: {why}. Export the part of the model without it, or write a rule for it in "
            "minidl.onnx.export.RULES"
        )

    # Steps

    def step(self, step: Step) -> str:
        """Write a step; returns the name of its output."""
        op, scales = step.op, self.graph.scales
        if op not in RULES and op not in REALS:
            raise self.refuse(step, "there is no rule for it")
        if step.output not in scales and scales.keys().isdisjoint(step.refs()):
            return RULES[op](
                self, step, *(self.name(x, self.dtypes[step.output]) for x in step.inputs)
            )
        if op in REALS:
            y = REALS[op](self, step)
        else:
            y = RULES[op](self, step, *map(self.real, step.inputs))
        if step.output not in scales:
            return y
        zero = step.inputs[ZERO_POINT[op]] if op in ZERO_POINT else self.zeros[step.inputs[0]]
        self.zeros[step.output] = zero
        return self.node("QuantizeLinear", y, self.name(scales[step.output]), self.name(zero))

    def real(self, x: Any) -> str:
        """The name of what a value stands for: of integers the real numbers, else itself."""
        if x not in self.zeros:
            return self.name(x)
        if x not in self.reals:
            qparams = self.name(self.graph.scales[x]), self.name(self.zeros[x])
            self.reals[x] = self.node("DequantizeLinear", self.names[x], *qparams)
        return self.reals[x]

    # The whole

    def write(self, input_names: Any, output_names: Any) -> Any:
        """The ModelProto."""
        found = dict(results(self.graph.output, "output"))
        names = checked("input_names", input_names, [
            "input" if len(self.inputs) == 1 else f"input{i}" for i in range(len(self.inputs))
        ])  # fmt: skip
        outputs = dict(zip(checked("output_names", output_names, list(found)), found.values()))
        self.taken = dict.fromkeys([*names, *outputs], 0)
        self.names = dict(zip(self.graph.inputs, names))
        for step in self.graph.steps:
            self.where = step.layer
            self.names[step.output] = self.step(step)
        self.where = ""
        self.name_outputs(outputs)
        make = self.onnx.helper

        def described(name: str, ref: Ref) -> Any:
            shape = ["batch" if n == PerSample(1) else None if isinstance(n, PerSample) else n
                     for n in self.shapes[ref]]  # fmt: skip
            return make.make_tensor_value_info(name, self.kind(self.dtypes[ref]), shape)

        nodes = self.used(outputs)
        graph = make.make_graph(
            nodes, type(self.model).__name__,
            [described(name, ref) for name, ref in zip(names, self.graph.inputs)],
            [described(name, ref) for name, ref in outputs.items()],
            list(self.initializers.values()),
        )  # fmt: skip
        opset = [make.make_opsetid("", OPSET)]
        version = make.find_min_ir_version_for(opset)
        return make.make_model(
            graph, opset_imports=opset, ir_version=version, producer_name="minidl"
        )

    def name_outputs(self, outputs: dict[str, Ref]) -> None:
        """Give the model's outputs their names."""
        renamed: dict[str, str] = {}
        made = {node.output[0] for node in self.nodes if node.op_type != "Constant"}
        for name, ref in outputs.items():
            before = self.name(ref)
            if before in made and before not in renamed:
                renamed[before] = name
            else:  # an input, a constant, or an output already
                source = renamed.get(before, before)
                self.nodes.append(self.onnx.helper.make_node("Identity", [source], [name]))
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = [renamed.get(name, name) for name in names]

    def used(self, outputs: Any) -> list[Any]:
        """The nodes on which the outputs depend; of the initializers too only these are kept."""
        wanted, kept = set(outputs), []
        for node in reversed(self.nodes):
            if not wanted.isdisjoint(node.output):
                wanted.update(node.input)
                kept.append(node)
        self.initializers = {k: v for k, v in self.initializers.items() if k in wanted}
        return kept[::-1]


def results(output: Any, name: str) -> list[tuple[str, Ref]]:
    """The tensors of a model's output, with names."""
    if isinstance(output, Ref):
        return [(name, output)]
    if isinstance(output, dict):
        return [pair for key, value in output.items() for pair in results(value, str(key))]
    if isinstance(output, tuple | list):
        return [pair for i, value in enumerate(output) for pair in results(value, f"{name}{i}")]
    return []  # a number


def checked(what: str, given: Sequence[str] | None, default: list[str]) -> list[str]:
    if given is not None and (len(given) != len(default) or len({*given}) != len(given)):
        raise ValueError(f"{what}: expected {len(default)} different names, got {list(given)}")
    return default if given is None else list(given)


# Rules ------------------------------------------------------------------------------------

SAME_NAME = {
    "neg": "Neg", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "abs": "Abs", "sin": "Sin",
    "cos": "Cos", "tanh": "Tanh", "sigmoid": "Sigmoid", "softplus": "Softplus", "relu": "Relu",
    "erf": "Erf", "sign": "Sign", "floor": "Floor", "ceil": "Ceil", "clone": "Identity",
    "to_device": "Identity", "isnan": "IsNaN", "isinf": "IsInf",
    "where": "Where", "matmul": "MatMul",
}  # fmt: skip
OF_ONE_TYPE = {
    "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "pow": "Pow", "maximum": "Max",
    "minimum": "Min", "eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater",
    "ge": "GreaterOrEqual",
}  # fmt: skip
LOGICAL = {"logical_not": "Not", "logical_and": "And", "logical_or": "Or", "logical_xor": "Xor"}


@rule(*SAME_NAME)
def _(w: Writer, step: Step, *xs: str) -> str:
    return w.node(SAME_NAME[step.op], *xs)


@rule(*OF_ONE_TYPE)
def _(w: Writer, step: Step, *xs: str) -> str:
    return w.node(OF_ONE_TYPE[step.op], *w.alike(step))


@rule(*LOGICAL)
def _(w: Writer, step: Step, *xs: str) -> str:
    return w.node(LOGICAL[step.op], *w.alike(step, bool))


@rule("ne")
def _(w: Writer, step: Step, *xs: str) -> str:
    return w.node("Not", w.node("Equal", *w.alike(step)))


@rule("log1p")
def _(w: Writer, step: Step, x: str) -> str:
    return w.node("Log", w.node("Add", x, w.constant(1, step.dtype)))


@rule("round")
def _(w: Writer, step: Step, x: str) -> str:
    if step.settings["decimals"]:
        raise w.refuse(step, "it rounds to decimals")
    return w.node("Round", x)  # halves to even, too


@rule("clamp")
def _(w: Writer, step: Step, x: str) -> str:
    bounds = (step.settings[key] for key in ("min", "max"))
    return w.node("Clip", x, *("" if b is None else w.constant(b, step.dtype) for b in bounds))


@rule("astype")
def _(w: Writer, step: Step, x: str) -> str:
    return w.node("Cast", x, to=w.kind(step.dtype))


# Products, and what follows them


@rule("conv2d", "conv2d_relu")
def _(w: Writer, step: Step, *xs: str) -> str:
    y = convolution(w, step, *xs)
    return w.node("Relu", y) if step.op == "conv2d_relu" else y


def convolution(w: Writer, step: Step, x: str, weight: str, bias: str) -> str:
    how = step.settings
    return w.node(
        "Conv", x, weight, bias, kernel_shape=w.shapes[step.inputs[1]][2:], strides=how["stride"],
        pads=how["padding"] * 2, dilations=how["dilation"], group=how["groups"],
    )  # fmt: skip


@rule("conv2d_input")
def _(w: Writer, step: Step, x: str, weight: str) -> str:
    """A transposed convolution."""
    how, kernel = step.settings, w.shapes[step.inputs[1]][2:]
    size = w.shapes[step.inputs[0]][2:]
    numbers = zip(size, kernel, how["stride"], how["padding"], how["dilation"], how["input_size"])
    more = [m - ((n - 1) * s - 2 * p + d * (k - 1) + 1) for n, k, s, p, d, m in numbers]
    return w.node(
        "ConvTranspose", x, weight, kernel_shape=kernel, strides=how["stride"],
        pads=how["padding"] * 2, dilations=how["dilation"], group=how["groups"],
        output_padding=more,
    )  # fmt: skip


@rule("linear")
def linear(w: Writer, step: Step, x: str, weight: str, bias: str) -> str:
    """x wᵀ + b."""
    if len(step.shape) == 2:
        return w.node("Gemm", x, weight, bias, transB=1)
    y = w.node("MatMul", x, w.node("Transpose", weight, perm=[1, 0]))
    return w.node("Add", y, bias) if bias else y


@rule("einsum")
def _(w: Writer, step: Step, *xs: str) -> str:
    return w.node("Einsum", *xs, equation=step.settings["equation"])


@rule("scale_shift")
def _(w: Writer, step: Step, x: str, scale: str, shift: str) -> str:
    """A batch norm with its statistics; else what the op does."""
    norm: Any = w.modules.get(step.layer)
    if type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d):
        count, dtype = norm.num_features, norm.running_var.dtype
        named = {
            "weight": norm.weight if norm.weight is not None else np.ones(count, dtype),
            "bias": norm.bias if norm.bias is not None else np.zeros(count, dtype),
            "running_mean": norm.running_mean,
            "running_var": norm.running_var,
        }
        given = [
            w.constant(v.numpy() if isinstance(v, Tensor) else v, parameter=f"{step.layer}.{name}")
            for name, v in named.items()
        ]
        return w.node("BatchNormalization", x, *given, epsilon=norm.eps)
    shape = w.ints([-1] + [1] * (len(step.shape) - 2))
    scale, shift = (w.node("Reshape", v, shape) for v in (scale, shift))
    return w.node("Add", w.node("Mul", x, scale), shift)


@rule("standardize")
def _(w: Writer, step: Step, x: str, weight: str, bias: str) -> str:
    """(x - μ) / √(σ² + ε) · weight + bias."""
    dims = w.ints(step.settings["dim"])
    away = w.node("Sub", x, w.node("ReduceMean", x, dims))
    var = w.node("ReduceMean", w.node("Mul", away, away), dims)
    y = w.node("Add", var, w.constant(step.settings["eps"], step.dtype))
    y = w.node("Div", away, w.node("Sqrt", y))
    y = w.node("Mul", y, weight) if weight else y
    return w.node("Add", y, bias) if bias else y


@rule("softmax", "log_softmax")
def _(w: Writer, step: Step, x: str) -> str:
    name = "Softmax" if step.op == "softmax" else "LogSoftmax"
    return w.node(name, x, axis=step.settings["dim"])


@rule("embedding")
def _(w: Writer, step: Step, weight: str, indices: str) -> str:
    return w.node("Gather", weight, indices, axis=0)


# Recurrent layers. ONNX has the gates in another order, and a dimension for directions.

GATES: dict[str, tuple[str, tuple[int, ...]]] = {
    "lstm": ("LSTM", (0, 3, 1, 2)),  # i, f, g, o as i, o, f, g
    "gru": ("GRU", (1, 0, 2)),  # r, z, n as z, r, n
    "rnn": ("RNN", (0,)),
}


@rule("rnn", "gru")
def _(w: Writer, step: Step, *xs: str) -> str:
    return recurrent(w, step)[0]


@rule("lstm")
def _(w: Writer, step: Step, *xs: str) -> str:
    """ONNX has only the last of the cell's states. So all hidden states (index 0), and both states
    after the last step (index :, -1), are written where they are read."""
    indices = [s.settings.get("index") if s else None for s in w.graph.users(step.output)]
    if any(i not in (0, (slice(None), -1)) for i in indices):
        raise w.refuse(step, "its cell states are read, of which ONNX has only the last")
    w.states[step.output] = recurrent(w, step)
    return w.states[step.output][0]


def recurrent(w: Writer, step: Step) -> tuple[str, str]:
    """All hidden states (T, N, H), and those after the last step: (1, N, H), of an LSTM with the
    cell's (2, N, H)."""
    op, order = GATES[step.op]
    x, *states, w_ih, w_hh, b_ih, b_hh, lengths = step.inputs
    if lengths is not None:
        raise w.refuse(step, "sequences of unequal length")
    hidden = w.shapes[w_hh][1]
    rows = np.concatenate([np.arange(hidden) + gate * hidden for gate in order])

    def by_gate(*names: str) -> str:
        parts = [w.node("Gather", name, w.ints(rows), axis=0) for name in names]
        whole = w.node("Concat", *parts, axis=0) if len(parts) > 1 else parts[0]
        return w.node("Unsqueeze", whole, w.ints([0]))

    def first(ref: Ref) -> str:
        """A state to start from; "": zeros."""
        made = next((s for s in w.graph.steps if s.output == ref), None)
        if made and made.op == "expand" and not w.array(made.inputs[0]).any():
            return ""
        return w.node("Unsqueeze", w.name(ref), w.ints([0]))

    bias = by_gate(w.name(b_ih), w.name(b_hh)) if b_ih is not None else ""
    how: dict[str, Any] = {"linear_before_reset": 1} if op == "GRU" else {}
    if op == "RNN":
        how["activations"] = [step.settings["nonlinearity"].capitalize()]
    ends = [w.free(f"{w.where}.{op}.{end}".lstrip(".")) for end in "hc"[: len(states)]]
    y = w.node(op, w.name(x), by_gate(w.name(w_ih)), by_gate(w.name(w_hh)), bias, "",
               *map(first, states), more=ends, hidden_size=hidden, **how)  # fmt: skip
    last = w.node("Concat", *ends, axis=0) if len(ends) > 1 else ends[0]
    return w.node("Squeeze", y, w.ints([1])), last


# Pooling


def windows(w: Writer, step: Step) -> dict[str, Any]:
    """Attributes of pooling. What `ceil_mode` adds is written as padding at the end."""
    how = step.settings
    numbers = zip(w.shapes[step.inputs[0]][2:], step.shape[2:], how["kernel_size"], how["stride"],
                  how["padding"], how.get("dilation", (1, 1)))  # fmt: skip
    ends = [max((m - 1) * s + d * (k - 1) + 1 - n - p, p if not how["ceil_mode"] else 0)
            for n, m, k, s, p, d in numbers]  # fmt: skip
    return {
        "kernel_shape": how["kernel_size"], "strides": how["stride"],
        "pads": (*how["padding"], *ends),
    }  # fmt: skip


@rule("max_pool2d")
def _(w: Writer, step: Step, x: str) -> str:
    return w.node("MaxPool", x, **windows(w, step), dilations=step.settings["dilation"])


@rule("avg_pool2d")
def _(w: Writer, step: Step, x: str) -> str:
    how, attributes = step.settings, windows(w, step)
    padding = how["padding"]
    counted = how["count_include_pad"] and any(padding)
    if how["divisor_override"] or (counted and attributes["pads"] != padding * 2):
        raise w.refuse(step, "divisor_override, or padding that counts together with ceil_mode")
    return w.node("AveragePool", x, **attributes, count_include_pad=int(counted))


@rule("adaptive_avg_pool2d")
def _(w: Writer, step: Step, x: str) -> str:
    out, size = step.settings["output_size"], w.shapes[step.inputs[0]][2:]
    if tuple(out) == (1, 1):
        return w.node("GlobalAveragePool", x)
    if any(n % m for n, m in zip(size, out)):
        raise w.refuse(step, f"windows of different sizes, from {tuple(size)} to {tuple(out)}")
    window = [n // m for n, m in zip(size, out)]
    return w.node("AveragePool", x, kernel_shape=window, strides=window)


# Along dimensions

REDUCTIONS = {"sum": "ReduceSum", "mean": "ReduceMean", "amax": "ReduceMax", "amin": "ReduceMin",
              "logsumexp": "ReduceLogSumExp"}  # fmt: skip


@rule(*REDUCTIONS)
def _(w: Writer, step: Step, x: str) -> str:
    dim = step.settings["dim"]
    dims = range(len(w.shapes[step.inputs[0]])) if dim is None else np.atleast_1d(dim)
    return w.node(REDUCTIONS[step.op], x, w.ints(dims), keepdims=int(step.settings["keepdim"]))


@rule("argmax", "argmin")
def _(w: Writer, step: Step, x: str) -> str:
    if step.settings["dim"] is None:
        raise w.refuse(step, "a position in all of the batch: give a dim")
    name = "ArgMax" if step.op == "argmax" else "ArgMin"
    return w.node(name, x, axis=step.settings["dim"], keepdims=int(step.settings["keepdim"]))


@rule("cumsum")
def _(w: Writer, step: Step, x: str) -> str:
    return w.node("CumSum", x, w.constant(step.settings["dim"], np.int64))


@rule("cat")
def _(w: Writer, step: Step, *xs: str) -> str:
    return w.node("Concat", *w.alike(step), axis=step.settings["dim"])


@rule("stack")
def _(w: Writer, step: Step, *xs: str) -> str:
    dim = step.settings["dim"]
    parts = [w.node("Unsqueeze", x, w.ints([dim])) for x in w.alike(step)]
    return w.node("Concat", *parts, axis=dim)


@rule("gather")
def _(w: Writer, step: Step, x: str, index: str) -> str:
    return w.node("GatherElements", x, index, axis=step.settings["dim"])


# Rounding in a float network


@rule("quantize_linear", "dequantize_linear")
def _(w: Writer, step: Step, x: str, scale: str, zero: str) -> str:
    name = "QuantizeLinear" if step.op == "quantize_linear" else "DequantizeLinear"
    return w.node(name, x, scale, zero, axis=step.settings["axis"])


# Shapes


@rule("reshape")
def _(w: Writer, step: Step, x: str) -> str:
    """One length may depend on the batch size: -1; if it is the first one, it is kept: 0."""
    before = w.shapes[step.inputs[0]]
    shape = [-1 if isinstance(n, PerSample) else n for n in step.shape]
    if step.shape[:1] == before[:1] == (PerSample(1),):
        shape[0] = 0
    if shape.count(-1) > 1:
        raise w.refuse(step, f"several lengths depend on the batch size, from {before}")
    return w.node("Reshape", x, w.ints(shape))


@rule("permute", "transpose")
def _(w: Writer, step: Step, x: str) -> str:
    order, how = [*range(len(step.shape))], step.settings
    if step.op == "permute":
        order = [dim % len(order) for dim in how["dims"]]
    else:
        a, b = how["dim0"], how["dim1"]
        order[a], order[b] = order[b], order[a]
    return w.node("Transpose", x, perm=order)


@rule("expand")
def _(w: Writer, step: Step, x: str) -> str:
    before = w.shapes[step.inputs[0]]
    old = (1,) * (len(step.shape) - len(before)) + before
    shape = [1 if n == m else n for n, m in zip(step.shape, old)]
    if not any(isinstance(n, PerSample) for n in shape):
        return w.node("Expand", x, w.ints(shape))
    batch = w.node("Shape", w.names[w.graph.inputs[0]], start=0, end=1)
    sizes = [w.node("Mul", batch, w.ints([n.times])) if isinstance(n, PerSample) else w.ints([n])
             for n in shape]  # fmt: skip
    return w.node("Expand", x, w.node("Concat", *sizes, axis=0))


@rule("flip")
def _(w: Writer, step: Step, x: str) -> str:
    dims = np.atleast_1d(step.settings["dims"])
    back = w.ints([-1] * len(dims))
    return w.node("Slice", x, back, w.ints([-FAR] * len(dims)), w.ints(dims), back)


@rule("tril", "triu")
def _(w: Writer, step: Step, x: str) -> str:
    diagonal = w.constant(step.settings["diagonal"], np.int64)
    return w.node("Trilu", x, diagonal, upper=int(step.op == "triu"))


@rule("getitem")
def _(w: Writer, step: Step, x: str) -> str:
    """NumPy's basic indexing: slices, then numbers are taken out and new axes put in."""
    index = step.settings["index"]
    if step.inputs[0] in w.states:
        return w.states[step.inputs[0]][index != 0]
    index = list(index) if isinstance(index, tuple) else [index]
    before = w.shapes[step.inputs[0]]
    if any(not isinstance(i, int | np.integer | slice | None) and i is not Ellipsis for i in index):
        raise w.refuse(step, "an index that is neither numbers nor slices")
    rest = [slice(None)] * (len(before) - sum(i is not None and i is not Ellipsis for i in index))
    at = next((k for k, i in enumerate(index) if i is Ellipsis), len(index))
    index[at : at + 1] = rest
    cuts: list[tuple[int, int, int, int]] = []  # start, end, axis, step
    numbers, new, axis, position = [], [], 0, 0
    for i in index:
        if i is None:
            new.append(position)
            position += 1
            continue
        n = before[axis]
        if isinstance(i, slice):
            position += 1
            start, stop, by = i.start, i.stop, 1 if i.step is None else i.step
            start = (0 if by > 0 else FAR) if start is None else start
            stop = (FAR if by > 0 else -FAR) if stop is None or stop == n else stop
        else:
            numbers.append(axis)
            start, stop, by = i, FAR if i == -1 else i + 1, 1
        if isinstance(start, PerSample) or isinstance(stop, PerSample):
            raise w.refuse(step, "a part of the batch")
        if (start, stop, by) != (0, FAR, 1) or not isinstance(i, slice):
            cuts.append((start, stop, axis, by))
        axis += 1
    x = w.node("Slice", x, *map(w.ints, zip(*cuts))) if cuts else x
    x = w.node("Squeeze", x, w.ints(numbers)) if numbers else x
    x = w.node("Unsqueeze", x, w.ints(new)) if new else x
    return x if cuts or new else w.node("Identity", x)


@rule("index_put")
def _(w: Writer, step: Step, x: str) -> str:
    """A border of zeros."""
    index, shape = step.settings["index"], step.settings["shape"]
    index = index if isinstance(index, tuple) else (index,)
    index += (slice(None),) * (len(shape) - len(index))
    if any(not isinstance(i, slice) or i.step not in (None, 1) for i in index):
        raise w.refuse(step, "it is more than a border of zeros")
    before, after = [], []
    for i, n in zip(index, shape):
        start, stop = i.start or 0, n if i.stop is None else i.stop
        before.append(start)
        after.append(0 if stop == n else n - stop)
    return w.node("Pad", x, w.ints(before + after))


# Integers ---------------------------------------------------------------------------------

# Which input is the zero point of the output; of other ops it is that of the input.
ZERO_POINT = {"quantize_linear": 2, "conv_integer": 6, "matmul_integer": 6, "add_integer": 6,
              "adaptive_avg_pool2d_integer": 3}  # fmt: skip


@rule("quantize_linear", "dequantize_linear", table=REALS)
def _(w: Writer, step: Step) -> str:
    return w.real(step.inputs[0])


@rule("maximum", table=REALS)
def _(w: Writer, step: Step) -> str:
    return w.node("Relu", w.real(step.inputs[0]))


@rule("minimum", table=REALS)
def _(w: Writer, step: Step) -> str:
    """Fewer than 8 bits: what the largest integer stands for."""
    q, most = step.inputs
    zero, scale = w.array(w.zeros[q]).astype(np.int32), w.array(w.graph.scales[q])
    return w.node("Min", w.real(q), w.constant((w.array(most) - zero) * scale, np.float32))


@rule("add_integer", table=REALS)
def _(w: Writer, step: Step) -> str:
    y = w.node("Add", *map(w.real, step.inputs[:2]))
    return w.node("Relu", y) if step.settings["relu"] else y


@rule("adaptive_avg_pool2d_integer", table=REALS)
def _(w: Writer, step: Step) -> str:
    return RULES["adaptive_avg_pool2d"](w, step, w.real(step.inputs[0]))


@rule("conv_integer", "matmul_integer", table=REALS)
def _(w: Writer, step: Step) -> str:
    """Weights and bias are integers too: q_w with s_w, and b with s_x s_w."""
    x, q, bias = step.inputs[0], step.inputs[1], step.inputs[5]
    x_scale, w_scale = (w.array(w.graph.scales[ref]) for ref in (x, q))
    product, flat = step.op == "matmul_integer", len(step.shape) == 2

    def integers(name: str, value: np.ndarray, scale: np.ndarray, axis: int = 0) -> str:
        scale = scale if scale.size > 1 else scale.reshape(())
        given = w.constant(value, parameter=f"{w.where}.{name}".lstrip("."))
        zero = w.constant(np.zeros(scale.shape, value.dtype))
        return w.node("DequantizeLinear", given, w.constant(scale), zero, axis=axis)

    b = "" if bias is None else integers("bias", w.array(bias), x_scale * w_scale)
    if product and not flat:
        y = w.node("MatMul", w.real(x), integers("weight", w.array(q), w_scale, axis=1))
        y = w.node("Add", y, b) if b else y
    else:
        weight = integers("weight", w.array(q).T if product else w.array(q), w_scale)
        y = (linear if product else convolution)(w, step, w.real(x), weight, b)
    return w.node("Relu", y) if step.settings["relu"] else y
