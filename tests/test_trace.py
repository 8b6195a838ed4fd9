"""A network as a list of ops: the same results, for any batch size, and what cannot be one."""

import numpy as np
import pytest

import minidl
import minidl.nn.functional as F
from minidl import models, nn
from minidl.nn import Module
from minidl.trace import Graph, PerSample, Ref, coded, decoded, resolve, trace

NETWORKS = {
    "cnn": (lambda: models.get("cnn", num_classes=10, in_channels=1), (1, 28, 28)),
    "resnet8": (lambda: models.get("resnet8", num_classes=10), (3, 32, 32)),
    "resnet18": (lambda: models.get("resnet18", num_classes=5), (3, 40, 40)),
    "norms": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.LayerNorm([4, 4, 4]), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(),
            nn.Linear(16, 5), nn.Dropout(), nn.Softmax(1),
        ),
        (2, 6, 6),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_a_trace_computes_what_the_model_does(name):
    make, shape = NETWORKS[name]
    model = make()
    for buffer in model.buffers():  # statistics that a batch norm may have
        if buffer.ndim:
            buffer.array[...] = np.random.default_rng(0).uniform(0.5, 1.5, buffer.shape)
    graph = trace(model.train(), minidl.rand(2, *shape))
    assert model.training  # it was only put in eval mode meanwhile
    model.eval()
    for n in (1, 2, 5):
        x = minidl.rand(n, *shape)
        assert np.array_equal(graph(x).numpy(), model(x).numpy())
    layers = dict(model.named_modules())
    assert all(step.layer in layers and step.shape[0] == PerSample(1) for step in graph.steps)
    assert set(graph.names.values()) <= {n for n, _ in model.named_parameters()} | {
        n for n, _ in model.named_buffers()
    }


def test_a_trace_of_a_batch_norm_is_a_scale_and_a_shift():
    graph = trace(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU()),
                  minidl.rand(1, 1, 5, 5))  # fmt: skip
    assert [step.op for step in graph.steps] == ["conv2d", "scale_shift", "relu"]
    assert [step.layer for step in graph.steps] == ["0", "1", "2"]
    assert set(graph.names.values()) == {"0.weight", "0.bias"}


class Framed(Module):
    def forward(self, x):
        return F.max_pool2d(F.pad(x, (0, 1, 2, 0), value=-np.inf), 2) + np.arange(2)[:, None]


def test_arrays_are_constants_too():
    x = minidl.rand(3, 1, 2, 3)
    graph = trace(Framed(), x)
    assert all(isinstance(ref, Ref) for step in graph.steps for ref in step.inputs)
    assert np.array_equal(graph(x[:1]).numpy(), Framed()(x[:1]).numpy())
    steps = Graph.from_dict(graph.to_dict())
    assert np.array_equal(steps(x).numpy(), graph(x).numpy())


def test_what_is_repeated_for_each_sample():
    """The zeros that a recurrent layer starts from; not what is different for each."""
    model = nn.LSTM(3, 4, batch_first=True)
    graph = trace(model, minidl.rand(2, 5, 3))
    assert [step.op for step in graph.steps[:2]] == ["expand"] * 2
    assert all(len(value) != 2 for value in graph.constants.values())
    for n in (1, 4):
        x = minidl.rand(n, 5, 3)
        assert np.array_equal(graph(x)[0].numpy(), model(x)[0].numpy())

    class Numbered(Module):
        def forward(self, x):
            return x + np.arange(len(x), dtype="f")[:, None]

    with pytest.raises(RuntimeError, match=r"a constant of shape \(2, 1\) depends on the input"):
        trace(Numbered(), minidl.rand(2, 3))


class Two(Module):
    def forward(self, x, y):
        z = x.detach() * 2 + y
        return {"sum": z, "parts": (x, [z.reshape(len(x) * 3)[: len(x)], 7])}


def test_several_inputs_and_outputs():
    x, y = minidl.rand(4, 3), minidl.rand(4, 3)
    graph, model = trace(Two(), x, y), Two()
    for n in (1, 4, 6):
        x, y = minidl.rand(n, 3), minidl.rand(n, 3)
        found, expected = graph(x, y), model(x, y)
        assert np.array_equal(found["sum"].numpy(), expected["sum"].numpy())
        assert np.array_equal(found["parts"][0].numpy(), x.numpy())
        assert np.array_equal(found["parts"][1][0].numpy(), expected["parts"][1][0].numpy())
        assert found["parts"][1][1] == 7
    with pytest.raises(ValueError, match="expected 2 inputs, got 1"):
        graph(x)


def test_a_trace_can_be_differentiated_and_watched():
    model = models.get("cnn", num_classes=10, in_channels=1).eval()
    x = minidl.rand(2, 1, 28, 28, requires_grad=True)
    graph = trace(model, x)
    (ours,) = minidl.grad(graph(x).sum(), [x])
    (theirs,) = minidl.grad(model(x).sum(), [x])
    assert np.array_equal(ours.numpy(), theirs.numpy())
    seen = []
    graph.run([x], lambda step, given, y: seen.append((step.op, given[0].shape, y.shape)))
    assert [op for op, _, _ in seen] == [step.op for step in graph.steps]
    zero = graph.run([x], lambda step, given, y: y * 0 if step.op == "linear" else None)
    assert not zero.numpy().any()


def test_values_are_let_go_after_their_last_use():
    graph = trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), minidl.rand(1, 2))
    first, second, last = graph.steps
    assert graph.last_uses() == {1: [first.output], 2: [second.output]} or graph.last_uses() == {
        0: [graph.inputs[0]], 1: [first.output], 2: [second.output],
    }  # fmt: skip
    assert graph.users(first.output) == [second] and graph.users(last.output) == [None]


class Branch(Module):
    def forward(self, x):
        return F.relu(x) if len(x) > 2 else -x


class Outside(Module):
    def forward(self, x):
        return x * minidl.tensor(x.numpy() + 1)


class Random(Module):
    def forward(self, x):
        return x + minidl.randn(3)


class NoOp(Module):
    def forward(self, x):
        return minidl.tensor(np.zeros((2, 1)))


class Squares(Module):
    def forward(self, x):
        return x.reshape(len(x) ** 2 if len(x) == 1 else 2 * 3, -1)


@pytest.mark.parametrize(
    "model, message",
    [
        (Branch(), "something else for another batch"),
        (Outside(), "outside minidl's ops|batches of"),
        (Random(), "random"),
        (NoOp(), "does not come from ops"),
        (Squares(), "batches of"),
    ],
)
def test_what_cannot_be_traced(model, message):
    before = model.training
    n = 1 if isinstance(model, Squares) else 2
    with pytest.raises(RuntimeError, match=f"cannot be traced: .*({message})"):
        trace(model, minidl.rand(n, 3))
    assert model.training == before
    with pytest.raises(ValueError, match="batches of equal size"):
        trace(model)
    with pytest.raises(ValueError, match="batches of equal size"):
        trace(model, minidl.rand(2, 3), minidl.rand(3, 3))


def test_settings_per_sample():
    setting = {"shape": (PerSample(2), 3), "index": (slice(0, PerSample(1), None), [PerSample(3)])}
    everything = {**setting, "dots": (Ellipsis, 1), "ref": Ref(3)}
    assert decoded(coded(everything)) == everything
    assert resolve(setting, 4) == {"shape": (8, 3), "index": (slice(0, 4, None), [12])}
    assert Ref(3) != PerSample(3) or type(Ref(3)) is not type(PerSample(3))
