"""Products of integers whose scale is found when the numbers come; weights of 8 and of 4 bits in
linear, convolutional and recurrent layers and embeddings."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

import minidl
from minidl import models, nn
from minidl.captioning import Captioner, Encoder, ShowAndTell, ShowAttend, Vocabulary, convolutions
from minidl.nn.utils.rnn import pack_padded_sequence
from minidl.ops.narrow import pack_int4, unpack_int4
from minidl.ops.quantized import dynamic_quantize_linear
from minidl.quantization import fuse, prepare_qat, quantize
from minidl.quantization.dynamic import DynamicConv2d, DynamicLinear
from minidl.quantization.int4 import Int4Embedding, Int4Linear
from minidl.quantization.recurrent import RECURRENT
from minidl.tensor import Tensor
from tests.nn_cases import CASES, Case, convert, draw, flat

WAYS: dict[str, dict[str, Any]] = {
    "dynamic": {"scheme": "dynamic"},
    "int8": {"scheme": "weight_only"},
    "int4": {"scheme": "weight_only", "dtype": "int4"},
    "float16": {"scheme": "weight_only", "dtype": "float16"},
}
LEAST = {"dynamic": 30, "int8": 35, "int4": 12, "float16": 60}  # signal to noise, in decibels
ways = pytest.mark.parametrize("way", WAYS)


def snr(exact: Any, found: Any) -> float:
    noise = ((exact - found) ** 2).mean()
    return float(10 * np.log10((exact**2).mean() / noise)) if noise else np.inf


# The numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [-3.0, 0.0, 3.0, 1e-3])
def test_all_of_x_is_covered_and_0_is_exact(shift: float) -> None:
    x = (np.random.default_rng(0).normal(size=(40, 7)) + shift).astype("f")
    q, scale, zero = dynamic_quantize_linear(x)
    assert q.dtype == zero.dtype == np.uint8 and scale.dtype == np.float32
    assert q.min() == 0 or x.min() > 0
    assert q.max() == 255 or x.max() < 0
    # rounded once, and the zero point too: by at most half a step each
    assert np.abs((q.astype(int) - zero) * np.float64(scale) - x).max() <= 1.001 * scale
    assert dynamic_quantize_linear(np.zeros(3, "f"))[1:] == (1, 0)
    assert dynamic_quantize_linear(np.full(3, 1e-44, "f"))[1] > 0
    assert dynamic_quantize_linear(np.zeros((0, 3), "f"))[0].shape == (0, 3)


def test_a_linear_layer_is_exact() -> None:
    """Against Python's integers; only the last two steps are float32's."""
    minidl.manual_seed(0)
    layer: Any = quantize(nn.Linear(50, 6), scheme="dynamic")
    assert type(layer) is DynamicLinear
    x = minidl.randn(2, 3, 50)
    found = layer(x).numpy()
    low, high = min(x.numpy().min(), 0), max(x.numpy().max(), 0)
    scale = np.float32(high - low) / np.float32(255)
    zero = round(float(-low / scale))
    for i in np.ndindex(2, 3, 6):
        q = [min(max(round(float(v / scale)) + zero, 0), 255) - zero for v in x.numpy()[i[:2]]]
        total = sum(a * int(b) for a, b in zip(q, layer.weight.numpy()[i[2]], strict=True))
        real = np.float32(total) * (scale * layer.scale.numpy()[i[2]]) + layer.bias.numpy()[i[2]]
        assert found[i] == real
    assert np.array_equal(layer(x[0, 0]).numpy(), layer(x[:1, :1]).numpy()[0, 0])


def recurrence(layer: Any, x: Any, state: list[Any]) -> Any:
    """One layer, step by step, in NumPy; the products are the layer's."""

    def gates(h: Any) -> Any:
        hh = layer.weight_hh_l0(Tensor(h)).numpy() + layer.bias_hh_l0.numpy()
        return np.split(hh, layer.gates, axis=1)

    def sigmoid(v: Any) -> Any:
        return 1 / (1 + np.exp(-v))

    ih = layer.weight_ih_l0(x.reshape((-1, x.shape[2]))).numpy() + layer.bias_ih_l0.numpy()
    h, out = state[0], []
    for step in ih.reshape(*x.shape[:2], -1):
        a, b = np.split(step, layer.gates, axis=1), gates(h)
        if isinstance(layer, nn.LSTM):
            i, f, g, o = (p + q for p, q in zip(a, b))
            state[1] = sigmoid(f) * state[1] + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(state[1])
        elif isinstance(layer, nn.GRU):
            r, z = sigmoid(a[0] + b[0]), sigmoid(a[1] + b[1])
            h = (1 - z) * np.tanh(a[2] + r * b[2]) + z * h
        else:
            h = np.tanh(a[0] + b[0])
        out.append(h)
    return np.stack(out)


@ways
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_step_by_step(kind: Any, way: str) -> None:
    minidl.manual_seed(0)
    layer: Any = quantize(kind(5, 8), **WAYS[way])
    x = minidl.randn(6, 3, 5)
    expected = recurrence(layer, x, [np.zeros((3, 8), "f") for _ in range(2)])
    np.testing.assert_allclose(layer(x)[0].numpy(), expected, atol=2e-3 * (way == "dynamic") + 1e-6)


@ways
@pytest.mark.parametrize("cell, kind", [("LSTMCell", nn.LSTM), ("GRUCell", nn.GRU)])
def test_a_cell_is_one_step(cell: str, kind: Any, way: str) -> None:
    minidl.manual_seed(0)
    float_cell, layer = getattr(nn, cell)(5, 8), kind(5, 8)
    layer.load_state_dict({name + "_l0": v for name, v in float_cell.state_dict().items()})
    x = minidl.randn(3, 5)
    one, other = (flat(quantize(m, **WAYS[way])(i)) for m, i in
                  ((float_cell, x), (layer, x.unsqueeze(0))))  # fmt: skip
    for a, b in zip(one, other[1:], strict=True):
        assert np.array_equal(a.numpy(), b.numpy()[0])


@ways
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_every_layer(case: Case, way: str) -> None:
    """Near the float layer; or refused by name."""
    layer: Any = case.make(nn).eval()
    inputs = convert(draw(case.inputs, np.random.default_rng(0)), lambda a: minidl.tensor(
        a.astype("float32") if a.dtype.kind == "f" else a))  # fmt: skip
    narrow = (nn.Linear, nn.Embedding, *RECURRENT) + (nn.Conv2d,) * (way == "dynamic")
    if not any(type(module) in narrow for module in layer.modules()):
        matrix = any(p.ndim > 1 for p in layer.parameters()) and way == "dynamic"
        words = "has no int8 form: leave it in float" if matrix else r"has no nn\.Linear"
        with pytest.raises(ValueError, match=rf"{type(layer).__name__} .*{words}"):
            quantize(layer, **WAYS[way])
        return
    before = {name: v.numpy().copy() for name, v in layer.state_dict().items()}
    small: Any = quantize(layer, None, **WAYS[way])
    outputs = flat(small(*inputs))
    for exact, found in zip(flat(layer(*inputs)), outputs, strict=True):
        assert exact.shape == found.shape and found.dtype == np.float32
        assert snr(exact.numpy(), found.numpy()) > LEAST[way]
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        for a, b in zip(flat(other(*inputs)), outputs, strict=True):
            assert np.array_equal(a.numpy(), b.numpy())
    assert all(np.array_equal(v.numpy(), before[name]) for name, v in layer.state_dict().items())


@ways
def test_sequences_of_unequal_length(way: str) -> None:
    """What lies behind a sequence's end is no matter."""
    minidl.manual_seed(0)
    lstm = nn.LSTM(5, 8, 2, bidirectional=True)
    x, lengths = minidl.randn(6, 3, 5), Tensor(np.array([6, 4, 1]))
    packed, ends = lstm(pack_padded_sequence(x, lengths))
    small = quantize(lstm, **WAYS[way])
    small_packed, small_ends = small(pack_padded_sequence(x, lengths))
    found = small_packed.data.numpy()
    for a, b in zip((packed.data, *ends), (small_packed.data, *small_ends), strict=True):
        assert snr(a.numpy(), b.numpy()) > LEAST[way]
    x.array[4:, 1] = x.array[1:, 2] = 1e6
    again = small(pack_padded_sequence(x, lengths))[0].data.numpy()
    assert np.array_equal(again, found)


# Networks ---------------------------------------------------------------------------------


def test_convolutions_with_and_without_batch_norm() -> None:
    minidl.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding="same"), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, (2, 3), stride=2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4),
    )  # fmt: skip
    x = minidl.randn(5, 3, 8, 8) + 1
    for _ in range(3):
        model(x)
    exact = model.eval()(x).numpy()
    for network in (model, fuse(model)):
        small: Any = quantize(network, scheme="dynamic")
        assert snr(exact, small(x).numpy()) > 30
        assert type(small[3]) is DynamicConv2d and small[3].weight.dtype == np.int8
        assert np.array_equal(small[0](x[0]).numpy(), small[0](x[:1]).numpy()[0])
        assert not any(p.requires_grad for p in small.parameters())
    kinds = {len(np.unique(quantize(model, per_channel=p, scheme="dynamic")[0].scale.numpy()))
             for p in (True, False)}  # type: ignore[index] # fmt: skip
    assert kinds == {1, 8}
    few: Any = quantize(model, scheme="dynamic", weight_bits=3)
    assert np.abs(few[0].weight.numpy()).max() == 3


WORDS = Vocabulary.build(["a small red star", "two blue dogs above a cat"])
CAPTIONS = ["a cat", "two small red dogs above a blue star", "a dogs", "red"]


def captioner(decoder: Any, **how: Any) -> Captioner:
    minidl.manual_seed(0)
    model = Captioner(Encoder(convolutions((8, 16))), decoder(WORDS, 18, 32, 24, **how))
    for parameter in model.decoder.parameters():  # sure of what it says
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=1.5 / parameter.shape[1] ** 0.5)
    return model.eval()


@ways
@pytest.mark.parametrize(
    "decoder, how",
    [(ShowAndTell, {"cell": "lstm"}), (ShowAttend, {"cell": "lstm", "layers": 2}),
     (ShowAndTell, {"cell": "gru"}), (ShowAttend, {"cell": "rnn"})],
)  # fmt: skip
def test_a_captioner(decoder: Any, how: Any, way: str, tmp_path: Any) -> None:
    """Captions and likelihoods of four images; there and back through a file."""
    model = captioner(decoder, **how)
    images = minidl.rand(4, 3, 16, 16)
    exact = model.log_likelihood(images, CAPTIONS)
    small: Any = quantize(model, None, **WAYS[way])
    found = small.log_likelihood(images, CAPTIONS)
    bound = {"dynamic": 0.05, "int8": 0.05, "int4": 0.5, "float16": 1e-3}[way]
    np.testing.assert_allclose(found, exact, rtol=bound)
    assert np.array_equal(model.log_likelihood(images, CAPTIONS), exact)
    said = [small.generate(images, beam, max_length=6) for beam in (1, 3)]
    assert all(len(captions) == 4 for captions in said)

    minidl.save(small.state_dict(), tmp_path / "small.safetensors")
    again: Any = quantize(captioner(decoder, **how).requires_grad_(False), None, **WAYS[way])
    for buffer in again.buffers():
        buffer.array[...] = 1
    again.load_state_dict(minidl.load(tmp_path / "small.safetensors"))
    assert np.array_equal(again.log_likelihood(images, CAPTIONS), found)
    decoders = [
        sum(v.array.nbytes for v in m.decoder.state_dict().values()) for m in (model, small)
    ]
    share = {"dynamic": 0.33, "int8": 0.33, "int4": 0.26, "float16": 0.55}[way]
    assert decoders[1] < share * decoders[0]


# Four bits --------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 6, 7])
def test_two_numbers_in_a_byte(columns: int) -> None:
    q = np.random.default_rng(0).integers(-8, 8, (5, columns)).astype(np.int8)
    packed = pack_int4(q)
    assert packed.shape == (5, -(-columns // 2)) and packed.dtype == np.uint8
    for i, row in enumerate(q):
        pairs = [*row.tolist(), 0][: 2 * packed.shape[1]]
        for k in range(packed.shape[1]):
            assert packed[i, k] == pairs[2 * k] % 16 + 16 * (pairs[2 * k + 1] % 16)
    assert np.array_equal(unpack_int4(packed, columns), q)


@pytest.mark.parametrize("size", [1, 4, 9, 33, None, 100])
def test_groups_of_four_bits(size: int | None) -> None:
    minidl.manual_seed(0)
    layer, table = nn.Linear(33, 6), nn.Embedding(6, 33)
    table.weight.array[...] = layer.weight.array
    x = minidl.randn(2, 4, 33)
    small: Any = quantize(layer, scheme="weight_only", dtype="int4", group_size=size)
    rows: Any = quantize(table, scheme="weight_only", dtype="int4", group_size=size)
    assert type(small) is Int4Linear and type(rows) is Int4Embedding
    w, step = layer.weight.numpy(), np.zeros((6, 33))
    for start in range(0, 33, size or 33):
        part = slice(start, start + (size or 33))
        step[:, part] = np.abs(w[:, part]).max(axis=1, keepdims=True) / 7
    stored = rows(Tensor(np.arange(6))).numpy()
    assert (np.abs(stored - w) <= 0.501 * step).all()
    expected = x.numpy() @ stored.T + layer.bias.numpy()
    np.testing.assert_allclose(small(x).numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(small(x[0, 0]).numpy(), expected[0, 0], atol=1e-5)
    index = Tensor(np.array([[1, 0], [5, 1]]))
    assert np.array_equal(rows(index).numpy(), stored[index.numpy()])
    x.requires_grad_()
    small(x).sum().backward()
    assert np.allclose(x.grad.numpy(), stored.sum(0), atol=1e-5)


def test_groups_keep_an_outlier_to_themselves() -> None:
    minidl.manual_seed(0)
    layer = nn.Linear(256, 16)
    layer.weight.array[:, 0] *= 20
    x = minidl.randn(8, 256)
    found = [snr(layer(x).numpy(), quantize(layer, scheme="weight_only", dtype="int4",
                                            group_size=size)(x).numpy())
             for size in (32, None)]  # fmt: skip
    assert found[0] > found[1] + 6


# Refusals ---------------------------------------------------------------------------------


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(minidl.rand(3, 3))

    def forward(self, x: Any) -> Any:
        return x @ self.table


def test_refusals() -> None:
    model = nn.Sequential(nn.Linear(3, 3), Odd(), nn.ConvTranspose2d(1, 1, 2))
    wide, broken = nn.Sequential(nn.Linear(70_000, 1)), nn.LSTM(3, 4)
    broken.weight_hh_l0.array[2] = np.nan
    calls: list[tuple[Any, str]] = [
        (lambda: quantize(model, scheme="dynamic"), r"Odd '1' has no int8 form: .* skip=\['1'\]"),
        (lambda: quantize(model, scheme="dynamic", skip=["1"]), "ConvTranspose2d '2' has no int8"),
        (lambda: quantize(prepare_qat(model[0]), scheme="dynamic"), "QATLinear '' has no int8"),  # type: ignore[arg-type]
        (lambda: quantize(model, scheme="dynamic", skip=["1", "2", "fc"]), "has no layer 'fc'"),
        (lambda: quantize(model, scheme="weight_only", skip=["fc"]), "has no layer 'fc'"),
        (lambda: quantize(model, scheme="dynamic", dtype="int4"), "dynamic scheme makes int8"),
        (lambda: quantize(model, scheme="dynamic", weight_bits=1), "from 2 to 8"),
        (lambda: quantize(model, scheme="weight_only", dtype="int4", group_size=0), "at least 1"),
        (lambda: quantize(nn.ReLU(), scheme="dynamic"), r"ReLU has no nn\.Linear, nn\.Conv2d"),
        (lambda: quantize(wide, scheme="dynamic"), "70000 products may not fit in 32 bits"),
        (lambda: quantize(broken, scheme="dynamic"), "row 2 of weight is not finite"),
        (lambda: quantize(broken, scheme="weight_only", dtype="int4"), "row 2 of weight is not"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message) as error:
            call()
        if "row 2" in message:
            assert error.value.__notes__ == ["in weight_hh_l0", "in layer 'LSTM'"]
    small: Any = quantize(model, scheme="dynamic", skip=["1", "2"])
    assert type(small[0]) is DynamicLinear and type(small[1]) is Odd
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="no scale in float32 fits them"):
            small[0](Tensor(np.array([[1, bad, 0]], "f")))
    for layer in (small[0], quantize(model[0], scheme="weight_only", dtype="int4")):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"takes \(\.\.\., 3\), got \(2, 4\)"):
            layer(minidl.rand(2, 4))
    conv = quantize(nn.Conv2d(3, 4, 1), scheme="dynamic")
    with pytest.raises(ValueError, match=r"takes \(N, 3, H, W\), got \(2, 4, 5, 5\)"):
        conv(minidl.rand(2, 4, 5, 5))


def test_values_of_nothing() -> None:
    """Zeros only, and no rows at all."""
    model: Any = quantize(models.get("cnn"), scheme="dynamic")
    float_model = models.get("cnn")
    assert np.isfinite(model(minidl.zeros(2, 1, 28, 28)).numpy()).all()
    assert model(minidl.zeros(0, 1, 28, 28)).shape == float_model(minidl.zeros(0, 1, 28, 28)).shape
