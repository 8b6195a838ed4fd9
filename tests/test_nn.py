"""Modules, layers, containers, initialisers, utilities: what needs no PyTorch to be checked.

The layers' numbers are compared with PyTorch's in tests/oracle/test_nn_torch.py.
"""

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest

import minidl
import minidl.nn.functional as F
from minidl import models, nn
from minidl.nn.utils import (
    clip_grad_norm_,
    clip_grad_value_,
    parameters_to_vector,
    vector_to_parameters,
)
from minidl.nn.utils.rnn import (
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
    pad_sequence,
)
from tests.nn_cases import CASES, CONTAINERS, Case, convert, draw, flat

every_layer = pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])


def tensors(case: Case, dtype: str = "float32", seed: int = 0) -> list[Any]:
    arrays = draw(case.inputs, np.random.default_rng(seed))
    return convert(arrays, lambda a: minidl.tensor(a.astype(dtype) if a.dtype.kind == "f" else a))


def values(outputs: Any) -> list[np.ndarray]:
    return [np.array(t.numpy()) for t in flat(outputs)]


def assert_same(a: Any, b: Any) -> None:
    for x, y in zip(values(a), values(b), strict=True):
        np.testing.assert_array_equal(x, y)


# Every layer ------------------------------------------------------------------------------------


def test_every_layer_has_a_case():
    exported = {name for name in nn.__all__ if isinstance(getattr(nn, name), type)}
    modules = {name for name in exported if issubclass(getattr(nn, name), nn.Module)}
    assert modules - {"Module"} == {case.name.split("-")[0] for case in CASES} | CONTAINERS


@every_layer
def test_layer_stays_float32_and_its_parameters_get_gradients(case):
    layer = case.make(nn)
    inputs = tensors(case)
    inputs[0].requires_grad = inputs[0].is_floating_point()
    outputs = flat(layer(*inputs))
    assert all(out.dtype == np.float32 for out in outputs)
    total = sum((out.sum() for out in outputs[1:]), outputs[0].sum())
    if total.requires_grad:
        total.backward()
    for name, parameter in [*layer.named_parameters(), ("input", inputs[0])]:
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.shape == parameter.shape, name
            assert parameter.grad.dtype == np.float32, name


@every_layer
def test_layer_in_float64(case):
    layer = case.make(nn).double()
    assert all(p.dtype == np.float64 for p in layer.parameters())
    assert all(out.dtype == np.float64 for out in flat(layer(*tensors(case, "float64"))))


@every_layer
def test_layer_from_another_layers_state(case):
    a = case.make(nn).eval()
    b = case.make(nn).eval()
    inputs = tensors(case)
    for tensor in a.state_dict().values():
        tensor.array += 1
    assert repr(b.load_state_dict(a.state_dict())) == "<All keys matched successfully>"
    assert_same(list(a.state_dict().values()), list(b.state_dict().values()))
    assert_same(a(*inputs), b(*inputs))


@every_layer
def test_copies_of_a_layer_are_independent(case):
    layer = case.make(nn).eval()
    inputs = tensors(case)
    expected = values(layer(*inputs))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(twin) == repr(layer) and not twin.training
        assert list(twin.state_dict()) == list(layer.state_dict())
        for tensor in twin.state_dict().values():
            tensor.array[...] = 7
        for a, b in zip(values(layer(*inputs)), expected, strict=True):
            np.testing.assert_array_equal(a, b)


@every_layer
def test_same_seed_same_bits(case):
    results = []
    for _ in range(2):
        minidl.manual_seed(3)
        layer = case.make(nn)
        results.append([*values(list(layer.state_dict().values())), *values(layer(*tensors(case)))])
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


@every_layer
def test_evaluation_changes_nothing_and_repeats(case):
    layer = case.make(nn)
    inputs = tensors(case)
    layer(*inputs)  # moves the running statistics once
    layer.eval()
    before = copy.deepcopy(layer.state_dict())
    assert_same(layer(*inputs), layer(*inputs))
    for name, tensor in layer.state_dict().items():
        np.testing.assert_array_equal(tensor.array, before[name].array, name)


@every_layer
def test_layer_prints_itself(case):
    layer = case.make(nn)
    assert repr(layer).startswith(type(layer).__name__ + "(")


# Module -----------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", minidl.tensor([2.0]))
        self.register_buffer("scratch", minidl.tensor([3.0]), persistent=False)
        self.body = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU())
        self.gain = nn.Parameter(minidl.ones(3))
        self.nothing = None
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.body(x) * self.gain) * self.scale


def test_names():
    net = Net()
    parameters = [
        "gain", "body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias", "head.weight",
        "head.bias",
    ]  # fmt: skip
    assert [n for n, _ in net.named_parameters()] == parameters
    assert [n for n, _ in net.named_parameters(prefix="net", recurse=False)] == ["net.gain"]
    assert [n for n, _ in net.named_parameters("net")] == ["net." + n for n in parameters]
    statistics = ["body.1.running_mean", "body.1.running_var", "body.1.num_batches_tracked"]
    assert [n for n, _ in net.named_buffers()] == ["scale", "scratch", *statistics]
    assert set(net.state_dict()) == {*parameters, "scale", *statistics}
    assert list(net.state_dict(prefix="net.")) == ["net." + n for n in net.state_dict()]
    assert [n for n, _ in net.named_children()] == ["body", "head"]
    assert [n for n, _ in net.named_modules()] == ["", "body", "body.0", "body.1", "body.2", "head"]
    assert net.get_submodule("body.1") is net.body[1] and net.get_submodule("") is net
    assert net.get_parameter("body.0.bias") is net.body[0].bias
    for wrong in ("body.7", "gain", "nothing"):
        with pytest.raises(AttributeError, match=wrong):
            net.get_submodule(wrong)
    with pytest.raises(AttributeError, match="scale"):
        net.get_parameter("scale")


def test_a_module_needs_no_init():
    class Double(nn.Module):
        def forward(self, x):
            return x * 2

    assert Double()(minidl.ones(2)).tolist() == [2, 2]
    with pytest.raises(NotImplementedError, match="forward"):
        nn.Module()(1)


def test_shared_parameters_count_once_but_are_saved_under_both_names():
    a, b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    b.weight = a.weight
    both = nn.Sequential(a, b)
    assert [n for n, _ in both.named_parameters()] == ["0.weight"]
    assert list(both.state_dict()) == ["0.weight", "1.weight"]
    both.double()
    assert a.weight is b.weight and a.weight.dtype == np.float64
    assert copy.deepcopy(both)[0].weight is not a.weight
    twin = copy.deepcopy(both)
    assert twin[0].weight is twin[1].weight
    twice = nn.Sequential(a, a)
    assert len(list(twice.modules())) == 2 and list(twice.state_dict()) == ["0.weight", "1.weight"]


def test_assignment_keeps_the_books():
    net = Net()
    with pytest.raises(TypeError, match=r"nn\.Parameter or None, got Tensor"):
        net.gain = minidl.ones(3)
    with pytest.raises(TypeError, match="buffer"):
        net.scale = 3.0
    net.scale = minidl.tensor([5.0])
    assert net.state_dict()["scale"].tolist() == [5.0]
    net.gain = None
    assert "gain" not in net.state_dict()
    net.gain = nn.Parameter(minidl.zeros(3))
    assert "gain" in net.state_dict()
    del net.gain
    assert "gain" not in net.state_dict()
    net.register_parameter("extra", nn.Parameter(minidl.zeros(1)))
    net.add_module("more", nn.ReLU())
    assert "extra" in net.state_dict() and isinstance(net.more, nn.ReLU)
    for name, error in [("forward", KeyError), ("a.b", KeyError), ("", KeyError)]:
        with pytest.raises(error):
            net.register_buffer(name, minidl.zeros(1))
        with pytest.raises(error):
            net.register_parameter(name, nn.Parameter(minidl.zeros(1)))
    for wrong in (lambda: net.register_buffer("x", 1.0), lambda: net.register_parameter("x", 1.0),
                  lambda: net.add_module("x", 1.0)):  # fmt: skip
        with pytest.raises(TypeError):
            wrong()


def test_parameter():
    t = minidl.zeros(3)
    p = nn.Parameter(t)
    assert isinstance(p, minidl.Tensor) and p.requires_grad and p.array is t.array
    assert not nn.Parameter(t, requires_grad=False).requires_grad
    assert repr(p).startswith("Parameter containing:\ntensor(")
    with pytest.raises(RuntimeError, match="floating"):
        nn.Parameter(minidl.tensor([1, 2]))
    p.grad = minidl.ones(3)
    p.note = "kept"
    twin = copy.deepcopy(p)
    assert isinstance(twin, nn.Parameter) and twin.grad is None and twin.note == "kept"
    assert not np.shares_memory(twin.array, p.array)


def test_load_state_dict_names_all_problems_and_changes_nothing():
    net = Net()
    before = copy.deepcopy(net.state_dict())
    state = {name: minidl.zeros(tensor.shape) for name, tensor in before.items()}
    state["body.1.num_batches_tracked"] = minidl.tensor(5)
    good = dict(state)
    del state["head.bias"], state["gain"]
    state["stranger"] = minidl.zeros(1)
    state["body.0.weight"] = minidl.zeros(3, 5)
    state["scale"] = minidl.tensor([1])
    with pytest.raises(RuntimeError) as caught:
        net.load_state_dict(state)
    message = str(caught.value)
    for part in (
        "Net", "Missing key(s) in state_dict: 'gain', 'head.bias'",
        "Unexpected key(s) in state_dict: 'stranger'",
        "size mismatch for body.0.weight: expected (3, 4), received (3, 5)",
        "dtype mismatch for scale: expected float32, received int64",
    ):  # fmt: skip
        assert part in message
    with pytest.raises(RuntimeError, match="size mismatch"):
        net.load_state_dict(state, strict=False)
    for name, tensor in net.state_dict().items():
        np.testing.assert_array_equal(tensor.array, before[name].array)

    del good["gain"]
    good["stranger"] = minidl.zeros(1)
    arrays = {name: tensor.numpy() for name, tensor in good.items()}  # bare arrays will do
    keys = net.load_state_dict(arrays, strict=False)
    assert keys.missing_keys == ["gain"] and keys.unexpected_keys == ["stranger"]
    assert "gain" in repr(keys)
    assert net.body[1].num_batches_tracked.item() == 5
    assert not net.head.weight.array.any() and net.gain.array.all()


def test_load_state_dict_copies_in_place():
    net, other = Net(), Net()
    array = net.head.weight.array
    loss = net(minidl.ones(2, 4)).sum()
    net.load_state_dict(other.state_dict())
    assert net.head.weight.array is array
    assert not np.shares_memory(array, other.head.weight.array)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


def test_train_eval_freeze_zero_grad_apply():
    net = Net()
    assert net.training and net.eval() is net
    assert not any(m.training for m in net.modules())
    assert all(m.training for m in net.train().modules())
    with pytest.raises(ValueError, match="True or False"):
        net.train("yes")
    assert net.requires_grad_(False) is net
    assert not any(p.requires_grad for p in net.parameters())
    net.requires_grad_()
    net(minidl.ones(2, 4)).sum().backward()
    net.zero_grad(set_to_none=False)
    assert all(not p.grad.array.any() for p in net.parameters())
    net.zero_grad()
    assert all(p.grad is None for p in net.parameters())
    seen = []
    assert net.apply(lambda module: seen.append(type(module).__name__)) is net
    assert seen == ["Linear", "BatchNorm1d", "ReLU", "Sequential", "Linear", "Net"]


def test_a_modules_own_train_is_called():
    class Frozen(nn.Module):
        def train(self, mode=True):
            return super().train(False)

    net = nn.Sequential(Frozen()).train()
    assert net.training and not net[0].training


def test_to():
    net = Net()
    net(minidl.ones(2, 4)).sum().backward()
    parameter = net.head.weight
    assert net.to("cpu", minidl.float64) is net
    assert net.head.weight is parameter and parameter.dtype == parameter.grad.dtype == np.float64
    assert net.scale.dtype == np.float64 and net.scratch.dtype == np.float64
    assert net.body[1].num_batches_tracked.dtype == np.int64
    assert net.half().gain.dtype == np.float16 and net.float().gain.dtype == np.float32
    assert net.to(minidl.zeros(1, dtype=minidl.float64)).gain.dtype == np.float64
    assert net.to(dtype=minidl.float32, device="cpu").gain.dtype == np.float32
    assert net.cpu() is net
    with pytest.raises(TypeError, match="int64"):
        net.to(minidl.int64)
    weight = minidl.tensor([1.0, 2.0])
    loss = nn.CrossEntropyLoss(weight).double()
    assert loss.weight.dtype == np.float64 and weight.dtype == np.float32  # the user's own stays


def test_hooks():
    layer = nn.Identity()
    calls = []
    before = layer.register_forward_pre_hook(lambda module, args: calls.append((module, args)))
    double = layer.register_forward_pre_hook(lambda module, args: args[0] * 2)
    after = layer.register_forward_hook(lambda module, args, output: calls.append(args[0].item()))
    add = layer.register_forward_hook(lambda module, args, output: output + 1)
    x = minidl.tensor(3.0)
    assert layer(x).item() == 7
    assert calls == [(layer, (x,)), 6]
    double.remove()
    add.remove()
    assert layer(x).item() == 3
    before.remove()
    after.remove()
    after.remove()
    calls.clear()
    assert layer(x).item() == 3 and not calls and layer._hooks is None


def test_repr():
    assert repr(Net()) == (
        "Net(\n"
        "  (body): Sequential(\n"
        "    (0): Linear(in_features=4, out_features=3, bias=True)\n"
        "    (1): BatchNorm1d(3, eps=1e-05, momentum=0.1, affine=True, "
        "bias=True, track_running_stats=True)\n"
        "    (2): ReLU()\n"
        "  )\n"
        "  (head): Linear(in_features=3, out_features=2, bias=True)\n"
        ")"
    )


# Containers -------------------------------------------------------------------------------------


def test_sequential():
    a, b, c = nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)
    net = nn.Sequential(a, b, c)
    x = minidl.randn(4, 2)
    assert_same(net(x), c(b(a(x))))
    assert len(net) == 3 and net[-1] is c and list(net) == [a, b, c]
    assert list(net[1:].state_dict()) == ["2.weight", "2.bias"]
    assert_same(net[1:](a(x)), net(x))
    net[1] = nn.Tanh()
    assert_same(net(x), c(a(x).tanh()))
    del net[1]
    assert list(net.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    net.append(b).extend([nn.Tanh()])
    net.insert(0, nn.Identity())
    assert [type(m).__name__ for m in net] == ["Identity", "Linear", "Linear", "ReLU", "Tanh"]
    named = nn.Sequential({"fc": a, "act": b})
    assert named.act is b and list(named.state_dict()) == ["fc.weight", "fc.bias"]
    del named[0]
    assert list(named) == [b] and named.act is b
    with pytest.raises(IndexError, match="5"):
        net[5]
    with pytest.raises(TypeError, match="function"):
        nn.Sequential(F.relu)


def test_module_list():
    layers = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
    layers.append(nn.ReLU())
    assert len(layers) == 4 and len(layers[1:3]) == 2 and layers[1:3][0] is layers[1]
    assert len(list(layers.parameters())) == 6
    layers.insert(1, nn.Tanh())
    del layers[0]
    assert [type(m).__name__ for m in layers] == ["Tanh", "Linear", "Linear", "ReLU"]
    assert "(1-2): 2 x Linear(" in repr(layers)


def test_module_dict():
    layers = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.ReLU()})
    layers["c"] = nn.Tanh()
    layers.update({"b": nn.Sigmoid()})
    assert list(layers) == list(layers.keys()) == ["a", "b", "c"] and "b" in layers
    assert isinstance(layers["b"], nn.Sigmoid) and len(layers) == len(layers.values()) == 3
    assert isinstance(layers.pop("c"), nn.Tanh) and "c" not in layers
    assert list(layers.state_dict()) == ["a.weight", "a.bias"]
    with pytest.raises(KeyError):
        layers["z"]
    with pytest.raises(KeyError):
        layers["keys"] = nn.ReLU()  # would hide the method
    layers.clear()
    assert len(layers) == 0


def test_parameter_list():
    parameters = nn.ParameterList([nn.Parameter(minidl.ones(2)), minidl.zeros(3)])
    parameters.append(minidl.zeros(1))
    assert [p.shape for p in parameters] == [(2,), (3,), (1,)]
    assert all(p.requires_grad for p in parameters.parameters())
    assert list(parameters.state_dict()) == ["0", "1", "2"]
    with pytest.raises(TypeError):
        parameters.append(3.0)


# Layers -----------------------------------------------------------------------------------------


def test_batch_norm_statistics():
    x = np.random.default_rng(0).normal(2, 3, size=(8, 3)).astype("f")
    layer = nn.BatchNorm1d(3, momentum=0.25)
    layer(minidl.tensor(x))
    np.testing.assert_allclose(layer.running_mean.array, 0.25 * x.mean(axis=0), rtol=1e-5)
    variance = 0.75 + 0.25 * x.var(axis=0, ddof=1)
    np.testing.assert_allclose(layer.running_var.array, variance, rtol=1e-5)
    assert layer.num_batches_tracked.item() == 1
    assert layer.running_mean.dtype == np.float32

    averaging = nn.BatchNorm1d(3, momentum=None)
    averaging(minidl.tensor(x[:4]))
    averaging(minidl.tensor(x[4:]))
    np.testing.assert_allclose(averaging.running_mean.array, x.mean(axis=0), rtol=1e-5)


def test_frozen_batch_norm_does_not_move_while_the_rest_trains():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).train()
    net[1].eval().requires_grad_(False)
    before = copy.deepcopy(net[1].state_dict())
    net(minidl.randn(5, 3)).square().sum().backward()
    assert net[0].weight.grad is not None and net[1].weight.grad is None
    for name, tensor in net[1].state_dict().items():
        np.testing.assert_array_equal(tensor.array, before[name].array)


def test_batch_norm_refuses_other_dimensions():
    for layer, shape in [(nn.BatchNorm1d(3), (3,)), (nn.BatchNorm1d(3), (2, 3, 4, 5)),
                         (nn.BatchNorm2d(3), (2, 3)), (nn.InstanceNorm2d(3), (2, 3))]:  # fmt: skip
        with pytest.raises(ValueError, match="takes"):
            layer(minidl.zeros(shape))


@pytest.mark.parametrize("p", [0.2, 0.7])
def test_dropout(p):
    x = minidl.ones(100, 50, 4, 4)
    y = nn.Dropout(p)(x).numpy()
    assert set(np.unique(y)) == {0, np.float32(1 / (1 - p))}
    assert abs((y == 0).mean() - p) < 0.01
    channels = nn.Dropout2d(p)(x).numpy()
    assert ((channels == channels[:, :, :1, :1]).all()) and abs((channels == 0).mean() - p) < 0.03
    assert_same(nn.Dropout(p).eval()(x), x)
    with pytest.raises(ValueError, match="probability"):
        nn.Dropout(1.5)


# A probability is `p`, or `dropout` of recurrent layers.
every_dropout = pytest.mark.parametrize(
    "case", [c for c in CASES if c.random], ids=lambda case: case.name
)


def dropping(case: Case, p: float) -> nn.Module:
    layer = case.make(nn)
    name = "p" if hasattr(layer, "p") else "dropout"
    assert getattr(layer, name) == 0.5  # also the default, where there is one
    setattr(layer, name, p)
    return layer


@every_dropout
def test_at_0_nothing_is_dropped_and_nothing_drawn(case):
    layer, inputs = dropping(case, 0.0), tensors(case)
    before = minidl.get_rng_state()
    outputs = layer(*inputs)
    assert_same(minidl.get_rng_state(), before)
    assert_same(layer.eval()(*inputs), outputs)


@every_dropout
def test_at_1_everything_is_dropped(case):
    """The same output for any input, and no gradient."""
    layer, inputs = dropping(case, 1.0), tensors(case)
    inputs[0].requires_grad = True
    output = flat(layer(*inputs))[0]
    other = flat(layer(inputs[0] * 100 + 1, *inputs[1:]))[0]
    assert np.isfinite(output.numpy()).all()
    assert_same(other, output)
    output.sum().backward()
    assert (inputs[0].grad.numpy() == 0).all()
    assert all(np.isfinite(p.grad.numpy()).all() for p in layer.parameters() if p.grad is not None)


def test_embedding():
    layer = nn.Embedding(5, 3, padding_idx=1)
    assert not layer.weight.array[1].any()
    layer(minidl.tensor([[1, 2], [1, 1]])).sum().backward()
    assert layer.weight.grad.tolist() == [[0] * 3, [0] * 3, [1] * 3, [0] * 3, [0] * 3]
    weight = minidl.randn(4, 2)
    frozen = nn.Embedding.from_pretrained(weight)
    assert not frozen.weight.requires_grad and frozen.weight.array is weight.array
    with pytest.raises(ValueError, match="5 embeddings"):
        nn.Embedding(5, 3, padding_idx=5)
    with pytest.raises((IndexError, ValueError), match="5"):
        layer(minidl.tensor([5]))


def test_layers_refuse_what_they_cannot_do():
    for make, message in [
        (lambda: nn.Conv2d(3, 4, 3, groups=2), "groups"),
        (lambda: nn.Conv2d(3, 4, 3, padding="full"), "valid"),
        (lambda: nn.Conv2d(3, 4, 3, padding="same", stride=2), "stride"),
        (lambda: nn.Conv2d(3, 4, 3, padding_mode="reflect"), "zeros"),
        (lambda: nn.GroupNorm(4, 6), "groups"),
        (lambda: nn.MaxPool2d(2, return_indices=True), "return_indices"),
        (lambda: nn.Hardtanh(1.0, -1.0), "below"),
        (lambda: nn.MSELoss("average"), "average"),
        (lambda: nn.LSTM(3, 0), "hidden_size"),
        (lambda: nn.RNN(3, 4, nonlinearity="sin"), "sin"),
        (lambda: nn.GRU(3, 4, dropout=2.0), "dropout"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()


def test_conv_transpose_output_size():
    layer = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1)
    x = minidl.randn(1, 2, 5, 5)
    assert layer(x).shape == (1, 3, 9, 9)
    assert layer(x, output_size=(10, 9)).shape == (1, 3, 10, 9)
    for size in [(8, 9), (11, 9)]:
        with pytest.raises(ValueError, match="possible"):
            layer(x, output_size=size)


def test_conv_transpose_is_the_gradient_of_conv():
    conv = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False)
    transposed = nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, bias=False)
    transposed.load_state_dict(conv.state_dict())
    x = minidl.randn(2, 3, 7, 7, requires_grad=True)
    y = conv(x)
    g = minidl.randn(*y.shape)
    y.backward(g)
    np.testing.assert_allclose(transposed(g).numpy(), x.grad.numpy(), rtol=1e-4, atol=1e-5)


# Recurrent layers -------------------------------------------------------------------------------


def one_by_one(layer: Any, cell: Any, x: Any) -> Any:
    """A layer of one direction as its cell does it, step by step."""
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    state, outputs = None, []
    for step in x:
        state = cell(step, state)
        outputs.append(state[0] if isinstance(state, tuple) else state)
    return minidl.stack(outputs), state


def test_dropconnect_drops_weights():
    layer = nn.DropConnectLinear(40, 50, p=0.25)
    x = minidl.eye(40)
    dropped = layer(x).numpy() - layer.bias.numpy()  # the weights that were left, transposed
    kept = dropped != 0
    assert abs(kept.mean() - 0.75) < 0.05
    np.testing.assert_allclose(dropped[kept], layer.weight.numpy().T[kept] / 0.75, rtol=1e-4)
    layer.eval()
    assert_same(layer(x), F.linear(x, layer.weight, layer.bias))
    with pytest.raises(ValueError, match="probability"):
        nn.DropConnectLinear(2, 2, p=-0.1)


@pytest.mark.parametrize("locked", [False, True])
def test_dropout_between_recurrent_layers(locked):
    """Seen by the upper layer, an RNN that hands its input through: relu(1 · x)."""
    rnn = nn.RNN(
        5, 5, 2, nonlinearity="relu", bias=False, dropout=0.5, locked_dropout=locked
    )  # fmt: skip
    for name, parameter in rnn.named_parameters():
        parameter.data = minidl.eye(5) if "ih" in name else minidl.zeros(5, 5)
    y = rnn(minidl.ones(30, 4, 5))[0].numpy()
    assert set(np.unique(y)) == {0.0, 2.0}
    assert (y == y[:1]).all() == locked
    assert "locked_dropout=True" in repr(rnn) or not locked


@pytest.mark.parametrize(
    ("layer", "cell"),
    [
        (nn.RNN(3, 4), nn.RNNCell(3, 4)),
        (nn.RNN(3, 4, nonlinearity="relu"), nn.RNNCell(3, 4, nonlinearity="relu")),
        (nn.LSTM(3, 4), nn.LSTMCell(3, 4)),
        (nn.GRU(3, 4), nn.GRUCell(3, 4)),
    ],
)
def test_recurrent_layer_is_its_cell_repeated(layer, cell):
    layer.double(), cell.double()
    x = minidl.tensor(np.random.default_rng(0).normal(size=(6, 2, 3)))
    out, state = layer(x)
    expected, last = one_by_one(layer, cell, x)
    np.testing.assert_allclose(out.numpy(), expected.numpy(), rtol=1e-10)
    for a, b in zip(flat(state), flat(last)):
        np.testing.assert_allclose(a[0].numpy(), b.numpy(), rtol=1e-10)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("batch_first", [False, True])
def test_packed_sequences_are_the_sequences_alone(kind, batch_first):
    layer = kind(3, 4, num_layers=2, bidirectional=True, batch_first=batch_first).double()
    rng = np.random.default_rng(0)
    lengths = [2, 5, 1, 5]
    sequences = [minidl.tensor(rng.normal(size=(n, 3))) for n in lengths]
    start = [minidl.tensor(rng.normal(size=(4, 4, 4))) for _ in range(2 if kind is nn.LSTM else 1)]
    packed = pack_sequence(sequences, enforce_sorted=False)
    out, state = layer(packed, tuple(start) if kind is nn.LSTM else start[0])
    padded, found = pad_packed_sequence(out, batch_first=True)
    assert found.tolist() == lengths and padded.shape == (4, 5, 8)
    for i, x in enumerate(sequences):
        own = [s[:, i] for s in start]
        alone, last = layer(x, tuple(own) if kind is nn.LSTM else own[0])
        np.testing.assert_allclose(padded[i, : lengths[i]].numpy(), alone.numpy(), rtol=1e-10)
        assert not padded[i, lengths[i] :].array.any()
        for a, b in zip(flat(state), flat(last)):
            np.testing.assert_allclose(a[:, i].numpy(), b.numpy(), rtol=1e-10)


def test_packing_keeps_gradients():
    x = minidl.tensor(np.random.default_rng(0).normal(size=(5, 3, 2)), requires_grad=True)
    packed = pack_padded_sequence(x, [5, 2, 1])
    assert packed.data.shape == (8, 2) and packed.batch_sizes.tolist() == [3, 2, 1, 1, 1]
    (packed.data * 3).sum().backward()
    expected = np.zeros((5, 3, 2))
    for n, length in enumerate([5, 2, 1]):
        expected[:length, n] = 3
    np.testing.assert_array_equal(x.grad.numpy(), expected)


def test_padding():
    a, b = minidl.ones(3, 2), minidl.ones(1, 2) * 2
    padded = pad_sequence([a, b], batch_first=True, padding_value=-1.0)
    assert padded.shape == (2, 3, 2) and padded[1].tolist() == [[2, 2], [-1, -1], [-1, -1]]
    assert pad_sequence([a, b]).shape == (3, 2, 2)
    packed = pack_sequence([a, b])
    out, lengths = pad_packed_sequence(packed, padding_value=7.0, total_length=4)
    assert out.shape == (4, 2, 2) and out[3, 0].tolist() == [7, 7] and lengths.tolist() == [3, 1]
    with pytest.raises(ValueError, match="total_length"):
        pad_packed_sequence(packed, total_length=2)
    with pytest.raises(ValueError, match="at least one"):
        pad_sequence([])
    x = minidl.ones(4, 2, 1)
    for lengths, message in [([4], "2 sequences"), ([4, 0], r"\[1, 4\]"), ([5, 1], r"\[1, 4\]"),
                             ([1, 4], "enforce_sorted")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            pack_padded_sequence(x, lengths)


def test_recurrent_layers_refuse_wrong_shapes():
    layer = nn.LSTM(3, 4)
    x = minidl.zeros(5, 2, 3)
    for wrong in (minidl.zeros(5, 2, 4), minidl.zeros(3), minidl.zeros(1, 5, 2, 3)):
        with pytest.raises(ValueError, match="LSTM takes"):
            layer(wrong)
    state = minidl.zeros(1, 2, 4)
    for wrong_state in ((state,), (state, minidl.zeros(1, 3, 4)), (state, minidl.zeros(2, 4))):
        with pytest.raises(ValueError, match=r"\(1, 2, 4\)"):
            layer(x, wrong_state)
    with pytest.raises(ValueError, match="GRUCell takes"):
        nn.GRUCell(3, 4)(minidl.zeros(2, 4))
    with pytest.raises(ValueError, match=r"\(2, 4\)"):
        nn.GRUCell(3, 4)(minidl.zeros(2, 3), minidl.zeros(2, 3))


# init -------------------------------------------------------------------------------------------


def sample_of(fill: Any, *shape: int) -> np.ndarray:
    weight = nn.Parameter(minidl.zeros(*shape))
    assert fill(weight) is weight and weight.requires_grad
    return weight.numpy().astype(float)


WEIGHT = (200, 50, 2, 2)  # fan in 200, fan out 800


@pytest.mark.parametrize(
    ("fill", "std", "bound"),
    [
        (lambda w: nn.init.uniform_(w, -1, 3), 4 / math.sqrt(12), 3),
        (lambda w: nn.init.normal_(w, 0, 0.3), 0.3, None),
        (nn.init.xavier_uniform_, math.sqrt(2 / 1000), math.sqrt(6 / 1000)),
        (lambda w: nn.init.xavier_normal_(w, gain=2), 2 * math.sqrt(2 / 1000), None),
        (lambda w: nn.init.kaiming_uniform_(w, a=math.sqrt(5)), math.sqrt(1 / 600), 200**-0.5),
        (nn.init.kaiming_normal_, math.sqrt(2 / 200), None),
        (
            lambda w: nn.init.kaiming_normal_(w, mode="fan_out", nonlinearity="relu"),
            math.sqrt(2 / 800),
            None,
        ),
        (lambda w: nn.init.trunc_normal_(w, std=2.0, a=-2.0, b=2.0), 2 * 0.53966, 2),
    ],
)
def test_init_distributions(fill, std, bound):
    values = sample_of(fill, *WEIGHT)
    mean = 1 if bound == 3 else 0
    assert values.mean() == pytest.approx(mean, abs=5 * std / math.sqrt(values.size))
    assert values.std() == pytest.approx(std, rel=0.02)
    if bound:
        assert 0.99 * bound < values.max() <= bound * (1 + 1e-6)


def test_init_constants():
    assert (sample_of(nn.init.ones_, 2, 3) == 1).all() and not sample_of(nn.init.zeros_, 3).any()
    assert (sample_of(lambda w: nn.init.constant_(w, 0.5), 2, 3) == 0.5).all()
    np.testing.assert_array_equal(sample_of(nn.init.eye_, 2, 3), np.eye(2, 3))
    for shape in [(3, 8), (8, 3), (4, 2, 3)]:
        q = sample_of(lambda w: nn.init.orthogonal_(w, gain=2), *shape).reshape(shape[0], -1)
        gram = q @ q.T if q.shape[0] <= q.shape[1] else q.T @ q
        np.testing.assert_allclose(gram, 4 * np.eye(len(gram)), atol=1e-5)
    assert nn.init.calculate_gain("relu") == math.sqrt(2)
    assert nn.init.calculate_gain("leaky_relu", 2.0) == math.sqrt(2 / 5)
    assert nn.init.calculate_gain("tanh") == 5 / 3 and nn.init.calculate_gain("conv2d") == 1


def test_init_refuses():
    w = minidl.zeros(3)
    for wrong in (
        lambda: nn.init.xavier_normal_(w), lambda: nn.init.orthogonal_(w), lambda: nn.init.eye_(w),
        lambda: nn.init.calculate_gain("sin"), lambda: nn.init.trunc_normal_(w, a=8.0, b=9.0),
        lambda: nn.init.kaiming_normal_(minidl.zeros(3, 3), mode="fan"),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            wrong()


# nn.utils ---------------------------------------------------------------------------------------


def with_gradients() -> list[nn.Parameter]:
    parameters = [nn.Parameter(minidl.zeros(2)), nn.Parameter(minidl.zeros(1, 1)),
                  nn.Parameter(minidl.zeros(3))]  # fmt: skip
    parameters[0].grad = minidl.tensor([3.0, -4.0])
    parameters[1].grad = minidl.tensor([[12.0]])
    return parameters


@pytest.mark.parametrize(("norm_type", "norm"), [(2, 13), (math.inf, 12), (1, 19)])
def test_clip_grad_norm(norm_type, norm):
    parameters = with_gradients()
    total = clip_grad_norm_(parameters, norm / 2, norm_type)
    assert total.item() == pytest.approx(norm)
    np.testing.assert_allclose(parameters[0].grad.array, [1.5, -2], rtol=1e-5)
    np.testing.assert_allclose(parameters[1].grad.array, [[6]], rtol=1e-5)
    assert parameters[0].grad.dtype == np.float32
    clip_grad_norm_(parameters, 100.0, norm_type)  # short enough: nothing happens
    np.testing.assert_allclose(parameters[0].grad.array, [1.5, -2], rtol=1e-5)


def test_clip_grad_norm_not_finite():
    parameters = with_gradients()
    parameters[1].grad.array[...] = math.nan
    with pytest.raises(RuntimeError, match="nan"):
        clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
    assert parameters[0].grad.tolist() == [3, -4]
    assert math.isnan(clip_grad_norm_(parameters, 1.0).item())
    assert clip_grad_norm_([nn.Parameter(minidl.zeros(2))], 1.0).item() == 0


def test_clip_grad_value():
    parameters = with_gradients()
    clip_grad_value_(parameters, 3.5)
    assert parameters[0].grad.tolist() == [3, -3.5] and parameters[1].grad.tolist() == [[3.5]]


def test_parameters_and_vectors():
    net = Net()
    vector = parameters_to_vector(net.parameters())
    assert vector.shape == (sum(p.numel() for p in net.parameters()),)
    vector_to_parameters(vector.detach() * 2, net.parameters())
    doubled = parameters_to_vector(net.parameters())
    np.testing.assert_array_equal(doubled.numpy(), vector.numpy() * 2)
    with pytest.raises(ValueError, match="numbers"):
        vector_to_parameters(minidl.zeros(3), net.parameters())


# Models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "shape", "parameters"),
    [
        ("linear", {}, (2, 1, 28, 28), 7850),
        ("mlp", {}, (2, 1, 28, 28), 784 * 240 + 240 + 240 * 241 + 241 * 10),
        ("mlp", {"image_size": 8, "hidden": [16], "dropout": 0.5}, (2, 1, 8, 8), 65 * 16 + 170),
        ("lenet", {}, (2, 1, 28, 28), 61706),
        ("lenet", {"image_size": 32, "in_channels": 3}, (2, 3, 32, 32), 62006),
        ("cnn", {}, (2, 1, 28, 28), 421642),
        ("cnn", {"image_size": 8, "num_classes": 3}, (2, 1, 8, 8), 18816 + 257 * 128 + 129 * 3),
        ("resnet8", {}, (2, 3, 32, 32), 75290),
        ("resnet20", {}, (1, 3, 32, 32), 269722),
        ("resnet20", {"in_channels": 1, "num_classes": 5}, (1, 1, 28, 28), 269722 - 288 - 325),
        ("resnet18", {"num_classes": 7, "image_size": 64}, (1, 3, 64, 64), 11176512 + 513 * 7),
        ("resnet18", {"num_classes": 7, "stem": "cifar"}, (1, 3, 8, 8), 11176512 - 7680 + 3591),
        ("resnet50", {"num_classes": 1000}, (1, 3, 32, 32), 25557032),
        ("resnet101", {"num_classes": 1000}, (1, 3, 32, 32), 44549160),
    ],
)
def test_models(name, settings, shape, parameters):
    net = models.get(name, **settings)
    assert sum(p.numel() for p in net.parameters()) == parameters
    classes = settings.get("num_classes", 10)
    with minidl.no_grad():
        assert net.eval()(minidl.randn(*shape)).shape == (shape[0], classes)


def test_the_default_cnn_is_the_contracts():
    shapes = {name: tensor.shape for name, tensor in models.cnn().state_dict().items()}
    assert shapes == {
        "conv1.weight": (32, 1, 3, 3), "conv1.bias": (32,), "conv2.weight": (64, 32, 3, 3),
        "conv2.bias": (64,), "fc1.weight": (128, 3136), "fc1.bias": (128,),
        "fc2.weight": (10, 128), "fc2.bias": (10,),
    }  # fmt: skip
    kinds = [type(layer).__name__ for layer in models.cnn()]
    assert kinds == [
        "Conv2d", "ReLU", "MaxPool2d", "Conv2d", "ReLU", "MaxPool2d", "Flatten", "Linear", "ReLU",
        "Dropout", "Linear",
    ]  # fmt: skip


def test_resnet_names_are_torchvisions():
    state = models.resnet18(10).state_dict()
    assert len(state) == 122
    for name in ("conv1.weight", "bn1.running_var", "layer1.0.conv1.weight", "layer1.1.bn2.bias",
                 "layer2.0.downsample.0.weight", "layer2.0.downsample.1.num_batches_tracked",
                 "layer4.1.conv2.weight", "fc.weight", "fc.bias"):  # fmt: skip
        assert name in state
    assert len(models.resnet34(10).state_dict()) == 218
    assert not any("downsample" in name for name in models.resnet20().state_dict())


def test_unknown_models_are_named():
    with pytest.raises(ValueError, match=r"'resnet19'.*did you mean 'resnet18'.*lenet"):
        models.get("resnet19")
    with pytest.raises(ValueError, match="at least 4"):
        models.cnn(image_size=3)
    with pytest.raises(ValueError, match="stem"):
        models.resnet18(stem="mnist")
