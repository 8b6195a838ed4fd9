"""Networks that ONNX Runtime quantized: imported as integers, and computed as ONNX Runtime does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from minidl.onnx import export, load
from minidl.quantization import Quantized
from tests.oracle.test_onnx_export import network, run


class Batches(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, images: np.ndarray) -> None:
        self.batches: Iterator[Any] = iter(np.split(images, 5))

    def get_next(self) -> Any:
        batch = next(self.batches, None)
        return None if batch is None else {"input": batch}


@pytest.mark.parametrize("of", ["QUInt8", "QInt8"])
@pytest.mark.parametrize("per_channel", [True, False], ids=["per channel", "per tensor"])
@pytest.mark.parametrize("name", ["cnn", "lenet", "resnet8", "resnet20"])
def test_integer_networks_of_others(name: str, per_channel: bool, of: str, tmp_path: Path) -> None:
    """Every product is one of integers, and the scores are ONNX Runtime's but for a few roundings
    that tip over; with batch norms folded by ONNX Runtime, or here."""
    model, _, images = network(name)
    export(model, images[:2], tmp_path / "m.onnx")
    quant_pre_process(str(tmp_path / "m.onnx"), str(tmp_path / "folded.onnx"))
    for file in ("folded", "m"):
        quantize_static(
            str(tmp_path / f"{file}.onnx"), str(tmp_path / "q.onnx"), Batches(images.numpy()),
            per_channel=per_channel, activation_type=QuantType[of], weight_type=QuantType.QInt8,
        )  # fmt: skip
        quantized = load(tmp_path / "q.onnx")
        assert isinstance(quantized, Quantized)
        ops = [step.op for step in quantized.graph.steps]
        assert not {"conv2d", "linear", "matmul", "add"}.intersection(ops)
        (found,) = run(str(tmp_path / "q.onnx"), images.numpy())
        y = quantized(images).numpy()
        noise = np.abs(found - model(images).numpy())
        assert np.abs(y - found).max() <= 0.02 * np.abs(found).max()
        assert (y == found).mean() > 0.7 and np.abs(y - found).mean() < 0.5 * noise.mean()
