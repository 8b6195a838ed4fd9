"""Imported operators on ONNX's own test cases, each of them also with its inputs as constants."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.backend.test.case.node import collect_testcases

import minidl
from minidl.onnx import load
from minidl.onnx.load import LAYERS
from minidl.tensor import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    CASES: dict[str, list[Any]] = {op: [] for op in LAYERS}
    for case in collect_testcases(None):
        if case.model is not None and len(case.model.graph.node) == 1:
            CASES.get(case.model.graph.node[0].op_type, []).append(case)

# What cannot be: types that NumPy lacks, lists, maxima of nothing.
OTHERS = ("e4m3", "e5m2", "int4", "int2", "e2m1", "e8m0", "blocked", "identity_sequence",
          "identity_opt", "empty_set")  # fmt: skip
# Of these there is no case with float32 and a single output: tests/test_onnx.py has some.
ELSEWHERE = ("Cast", "CastLike", "LayerNormalization", "Not", "Constant")


def computed(case: Any, path: Path, constants: bool) -> None:
    """Compare; the inputs after the first may be constants of the file."""
    content = onnx.ModelProto()
    content.CopyFrom(case.model)
    inputs, outputs = case.data_sets[0]
    if constants:
        names = [v.name for v in content.graph.input][1:]
        for name, value in zip(names, inputs[1:], strict=True):
            content.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
        del content.graph.input[1:]
        inputs = inputs[:1]
        content.ir_version = max(content.ir_version, 4)
    onnx.save(content, path)
    model = load(path)
    with minidl.no_grad():
        found = model(*(Tensor(np.asarray(x)) for x in inputs))
    found = found if isinstance(found, tuple) else (found,)
    for y, expected in zip(found, outputs, strict=True):
        y = y.numpy() if isinstance(y, Tensor) else np.asarray(y)
        assert y.shape == expected.shape and y.dtype == expected.dtype
        np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("op", [op for op in LAYERS if op not in ELSEWHERE])
def test_of_onnx(op: str, tmp_path: Path) -> None:
    """Right, or refused with the node's name; and right at least once."""
    right = 0
    for case in CASES[op]:
        if any(part in case.name for part in OTHERS):
            continue
        for constants in (False, True):
            try:
                computed(case, tmp_path / "m.onnx", constants)
            except ValueError as error:
                assert "cannot be imported" in str(error) or "convert it with" in str(error)
            except Exception as error:
                error.add_note(case.name)
                raise
            else:
                right += 1
    assert right
