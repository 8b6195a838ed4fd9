"""Imported operators on ONNX's own test cases, each of them also with its inputs as constants."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.backend.test.case.node import collect_testcases

import minidl
from minidl.onnx import load
from minidl.onnx.load import LAYERS
from minidl.tensor import Tensor
from minidl.trace import trace
from tests.test_onnx import RECURRENT, words

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    CASES: dict[str, list[Any]] = {op: [] for op in [*LAYERS, "several"]}
    for case in collect_testcases(None):
        ops = {node.op_type for node in case.model.graph.node} if case.model else {""}
        if ops <= LAYERS.keys():
            CASES["several" if len(case.model.graph.node) > 1 else ops.pop()].append(case)

# Of these all cases have several outputs, are older than what is read, or have the other kind of
# reset gate: tests/test_onnx.py.
ELSEWHERE = ("LayerNormalization", "Not", "GRU")
# The operators of integer networks: nothing of them is refused, but for other types.
WHOLE = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear")


def array(x: Any) -> Any:
    return onnx.numpy_helper.to_array(x) if isinstance(x, onnx.TensorProto) else x


def computed(case: Any, path: Path, constants: bool) -> None:
    """Compare; the inputs after the first may be constants of the file."""
    content = onnx.ModelProto()
    content.CopyFrom(case.model)
    inputs, outputs = ([array(x) for x in values] for values in case.data_sets[0])
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


@pytest.mark.parametrize("op", [op for op in CASES if op not in ELSEWHERE])
def test_of_onnx(op: str, tmp_path: Path) -> None:
    """Right, or refused with the node's name; and right at least once."""
    right, refused = 0, []
    for case in CASES[op]:
        for constants in (False, True):
            try:
                computed(case, tmp_path / "m.onnx", constants)
            except ValueError as error:
                if "cannot be imported" not in str(error) and "convert it with" not in str(error):
                    raise
                refused.append(str(error))
            except Exception as error:
                error.add_note(case.name)
                raise
            else:
                right += 1
    print(f"{op}: {right} right, {len(refused)} refused", *sorted({*refused}), sep="\n    ")
    assert right
    assert op not in WHOLE or not refused
    other = [why for why in refused if "type" not in why and "block_size" not in why]
    assert op not in ("QuantizeLinear", "DequantizeLinear") or not other


class Words(torch.nn.Module):
    def __init__(self, kind: Any, **how: Any) -> None:
        super().__init__()
        self.table, self.rnn = torch.nn.Embedding(9, 5), kind(5, 4, 2, batch_first=True, **how)
        self.out = torch.nn.Linear(8 if how.get("bidirectional") else 4, 3)

    def forward(self, words: Any) -> Any:
        y, last = self.rnn(self.table(words))
        return (self.out(y[:, -1]), y, *(last if isinstance(last, tuple) else (last,)))


@pytest.mark.parametrize("kind, how", RECURRENT)
def test_recurrent_networks_of_pytorch(kind: Any, how: Any, tmp_path: Path) -> None:
    """Whose states to start from are computed from the batch's size; also traced."""
    torch.manual_seed(0)
    model = Words(getattr(torch.nn, kind.__name__), **how).eval()
    some, x = (torch.tensor(words(n).numpy()) for n in (2, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (some,), str(tmp_path / "m.onnx"), dynamo=False, input_names=["x"],
            dynamic_axes={"x": {0: "n"}},
        )  # fmt: skip
    again = load(tmp_path / "m.onnx")
    graph = trace(again, words(2))
    for f in (again, graph):
        for ours, theirs in zip(f(words(5)), model(x), strict=True):
            np.testing.assert_allclose(ours.numpy(), theirs.detach().numpy(), rtol=1e-5, atol=1e-6)
