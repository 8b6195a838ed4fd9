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
from minidl import models, nn
from minidl.onnx import export
from minidl.quantization import Quantized, quantize

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
