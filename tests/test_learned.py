"""From quantization-aware training to integers: the scales are those that were trained with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import minidl
import minidl.nn.functional as F
from minidl import nn
from minidl.quantization import convert, fuse, prepare_qat, quantize
from tests.test_qat import HOW, batch, fit, trained_a_little
from tests.test_quantize import snr


def products(small: Any) -> list[Any]:
    return [s for s in small.graph.steps if s.op in ("conv_integer", "matmul_integer")]


def factor(norm: Any, n: int) -> Any:
    """What a batch norm multiplies its channels by."""
    if norm is None:
        return np.ones(n)
    return norm.weight.numpy() / np.sqrt(norm.running_var.numpy() + norm.eps, dtype=np.float64)


def layers_and_norms(model: Any) -> list[tuple[Any, Any]]:
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)] or [None, None]
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return list(zip(layers, [*norms, None], strict=True))


def whole_biases(qat: Any) -> Any:
    """Biases that are whole multiples of their sums' units, as they have to be in integers."""
    for layer, norm in layers_and_norms(qat):
        a = factor(norm, len(layer.weight))
        scale = layer.weight_fake_quantize.grid(layer.weight).scale
        unit = layer.input_fake_quantize.grid().scale.astype(np.float64) * scale * np.abs(a)
        target, bias = (layer.bias, layer.bias.numpy() * 1.0) if norm is None else (
            norm.bias, (layer.bias.numpy() - norm.running_mean.numpy()) * a + norm.bias.numpy()
        )  # fmt: skip
        target.array[...] += np.rint(bias / unit) * unit - bias
    return qat


@pytest.mark.parametrize("how", [*HOW, {"learned": True}])
@pytest.mark.parametrize("norm", [False, True])
def test_integers_as_they_were_trained(how: dict[str, Any], norm: bool) -> None:
    """The integer network is the trained one, and nothing of it is calibrated."""
    qat: Any = trained_a_little(norm, **how).eval()
    if norm:
        qat[1].weight.array[:3] *= -1
    model = convert(whole_biases(qat))
    x, _ = batch(300)
    small: Any = quantize(model, [x[:2] * 0 + 99])  # batches that would give absurd ranges
    constants = {ref: v.numpy() for ref, v in small.graph.constants.items()}
    for (layer, after), step in zip(layers_and_norms(model), products(small), strict=True):
        q, zero = constants[step.inputs[1]], constants[step.inputs[2]]
        q = q.T if step.op == "matmul_integer" else q
        assert zero == layer.input_grid.zero_point
        shape = (-1, *[1] * (q.ndim - 1))
        scale = np.broadcast_to(layer.weight_grid.scale, len(q)).reshape(shape)
        a = np.sign(factor(after, len(q))).reshape(shape)
        assert np.array_equal((a * q * scale).astype(np.float32), layer.weight.numpy())
    first = small.graph.steps[0]
    assert first.op == "quantize_linear"
    assert constants[first.inputs[1]] == layers_and_norms(model)[0][0].input_grid.scale
    exact, found = qat(x).numpy(), small(x).numpy()
    # a sum that lies on the edge of two steps may fall to either side; else they are the same
    off = np.abs(exact - found).max(axis=1) / np.abs(exact).max()
    assert (off < 1e-5).mean() > 0.8 and snr(exact, found) > 40
    assert (exact.argmax(1) == found.argmax(1)).mean() > 0.99


@pytest.mark.parametrize("groups", [None, [["0", "1"], ["3", "4"]]])
@pytest.mark.parametrize("how", [{"bits": 4}, {"learned": True, "per_channel": False}])
def test_batch_norms_folded_before(how: dict[str, Any], groups: Any) -> None:
    """`fuse` gives the same integers as `quantize` does by itself, ReLU included."""
    model: Any = convert(trained_a_little(True, **how))
    model[1].weight.array[:3] *= -1
    x, _ = batch(100)
    small, other = (quantize(m, [x]) for m in (model, fuse(model, groups)))
    found, again = (
        [small.graph.constants[s.inputs[1]].numpy() for s in products(small)]
        for small in (small, other)
    )
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))
    np.testing.assert_allclose(other(x).numpy(), small(x).numpy(), atol=1e-2)


class Branches(nn.Module):
    """A value that products read in grids of their own, beside an addition that reads it all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = nn.Conv2d(1, 6, 3, padding=1), nn.MaxPool2d(2)
        self.a, self.b = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.fc = nn.Linear(6, 10)

    def forward(self, x: Any) -> Any:
        x = F.relu(self.stem(x))
        x = F.relu(self.a(x) + self.b(x)) + x
        return self.fc(F.adaptive_avg_pool2d(self.pool(x), 1).flatten(1))


@pytest.mark.parametrize("how", [{"bits": (8, 4)}, {"bits": (4, 8), "learned": True}])
@pytest.mark.parametrize("apart", [0, 1 / 8])
def test_a_value_that_several_read(how: dict[str, Any], apart: float) -> None:
    minidl.manual_seed(0)
    qat: Any = fit(prepare_qat(fit(Branches(), 1, 3e-3), batches=3, **how), 1, 1e-3)
    for i, fake in enumerate((qat.a.input_fake_quantize, qat.b.input_fake_quantize)):
        fake.scale.array[...] *= 1 + i * apart  # as training might leave them
    x, _ = batch(300)
    small: Any = quantize(convert(qat), [x])
    exact, found = qat(x).numpy(), small(x).numpy()
    assert snr(exact, found) > (20 if "learned" not in how else 25)
    narrow = [step.output for step in small.graph.steps if step.op == "minimum"]
    assert len(narrow) == ((4 if apart else 3) if how["bits"][1] == 4 else 0)
    for step in small.graph.steps:  # what was not rounded in training has all 8 bits
        assert step.op != "add_integer" or not set(narrow) & set(step.inputs)
    constants = {ref: v.numpy() for ref, v in small.graph.constants.items()}
    scales = {float(constants[s.inputs[1]]) for s in small.graph.steps if s.op == "quantize_linear"}
    assert scales >= {float(np.abs(fake.scale.item())) for fake in
                      (qat.stem.input_fake_quantize, qat.a.input_fake_quantize,
                       qat.b.input_fake_quantize)}  # fmt: skip


def test_a_sum_too_long_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 70_000), nn.ReLU(), nn.Linear(70_000, 1))
    with pytest.raises(ValueError, match="70000 products may not fit in 32 bits") as error:
        quantize(model, [minidl.rand(2, 3)])
    assert error.value.__notes__ == ["in layer '2': leave it in float with skip="]
    assert quantize(model, [minidl.rand(2, 3)], skip=["2"])


def test_what_was_not_trained_is_calibrated_and_equalising_is_refused() -> None:
    x, _ = batch()
    model = convert(trained_a_little())
    with pytest.raises(ValueError, match="leave the scales that the network was trained with"):
        quantize(model, [x], equalize=True)
    longer = nn.Sequential(*model, nn.ReLU(), nn.Linear(10, 10))
    small: Any = quantize(longer, [x], bias_correction=True)
    assert snr(longer(x).numpy(), small(x).numpy()) > 15
    skipped: Any = quantize(model, [x], skip=["3"])
    assert "conv2d" in [step.op for step in skipped.graph.steps]
    assert snr(model(x).numpy(), skipped(x).numpy()) > 15
