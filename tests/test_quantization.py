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
from minidl.ops.narrow import pack_linear
from minidl.quantization import (
    ConvReLU2d,
    WeightOnlyLinear,
    fuse,
    half,
    quantize,
    weight_only,
)

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


@pytest.mark.parametrize(
    "scheme, dtype",
    [("weight_only", "int8"), ("weight_only", "int4"), ("dynamic", "int8"), ("half", "float16"),
     ("half", "bfloat16")],
)  # fmt: skip
def test_a_batch_of_nothing(scheme: str, dtype: str) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    model = half(model, dtype) if scheme == "half" else quantize(model, dtype=dtype, scheme=scheme)
    assert model(minidl.zeros(0, 8)).shape == (0, 2)


def test_bad_input() -> None:
    linear = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="int4, int8, float16, bfloat16, got 'int2'"):
        weight_only(linear, "int2")
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        weight_only(nn.Sequential(nn.ReLU()))
    linear.weight.array[1, 2] = 1e5
    with pytest.raises(ValueError, match="too large for float16"):
        weight_only(linear, "float16")
    linear.weight.array[1, 2] = np.nan
    with pytest.raises(ValueError, match="row 1 of weight is not finite") as error:
        weight_only(nn.Sequential(nn.ReLU(), linear))
    assert error.value.__notes__ == ["in layer '1'"]


# Layers as one ----------------------------------------------------------------------------


def chain() -> nn.Sequential:
    minidl.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8),
        nn.Sequential(nn.Conv2d(8, 4, 1, stride=2), nn.ReLU()),
        nn.ReLU(), nn.Flatten(), nn.Linear(36, 2),
    )  # fmt: skip
    for _ in range(3):  # statistics that are not 0 and 1
        model(minidl.randn(4, 3, 8, 8) * 2 + 1)
    return model


def test_fused_layers_compute_the_same() -> None:
    model, x = chain(), minidl.randn(2, 3, 8, 8)
    before = [p.numpy().copy() for p in model.parameters()]
    one = fuse(model)
    kinds = [type(layer).__name__ for layer in one.modules()]
    assert kinds.count("ConvReLU2d") == 2 and "BatchNorm2d" not in kinds
    assert type(one[6]) is nn.ReLU and not one.training  # type: ignore[index]
    assert model.training and all(
        (a == p.numpy()).all() for a, p in zip(before, model.parameters())
    )
    model.eval()
    assert np.abs(one(x).numpy() - model(x).numpy()).max() < 1e-5
    assert np.array_equal(one[0](x[0]).numpy(), one[0](x).numpy()[0])  # type: ignore[index]
    pickled = pickle.loads(pickle.dumps(one))
    assert np.array_equal(pickled(x).numpy(), one(x).numpy())
    x.requires_grad_()
    (g,) = minidl.grad(one(x).sum(), x)
    (expected,) = minidl.grad(model(x).sum(), x)
    assert np.abs(g.numpy() - expected.numpy()).max() < 1e-5


def test_groups_by_name() -> None:
    from minidl import models

    model = models.resnet8()
    for _ in range(2):
        model(minidl.randn(4, 3, 32, 32) + 1)
    names = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    pairs = [[name.replace("bn", "conv"), name] for name in names if "bn" in name]
    one, x = fuse(model, pairs), minidl.randn(2, 3, 32, 32)
    model.eval()
    assert np.abs(one(x).numpy() - model(x).numpy()).max() < 1e-4
    assert len(list(one.buffers())) < len(list(model.buffers()))


def test_layers_used_twice_stay() -> None:
    conv = nn.Conv2d(3, 3, 1)
    model, x = nn.Sequential(conv, nn.ReLU(), conv), minidl.randn(1, 3, 4, 4)
    assert not any(isinstance(m, ConvReLU2d) for m in fuse(model).modules())
    with pytest.raises(ValueError, match="used twice"):
        fuse(model, [["0", "1"]])
    assert np.array_equal(fuse(model)(x).numpy(), model(x).numpy())


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([["0", "9"]], "no layer '9'"),
        ([["0", "2", "1"]], "Conv2d, ReLU, BatchNorm2d: a group is"),
        ([["0"]], "a group is"),
        ([["8", "6"]], "Linear, ReLU"),
        ([["0", "1"], ["0", "2"]], "Identity"),
    ],
)
def test_groups_that_cannot_be_fused(groups: list[list[str]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fuse(chain(), groups)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(5))
    with pytest.raises(ValueError, match="has 5 channels, 0 gives 4"):
        fuse(model)
