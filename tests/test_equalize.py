"""Cross-layer equalisation and bias correction: the same function, in better numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import minidl
import minidl.nn.functional as F
from minidl import models, nn
from minidl.quantization import quantize
from minidl.quantization.bias_correction import correct_biases
from minidl.quantization.equalize import equalize, pairs
from minidl.quantization.static import Lowering, fold
from minidl.trace import Graph, trace
from tests.test_quantize import snr


def folded_network() -> nn.Sequential:
    """Channels whose batch norms scale them very differently, as those of MobileNets do."""
    minidl.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 1, groups=2, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24 * 16, 12), nn.ReLU(), nn.Linear(12, 10),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    for layer in model:
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.array[...] = np.exp(rng.normal(0, 1.2, layer.weight.shape))
            layer.running_var.array[...] = np.exp(rng.normal(0, 1.2, layer.weight.shape))
            layer.bias.array[...] = rng.normal(size=layer.bias.shape)
    return model.eval()


def graph_of(model: nn.Module, *inputs: Any) -> tuple[Graph, Any]:
    graph = fold(trace(model, *inputs))
    return graph, Lowering(graph, (), False, 8)


X = [minidl.from_numpy(np.random.default_rng(i).random((16, 3, 8, 8), "f")) for i in range(4)]


def weights(graph: Graph, i: int) -> Any:
    return graph.constants[graph.steps[i].inputs[1]].numpy()


def test_channels_become_alike_and_outputs_stay() -> None:
    model = folded_network()
    graph, lowering = graph_of(model, X[0])
    found = list(pairs(graph, lowering.is_product))
    assert [(graph.steps[a].layer, graph.steps[b].layer, n) for a, b, n in found] == [
        ("0", "3", 1), ("3", "6", 1), ("6", "11", 16), ("11", "13", 1)
    ]  # fmt: skip
    equal = equalize(graph, lowering.is_product)
    y, y_ = graph(X[1]).numpy(), equal(X[1]).numpy()
    assert 0 < np.abs(y - y_).max() < 3e-6 * np.abs(y).max()

    # by the definition of a channel's inputs, in loops
    for first, second, pixels in found:
        w1, w2 = weights(equal, first), weights(equal, second)
        settings = graph.steps[second].settings
        groups, wide = settings.get("groups", 1), []
        for channel in range(len(w1)):
            of_group = w2.shape[1] // pixels
            group, inside = divmod(channel, of_group)
            rows = w2.reshape(groups, -1, *w2.shape[1:])[group]
            wide.append(np.abs(rows[:, inside * pixels : (inside + 1) * pixels]).max())
        r1 = np.abs(w1).reshape(len(w1), -1).max(axis=1)
        np.testing.assert_allclose(r1, wide, rtol=5e-3)

    def spread(graph: Graph) -> float:
        r = np.abs(weights(graph, found[0].second)).max(axis=(1, 2, 3))
        return float(r.max() / np.median(r))

    assert spread(equal) < spread(graph) / 2


def test_what_naive_rounding_loses_is_repaired() -> None:
    """One scale for all channels, after batch norms were folded: what differs from image to image
    drowns, and equalisation brings it back to what a scale a channel has. Bias correction brings
    back the mean."""
    model = folded_network()
    exact = np.concatenate([model(x).numpy() for x in X])

    def quality(bits: int, **how: Any) -> tuple[float, float]:
        """Signal to noise about the mean, in decibels; and how far the mean is off."""
        small = quantize(model, X, weight_bits=bits, **how)
        found = np.concatenate([small(x).numpy() for x in X])
        off = np.abs(found.mean(0) - exact.mean(0)).mean()
        return snr(exact - exact.mean(0), found - found.mean(0)), float(off)

    for bits, lost in ((8, 2), (6, 5)):
        per_channel, naive = quality(bits), quality(bits, per_channel=False)
        assert naive[0] < per_channel[0] - lost
        repaired = quality(bits, per_channel=False, equalize=True)
        assert repaired[0] > per_channel[0] - 0.5
        corrected = quality(bits, per_channel=False, bias_correction=True)
        assert corrected[1] < naive[1] / 5
        both = quality(bits, per_channel=False, equalize=True, bias_correction=True)
        assert both[0] > per_channel[0] - 1 and both[1] < naive[1] / 5


class Branches(nn.Module):
    """What must not be equalised: a value with two readers, and weights with two uses."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        x = F.relu(self.a(x))
        x = F.relu(self.b(x)) + x
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.fc(F.relu(self.fc(x)))


def test_only_where_nothing_else_reads() -> None:
    minidl.manual_seed(0)
    graph, lowering = graph_of(Branches(), X[0])
    assert list(pairs(graph, lowering.is_product)) == []
    assert equalize(graph, lowering.is_product).steps == graph.steps
    resnet = models.get("resnet8")
    graph, lowering = graph_of(resnet, minidl.rand(2, 3, 32, 32))
    found = [(graph.steps[a].layer, graph.steps[b].layer)
             for a, b, _ in pairs(graph, lowering.is_product)]  # fmt: skip
    assert len(found) == 3 and all(a.replace("conv1", "conv2") == b for a, b in found)


def test_dead_channels_and_missing_biases() -> None:
    minidl.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2))
    model[0].weight.array[1] = 0  # type: ignore[union-attr]
    model[2].weight.array[:, 2] = 0  # type: ignore[union-attr]
    x = minidl.rand(5, 3)
    graph, lowering = graph_of(model, x)
    equal = equalize(graph, lowering.is_product)
    np.testing.assert_allclose(equal(x).numpy(), graph(x).numpy(), rtol=1e-5, atol=1e-7)
    assert np.isfinite(weights(equal, 0)).all() and (weights(equal, 0)[1] == 0).all()


def test_skipped_layers_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    graph = fold(trace(model, minidl.rand(5, 3)))
    found = pairs(graph, Lowering(graph, ["2"], False, 8).is_product)
    assert list(found) == []
    assert quantize(model, [minidl.rand(5, 3)], equalize=True, skip=["0"])


def test_a_bias_makes_up_for_the_mean_error() -> None:
    """b - E[(W̃ - W) x], on batches of unequal size; later layers see corrected inputs."""
    minidl.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5, bias=False))
    batches = [minidl.rand(n, 6) for n in (7, 2, 20)]
    graph, _ = graph_of(model, batches[0])
    lowering = Lowering(graph, (), False, 3)
    corrected = correct_biases(graph, batches, lowering.is_product, lowering.rounded)
    exact = rough = np.concatenate([b.numpy() for b in batches]).astype(np.float64)
    for i, step in enumerate(graph.steps):
        if step.op == "relu":
            exact, rough = np.maximum(exact, 0), np.maximum(rough, 0)
            continue
        w = weights(graph, i).astype(np.float64)
        q = np.abs(w).max() / 3
        bias = np.float32(0) if i else graph.constants[step.inputs[2]].numpy()
        exact, rough = exact @ w.T + bias, rough @ (np.rint(w / q) * q).T + bias
        shift = rough.mean(0) - exact.mean(0)
        found = corrected.constants[corrected.steps[i].inputs[2]].numpy()
        np.testing.assert_allclose(found, bias - shift, atol=2e-6)
        assert np.abs(shift).max() > 1e-3
        rough -= shift
    assert np.array_equal(weights(corrected, 0), weights(graph, 0))


@pytest.mark.parametrize("scheme", ["dynamic", "weight_only"])
def test_only_for_the_static_scheme(scheme: str) -> None:
    for option in ("equalize", "bias_correction"):
        with pytest.raises(ValueError, match=f"{option} is for the static scheme"):
            quantize(nn.Linear(3, 2), None, scheme=scheme, **{option: True})
