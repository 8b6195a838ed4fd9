"""An ONNX file as a Module.

    model = minidl.onnx.load("m.onnx")
    model(images)
    model.train()   # its parameters learn, its batch norms follow, its dropout drops
    load("m.int8.onnx")     # a network on integers

Every node becomes a layer (`layers.py`): those with weights the layers of `minidl.nn` that they
are, so that training, transfer and quantization find what they look for, the others a `Function`.
The module runs them in the file's order, whatever the batch size, if the file itself does not fix
it.

A QuantizeLinear with a DequantizeLinear after it rounds numbers; that becomes a `Rounding`, through
which gradients pass. Integer weights become the real numbers that they stand for. Of such a network
`integers.py` makes one that computes with the integers.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minidl import nn
from minidl.onnx.export import library
from minidl.onnx.integers import on_integers
from minidl.onnx.layers import HELP, LAYERS, Node
from minidl.tensor import Tensor

OLDEST = 7  # before, broadcasting was written otherwise
TYPES = {
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FLOAT16",
    "FLOAT", "DOUBLE",
}  # fmt: skip


class Function(nn.Module):
    """An operator without weights.

    Args:
        name: ONNX's.
        function: of the inputs, Tensors or (shapes and other constants) NumPy arrays.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        super().__init__()
        self.name, self.function = name, function

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs)

    def extra_repr(self) -> str:
        return self.name


class Call(NamedTuple):
    """Which layer runs, on which values, and what it makes; `done` are read for the last time."""

    layer: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    done: tuple[str, ...] = ()


class GraphModule(nn.Module):
    """Layers and the order in which they run: what `load` returns.

    Attributes:
        inputs, outputs: names of the values that it takes and returns.
        calls: what runs, in order; layers by their dotted path.
        tensors: values that are parameters and buffers: where they are.
        numbers: integer constants: shapes, axes, indices.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[str] = []
        self.outputs: list[str] = []
        self.calls: list[Call] = []
        self.tensors: dict[str, str] = {}
        self.numbers: dict[str, np.ndarray] = {}

    def forward(self, *inputs: Tensor) -> Any:
        """A Tensor, or a tuple of as many as the file has outputs.

        Raises:
            ValueError: another number of inputs than the file has.
        """
        if len(inputs) != len(self.inputs):
            raise ValueError(f"expected the inputs {self.inputs}, got {len(inputs)}")
        values: dict[str, Any] = {**self.numbers, **dict(zip(self.inputs, inputs)), "": None}
        values.update((name, self.find(path)) for name, path in self.tensors.items())
        for call in self.calls:
            made = self.find(call.layer)(*(values[name] for name in call.inputs))
            made = made if isinstance(made, tuple) else (made,)
            values.update((name, y) for name, y in zip(call.outputs, made) if name)
            for name in call.done:
                values.pop(name, None)
        found = [values[name] for name in self.outputs]
        return found[0] if len(found) == 1 else tuple(found)

    def find(self, path: str) -> Any:
        found: Any = self
        for part in path.split("."):
            found = vars(found)[part]
        return found

    def put(self, path: str, value: Any) -> str:
        """Make a layer, parameter or buffer part of this module, below modules for each dot in its
        path; returns the path, which is another if this one is taken."""
        module: nn.Module = self
        *above, last = [part + "_" * hasattr(GraphModule, part) for part in path.split(".")]
        for part in above:
            if not isinstance(vars(module).get(part), nn.Module):
                module.add_module(part, nn.Module())
            module = vars(module)[part]
        name, count = last, 1
        while hasattr(module, name):
            name, count = f"{last}_{count}", count + 1
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            module.register_buffer(name, value)
        else:
            setattr(module, name, value)
        return ".".join([*above, name])


# Reading ----------------------------------------------------------------------------------


def load(f: str | os.PathLike[str], *, quantized: bool = True) -> Any:
    """The network in an ONNX file, in eval mode: a `GraphModule`, or a `Quantized`.

    Args:
        quantized: of a file with a DequantizeLinear before and a QuantizeLinear after its
            operators: make the network on integers that it stands for, as `quantize` would. (If
            that cannot be, a warning says why.) False: a `GraphModule`, which rounds where the file
            does, and can be trained.

    Raises:
        ImportError: the package onnx is not installed.
        FileNotFoundError: there is no such file.
        ValueError: it is no ONNX file or a damaged one; it has operators or attributes that are not
            known here: names all of them, and says what to do.
    """
    onnx = library()
    if not Path(f).is_file():
        raise FileNotFoundError(f"no such file: {f}")
    try:
        content = onnx.load(f)
        onnx.checker.check_model(content)
    except Exception as error:  # protobuf's and the checker's have no base of their own
        raise ValueError(f"{f}: not a valid ONNX file ({str(error).strip()})") from None
    if content.functions:
        content = onnx.inliner.inline_local_functions(content)
    reader = Reader(content)
    module = reader.read()
    if not quantized or not reader.integers or not reader.rounds():
        return module
    try:
        return on_integers(module, reader.examples(), reader.integers) or module
    except (ValueError, RuntimeError) as error:
        warnings.warn(f"{f}: comes as real numbers with rounding, for {error}", stacklevel=2)
        return module


# Which input is a layer's weight.
WEIGHTS = {"Gather": 0, **dict.fromkeys(
    ("Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization", "PRelu"), 1)}  # fmt: skip
BESIDE = {
    "QuantizeLinear": "quantize",
    "DequantizeLinear": "rounding",
}  # the layer's own name stays
SEVERAL = ("Split", "DynamicQuantizeLinear", "LSTM", "GRU", "RNN")  # what has several outputs


class Reader:
    """Makes layers of nodes.

    Attributes:
        constants: values that are known beforehand.
        weights: of these, names of those that are parameters where a function takes them.
        ranks: of values: how many dimensions they have, if that is known.
        makers: the node that makes a value.
        dequantized: of constants that a DequantizeLinear made: (integers, scale, axis).
        integers: of these, those that are parameters of layers, by their paths.
    """

    def __init__(self, content: Any) -> None:
        self.onnx, self.graph = library(), content.graph
        opsets = {entry.domain: entry.version for entry in content.opset_import}
        self.opset = opsets.get("", opsets.get("ai.onnx", 0))
        if self.opset < OLDEST:
            raise ValueError(
                f"the file has operators of ONNX {self.opset}, expected {OLDEST} or later: convert "
                "it with onnx.version_converter"
            )
        if self.graph.sparse_initializer:
            raise ValueError("the file has sparse weights: make them dense first")
        array = self.onnx.numpy_helper.to_array
        self.constants: dict[str, Any] = {t.name: array(t) for t in self.graph.initializer}
        self.weights = {k for k, v in self.constants.items() if v.dtype.kind == "f" and v.ndim}
        self.makers = {name: node for node in self.graph.node for name in node.output if name}
        inferred = self.onnx.shape_inference.infer_shapes(content).graph
        values = [*inferred.value_info, *inferred.input, *inferred.output]
        self.expect_types(values)
        self.ranks = {
            value.name: len(value.type.tensor_type.shape.dim)
            for value in values
            if value.type.tensor_type.HasField("shape")
        } | {name: value.ndim for name, value in self.constants.items()}
        self.dequantized: dict[str, Any] = {}
        self.integers: dict[str, Any] = {}
        self.module = GraphModule()
        self.used = {v.name for v in self.graph.output}.union(*(n.input for n in self.graph.node))
        self.layers = {*map(self.weights_path, self.graph.node)}
        nodes = (node for node in self.graph.node if node.op_type != "Constant")
        names = self.layers | set(map(named, nodes))
        self.containers = {""} | {
            name[:i] for name in names for i, c in enumerate(name) if c == "."
        }

    def expect_types(self, values: Sequence[Any]) -> None:
        """Raises ValueError unless all are tensors, of the types that NumPy has of its own."""
        names = self.onnx.TensorProto.DataType.Name
        kinds = {t.name: t.data_type for t in self.graph.initializer}
        for value in values:
            if value.type.WhichOneof("value") not in ("tensor_type", None):
                raise ValueError(
                    f"value {value.name!r} cannot be imported: it is no tensor. {HELP}"
                )
            kinds[value.name] = value.type.tensor_type.elem_type
        for name, kind in kinds.items():
            if kind and names(kind) not in TYPES:
                raise ValueError(
                    f"value {name!r} cannot be imported: it is of type {names(kind)}. {HELP}"
                )

    def read(self) -> GraphModule:
        module = self.module
        foreign = {f"{node.domain}.{node.op_type}".lstrip(".") for node in self.graph.node
                   if node.op_type not in LAYERS or node.domain not in ("", "ai.onnx")}  # fmt: skip
        if foreign:
            raise ValueError(f"operators that minidl does not know: {sorted(foreign)}. {HELP}")
        module.inputs = [v.name for v in self.graph.input if v.name not in self.constants]
        module.outputs = [v.name for v in self.graph.output]
        for proto in self.graph.node:
            self.add(Node(self, proto))
        self.forget()
        return module.eval()

    def add(self, node: Node) -> None:
        """Compute what does not depend on the network's inputs; make a layer of anything else."""
        known = all(name in self.constants for name in node.inputs if name)
        made = LAYERS[node.op](node)
        if node.attributes:
            raise node.refused(f"attributes {sorted(node.attributes)} are not known here")
        if node.op not in SEVERAL and not self.used.isdisjoint(node.outputs[1:]):
            raise node.refused("only its first output can be used")
        stages: list[Any] = made if isinstance(made, list) else [made]
        names = [name for i, name in enumerate(node.inputs) if i not in node.consumed]
        if known:
            values = [real(self.constants[name]) if name else None for name in names]
            for stage in stages:
                out = stage(*values)
                values = list(out) if isinstance(out, tuple) else [out]
            self.constants.update(zip(node.outputs, map(plain, values)))
            return
        path = self.path(node.proto)
        for i, stage in enumerate(stages):
            last = i == len(stages) - 1
            if not isinstance(stage, nn.Module):
                stage = Function(node.op, stage)
            place = self.module.put(path if last else f"{path}_{i}", stage)
            outputs = node.outputs if last else [f"{node.outputs[0]}/{i}"]
            self.module.calls.append(Call(place, tuple(names), tuple(outputs)))
            names = outputs
        for i, parameter in enumerate(("weight", "bias"), 1):
            if node.op in WEIGHTS and node.input(i) in self.dequantized:
                self.integers[f"{place}.{parameter}"] = self.dequantized[node.input(i)]

    def rounds(self) -> bool:
        return any(node.op_type == "QuantizeLinear" for node in self.graph.node)

    def examples(self) -> list[Tensor]:
        """Inputs, of two samples, as the file describes them.

        Raises:
            ValueError: a size is left open.
        """
        found = []
        for value in self.graph.input:
            if value.name in self.constants:
                continue
            kind = value.type.tensor_type
            sizes = [dim.dim_value for dim in kind.shape.dim]
            if not sizes or not all(sizes[1:]):
                raise ValueError(f"the file leaves open of which size input {value.name!r} is")
            dtype = self.onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
            found.append(Tensor(np.zeros((2, *sizes[1:]), dtype)))
        return found

    def path(self, node: Any) -> str:
        """Where a node's layer goes: where its weights were, or what the node is called."""
        if weights := self.weights_path(node):
            return weights
        path = named(node)
        if path in self.containers:
            return f"{path}.{node.op_type}".lstrip(".")
        beside = path in self.layers or node.op_type in BESIDE
        return f"{path}_{BESIDE.get(node.op_type, node.op_type.lower())}" if beside else path

    def weights_path(self, node: Any) -> str:
        """What a layer was called whose weights are called NAME.weight; else nothing."""
        if node.op_type not in WEIGHTS or len(node.input) < 2:
            return ""
        weight = node.input[WEIGHTS[node.op_type]]
        maker = self.makers.get(weight)
        if maker is not None and maker.op_type == "DequantizeLinear":
            weight = maker.input[0]
        return weight.removesuffix(".weight") if weight.endswith(".weight") else ""

    def forget(self) -> None:
        """Drop calls that nobody reads; note what is read for the last time; place constants."""
        module = self.module
        wanted, kept = set(module.outputs), []
        for call in reversed(module.calls):
            if wanted.isdisjoint(call.outputs):
                *above, last = call.layer.split(".")
                delattr(module.get_submodule(".".join(above)), last)
                continue
            unread = set(call.inputs) | set(call.outputs)
            constant = self.constants.keys() | {"", *module.outputs}
            kept.append(call._replace(done=tuple(sorted(unread - wanted - constant))))
            wanted.update(call.inputs)
        module.calls = kept[::-1]
        for name in wanted & self.constants.keys():
            value = self.constants[name]
            if value.dtype.kind != "f":
                module.numbers[name] = value
                continue
            tensor = Tensor(value.copy())
            made = nn.Parameter(tensor) if name in self.weights else tensor
            module.tensors[name] = module.put(dotted(name), made)


def named(node: Any) -> str:
    """What a node is called, without its operator: "layer1.relu" of "/layer1/relu/Relu_1"."""
    return re.sub(rf"\.?{node.op_type}(_\d+)?$", "", dotted(node.name))


def dotted(name: str) -> str:
    """A name of ONNX as a path of modules: "/layer1/conv/Conv" as "layer1.conv.Conv"."""
    return re.sub(r"\.+", ".", re.sub("/|:+", ".", name)).strip(".")


def real(array: np.ndarray) -> Any:
    """As a function gets it: a Tensor, but integers (shapes, axes) as they are."""
    return Tensor(array) if array.dtype.kind == "f" else array


def plain(x: Any) -> np.ndarray:
    return x.detach().numpy() if isinstance(x, Tensor) else np.asarray(x)
