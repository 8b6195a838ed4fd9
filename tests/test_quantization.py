"""Layers with narrow weights: what they compute, and that they pack their weights once."""

from __future__ import annotations

import copy
import pickle
import sys
from typing import Any

import numpy as np
import pytest

import minidl
from minidl import nn
from minidl.backend.native import native
from minidl.ops.quantized import pack_linear
from minidl.quantization import WeightOnlyLinear, weight_only

DTYPES = ["int8", "float16", "bfloat16"]
# half a step of the narrow numbers, relative to the largest weight of a row or to the weight itself
STEP = {"int8": 0.5 / 127, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@pytest.fixture
def x() -> Any:
    return minidl.from_numpy(np.random.default_rng(0).standard_normal((3, 40), np.float32))


def stored(layer: WeightOnlyLinear) -> Any:
    w = layer.weight.array.astype(np.float64)
    return w if layer.scale is None else w * layer.scale.array[:, None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_of_the_rounded_weights(x: Any, dtype: str, bias: bool) -> None:
    linear = nn.Linear(40, 7, bias)
    layer = WeightOnlyLinear.from_float(linear, dtype)
    w = linear.weight.array.astype(np.float64)
    assert layer.weight.array.dtype.name == dtype
    assert (
        np.abs(stored(layer) - w) <= 1.001 * STEP[dtype] * np.abs(w).max(1, keepdims=True)
    ).all()
    expected = x.array @ stored(layer).T + (linear.bias.array if bias else 0)
    for given in (x, x.reshape((1, 3, 1, 40)), x[0]):
        assert (
            np.abs(layer(given).numpy().reshape(-1, 7) - expected[: given.numel() // 40]).max()
            < 1e-5
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_passes_through(x: Any, dtype: str) -> None:
    layer = WeightOnlyLinear.from_float(nn.Linear(40, 7), dtype)
    x.requires_grad_()
    layer(x).sum().backward()
    assert np.allclose(x.grad.numpy(), stored(layer).sum(0), atol=1e-5)


@pytest.mark.skipif(native is None, reason="the C++ kernels are not built")
def test_weights_are_packed_once(x: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = WeightOnlyLinear.from_float(nn.Linear(40, 7), "int8")
    packings = []

    def pack(w: Any) -> Any:
        packings.append(w)
        return pack_linear(w)

    module = sys.modules[WeightOnlyLinear.__module__]
    monkeypatch.setattr(module, "pack_linear", pack)
    before = layer(x).numpy()
    layer(x)
    assert len(packings) == 1
    # in place, by a checkpoint, in another array: each time the new weights count
    layer.weight.mul_(-1)
    assert np.allclose(layer(x).numpy() - layer.bias.array, layer.bias.array - before, atol=1e-5)
    state = {name: t.numpy().copy() for name, t in layer.state_dict().items()}
    layer.load_state_dict({**state, "weight": np.zeros_like(state["weight"])})
    assert np.allclose(layer(x).numpy(), layer.bias.array)
    layer.weight = minidl.Tensor(state["weight"])
    assert np.allclose(layer(x).numpy() - layer.bias.array, layer.bias.array - before, atol=1e-5)
    assert len(packings) == 4
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert np.array_equal(other(x).numpy(), layer(x).numpy())
    with minidl.use("linear_weight_only", "formula"):  # which wants the weights themselves
        assert np.allclose(
            layer(x).numpy() - layer.bias.array, layer.bias.array - before, atol=1e-5
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model(x: Any, dtype: str, tmp_path: Any) -> None:
    shared = nn.Linear(40, 40)
    model = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared, nn.Dropout()), nn.Linear(40, 5))
    narrow = weight_only(model, dtype)
    assert not narrow.training and model.training  # type: ignore[truthy-function]
    assert narrow[0] is narrow[2][0] and type(model[0]) is nn.Linear  # type: ignore[index]
    model.eval()
    assert np.abs(narrow(x).numpy() - model(x).numpy()).max() < 0.02
    bytes_before = sum(p.numel() * 4 for p in model.parameters())
    assert sum(b.array.nbytes for b in narrow.buffers()) < bytes_before * 0.6
    minidl.save(narrow.state_dict(), tmp_path / "narrow.safetensors")
    again = weight_only(nn.Sequential(*[copy.deepcopy(m) for m in model]), dtype)
    for buffer in again.buffers():
        buffer.array[...] = 0
    again.load_state_dict(minidl.load(tmp_path / "narrow.safetensors"))
    assert np.array_equal(again(x).numpy(), narrow(x).numpy())


def test_a_row_of_zeros_or_of_subnormal_numbers(x: Any) -> None:
    linear = nn.Linear(40, 3, bias=False)
    with minidl.no_grad():
        linear.weight.array[0], linear.weight.array[1] = 0, 1e-42
    y = WeightOnlyLinear.from_float(linear)(x).numpy()
    assert (y[:, 0] == 0).all() and np.isfinite(y).all()


def test_bad_input() -> None:
    linear = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="int8, float16, bfloat16, got 'int4'"):
        weight_only(linear, "int4")
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        weight_only(nn.Sequential(nn.ReLU()))
    linear.weight.array[1, 2] = 1e5
    with pytest.raises(ValueError, match="too large for float16"):
        weight_only(linear, "float16")
    linear.weight.array[1, 2] = np.nan
    with pytest.raises(ValueError, match="row 1 of weight is not finite") as error:
        weight_only(nn.Sequential(nn.ReLU(), linear))
    assert error.value.__notes__ == ["in layer '1'"]
