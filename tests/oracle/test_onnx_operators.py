"""The operators on integers against ONNX's own test cases and against ONNX Runtime."""

from __future__ import annotations

import itertools
import re
import warnings
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper
from onnx.backend.test.case.node import collect_testcases

from minidl.onnx import operators

NAMES = {
    "QuantizeLinear": "quantize_linear",
    "DequantizeLinear": "dequantize_linear",
    "DynamicQuantizeLinear": "dynamic_quantize_linear",
    "QLinearConv": "qlinear_conv",
    "QLinearMatMul": "qlinear_matmul",
    "ConvInteger": "conv_integer",
    "MatMulInteger": "matmul_integer",
}
OTHER_TYPES = re.compile("e4m3|e5m2|int4|int2|e2m1|blocked")  # not of 8 bits, or scales in blocks


def ours(op: str, inputs: Any, attributes: dict[str, Any]) -> tuple[Any, ...]:
    y = getattr(operators, NAMES[op])(*inputs, **attributes)
    return y if isinstance(y, tuple) else (y,)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    CASES = [case for case in collect_testcases(None)
             if case.model is not None and len(case.model.graph.node) == 1
             and case.model.graph.node[0].op_type in NAMES
             and not OTHER_TYPES.search(case.name)]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_of_onnx(case: Any) -> None:
    (node,) = case.model.graph.node
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    for inputs, outputs in case.data_sets:
        found = ours(node.op_type, inputs, attributes)
        for y, expected in zip(found, outputs, strict=True):
            assert y.dtype == expected.dtype and y.shape == expected.shape
            tolerance = 1e-6 if y.dtype.kind == "f" else 0
            np.testing.assert_allclose(y, expected, rtol=tolerance)


def test_no_case_is_left_out() -> None:
    found = {case.model.graph.node[0].op_type for case in CASES}
    assert found == NAMES.keys() and len(CASES) >= 20


# ONNX Runtime -----------------------------------------------------------------------------


def runtime(op: str, inputs: Any, attributes: dict[str, Any]) -> Any:
    """What ONNX Runtime makes of one node, without its optimizations."""
    names = ["" if x is None else f"x{i}" for i, x in enumerate(inputs)]
    outputs = ["y", "scale", "zero"] if op == "DynamicQuantizeLinear" else ["y"]
    node = helper.make_node(op, names, outputs, **attributes)
    given = {name: x for name, x in zip(names, inputs) if name}
    types = [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
             for n, x in given.items()]  # fmt: skip
    results = [onnx.ValueInfoProto(name=name) for name in outputs]
    graph = helper.make_graph([node], "g", types, results)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return onnxruntime.InferenceSession(model.SerializeToString()).run(outputs, given)


def bytes_of(rng: np.random.Generator, dtype: Any, *shape: int) -> np.ndarray:
    limits = np.iinfo(dtype)
    return np.asarray(rng.integers(limits.min, limits.max + 1, shape), dtype)


def agree(op: str, inputs: Any, **attributes: Any) -> None:
    for y, expected in zip(ours(op, inputs, attributes), runtime(op, inputs, attributes)):
        assert y.dtype == expected.dtype and y.shape == expected.shape
        np.testing.assert_array_equal(y, expected)


GEOMETRY: list[dict[str, Any]] = [
    {},
    {"pads": (1, 1, 1, 1)},
    {"pads": (0, 2, 1, 0), "strides": (2, 1)},
    {"group": 2, "strides": (2, 2), "pads": (1, 0, 1, 0)},
    {"dilations": (2, 1), "pads": (1, 1, 1, 1), "kernel_shape": (3, 2)},
    {"auto_pad": "SAME_UPPER", "strides": (2, 2)},
    {"auto_pad": "SAME_LOWER"},
    {"auto_pad": "VALID", "group": 4},
]
TYPES = list(itertools.product(("uint8", "int8"), repeat=2))


@pytest.mark.parametrize("how", GEOMETRY, ids=str)
@pytest.mark.parametrize("of_x, of_w", TYPES)
@pytest.mark.parametrize("per_channel", [False, True])
def test_convolutions(how: dict[str, Any], of_x: str, of_w: str, per_channel: bool) -> None:
    rng = np.random.default_rng(len(str(how)))
    x = bytes_of(rng, of_x, 2, 8, 7, 6)
    w = bytes_of(rng, of_w, 8, 8 // how.get("group", 1), 3, 2)
    x_zero, w_zero = bytes_of(rng, of_x), bytes_of(rng, of_w)
    if per_channel:
        w_zero = np.full(8, w_zero)  # ONNX Runtime takes no others, in QLinearConv
    if (of_x, of_w) == ("uint8", "uint8") or not per_channel:
        agree("ConvInteger", [x, w, x_zero, w_zero.reshape(-1)[:1]], **how)
    if of_x == "int8" and of_w == "uint8":
        return  # ONNX Runtime has no QLinearConv of these
    scales = np.float32(0.02), rng.uniform(0.001, 0.02, 8).astype("f"), np.float32(0.7)
    w_scale = scales[1] if per_channel else scales[1][0]
    y_zero, bias = bytes_of(rng, of_x), rng.integers(-9000, 9000, 8).astype(np.int32)
    for B in (None, bias):
        given = [x, scales[0], x_zero, w, w_scale, w_zero, scales[2], y_zero, B]
        agree("QLinearConv", [None if v is None else np.asarray(v) for v in given], **how)


@pytest.mark.parametrize("of_a, of_b", TYPES)
@pytest.mark.parametrize(
    "a_shape, b_shape",
    [((5, 7), (7, 6)), ((2, 3, 5, 7), (7, 6)), ((2, 5, 7), (2, 7, 6)), ((3, 1, 5, 7), (2, 7, 6))],
)
def test_matrix_products(of_a: str, of_b: str, a_shape: Any, b_shape: Any) -> None:
    rng = np.random.default_rng(sum(a_shape))
    a, b = bytes_of(rng, of_a, *a_shape), bytes_of(rng, of_b, *b_shape)
    a_zero, b_zero = bytes_of(rng, of_a), bytes_of(rng, of_b)
    columns = bytes_of(rng, of_b, 6) if b.ndim == 2 else np.tile(
        bytes_of(rng, of_b, 2, 1, 6), (1, 1, 1))  # fmt: skip
    for zeros in ([None, None], [a_zero, b_zero], [a_zero, columns]):
        agree("MatMulInteger", [a, b, *zeros])
    if (of_a, of_b) == ("int8", "uint8"):
        return  # ONNX Runtime has no QLinearMatMul of these
    a_scale, b_scale, y_scale = (np.asarray(s, "f") for s in (0.02, 0.015, 1.3))
    y_zero = bytes_of(rng, of_a)
    agree("QLinearMatMul", [a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero])
    b_scales = rng.uniform(0.01, 0.02, columns.shape).astype("f")
    agree("QLinearMatMul", [a, a_scale, a_zero, b, b_scales, columns, y_scale, y_zero])


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_between_floats_and_integers(dtype: str) -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=3000) * 20, np.arange(-300, 300) / 2]).astype("f")
    x = np.concatenate([x, [1e30, -1e30, np.inf, -np.inf]]).astype("f").reshape(4, -1, 1)
    for scale, zero in ((np.float32(1), 0), (np.float32(0.037), 100), (np.float32(1e-20), 7)):
        given = [x, np.asarray(scale), np.asarray(zero, dtype)]
        agree("QuantizeLinear", given)
        q = ours("QuantizeLinear", given, {})[0]
        agree("DequantizeLinear", [q, *given[1:]])
        agree("DequantizeLinear", [q, given[1], None])
    scales, zeros = rng.uniform(0.1, 1, 4).astype("f"), bytes_of(rng, dtype, 4)
    agree("QuantizeLinear", [x, scales, zeros], axis=0)
    agree("QuantizeLinear", [x, scales, zeros], axis=-3)
    agree("DequantizeLinear", [bytes_of(rng, dtype, 3, 4), scales, zeros], axis=1)
    agree("DequantizeLinear", [rng.integers(-(2**30), 2**30, 9).astype("i"), np.asarray(0.1, "f")])
    agree("QuantizeLinear", [x, np.asarray(0.3, "f"), None])


@pytest.mark.parametrize("low, high", [(-3, 5), (1, 5), (-5, -1), (0, 0), (-1e-30, 1e-3)])
def test_dynamic(low: float, high: float) -> None:
    x = np.random.default_rng(0).uniform(low, high, (7, 9)).astype("f")
    agree("DynamicQuantizeLinear", [x])
