"""Quantization-aware training: what is rounded and when, what remains, and that it helps."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

import minidl
import minidl.nn.functional as F
from minidl import nn, optim
from minidl.data import DataLoader, Digits
from minidl.quantization import convert, fuse, prepare_qat
from minidl.quantization.qat import Grid, QATConv2d, QATLinear

HOW: list[dict[str, Any]] = [
    {}, {"bits": 4, "per_channel": False}, {"bits": (4, 8), "observer": "mse"},
    {"bits": 3, "learned": True}, {"bits": (2, 4), "learned": True, "per_channel": False},
]  # fmt: skip
every_how = pytest.mark.parametrize("how", HOW)


def network(norm: bool = False) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16) if norm else nn.Identity(), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


def batch(n: int = 64) -> tuple[Any, Any]:
    return next(iter(DataLoader(Digits(), n)))


def fit(model: nn.Module, epochs: int, lr: float) -> nn.Module:
    minidl.manual_seed(0)
    optimizer = optim.Adam(model.parameters(), lr)
    model.train()
    for _ in range(epochs):
        for x, y in DataLoader(Digits(), 64, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


def trained_a_little(norm: bool = False, **how: Any) -> nn.Module:
    minidl.manual_seed(1)
    return fit(prepare_qat(fit(network(norm), 1, 3e-3), batches=5, **how), 1, 1e-3)


def layers_of(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def to_grid(x: Any, grid: Grid) -> np.ndarray:
    """The nearest numbers of a grid with one scale; written down anew."""
    q = np.rint(x / grid.scale) + int(grid.zero_point)
    return (np.clip(q, grid.quant_min, grid.quant_max) - int(grid.zero_point)) * grid.scale


@every_how
def test_converted_weights_lie_on_the_grid(how: dict[str, Any]) -> None:
    model = convert(trained_a_little(**how))
    bits = how.get("bits", 8)
    of_weights, of_inputs = bits if isinstance(bits, tuple) else (bits, bits)
    for layer in layers_of(model):
        assert type(layer) in (nn.Conv2d, nn.Linear)
        grid, w = layer.weight_grid, layer.weight.numpy()
        assert grid.scale.shape == ((len(w),) if how.get("per_channel", True) else ())
        scale = grid.scale.reshape(grid.scale.shape + (1,) * (w.ndim - grid.scale.ndim))
        q = np.rint(w / scale)
        np.testing.assert_array_equal(w, q * scale)
        assert -(2 ** (of_weights - 1)) <= grid.quant_min <= q.min()
        assert q.max() <= grid.quant_max == 2 ** (of_weights - 1) - 1
        assert len(np.unique(q)) > 2
        assert (layer.input_grid.quant_min, layer.input_grid.quant_max) == (0, 2**of_inputs - 1)
        assert layer.input_grid.zero_point.dtype == np.uint8
    pickle.loads(pickle.dumps(model))


@every_how
@pytest.mark.parametrize("norm", [False, True])
def test_what_was_trained_is_what_is_converted(how: dict[str, Any], norm: bool) -> None:
    """In eval mode: the converted layers, with their inputs rounded to the grids kept."""
    qat = trained_a_little(norm, **how)
    model = convert(qat)
    for layer in layers_of(model):
        layer.register_forward_pre_hook(
            lambda m, args: (minidl.tensor(to_grid(args[0].numpy(), m.input_grid)),)
        )
    x, _ = batch()
    with minidl.no_grad():
        np.testing.assert_allclose(model(x).numpy(), qat(x).numpy(), atol=1e-5)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("learned", [True, False])
def test_a_batch_norm_can_be_folded_afterwards(per_channel: bool, learned: bool) -> None:
    """The same integers, with a scale for each channel that is the old one times a_j."""
    model = convert(trained_a_little(True, bits=4, per_channel=per_channel, learned=learned))
    folded = fuse(model)
    for i in (0, 3):
        conv, norm = model.get_submodule(str(i)), model.get_submodule(str(i + 1))
        a = norm.weight.numpy() / np.sqrt(norm.running_var.numpy() + norm.eps)  # type: ignore
        scale = (conv.weight_grid.scale * a)[:, None, None, None]  # type: ignore[operator]
        before = conv.weight.numpy() * a[:, None, None, None] / scale  # type: ignore[operator]
        after = folded.get_submodule(str(i)).weight.numpy() / scale  # type: ignore[operator]
        np.testing.assert_allclose(after, np.rint(before), atol=1e-4)


def test_inputs_are_observed_then_frozen() -> None:
    model = network()
    x, _ = batch()
    qat = prepare_qat(model, bits=2, batches=2)
    first = qat.get_submodule("0").input_fake_quantize
    with pytest.raises(RuntimeError, match="no input was observed yet"):
        qat.eval()(x)
    with pytest.raises(RuntimeError, match="no input was observed yet"):
        convert(qat)
    qat.train()(x)
    scale = first.scale.item()
    assert scale == pytest.approx(x.numpy().max() / 3) and first.batches_left.item() == 1
    qat.eval()(x * 5)  # evaluation observes nothing
    assert first.scale.item() == scale
    qat.train()(x * 2)
    assert first.scale.item() == 2 * scale and first.batches_left.item() == 0
    qat(x * 100)
    assert first.scale.item() == 2 * scale
    # a checkpoint has the ranges
    again = prepare_qat(model, bits=2, batches=2)
    again.load_state_dict(qat.state_dict())
    np.testing.assert_array_equal(again.eval()(x).numpy(), qat.eval()(x).numpy())


def test_inputs_pass_as_they_are_while_observed() -> None:
    linear = nn.Linear(30, 5)
    qat = prepare_qat(linear, bits=(8, 2), batches=1)
    assert isinstance(qat, QATLinear)
    x = minidl.tensor(np.random.default_rng(0).normal(size=(4, 30)).astype(np.float32))
    w = qat.weight_fake_quantize(linear.weight).numpy()
    np.testing.assert_allclose(qat(x).numpy(), x.numpy() @ w.T + linear.bias.numpy(), atol=1e-5)
    rounded = to_grid(x.numpy(), qat.input_fake_quantize.grid())
    assert len(np.unique(rounded)) <= 4
    np.testing.assert_allclose(qat(x).numpy(), rounded @ w.T + linear.bias.numpy(), atol=1e-5)


def test_the_gradient_goes_straight_through_to_the_weights() -> None:
    linear = nn.Linear(30, 5)
    qat = prepare_qat(linear, bits=2, batches=1)
    x = minidl.tensor(np.random.default_rng(0).normal(size=(4, 30)).astype(np.float32))
    qat(x)
    g = np.random.default_rng(1).normal(size=(4, 5)).astype(np.float32)
    qat(x).backward(minidl.tensor(g))
    rounded = to_grid(x.numpy(), qat.input_fake_quantize.grid())
    np.testing.assert_allclose(qat.weight.grad.numpy(), g.T @ rounded, atol=1e-5)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("per_channel", [True, False])
def test_learned_steps(signed: bool, per_channel: bool) -> None:
    """Where they begin (Esser et al. 2020, section 2.1), and their gradients (section 2.2)."""
    linear = nn.Linear(30, 5)
    qat: Any = prepare_qat(linear, bits=4, learned=True, per_channel=per_channel)
    x = np.random.default_rng(0).normal(size=(4, 30)).astype(np.float32)
    x = x if signed else abs(x)
    qat(minidl.tensor(x))
    of_input, of_weight = qat.input_fake_quantize, qat.weight_fake_quantize
    low, high = (-8, 7) if signed else (0, 15)
    assert of_input.grid().zero_point == (8 if signed else 0)
    assert of_input.scale.item() == pytest.approx(2 * abs(x).mean() / high**0.5, rel=1e-5)
    w, b = linear.weight.numpy(), linear.bias.numpy()
    mean = abs(w).mean(axis=1) if per_channel else abs(w).mean()
    np.testing.assert_allclose(of_weight.scale.numpy(), 2 * mean / 7**0.5, rtol=1e-5)

    y = qat(minidl.tensor(x))
    g = np.random.default_rng(1).normal(size=(4, 5)).astype(np.float32)
    y.backward(minidl.tensor(g))
    s, t = of_input.scale.item(), of_weight.scale.numpy().reshape(-1, 1)
    v, u = x / s, w / t
    rounded_x, rounded_w = np.clip(np.rint(v), low, high), np.clip(np.rint(u), -8, 7)
    np.testing.assert_allclose(y.numpy(), rounded_x * s @ (rounded_w * t).T + b, atol=1e-4)
    to_s = np.where(rounded_x == np.rint(v), rounded_x - v, rounded_x)
    to_t = np.where(rounded_w == np.rint(u), rounded_w - u, rounded_w)
    expected = (g @ (rounded_w * t) * to_s).sum() / (30 * high) ** 0.5
    assert of_input.scale.grad.item() == pytest.approx(expected, rel=1e-3)
    parts = g.T @ (rounded_x * s) * to_t
    expected = parts.sum(1) / (30 * 7) ** 0.5 if per_channel else parts.sum() / (150 * 7) ** 0.5
    np.testing.assert_allclose(of_weight.scale.grad.numpy(), expected, rtol=1e-3, atol=1e-5)


def test_a_learned_step_stays_positive() -> None:
    qat: Any = prepare_qat(nn.Linear(3, 2), bits=4, learned=True)
    x = minidl.ones(2, 3)
    qat(x)
    with minidl.no_grad():
        qat.input_fake_quantize.scale.mul_(-1)
        qat.weight_fake_quantize.scale.mul_(0)
    assert np.isfinite(qat(x).numpy()).all()
    model: Any = convert(qat)
    assert model.input_grid.scale > 0 and (model.weight_grid.scale > 0).all()


def test_the_float_model_is_untouched_and_names_stay() -> None:
    model = network(norm=True).eval()
    before = copy.deepcopy(model.state_dict())
    qat = prepare_qat(model, bits=4)
    assert qat.training and not model.training
    assert [type(m) for m in layers_of(qat)] == [QATConv2d, QATConv2d, QATLinear]
    fit(qat, 1, 1e-2)
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), before[name].numpy())
    assert set(before) < set(qat.state_dict())
    assert set(convert(qat).state_dict()) == set(before)


def test_bad_input() -> None:
    model = network()
    for bits in (1, 9, (8, 16), (0, 8)):
        with pytest.raises(ValueError, match="bits must be an integer from 2 to 8"):
            prepare_qat(model, bits=bits)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="observer must be one of minmax, percentile"):
        prepare_qat(model, observer="max")
    with pytest.raises(ValueError, match="batches must be at least 1"):
        prepare_qat(model, batches=0)
    with pytest.raises(ValueError, match="ReLU has no Conv2d or Linear"):
        prepare_qat(nn.ReLU())
    with pytest.raises(ValueError, match="no Conv2d or Linear"):
        prepare_qat(prepare_qat(model))
    with pytest.raises(ValueError, match="no layer that prepare_qat made"):
        convert(model)
    with pytest.raises(ValueError, match="NaN"):
        prepare_qat(model)(minidl.tensor(np.full((1, 1, 8, 8), np.nan, np.float32)))


def test_it_helps() -> None:
    """Digits in 4 bits: at most 2 points below floats trained as long, better than rounding."""
    x, y = next(iter(DataLoader(Digits(train=False), 360)))
    images, _ = batch(len(Digits()))

    @minidl.no_grad()
    def accuracy(model: nn.Module) -> float:
        return 100 * float((model.eval()(x).argmax(dim=1) == y).float().mean().item())

    def calibrated(model: nn.Module) -> nn.Module:
        model(images)  # and no step
        return model

    floats, rounded, trained = [], [], []
    for seed in range(3):
        minidl.manual_seed(seed)
        model = fuse(fit(network(norm=True), 8, 3e-3), [["0", "1"], ["3", "4"]])
        floats.append(accuracy(fit(copy.deepcopy(model), 3, 1e-3)))
        rounded.append(accuracy(calibrated(prepare_qat(model, 4, per_channel=False))))
        trained.append(accuracy(fit(prepare_qat(model, 4, per_channel=False), 3, 1e-3)))
    assert np.mean(trained) > np.mean(rounded)
    assert np.mean(trained) >= np.mean(floats) - 2
    two_bits = [prepare_qat(model, 2, per_channel=False, learned=learned) for learned in (0, 1)]
    assert accuracy(calibrated(two_bits[0])) < 60 < 80 < accuracy(fit(two_bits[1], 3, 1e-3))
