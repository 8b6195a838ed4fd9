"""Networks as ONNX files: what is in a file, and what cannot be."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minidl
import minidl.nn.functional as F
from minidl import models, nn, optim
from minidl.onnx import GraphModule, export, load
from minidl.ops import rnn
from minidl.quantization import Quantized, convert, prepare_qat, quantize

onnx = pytest.importorskip("onnx")


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def written(model: Any, *inputs: Any, **names: Any) -> Any:
        """The content of the file that `export` writes."""
        export(model, inputs, tmp_path / "m.onnx", **names)
        return onnx.load(tmp_path / "m.onnx")

    return written


def shape(value: Any) -> list[Any]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def test_a_file_has_the_parameters_by_name_and_an_open_batch(write: Any) -> None:
    model = models.get("resnet8", num_classes=7)
    content = write(model, minidl.rand(2, 3, 16, 16))
    state = {k: v.numpy() for k, v in model.state_dict().items() if "num_batches" not in k}
    found = {t.name: onnx.numpy_helper.to_array(t) for t in content.graph.initializer}
    assert found.keys() == state.keys()
    assert all(np.array_equal(found[name], state[name]) for name in state)
    assert [shape(v) for v in content.graph.input] == [["batch", 3, 16, 16]]
    assert [shape(v) for v in content.graph.output] == [["batch", 7]]
    ops = [node.op_type for node in content.graph.node]
    assert ops.count("BatchNormalization") == ops.count("Conv") == 7 and "Mul" not in ops
    assert (content.producer_name, content.opset_import[0].version) == ("minidl", 18)


def test_an_integer_network_is_written_with_its_integers(write: Any) -> None:
    minidl.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(16, 3),
    )  # fmt: skip
    for per_channel in (True, False):
        quantized = quantize(model, [minidl.rand(8, 2, 6, 6)], per_channel=per_channel)
        assert isinstance(quantized, Quantized)
        content = write(quantized, minidl.rand(1, 2, 6, 6))
        made = {node.output[0]: node for node in content.graph.node}
        values = {t.name: onnx.numpy_helper.to_array(t) for t in content.graph.initializer}
        values |= {name: onnx.numpy_helper.to_array(node.attribute[0].t)
                   for name, node in made.items() if node.op_type == "Constant"}  # fmt: skip
        (conv,) = (node for node in made.values() if node.op_type == "Conv")
        (relu,) = (node for node in made.values() if node.op_type == "Relu")
        assert relu.input[0] == conv.output[0]
        x, w, b = (made[name] for name in conv.input)
        assert [node.op_type for node in (x, w, b)] == ["DequantizeLinear"] * 3
        q, w_scale, zero = (values[name] for name in w.input)
        assert q.dtype == np.int8 and not zero.any()
        assert w_scale.shape == ((4,) if per_channel else ())
        x_scale, bias, b_scale = (values[n] for n in (x.input[1], b.input[0], b.input[1]))
        assert bias.dtype == np.int32 and np.array_equal(b_scale, x_scale * w_scale)
        (step,) = (s for s in quantized.graph.steps if s.op == "conv_integer")
        y_scale = quantized.graph.constants[quantized.graph.scales[step.output]].numpy()
        factor = quantized.graph.constants[step.inputs[4]].numpy()
        assert np.array_equal(
            np.float32(x_scale * w_scale / y_scale), factor.reshape(w_scale.shape)
        )
        integers = [n for n in made.values() if n.op_type == "QuantizeLinear"]
        assert len(integers) == 4  # the input, and what the first three layers make
        for node in content.graph.node:
            assert node.op_type in ("Constant", "Conv", "Relu", "MaxPool", "Reshape", "Gemm",
                                    "QuantizeLinear", "DequantizeLinear")  # fmt: skip


class Few(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Any, y: Any) -> Any:
        return self.fc(x), y.flip(1)[..., 1:3]


def test_names_of_inputs_and_outputs(write: Any) -> None:
    x, y = minidl.rand(2, 3), minidl.rand(2, 4)
    content = write(Few(), x, y)
    assert [v.name for v in content.graph.input] == ["input0", "input1"]
    assert [v.name for v in content.graph.output] == ["output0", "output1"]
    names: dict[str, Any] = {"input_names": ["a", "b"], "output_names": ["fc", "fc.weight"]}
    content = write(Few(), x, y, **names)
    assert [v.name for v in content.graph.output] == ["fc", "fc.weight"]
    reference = importlib.import_module("onnx.reference").ReferenceEvaluator(content)
    found = reference.run(None, {"a": x.numpy(), "b": y.numpy()})
    for ours, theirs in zip(Few()(x, y)[1:], found[1:]):
        np.testing.assert_array_equal(theirs, ours.numpy())
    with pytest.raises(ValueError, match="output_names: expected 2 different names, got"):
        write(Few(), x, y, output_names=["a", "a"])
    with pytest.raises(ValueError, match="input_names: expected 2"):
        write(Few(), x, y, input_names=["a"])


class Rolled(nn.Module):
    def forward(self, x: Any) -> Any:
        return x.roll(1, 1)


class Mixed(nn.Module):
    def forward(self, x: Any) -> Any:
        return F.adaptive_avg_pool2d(x, 3)


class Part(nn.Module):
    def forward(self, x: Any) -> Any:
        return x.reshape(2 * len(x), 2)[: len(x)]


@pytest.mark.parametrize(
    "model, size, message",
    [
        (nn.Sequential(Rolled()), (3,), "op roll in layer '0' cannot be written in ONNX"),
        (nn.Sequential(Mixed()), (1, 5, 5), "op adaptive_avg_pool2d in layer '0' .* of different"),
        (Part(), (4,), "in layer 'the model itself' .* a part of the batch"),
    ],
)
def test_what_cannot_be_written(model: Any, size: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export(model, minidl.rand(2, *size), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match="pip install onnx"):
        export(nn.Linear(2, 3), minidl.rand(1, 2), tmp_path / "m.onnx")


# And in again ----------------------------------------------------------------------------


def seen(model: Any, *shape: int) -> Any:
    """A model whose batch norms have seen numbers."""
    with minidl.no_grad():
        for _ in range(4):
            model.train()(minidl.randn(8, *shape))
    return model.eval()


def around(model: Any, x: Any, path: Path, **how: Any) -> Any:
    export(model, x, path / "m.onnx")
    return load(path / "m.onnx", **how)


@pytest.mark.parametrize("name, shape", [("cnn", (1, 28, 28)), ("resnet8", (3, 32, 32)),
                                         ("resnet18", (3, 32, 32))])  # fmt: skip
def test_a_network_comes_back(name: str, shape: Any, tmp_path: Path) -> None:
    """With the same parameters by the same names, and computes the same to the bit."""
    minidl.manual_seed(0)
    model = seen(models.get(name, num_classes=10, in_channels=shape[0]), *shape)
    again = around(model, minidl.randn(2, *shape), tmp_path)
    x = minidl.randn(3, *shape)
    assert np.array_equal(again(x).numpy(), model(x).numpy())
    assert again.state_dict().keys() == model.state_dict().keys()
    again.load_state_dict(model.state_dict())
    assert {n for n, _ in again.named_parameters()} == {n for n, _ in model.named_parameters()}
    assert not again.training and np.array_equal(again(x).numpy(), model(x).numpy())


def test_an_imported_network_learns_and_is_quantized(tmp_path: Path) -> None:
    minidl.manual_seed(0)
    model = seen(models.get("resnet8", num_classes=4), 3, 16, 16)
    x, y = minidl.randn(8, 3, 16, 16), minidl.tensor(np.arange(8) % 4)
    again = around(model, x, tmp_path)
    ours, theirs = quantize(again, [x]), quantize(model, [x])
    assert np.array_equal(ours(x).numpy(), theirs(x).numpy())
    before = again.find("bn1").running_mean.numpy().copy()
    optimizer, losses = optim.SGD(again.train().parameters(), lr=0.05), []
    for _ in range(4):
        loss = F.cross_entropy(again(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and (again.find("bn1").running_mean.numpy() != before).any()


def test_an_integer_network_can_learn_again(tmp_path: Path) -> None:
    """With rounding, as the real numbers that its integers stand for; gradients pass."""
    minidl.manual_seed(0)
    shape = (1, 28, 28)
    model, x = models.get("cnn", num_classes=10, in_channels=1).eval(), minidl.rand(6, *shape)
    quantized: Any = quantize(model, [minidl.rand(32, *shape)])
    again = around(quantized, x, tmp_path, quantized=False)
    assert isinstance(again, GraphModule)
    y, exact = quantized(x).numpy(), model(x).numpy()
    assert np.abs(again(x).numpy() - y).mean() < 0.2 * np.abs(exact - y).mean()
    assert isinstance(again.find("conv1"), nn.Conv2d) and isinstance(again.find("fc2"), nn.Linear)
    (first, *_) = (step for step in quantized.graph.steps if step.op == "conv_integer")
    scale = quantized.graph.constants[quantized.graph.scales[first.inputs[1]]].numpy()
    w = again.find("conv1").weight.numpy() / scale.reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(w, np.rint(w), atol=1e-4)
    with minidl.no_grad():
        rounded = again(x).numpy()
    loss = again.train()(x).square().sum()
    loss.backward()
    assert all(np.abs(p.grad.numpy()).sum() > 0 for p in again.parameters())  # type: ignore[union-attr]
    once_more = around(again.eval(), x, tmp_path)  # its rounding is written as it came
    assert np.array_equal(once_more(x).numpy(), rounded)


class Tokens(nn.Module):
    """Products of three dimensions, a mean over windows, an addition without ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mean = nn.Conv2d(2, 4, 3, padding=1), nn.AdaptiveAvgPool2d((3, 2))
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4, bias=False)

    def forward(self, x: Any) -> Any:
        tokens = self.mean(self.conv(x)).flatten(2).permute(0, 2, 1)
        return (tokens + self.down(F.relu(self.up(tokens))))[:, 1:]


def learned(model: Any, x: Any) -> Any:
    """After quantization-aware training: grids of 4 bits, several for one value."""
    qat = prepare_qat(model, bits=4, learned=True)
    with minidl.no_grad():
        qat(x)
    return convert(qat)


INTEGERS: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {
    "cnn": (lambda x: models.get("cnn", num_classes=10, in_channels=3), (3, 28, 28), {}),
    "resnet8": (lambda x: models.get("resnet8", num_classes=4), (3, 16, 16), {}),
    "per tensor": (lambda x: models.get("resnet8"), (3, 16, 16), {"per_channel": False}),
    "tokens": (lambda x: Tokens(), (2, 6, 4), {}),
    "4 bits": (lambda x: learned(models.get("resnet8"), x), (3, 16, 16), {}),
    "a float layer": (lambda x: nn.Sequential(nn.Linear(5, 7), nn.Sigmoid(), nn.Linear(7, 3)),
                      (5,), {"skip": ["1"]}),
}  # fmt: skip


@pytest.mark.parametrize("name", INTEGERS)
def test_an_integer_network_comes_back(name: str, tmp_path: Path) -> None:
    """The same ops on the same integers; also once it was saved, and written once more."""
    make, shape, how = INTEGERS[name]
    minidl.manual_seed(0)
    x = minidl.randn(8, *shape)
    model = make(x)
    quantized: Any = quantize(seen(model, *shape) if name != "4 bits" else model, [x], **how)
    again = around(quantized, x[:2], tmp_path)
    assert isinstance(again, Quantized)
    assert [step.op for step in again.graph.steps] == [step.op for step in quantized.graph.steps]
    y = minidl.randn(5, *shape) * 2  # some of it beyond the ranges
    expected = quantized(y).numpy()
    assert np.array_equal(again(y).numpy(), expected)
    assert sorted(map(str, again.state_dict().values())) == sorted(
        map(str, quantized.state_dict().values())
    )
    again.save(tmp_path / "q.safetensors")
    for other in (Quantized.load(tmp_path / "q.safetensors"), around(again, x[:2], tmp_path)):
        assert np.array_equal(other(y).numpy(), expected)


def test_large_biases_come_back(tmp_path: Path) -> None:
    """Beside weights that are nearly zero: integers that no float32 tells from their neighbours."""
    minidl.manual_seed(0)
    model: Any = nn.Linear(6, 4)
    model.weight.array[:] *= 1e-4
    x = minidl.randn(8, 6)
    quantized: Any = quantize(model, [x])
    (step,) = (s for s in quantized.graph.steps if s.op == "matmul_integer")
    bias = quantized.graph.constants[step.inputs[5]].numpy()
    assert np.abs(bias).max() > 2**25
    again = around(quantized, x, tmp_path)
    (step,) = (s for s in again.graph.steps if s.op == "matmul_integer")
    assert np.array_equal(again.graph.constants[step.inputs[5]].numpy(), bias)


class Words(nn.Module):
    """Numbers of words through a table and a recurrent network of two layers."""

    def __init__(self, kind: Any, **how: Any) -> None:
        super().__init__()
        self.table, self.rnn = nn.Embedding(9, 5), kind(5, 4, 2, batch_first=True, **how)
        self.out = nn.Linear(4 * self.rnn.directions, 3)

    def forward(self, words: Any) -> Any:
        y, last = self.rnn(self.table(words))
        return (self.out(y[:, -1]), y, *(last if isinstance(last, tuple) else (last,)))


RECURRENT: list[tuple[Any, dict[str, Any]]] = [
    (nn.LSTM, {}), (nn.LSTM, {"bidirectional": True}), (nn.LSTM, {"bias": False}), (nn.GRU, {}),
    (nn.GRU, {"bidirectional": True, "bias": False}), (nn.RNN, {"bidirectional": True}),
    (nn.RNN, {"nonlinearity": "relu"}),
]  # fmt: skip


def words(n: int) -> Any:
    return minidl.tensor(np.random.default_rng(n).integers(0, 9, (n, 6)))


@pytest.mark.parametrize("kind, how", RECURRENT)
def test_a_recurrent_network_comes_back(kind: Any, how: Any, tmp_path: Path) -> None:
    """The same numbers, and the same integers when it is quantized."""
    minidl.manual_seed(0)
    model, x = Words(kind, **how).eval(), words(5)
    again = around(model, words(2), tmp_path)
    for a, b in zip(again(x), model(x), strict=True):
        assert np.array_equal(a.numpy(), b.numpy())
    assert [type(m) for m in again.modules() if type(m) is kind] == [kind] * 2 * len(
        [1, 1][: model.rnn.directions]
    )
    for a, b in zip(*(quantize(m, scheme="dynamic")(x) for m in (again, model)), strict=True):
        assert np.array_equal(a.numpy(), b.numpy())


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 2)

    def forward(self, x: Any) -> Any:
        first = minidl.zeros(x.shape[1], 2)
        w = self.rnn
        return rnn.lstm(x, first, first, w.weight_ih_l0, w.weight_hh_l0, None, None, None)[1]


def test_cell_states_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="its cell states are read, of which ONNX has only the"):
        export(Cells(), minidl.rand(4, 2, 3), tmp_path / "m.onnx")


# Files by others


def file(
    path: Path, nodes: Any, inputs: Any, constants: Any = (), opset: int = 18, rank: int = 2
) -> Path:
    """A file with these nodes: (op, inputs, outputs, attributes); the last makes "y"."""
    make = onnx.helper
    graph = make.make_graph(
        [make.make_node(op, given, made, name=f"/{op}", **how) for op, given, made, how in nodes],
        "g", [make.make_tensor_value_info(n, 1, shape) for n, shape in inputs.items()],
        [make.make_tensor_value_info("y", 1, [None] * rank)],
        [onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in dict(constants).items()],
    )  # fmt: skip
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", opset)], ir_version=8)
    onnx.save(model, path / "f.onnx")
    return path / "f.onnx"


def test_shapes_that_are_computed(tmp_path: Path) -> None:
    """How exporters write x.reshape(len(x), -1): whatever the batch size, and traceable."""
    i64 = np.int64
    path = file(
        tmp_path,
        [("Shape", ["x"], ["s"], {}), ("Gather", ["s", "zero"], ["n"], {"axis": 0}),
         ("Unsqueeze", ["n", "axes"], ["n1"], {}),
         ("Concat", ["n1", "rest"], ["size"], {"axis": 0}),
         ("Reshape", ["x", "size"], ["f"], {}), ("MatMul", ["f", "w"], ["m"], {}),
         ("Add", ["m", "b"], ["y"], {})],
        {"x": ["n", 2, 3]},
        {"zero": i64(0), "axes": i64([0]), "rest": i64([-1]),
         "w": np.ones((6, 4), "f"), "b": np.arange(4, dtype="f")},
    )  # fmt: skip
    model, x = load(path), minidl.rand(5, 2, 3)
    expected = x.numpy().reshape(5, 6).sum(1, keepdims=True) + np.arange(4)
    np.testing.assert_allclose(model(x).numpy(), expected, rtol=1e-6)
    assert len(list(model.parameters())) == 2 and "zero" not in model.tensors
    again = around(model, x, tmp_path)
    for n in (1, 3):
        assert np.array_equal(again(x[:n]).numpy(), model(x[:n]).numpy())


def test_other_layers(tmp_path: Path) -> None:
    """Padding at one end, constants that are computed, a norm, casts."""
    path = file(
        tmp_path,
        [("Mul", ["w0", "two"], ["w"], {}),
         ("Conv", ["x", "w"], ["c"], {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
         ("MaxPool", ["c"], ["p"], {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1]}),
         ("LayerNormalization", ["p", "g"], ["l"], {"axis": -1}),
         ("Cast", ["l"], ["i"], {"to": 7}), ("Cast", ["i"], ["r"], {"to": 1}),
         ("ReduceMean", ["r"], ["y"], {"axes": [2, 3], "keepdims": 0})],
        {"x": ["n", 1, 6, 6]},
        {"w0": np.ones((2, 1, 3, 3), "f"), "two": np.float32(2), "g": 9 * np.ones(3, "f")},
        opset=17,
    )  # fmt: skip
    model, x = load(path), minidl.rand(2, 1, 6, 6)
    conv = F.conv2d(F.pad(x, (0, 1, 0, 1)), minidl.full((2, 1, 3, 3), 2.0), stride=2)
    pooled = F.max_pool2d(F.pad(conv, (0, 1, 0, 1), value=-np.inf), 2, 1)
    normal = np.trunc(F.layer_norm(pooled, (3,)).numpy() * 9)
    np.testing.assert_allclose(model(x).numpy(), normal.mean((2, 3)), rtol=1e-5)
    assert [type(m).__name__ for m in model.children()][-1] != "Function"


SCALES = {
    "s": np.float32(0.05),
    "z": np.uint8(120),
    "t": np.float32(0.1234),
    "zt": np.uint8(3),
    "ws": np.float32(0.01),
    "wz": np.int8(0),
    "w": np.arange(-8, 4, dtype=np.int8).reshape(3, 4),
}
DENSE = [
    ("QuantizeLinear", ["x", "s", "z"], ["q"], {}),
    ("DequantizeLinear", ["q", "s", "z"], ["r"], {}),
    ("DequantizeLinear", ["w", "ws", "wz"], ["v"], {}),
]  # fmt: skip


@pytest.mark.parametrize(
    "nodes, ops",
    [
        # A product that is rounded, and another one whose weights are the other way round.
        ([*DENSE, ("Gemm", ["r", "v"], ["h"], {"transB": 1}),
          ("QuantizeLinear", ["h", "t", "zt"], ["i"], {}),
          ("DequantizeLinear", ["i", "t", "zt"], ["k"], {}), ("MatMul", ["k", "v"], ["y"], {})],
         "quantize_linear matmul_integer matmul_integer"),
        # What else reads the sums reads them unrounded.
        ([*DENSE, ("Gemm", ["r", "v"], ["h"], {"transB": 1}),
          ("QuantizeLinear", ["h", "t", "zt"], ["i"], {}),
          ("DequantizeLinear", ["i", "t", "zt"], ["k"], {}), ("Sub", ["h", "k"], ["y"], {})],
         "quantize_linear matmul_integer quantize_linear dequantize_linear sub"),
        # Two that round alike, one that rounds otherwise; an addition of what both stand for.
        ([*DENSE, ("QuantizeLinear", ["x", "s", "z"], ["i"], {}),
          ("DequantizeLinear", ["i", "s", "z"], ["k"], {}),
          ("QuantizeLinear", ["x", "t", "zt"], ["m"], {}),
          ("DequantizeLinear", ["m", "t", "zt"], ["n"], {}), ("Add", ["k", "n"], ["a"], {}),
          ("Relu", ["a"], ["b"], {}), ("QuantizeLinear", ["b", "t", "zt"], ["c"], {}),
          ("DequantizeLinear", ["c", "t", "zt"], ["d"], {}), ("Add", ["d", "r"], ["e"], {}),
          ("Gemm", ["r", "v"], ["h"], {"transB": 1}), ("Gemm", ["e", "v"], ["f"], {"transB": 1}),
          ("Add", ["h", "f"], ["y"], {})],
         "quantize_linear quantize_linear add_integer dequantize_linear dequantize_linear add "
         "matmul_integer linear add"),
        # Not symmetric weights, and weights by column where rows are added up: real numbers.
        ([*DENSE[:2], ("DequantizeLinear", ["w", "ws", "wz7"], ["v"], {}),
          ("Gemm", ["r", "v"], ["y"], {"transB": 1})], None),
        ([*DENSE[:2], ("DequantizeLinear", ["w", "columns", "zeros"], ["v"], {"axis": 1}),
          ("Gemm", ["r", "v"], ["y"], {"transB": 1})], None),
        # Numbers that end somewhere else than at an integer.
        ([*DENSE, ("Gemm", ["r", "v"], ["h"], {"transB": 1}), ("Min", ["r", "top"], ["m"], {}),
          ("ReduceSum", ["m", "axes"], ["n"], {}), ("Add", ["h", "n"], ["y"], {})],
         "quantize_linear matmul_integer dequantize_linear minimum sum add"),
    ],
    ids=["products", "unrounded", "alike", "asymmetric", "columns", "top"],
)  # fmt: skip
def test_patterns_of_others(nodes: Any, ops: str | None, tmp_path: Path) -> None:
    """What is recognised as integers, and what stays as it is: either way the same numbers."""
    constants = {**SCALES, "wz7": np.int8(7), "columns": np.full(4, 0.01, "f"),
                 "zeros": np.zeros(4, np.int8), "top": np.float32(0.123),
                 "axes": np.int64([1])}  # fmt: skip
    path = file(tmp_path, nodes, {"x": ["n", 4]}, constants)
    model, rounding = load(path), load(path, quantized=False)
    assert isinstance(rounding, GraphModule)
    assert (type(model) is Quantized) == (ops is not None)
    if ops:
        assert [step.op for step in model.graph.steps] == ops.split()
    x = minidl.randn(50, 4) * 3
    np.testing.assert_allclose(model(x).numpy(), rounding(x).numpy(), rtol=1e-5, atol=1e-5)


def test_sizes_that_a_file_leaves_open(tmp_path: Path) -> None:
    nodes = [*DENSE, ("Gemm", ["r", "v"], ["y"], {"transB": 1})]
    path = file(tmp_path, nodes, {"x": ["n", "features"]}, SCALES)
    with pytest.warns(UserWarning, match="with rounding, for the file leaves open of which size"):
        assert isinstance(load(path), GraphModule)


@pytest.mark.parametrize(
    "nodes, message",
    [
        ([("Loop", ["x"], ["y"], {})], r"do(es)? not know: \['NonZero', 'my.Own'\]. Cut it out"),
        ([("Relu", ["x"], ["h"], {}), ("Conv", ["x", "h"], ["y"], {})], "weights are computed"),
        ([("MaxPool", ["x"], ["h", "i"], {"kernel_shape": [2, 2]}), ("Add", ["h", "i"], ["y"], {})],
         "node '/MaxPool' .MaxPool, opset 18. cannot be imported: only its first output"),
        ([("Dropout", ["x", "", "on"], ["y"], {})], "drops also when it is not trained"),
        ([("GRU", ["t", "w", "r"], ["y"], {})], "linear_before_reset=0 computes otherwise"),
        ([("LSTM", ["t", "w4", "r4", "", "n"], ["y"], {})], "sequences of unequal length, peephol"),
        ([("RNN", ["t", "w1", "r1"], ["y"], {"activations": ["Sigmoid"]})], "activations .'sig"),
        ([("RNN", ["t", "w1", "r1"], ["y"], {"clip": 1.0})], "attributes .'clip'. are not known"),
        ([("Cast", ["x"], ["h"], {"to": 16}), ("Cast", ["h"], ["y"], {"to": 1})],
         "value 'h' cannot be imported: it is of type BFLOAT16"),
    ],
)  # fmt: skip
def test_what_cannot_be_imported(nodes: Any, message: str, tmp_path: Path) -> None:
    weights = {f"{name}{g or ''}": np.zeros((1, 2 * (g or 3), 2), "f")
               for name in "wr" for g in (0, 1, 4)}  # fmt: skip
    constants = {"on": np.True_, "n": np.int32([1]), **weights}
    path = file(tmp_path, nodes, {"x": [1, 1, 4, 4], "t": [3, 1, 2]}, constants, rank=4)
    content = onnx.load(path)
    if nodes[0][0] == "Loop":
        content.graph.node[0].op_type, content.graph.node[0].domain = "Own", "my"
        content.graph.node.append(onnx.helper.make_node("NonZero", ["x"], ["z"]))
        content.opset_import.append(onnx.helper.make_opsetid("my", 1))
        onnx.save(content, path)
    with pytest.raises(ValueError, match=message):
        load(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        load(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no protobuf at all")
    with pytest.raises(ValueError, match="not a valid ONNX file"):
        load(tmp_path / "bad.onnx")
    path = file(tmp_path, [("Relu", ["x"], ["y"], {})], {"x": [1]}, opset=6, rank=1)
    with pytest.raises(ValueError, match="operators of ONNX 6, expected 7 or later"):
        load(path)
    model = load(file(tmp_path, [("Relu", ["x"], ["y"], {})], {"x": ["n"]}, rank=1))
    with pytest.raises(ValueError, match=r"expected the inputs \['x'\], got 2"):
        model(minidl.rand(1), minidl.rand(1))
