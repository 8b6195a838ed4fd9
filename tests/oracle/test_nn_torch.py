"""Every layer against PyTorch's: names, shapes, printing, numbers, gradients, initial values."""

import copy
import inspect
from typing import Any

import numpy as np
import pytest
import torch

import minidl
from minidl import models, nn
from minidl.nn.utils import clip_grad_norm_
from tests.nn_cases import CASES, Case, convert, draw, flat

pytestmark = pytest.mark.torch

every_layer = pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])


def pair(case: Case) -> tuple[Any, Any]:
    """A layer and its twin, in float64, with the same numbers."""
    minidl.manual_seed(0)
    ours, theirs = case.make(nn).double(), case.torch(torch.nn).double()
    load_into_torch(theirs, ours)
    return ours, theirs


def load_into_torch(theirs: Any, ours: Any) -> None:
    state = {name: torch.tensor(t.numpy()) for name, t in ours.state_dict().items()}
    theirs.load_state_dict(state)  # strict: names and shapes are the same


def close(a: Any, b: Any, name: str = "", tolerance: float = 1e-9) -> None:
    np.testing.assert_allclose(
        np.asarray(a.numpy()), b.detach().numpy(), rtol=tolerance, atol=tolerance, err_msg=name
    )


def inputs_of(case: Case, seed: int = 0) -> tuple[list[Any], list[Any]]:
    """The same inputs for both; the floating ones require gradients."""
    arrays = draw(case.inputs, np.random.default_rng(seed))
    ours = convert(arrays, minidl.tensor)
    theirs = convert(arrays, torch.tensor)
    wanted = 1 if case.name.split("-")[0].endswith("Loss") else None  # not the target
    for x in flat(ours)[:wanted] + flat(theirs)[:wanted]:
        if x.is_floating_point():
            x.requires_grad_()
    return ours, theirs


@every_layer
def test_names_shapes_and_printing(case):
    ours, theirs = case.make(nn), case.torch(torch.nn)
    shapes = {name: tuple(t.shape) for name, t in theirs.state_dict().items()}
    assert {name: t.shape for name, t in ours.state_dict().items()} == shapes
    assert list(ours.state_dict()) == list(shapes)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    dtypes = {name: str(t.dtype).removeprefix("torch.") for name, t in theirs.state_dict().items()}
    assert {name: str(t.dtype) for name, t in ours.state_dict().items()} == dtypes
    assert case.twin or repr(ours) == repr(theirs)


LAYERS = sorted({c.name.split("-")[0] for c in CASES if not c.twin} - {"Identity", "Sequential"})
OURS = {"locked_dropout"}  # settings that PyTorch lacks: keywords, and off by default


@pytest.mark.parametrize("name", LAYERS)
def test_constructors_are_pytorchs(name):
    def parameters(module: Any) -> dict[str, inspect.Parameter]:
        layer = getattr(module, name)
        if name in ("RNN", "LSTM", "GRU"):  # PyTorch's say (*args, **kwargs)
            layer = torch.nn.RNNBase if module is torch.nn else nn.rnn.RNNBase
        found = inspect.signature(layer.__init__).parameters.items()
        dropped = ("self", "args", "kwargs", "size_average", "reduce", "mode", "proj_size")
        return {n: p for n, p in found if n not in dropped}

    ours, theirs = parameters(nn), parameters(torch.nn)
    for extra in OURS & ours.keys():
        setting = ours.pop(extra)
        assert setting.kind is setting.KEYWORD_ONLY and setting.default is False
    assert set(ours) <= set(theirs)
    positional = [n for n, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == list(theirs)[: len(positional)]
    for parameter in ours:
        assert ours[parameter].default == theirs[parameter].default, parameter


@every_layer
@pytest.mark.parametrize("training", [True, False])
def test_numbers_and_gradients(case, training):
    if case.random and training:
        pytest.skip("other random numbers")
    ours, theirs = pair(case)
    ours.train(training), theirs.train(training)
    rng = np.random.default_rng(1)
    for seed in range(2):  # twice, for the running statistics
        xs, ys = inputs_of(case, seed)
        ours.zero_grad(), theirs.zero_grad()
        # A copy, since `inplace` means it in PyTorch.
        zs = [y.clone() if isinstance(y, torch.Tensor) else y for y in ys]
        outs, expected = flat(ours(*xs)), flat(theirs(*zs))
        assert len(outs) == len(expected)
        a, b = 0.0, 0.0
        for out, reference in zip(outs, expected):
            assert out.shape == tuple(reference.shape)
            close(out, reference)
            weight = rng.normal(size=out.shape)
            a = a + (out * minidl.tensor(weight)).sum()
            b = b + (reference * torch.tensor(weight)).sum()
        if b.requires_grad:
            a.backward()
            b.backward()
    for x, y in zip(flat(xs), flat(ys)):
        if y.requires_grad:
            close(x.grad, y.grad, "input")
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        close(p.grad, q.grad, name)
    for (name, p), q in zip(ours.named_buffers(), theirs.buffers()):
        close(p, q, name)
    # PyTorch's state loads into ours as it is (NumPy reads its tensors).
    fresh = case.make(nn).double()
    fresh.load_state_dict(theirs.state_dict())
    for name, tensor in fresh.state_dict().items():
        close(tensor, theirs.state_dict()[name], name)


@every_layer
def test_initial_values_have_pytorchs_distribution(case):
    names = list(case.make(nn).state_dict())
    drawn: dict[str, tuple[list[Any], list[Any]]] = {name: ([], []) for name in names}
    torch.manual_seed(0)
    for _ in range(200):
        ours, theirs = case.make(nn).state_dict(), case.torch(torch.nn).state_dict()
        for name, (a, b) in drawn.items():
            a.append(ours[name].numpy().ravel()), b.append(theirs[name].numpy().ravel())
    for name, (a, b) in drawn.items():
        x, y = np.stack(a).astype(float), np.stack(b).astype(float)
        for i in range(x.shape[1]):  # an element alone may differ: the padding's row
            assert (x[:, i].std() == 0) == (y[:, i].std() == 0), name
        error = y.std() / np.sqrt(y.size)
        assert abs(x.mean() - y.mean()) <= 7 * error, name
        assert abs(x.std() - y.std()) <= 7 * error, name
        if np.abs(y).max() < 2 * y.std():  # uniform: the bound is sharp
            assert np.abs(x).max() == pytest.approx(np.abs(y).max(), rel=0.02), name


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_packed_sequences(kind, enforce_sorted, bidirectional):
    case = Case("", lambda m: getattr(m, kind)(3, 4, 2, bidirectional=bidirectional), ())
    ours, theirs = pair(case)
    lengths = [5, 3, 3, 1] if enforce_sorted else [3, 1, 5, 3]
    array = np.random.default_rng(0).normal(size=(5, 4, 3))
    x, y = minidl.tensor(array, requires_grad=True), torch.tensor(array, requires_grad=True)
    a = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
    b = torch.nn.utils.rnn.pack_padded_sequence(y, lengths, enforce_sorted=enforce_sorted)
    for mine, other in zip(a, b):
        assert (mine is None) == (other is None)
        if mine is not None:
            close(mine, other)
    (a, s), (b, t) = ours(a), theirs(b)
    close(a.data, b.data)
    for mine, other in zip(flat(s), flat(t)):
        close(mine, other)
    padded, found = nn.utils.rnn.pad_packed_sequence(a, padding_value=2.0, total_length=7)
    unpack = torch.nn.utils.rnn.pad_packed_sequence
    expected, lengths = unpack(b, padding_value=2.0, total_length=7)
    close(padded, expected)
    close(found, lengths)
    weight = np.random.default_rng(1).normal(size=padded.shape)
    loss = (padded * minidl.tensor(weight)).sum() + sum(p.square().sum() for p in flat(s))
    loss.backward()
    ((expected * torch.tensor(weight)).sum() + sum(p.square().sum() for p in flat(t))).backward()
    close(x.grad, y.grad)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        close(p.grad, q.grad, name)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0, float("inf")])
@pytest.mark.parametrize("max_norm", [0.1, 1e3])
def test_clip_grad_norm(norm_type, max_norm):
    gradients = [np.random.default_rng(i).normal(size=(3, i + 1)).astype("f") for i in range(3)]
    ours = [nn.Parameter(minidl.tensor(g)) for g in gradients]
    theirs = [torch.nn.Parameter(torch.tensor(g)) for g in gradients]
    for p, q, g in zip(ours, theirs, gradients):
        p.grad, q.grad = minidl.tensor(g), torch.tensor(g)
    total = clip_grad_norm_(ours, max_norm, norm_type)
    close(total, torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type), tolerance=1e-5)
    for p, q in zip(ours, theirs):
        close(p.grad, q.grad, tolerance=1e-6)


class TorchBlock(torch.nn.Module):
    """The basic block with a shortcut of kind A, as He et al. describe it, in PyTorch."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(channels)
        self.conv2 = torch.nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(channels)

    def forward(self, x):
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        skip = torch.zeros_like(out)
        step = x.shape[2] // out.shape[2]
        skip[:, : x.shape[1]] = x[:, :, ::step, ::step]
        return (out + skip).relu()


@pytest.mark.parametrize(("channels_in", "channels", "stride"), [(4, 4, 1), (4, 8, 2)])
def test_residual_block(channels_in, channels, stride):
    (ours,) = models.resnet.stage(models.resnet.BasicBlock, channels_in, channels, 1, stride, "A")
    theirs = TorchBlock(channels_in, channels, stride).double()
    ours.double()
    load_into_torch(theirs, ours)
    x = np.random.default_rng(0).normal(size=(2, channels_in, 6, 6))
    a, b = minidl.tensor(x, requires_grad=True), torch.tensor(x, requires_grad=True)
    y, z = ours(a), theirs(b)
    close(y, z)
    y.square().sum().backward()
    z.square().sum().backward()
    close(a.grad, b.grad)


def test_the_default_cnn_trains_like_pytorchs():
    """Ten steps of SGD with momentum from the same weights, dropout off: the same weights."""
    ours = models.cnn(image_size=8)
    t = torch.nn
    theirs = t.Sequential(
        t.Conv2d(1, 32, 3, padding=1), t.ReLU(), t.MaxPool2d(2), t.Conv2d(32, 64, 3, padding=1),
        t.ReLU(), t.MaxPool2d(2), t.Flatten(), t.Linear(256, 128), t.ReLU(), t.Dropout(0.5),
        t.Linear(128, 10),
    )  # fmt: skip
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        q.data = torch.tensor(p.numpy())
    ours[9].eval(), theirs[9].eval()
    start = copy.deepcopy(ours)
    a = minidl.optim.SGD(ours.parameters(), lr=0.05, momentum=0.9)
    b = torch.optim.SGD(theirs.parameters(), lr=0.05, momentum=0.9)
    rng = np.random.default_rng(0)
    for _ in range(10):
        x = rng.uniform(size=(16, 1, 8, 8)).astype("f")
        label = rng.integers(0, 10, size=16)
        a.zero_grad(), b.zero_grad()
        loss = nn.CrossEntropyLoss()(ours(minidl.tensor(x)), minidl.tensor(label))
        loss.backward()
        t.CrossEntropyLoss()(theirs(torch.tensor(x)), torch.tensor(label)).backward()
        a.step(), b.step()
    for p, q, s in zip(ours.parameters(), theirs.parameters(), start.parameters()):
        close(p, q, tolerance=1e-4)
        assert np.abs(p.numpy() - s.numpy()).max() > 1e-3  # they did move
