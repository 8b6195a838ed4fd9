"""Exported networks in ONNX Runtime: the same outputs. And every rule of the exporter by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import minidl
from minidl import models, nn
from minidl.onnx import export
from minidl.onnx.export import RULES, Writer
from minidl.op import registry
from minidl.quantization import convert, prepare_qat, quantize
from minidl.tensor import Tensor
from minidl.trace import Graph, Ref, Step
from tests.test_onnx import RECURRENT, Words, words


def run(model: Any, *inputs: np.ndarray, optimized: bool = True) -> list[Any]:
    """What ONNX Runtime makes of a file, or of its bytes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    return session.run(None, dict(zip(names, inputs, strict=True)))


def one_op(name: str, inputs: Any, kwargs: dict[str, Any]) -> tuple[bytes, list[Any], Any]:
    """A file with a single op: its bytes, its inputs, and what minidl computes."""
    op = registry[name]
    single = [x.astype("f") if isinstance(x, np.ndarray) and x.dtype == np.float64 else x
              for x in inputs]  # fmt: skip
    y = np.asarray(op(*single, **kwargs))
    tensors = [x for x in single if isinstance(x, np.ndarray)]
    refs = iter(range(len(single)))
    given = tuple(Ref(next(refs)) if isinstance(x, np.ndarray) else x for x in single)
    settings = {**op.op.defaults, **kwargs}
    step = Step(name, given, settings, Ref(99), "layer", y.shape, y.dtype.name)
    live = [ref for ref in given if isinstance(ref, Ref)]
    graph = Graph([step], live, Ref(99), {})
    writer = Writer(nn.Identity(), graph, [Tensor(x) for x in tensors])
    writer.shapes.update((ref, x.shape) for ref, x in zip(live, tensors))
    return writer.write(None, None).SerializeToString(), tensors, y


@pytest.mark.parametrize("name", [name for name in RULES if name not in ("to_device", "lstm")])
def test_every_rule(name: str) -> None:
    """On every sample of the op that ONNX has a form for; on one at least."""
    compared = 0
    for inputs, kwargs in registry[name].op.draw_samples(np.random.default_rng(0)):  # type: ignore[misc]
        if any(isinstance(x, np.ndarray) and not x.size for x in inputs):
            continue  # ONNX Runtime wants no empty ones
        try:
            content, tensors, y = one_op(name, inputs, kwargs)
        except ValueError as error:
            assert "cannot be written in ONNX" in str(error)
            continue
        if not y.size:
            continue
        (found,) = run(content, *tensors)
        assert found.dtype == y.dtype and found.shape == y.shape
        largest = np.abs(y, where=np.isfinite(y), out=np.zeros(y.shape)).max()
        np.testing.assert_allclose(found, y, rtol=2e-5, atol=1e-5 * largest)
        compared += 1
    assert compared


# Networks ---------------------------------------------------------------------------------

NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "cnn": (lambda: models.get("cnn", num_classes=10, in_channels=1), (1, 28, 28)),
    "lenet": (lambda: models.get("lenet", num_classes=10, in_channels=1), (1, 28, 28)),
    "resnet8": (lambda: models.get("resnet8", num_classes=10), (3, 32, 32)),
    "resnet20": (lambda: models.get("resnet20", num_classes=10), (3, 32, 32)),
    "resnet18": (lambda: models.get("resnet18", num_classes=10), (3, 64, 64)),
}


def network(name: str) -> tuple[nn.Module, tuple[int, ...], Tensor]:
    """A network whose batch norms have seen numbers, and some images."""
    minidl.manual_seed(0)
    make, shape = NETWORKS[name]
    model = make()
    with minidl.no_grad():
        for _ in range(12):
            model.train()(minidl.randn(8, *shape))
    return model.eval(), shape, minidl.randn(20, *shape)


@pytest.mark.parametrize("name", NETWORKS)
def test_float_networks(name: str, tmp_path: Path) -> None:
    model, _, images = network(name)
    export(model, images[:2], tmp_path / "m.onnx")
    for n in (1, 20):
        y = model(images[:n]).numpy()
        (found,) = run(str(tmp_path / "m.onnx"), images[:n].numpy())
        np.testing.assert_allclose(found, y, rtol=1e-4, atol=1e-5 * np.abs(y).max())


@pytest.mark.parametrize("kind, how", RECURRENT)
def test_recurrent_networks(kind: Any, how: Any, tmp_path: Path) -> None:
    minidl.manual_seed(0)
    model = Words(kind, **how)
    export(model, words(2), tmp_path / "m.onnx")
    for n in (1, 5):
        found = run(str(tmp_path / "m.onnx"), words(n).numpy())
        for theirs, y in zip(found, model(words(n)), strict=True):
            np.testing.assert_allclose(theirs, y.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("per_channel", [True, False], ids=["per channel", "per tensor"])
@pytest.mark.parametrize("name", NETWORKS)
def test_integer_networks(name: str, per_channel: bool, tmp_path: Path) -> None:
    """ONNX Runtime finds the integer network that was written: its scores are minidl's but for a
    few roundings that tip over. Without its optimizations it computes with the real numbers."""
    model, shape, images = network(name)
    batches = [minidl.randn(16, *shape) for _ in range(3)]
    quantized = quantize(model, batches, per_channel=per_channel)
    export(quantized, images[:2], tmp_path / "q.onnx")
    y = quantized(images).numpy()
    noise = np.abs(y - model(images).numpy())
    (found,) = run(str(tmp_path / "q.onnx"), images.numpy())
    error = np.abs(found - y)
    assert error.max() <= 0.03 * np.abs(y).max() and (error == 0).mean() > 0.8
    assert (found.argmax(1) == y.argmax(1)).all()
    (found,) = run(str(tmp_path / "q.onnx"), images.numpy(), optimized=False)
    assert np.abs(found - y).mean() < 0.5 * noise.mean()


@pytest.mark.parametrize("bits", [8, (4, 4)])
@pytest.mark.parametrize("norm", [True, False])
def test_integers_that_were_trained(bits: Any, norm: bool, tmp_path: Path) -> None:
    """Scales from quantization-aware training; a grid of fewer than 8 bits ends where it ended."""
    minidl.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5),
    )  # fmt: skip
    x = minidl.randn(40, 3, 16, 16)
    qat = prepare_qat(model, bits, batches=1)
    qat(x[:20] / 2)  # so that some of x is beyond the grid
    quantized = quantize(convert(qat), [x])
    export(quantized, x[:2], tmp_path / "q.onnx")
    (found,) = run(str(tmp_path / "q.onnx"), x.numpy())
    y, rough = quantized(x).numpy(), convert(qat)(x).numpy()
    assert np.abs(found - y).mean() < 0.1 * np.abs(rough - y).mean()


def test_integers_of_few_bits_and_layers_that_stay_float(tmp_path: Path) -> None:
    """Learned steps of 4 bits, whose largest integer is 15; and a float layer among the others."""
    model, shape, images = network("resnet8")
    qat = prepare_qat(model, bits=4, learned=True)
    with minidl.no_grad():
        for _ in range(2):
            qat(minidl.randn(16, *shape))
    batches = [minidl.randn(16, *shape)]
    few = quantize(convert(qat), batches)
    assert "minimum" in {step.op for step in few.graph.steps}  # type: ignore[union-attr]
    for quantized in (few, quantize(model, batches, skip=["layer2.0.conv2", "avgpool"])):
        export(quantized, images[:2], tmp_path / "q.onnx")
        y = quantized(images).numpy()
        (found,) = run(str(tmp_path / "q.onnx"), images.numpy())
        assert np.abs(found - y).mean() <= 0.01 * np.abs(y).max()
