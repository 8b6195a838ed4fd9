"""Networks with weights of 16 bits: what they compute, and what becomes of them on disk."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

import minidl
from minidl import models, nn
from minidl.quantization import half
from minidl.quantization.half import LAYERS
from minidl.tensor import Tensor
from tests.nn_cases import CASES, Case, convert, draw, flat

dtypes = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])


def rounded(model: nn.Module, dtype: str) -> nn.Module:
    """In float32, with the weights that a half network has: what it has to compute."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        for _, p in module._own_parameters():
            if type(module) in LAYERS and p.ndim > 1:
                p.array = p.array.astype(np.dtype(dtype)).astype(np.float32)
    return model


def same(a: Any, b: Any, bound: float = 1e-5) -> bool:
    pairs = list(zip(flat(a), flat(b), strict=True))
    return all(x.dtype == y.dtype == np.float32 for x, y in pairs) and all(
        np.abs(x.numpy() - y.numpy()).max() <= bound * max(1, np.abs(y.numpy()).max())
        for x, y in pairs
    )


class Everything(nn.Module):
    """Layers of all families, and a table that is the last layer's weight too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32)
        self.embed, self.lstm = nn.Embedding(500, 64), nn.LSTM(64, 64, 2, bidirectional=True)
        self.cell, self.norm = nn.GRUCell(128, 64), nn.LayerNorm(64)
        self.out = nn.Linear(64, 500)
        self.out.weight = self.embed.weight

    def forward(self, images: Tensor, words: Tensor) -> Tensor:
        seen = self.bn(self.conv(images)).mean(dim=(2, 3))
        h, _ = self.lstm(self.embed(words))
        logits: Tensor = self.out(self.norm(self.cell(h[-1], minidl.cat([seen, seen], dim=1))))
        return logits


def something() -> tuple[Tensor, Tensor]:
    words = np.random.default_rng(0).integers(0, 500, (5, 4))
    return minidl.randn(4, 3, 8, 8), Tensor(words)


@dtypes
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_every_layer(case: Case, dtype: str) -> None:
    """It computes what float32 computes with the rounded weights; or is refused by name."""
    layer: Any = case.make(nn)
    if not any(type(module) in LAYERS for module in layer.modules()):
        with pytest.raises(ValueError, match=rf"{type(layer).__name__} has no nn\.Linear, "):
            half(layer)
        return
    arrays = draw(case.inputs, np.random.default_rng(0))
    inputs = convert(
        arrays, lambda a: minidl.tensor(a.astype("float32") if a.dtype.kind == "f" else a)
    )
    before = [p.numpy().copy() for p in layer.parameters()]
    narrow, outputs = half(layer, dtype), rounded(layer, dtype)(*inputs)
    assert same(narrow(*inputs), outputs)
    for other in (copy.deepcopy(narrow), pickle.loads(pickle.dumps(narrow))):
        assert same(other(*inputs), outputs, 0)
    assert all((a == p.numpy()).all() for a, p in zip(before, layer.parameters(), strict=True))
    if inputs[0].is_floating_point():  # for FGSM
        inputs[0].requires_grad_()
        g, expected = (
            minidl.grad(flat(model(*inputs))[0].square().sum(), inputs[0])
            for model in (narrow, rounded(layer, dtype))
        )
        assert same(g, expected)


@dtypes
@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet8", "everything"])
def test_a_network(name: str, dtype: str, tmp_path: Any) -> None:
    """Its answers, its size, and there and back through a file."""
    model: Any = Everything() if name == "everything" else models.get(name, in_channels=1)
    inputs = something() if name == "everything" else (minidl.randn(4, 1, 28, 28),)
    with minidl.no_grad():
        model(*inputs)  # statistics of batch norm that are not 0 and 1
    narrow = half(model, dtype)
    outputs = narrow(*inputs)
    assert same(outputs, rounded(model, dtype)(*inputs))
    assert not narrow.training and model.training
    assert not outputs.requires_grad and all(p.requires_grad for p in model.parameters())
    assert {b.dtype.name for n, b in narrow.named_buffers() if "weight" in n} == {dtype}
    assert all(p.dtype == np.float32 for p in narrow.parameters())

    paths = [tmp_path / "float.safetensors", tmp_path / "half.safetensors"]
    for network, path in zip((model, narrow), paths, strict=True):
        minidl.save(network.state_dict(), path)
    assert paths[1].stat().st_size < 0.51 * paths[0].stat().st_size
    state = minidl.load(paths[1])
    again = half(Everything() if name == "everything" else models.get(name, in_channels=1), dtype)
    again.load_state_dict(state)
    assert same(again(*inputs), outputs, 0)
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        with pytest.raises(RuntimeError, match="running_mean"):
            model.load_state_dict(state)
        return
    model.load_state_dict(state)  # the names are the same, so it fits the float32 network too
    assert same(model.eval()(*inputs), outputs)


def test_what_two_layers_share_stays_one(tmp_path: Any) -> None:
    conv = nn.Conv2d(1, 1, 3, padding=1)
    narrow: Any = half(nn.Sequential(conv, nn.ReLU(), conv, nn.Sequential(conv)))
    assert narrow[0] is narrow[2] is narrow[3][0]
    tied: Any = half(Everything())
    assert tied.embed.weight is tied.out.weight


def test_what_is_narrow_is_printed() -> None:
    text = repr(half(Everything(), "bfloat16"))
    assert "HalfConv2d(3, 32, kernel_size=(3, 3), stride=(1, 1), dtype=bfloat16)" in text
    assert "HalfLSTM(64, 64, num_layers=2, bidirectional=True, dtype=bfloat16)" in text
    assert "(bn): ScaleShift(32)" in text and "(norm): LayerNorm(" in text


def test_rounding() -> None:
    """Half to even; what is too small for float16 becomes a subnormal or 0."""
    layer = nn.Linear(6, 1, bias=False)
    values = [1 + 2**-11, 1 + 3 * 2**-11, 2**-24, 2**-25, 65504, 1e-3]
    layer.weight.array[0] = values
    found = half(layer).weight.array[0].tolist()
    assert found == [1, 1 + 2**-9, 2**-24, 0, 65504, float(np.float16(1e-3))]
    layer.weight.array[0, 4] = 3e38
    assert half(layer, "bfloat16").weight.array[0, 4] == np.float32(3e38).astype("bfloat16")


def test_bad_input() -> None:
    model = models.get("cnn")
    for dtype in ("int8", "float32", np.float64):
        with pytest.raises(ValueError, match="must be float16 or bfloat16, got"):
            half(model, dtype)
    with pytest.raises(ValueError, match=r"LayerNorm has no nn\.Linear, nn\.BatchNorm1d"):
        half(nn.LayerNorm(3))
    norm = half(nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match=r"ScaleShift takes \(N, 3, \.\.\.\), got \(2, 4, 1, 1\)"):
        norm(minidl.zeros(2, 4, 1, 1))
    weight: Any = model.conv2.weight  # type: ignore[union-attr]
    weight.array[3, 1, 0, 2] = -65520
    with pytest.raises(ValueError, match="a weight of 65520 is too large for float16") as error:
        half(model)
    assert error.value.__notes__ == ["in layer 'conv2'"]
    assert np.isfinite(half(model, "bfloat16").eval()(minidl.randn(1, 1, 28, 28)).numpy()).all()
    weight.array[3, 1, 0, 2] = np.nan
    with pytest.raises(ValueError, match="row 3 of weight is not finite") as error:
        half(model, "bfloat16")
    assert error.value.__notes__ == ["in layer 'conv2'"]
