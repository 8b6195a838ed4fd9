"""`dynamic_quantize_linear` and the layer on it against ONNX Runtime, to the bit."""

from __future__ import annotations

import numpy as np
import pytest

from minidl.ops.quantized import dynamic_quantize_linear, linear_dynamic

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def test_onnx_runtime_finds_the_same_bytes_and_sums() -> None:
    from onnx import TensorProto, helper

    def info(name: str, kind: int, shape: list[object]) -> object:
        return helper.make_tensor_value_info(name, kind, shape)

    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
        helper.make_node("MatMulInteger", ["q", "w", "zero"], ["sum"]),
    ]
    inputs = [info("x", TensorProto.FLOAT, [None, 30]), info("w", TensorProto.INT8, [30, 5])]
    outputs = [
        info("q", TensorProto.UINT8, [None, 30]),
        info("scale", TensorProto.FLOAT, []),
        info("zero", TensorProto.UINT8, []),
        info("sum", TensorProto.INT32, [None, 5]),
    ]
    graph = helper.make_graph(nodes, "dynamic", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    rng = np.random.default_rng(0)
    for i in range(300):
        x = rng.normal(rng.integers(-2, 3), 1, (rng.integers(1, 9), 30))
        x = (x * 10.0 ** rng.integers(-9, 9) * (i > 0)).astype("f")
        w = rng.integers(-127, 128, (5, 30)).astype(np.int8)
        *expected, total = session.run(None, {"x": x, "w": w.T.copy()})
        found = dynamic_quantize_linear(x)
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype and np.array_equal(a, b)
        w_scale = np.ones(5, np.float32)
        real = total.astype("f") * expected[1]
        assert np.array_equal(linear_dynamic(x, w, w_scale, None), real)
