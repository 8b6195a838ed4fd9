"""Whole networks in int8: exact to the bit against plain loops, near the float ones, honest."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import minidl
import minidl.nn.functional as F
from minidl import models, nn
from minidl.backend.native import native
from minidl.quantization import Quantized, quantize
from minidl.quantization.static import fold
from minidl.trace import resolve, trace
from tests import oracles, registry


def snr(exact: Any, found: Any) -> float:
    """In decibels."""
    noise = ((exact - found) ** 2).mean()
    return float(10 * np.log10((exact**2).mean() / noise))


class Residual(nn.Module):
    """Everything that has a form on integers, small enough for plain loops."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.pool = nn.MaxPool2d(2)
        self.conv3 = nn.Conv2d(4, 6, 1)
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Linear(6, 5)
        self.fc2 = nn.Linear(5, 3)

    def forward(self, x: Any) -> Any:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.conv2(x) + x)
        x = self.conv3(self.pool(x))
        x = self.mean(F.relu(x + x.flip(3)) if x.shape[1] == 0 else x).flatten(1)
        return self.fc2(F.relu(self.fc1(x)))


@pytest.fixture
def residual() -> Any:
    minidl.manual_seed(3)
    model = Residual()
    for buffer in model.buffers():
        if buffer.ndim:
            buffer.array[...] = np.random.default_rng(0).uniform(0.5, 1.5, buffer.shape)
    return model


BATCHES = [minidl.from_numpy(np.random.default_rng(i).normal(size=(4, 2, 6, 6)).astype("f"))
           for i in range(3)]  # fmt: skip


assert "conv_integer" in registry.oracles.LOOPS  # which the registry has filled


def half_to_even(y: Any) -> int:
    return int(np.rint(y))


def by_loops(op: str, given: list[Any], how: dict[str, Any]) -> Any:
    """An op on integers in Python's numbers; products with a scale are rounded to float32."""
    if op == "quantize_linear":
        x, scale, zero = given
        q = [np.clip(half_to_even(v / scale) + int(zero), 0, 255) for v in x.ravel()]
        return np.array(q, np.uint8).reshape(x.shape)
    if op in ("conv_integer", "matmul_integer"):
        x, w, x_zero, _, scale, bias, zero = given
        relu = how.pop("relu")
        sums = oracles.LOOPS[op](x, w, x_zero, None, None, None, None, relu=False, **how)
        y = np.zeros(sums.shape, np.float32 if zero is None else np.uint8)
        for i in np.ndindex(y.shape):
            channel = i[1]
            total = int(sums[i]) + (0 if bias is None else int(bias[channel]))
            real = np.float32(total) * np.float32(scale[channel if scale.size > 1 else 0])
            if zero is None:
                y[i] = max(real, 0) if relu else real
            else:
                y[i] = np.clip(half_to_even(real) + int(zero), int(zero) if relu else 0, 255)
        return y
    if op == "add_integer":
        a, b, a_scale, b_scale, a_zero, b_zero, zero = given
        y = np.zeros(a.shape, np.uint8)
        for i in np.ndindex(y.shape):
            left = np.float32(int(a[i]) - int(a_zero)) * a_scale
            real = left + np.float32(int(b[i]) - int(b_zero)) * b_scale
            low = int(zero) if how["relu"] else 0
            y[i] = np.clip(half_to_even(real) + int(zero), low, 255)
        return y
    if op == "adaptive_avg_pool2d_integer":
        x, scale, x_zero, zero = given
        y = np.zeros((*x.shape[:2], 1, 1), np.uint8)
        for n, c in np.ndindex(x.shape[:2]):
            total = sum(int(v) - int(x_zero) for v in x[n, c].ravel())
            real = np.float32(total) * (scale / np.float32(x[n, c].size))
            y[n, c] = np.clip(half_to_even(real) + int(zero), 0, 255)
        return y
    if op == "reshape":
        return given[0].reshape(how["shape"])
    if op == "max_pool2d":
        n, c, h, w = given[0].shape
        return given[0].reshape(n, c, h // 2, 2, w // 2, 2).max(axis=(3, 5))
    raise AssertionError(op)


@pytest.mark.parametrize("per_channel", [True, False])
def test_the_integers_are_those_of_plain_loops(residual: Any, per_channel: bool) -> None:
    model = quantize(residual, BATCHES, per_channel=per_channel)
    assert isinstance(model, Quantized)
    graph, x = model.graph, BATCHES[1][:3]
    values = {ref: tensor.numpy() for ref, tensor in graph.constants.items()}
    values[graph.inputs[0]] = x.numpy()
    found: list[Any] = []
    graph.run([x], lambda step, given, y: found.append(y.numpy()))
    for step, y in zip(graph.steps, found, strict=True):
        given = [values.get(v, v) if isinstance(v, tuple) else v for v in step.inputs]
        values[step.output] = by_loops(step.op, given, resolve(step.settings, len(x)))
        np.testing.assert_array_equal(y, values[step.output], err_msg=step.op)
    np.testing.assert_array_equal(model(x).numpy(), values[graph.output])
    between = {y.dtype.name for y in found[:-1]}
    assert between == {"uint8"}  # from layer to layer there are bytes only


@pytest.mark.parametrize("skip", [(), ("conv3",)])
def test_bare_calls_give_what_the_graph_gives(residual: Any, skip: Any) -> None:
    """Also after something was changed: the batch size, a weight, the kernel, the input's dtype."""
    model: Any = quantize(residual, BATCHES, skip=skip)
    x = BATCHES[1]

    def same(net: Any, x: Any) -> Any:
        y = net(x).numpy()
        np.testing.assert_array_equal(y, model.graph.run([x], constants=model.constants()).numpy())
        if net.program.takes([x]):  # (where a call failed, the graph would have stepped in)
            np.testing.assert_array_equal(net.program.run([x]).numpy(), y)
        return y

    first = [same(model, batch) for batch in (x, x[:1], x[:0], x)][-1]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    weight = getattr(model, model.names[model.graph.steps[1].inputs[1]])
    weight.mul_(-1)
    assert (same(model, x) != first).any()
    model.load_state_dict(state)
    assert (same(model, x) == first).all()
    same(copy.deepcopy(model), x)
    same(pickle.loads(pickle.dumps(model)), x)
    same(model, x.double())
    with minidl.use("conv_integer", "formula"):
        same(model, x)
        assert not model.program.takes([x])
    assert model.program.takes([x]) == (native is not None)
    with pytest.raises(ValueError, match="channels") as wrong:
        model(minidl.rand(4, 3, 6, 6))
    assert "in op conv_integer" in str(getattr(wrong.value, "__notes__", ""))


@pytest.mark.parametrize("name, shape", [("cnn", (1, 28, 28)), ("resnet8", (3, 32, 32))])
@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
def test_near_the_float_network(name: str, shape: Any, observer: str) -> None:
    minidl.manual_seed(0)
    model = models.get(name, num_classes=10, in_channels=shape[0])
    before = {k: v.numpy().copy() for k, v in model.state_dict().items()}
    batches = [minidl.rand(8, *shape) for _ in range(3)]
    quantized = quantize(model, batches, observer=observer)
    exact = model.eval()(batches[0]).numpy()
    assert snr(exact, quantized(batches[0]).numpy()) > 25
    assert snr(exact, quantize(model, batches, weight_bits=3)(batches[0]).numpy()) < 20
    after = model.state_dict()
    assert all(np.array_equal(v, after[k].numpy()) for k, v in before.items())
    ops = [step.op for step in quantized.graph.steps]  # type: ignore[union-attr]
    assert ops[0] == "quantize_linear" and "dequantize_linear" not in ops
    again = quantize(model, batches, observer=observer)
    assert np.array_equal(again(batches[1]).numpy(), quantized(batches[1]).numpy())


def test_fold(residual: Any) -> None:
    graph = trace(residual, BATCHES[0])
    folded = fold(graph)
    assert "scale_shift" in [s.op for s in graph.steps]
    assert "scale_shift" not in [s.op for s in folded.steps]
    np.testing.assert_allclose(
        folded(BATCHES[1]).numpy(), graph(BATCHES[1]).numpy(), rtol=1e-4, atol=1e-5
    )


class Added(nn.Module):
    """Biases that are added in steps of their own, and means over windows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.fc = nn.Linear(16, 5, bias=False)
        self.a, self.b = nn.Parameter(minidl.randn(4, 1, 1)), nn.Parameter(minidl.randn(5))
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Any) -> Any:
        x = self.pool(F.relu(self.norm(self.conv(x) + self.a)))
        return self.b + self.fc(x.flatten(1))


def test_biases_of_their_own_and_means_over_windows() -> None:
    minidl.manual_seed(0)
    model = Added().eval()
    model.norm.running_mean.array[:] = [1, -1, 0.5, 0]
    quantized: Any = quantize(model, BATCHES)
    assert [step.op for step in quantized.graph.steps] == [
        "quantize_linear", "conv_integer", "adaptive_avg_pool2d_integer", "reshape",
        "matmul_integer",
    ]  # fmt: skip
    assert snr(model(BATCHES[0]).numpy(), quantized(BATCHES[0]).numpy()) > 30
    for pool in (nn.AvgPool2d(3), nn.AvgPool2d(2, 1), nn.AvgPool2d(2, padding=1)):
        with pytest.raises(ValueError, match=r"avg_pool2d in layer '1' has no form on integers"):
            quantize(nn.Sequential(nn.Conv2d(2, 4, 3), pool), BATCHES)


def test_a_batch_norm_that_no_product_comes_before() -> None:
    """After pooling, or first of all: a depthwise convolution."""
    minidl.manual_seed(0)
    layers = nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.BatchNorm2d(8), nn.ReLU()
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 49, 5))
    batches = [minidl.rand(8, 3, 16, 16) for _ in range(3)]
    for batch in batches:  # statistics
        model(batch)
    quantized = quantize(model.eval(), batches)
    assert snr(model(batches[0]).numpy(), quantized(batches[0]).numpy()) > 30
    ops = [step.op for step in quantized.graph.steps]  # type: ignore[union-attr]
    assert ops[0] == "quantize_linear" and "dequantize_linear" not in ops


def test_other_batch_sizes_and_the_parameters(residual: Any) -> None:
    model = quantize(residual, BATCHES)
    whole = model(BATCHES[0]).numpy()
    parts = [model(BATCHES[0][i : i + 1]).numpy() for i in range(4)]
    assert np.array_equal(np.concatenate(parts), whole)
    other = quantize(residual, BATCHES[1:])
    other.load_state_dict(model.state_dict())
    assert np.array_equal(other(BATCHES[0]).numpy(), whole)


def test_save_and_load(residual: Any, tmp_path: Any) -> None:
    """The network comes back without the model, slices and batch sizes included."""
    path = tmp_path / "q.safetensors"
    for model, batches in (
        (residual, BATCHES),
        (models.get("resnet8", num_classes=4), [minidl.rand(2, 3, 16, 16)]),
    ):
        quantized: Any = quantize(model, batches)
        quantized.save(path)
        again = Quantized.load(path)
        x = batches[0][:1]
        assert np.array_equal(again(x).numpy(), quantized(x).numpy())
        assert [*map(vars, again.graph.steps)] == [*map(vars, quantized.graph.steps)]
        assert again.graph.scales == quantized.graph.scales
        assert again.state_dict().keys() == quantized.state_dict().keys()
        owned = [value.array for value in again.constants().values()]
        assert all(array.base is None and array.flags.writeable for array in owned)
    minidl.save({"a": 1}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"is not a network that `Quantized\.save` wrote"):
        Quantized.load(tmp_path / "other.safetensors")

    def damaged(message: str, change: Callable[[Any], Any]) -> None:
        content = minidl.load(path)["graph"]
        change(content)
        minidl.save({"graph": content}, tmp_path / "damaged")
        with pytest.raises(ValueError, match=f"damaged: .*{message}"):
            Quantized.load(tmp_path / "damaged")

    damaged("has no op 'magic'", lambda graph: graph["steps"][0].update(op="magic"))
    damaged("format 99, where this minidl reads 2", lambda graph: graph.update(format=99))
    damaged("format None, where", lambda graph: graph.pop("format"))
    damaged(r"constant \d+, int8 of shape .* is missing", lambda graph: graph["values"].pop("int8"))
    damaged(
        r"constant \d+, float32 of", lambda graph: graph["constants"].append([999, "float32", [1]])
    )


def test_sizes_on_disk(tmp_path: Any) -> None:
    """What describes a network must not weigh more than a quarter of it can bear."""
    for name, size in (("cnn", 28), ("resnet8", 32), ("resnet20", 32)):
        model = models.get(name, num_classes=10, in_channels=3)
        images = minidl.rand(8, 3, size, size)
        model.train()(images)  # norms that differ, and with them all biases
        quantize(model, [images]).save(tmp_path / "int8")  # type: ignore[operator]
        minidl.save(model.state_dict(), tmp_path / "float")
        small, large = (path.stat().st_size for path in (tmp_path / "int8", tmp_path / "float"))
        assert small < 0.26 * large


def test_skipped_layers_stay_float() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(48, 2))
    with pytest.raises(ValueError, match=r"sigmoid in layer '1' .* skip=\['1'\]"):
        quantize(model, BATCHES)
    quantized = quantize(model, BATCHES, skip=["1"])
    ops = [step.op for step in quantized.graph.steps]  # type: ignore[union-attr]
    assert "sigmoid" in ops and ops.count("quantize_linear") == 2
    assert snr(model(BATCHES[0]).numpy(), quantized(BATCHES[0]).numpy()) > 25
    everything = quantize(model, BATCHES, skip=["0", "1", "2", "3"])
    assert np.array_equal(model(BATCHES[0]).numpy(), everything(BATCHES[0]).numpy())


def test_per_channel_matters_where_channels_differ() -> None:
    """What folding batch norms does: ranges of the channels far apart."""
    minidl.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    model[0].weight.array[:4] *= 100  # type: ignore[union-attr]
    model[3].weight.array[:, :64] /= 100  # type: ignore[union-attr]
    exact = model(BATCHES[0]).numpy()
    found = [snr(exact, quantize(model, BATCHES, per_channel=p)(BATCHES[0]).numpy())
             for p in (True, False)]  # fmt: skip
    assert found[0] > found[1]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Any) -> Any:
        return {"a": self.fc(F.relu(self.fc(x))), "x": x}


def test_shared_layers_and_several_outputs() -> None:
    x = minidl.rand(5, 3)
    model = Twice()
    found = quantize(model, [x])(x)
    assert np.array_equal(found["x"].numpy(), x.numpy())
    assert snr(model(x)["a"].numpy(), found["a"].numpy()) > 25


def test_refusals(residual: Any) -> None:
    bad = minidl.from_numpy(np.full((4, 2, 6, 6), np.nan, "f"))
    broken = Residual()
    broken.conv3.weight.array[0] = np.inf
    thin = nn.Sequential(nn.Linear(3, 2))
    thin[0].weight.array[...], thin[0].bias.array[...] = 1e-12, 1e6  # type: ignore[union-attr]
    calls: list[tuple[Any, str]] = [
        (lambda: quantize(residual, []), "no batches to calibrate with"),
        (lambda: quantize(residual, BATCHES, scheme="statik"), "expected one of static"),
        (lambda: quantize(residual, BATCHES, dtype="int4"), "makes int8, not 'int4'"),
        (lambda: quantize(residual, BATCHES, observer="max"), "expected one of minmax"),
        (lambda: quantize(residual, BATCHES, skip=["fc9"]), "has no layer 'fc9'"),
        (lambda: quantize(residual, BATCHES, weight_bits=9), "from 2 to 8"),
        (lambda: quantize(residual, [bad]), "(?i)nan|finite"),
        (lambda: quantize(broken, BATCHES), "not finite|infinite|inf"),
        (lambda: quantize(thin, [minidl.rand(2, 3)]), "too much for 32 bits"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_constant_activations() -> None:
    """A value that is always 0 has a range of nothing: its scale must not be 0."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].bias.array[...] = -100  # type: ignore[union-attr]
    x = minidl.rand(6, 3)
    np.testing.assert_allclose(quantize(model, [x])(x).numpy(), model(x).numpy(), atol=5e-3)
