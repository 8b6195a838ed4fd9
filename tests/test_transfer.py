"""Transfer learning: what is frozen stays and costs nothing; cached features; checkpoints."""

from __future__ import annotations

import copy
import pickle
import zipfile
from typing import Any

import numpy as np
import pytest

import minidl
import minidl.nn.functional as F
from minidl import models, nn, optim, transfer
from minidl.data import ConcatDataset, DataLoader, Digits, Subset, TensorDataset, transforms
from minidl.data.augment import Compose, RandomCrop
from minidl.transfer import freeze, unfreeze


def network() -> nn.Sequential:
    minidl.manual_seed(0)
    return nn.Sequential({
        "conv1": nn.Conv2d(1, 4, 3, padding=1),
        "bn1": nn.BatchNorm2d(4),
        "relu1": nn.ReLU(),
        "conv2": nn.Conv2d(4, 6, 3, padding=1),
        "bn2": nn.BatchNorm2d(6),
        "relu2": nn.ReLU(),
        "flatten": nn.Flatten(),
        "dropout": nn.Dropout(0.5),
        "fc": nn.Linear(6 * 64, 10),
    })  # fmt: skip


def learning(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def train_a_little(model: nn.Module, steps: int = 3) -> None:
    optimizer = optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    rng = np.random.default_rng(0)
    model.train()
    for _ in range(steps):
        x = minidl.tensor(rng.normal(2, 3, (8, 1, 8, 8)).astype(np.float32))
        optimizer.zero_grad()
        F.cross_entropy(model(x), minidl.tensor(rng.integers(0, 10, 8))).backward()
        optimizer.step()


def values(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}


# Freezing ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, still",
    [
        ((["conv1"], None), "bn1. conv2. bn2. fc."),
        ((["conv1", "bn1.weight"], None), "bn1.bias conv2. bn2. fc."),
        ((["conv?"], None), "bn1. bn2. fc."),
        ((["*.bias"], None), "conv1.weight bn1.weight conv2.weight bn2.weight fc.weight"),
        (([], None), ""),
        (([], 0), "conv1. bn1. conv2. bn2. fc."),
        (([], 3), "bn2. fc."),
        (([], -1), "fc."),
        (([], 5), ""),
    ],
)
def test_freeze_by_name_pattern_and_depth(arguments: Any, still: str) -> None:
    model, (names, depth) = network(), arguments
    everything = learning(model)
    frozen = freeze(model, *names, depth=depth)
    expected = [n for n in everything if any(n.startswith(s) for s in still.split())]
    assert learning(model) == expected
    assert frozen == [n for n in everything if n not in expected]
    assert unfreeze(model, *names, depth=depth) == frozen and learning(model) == everything


@pytest.mark.parametrize(
    "names, moves",
    [
        (["bn1"], "bn2"),
        (["bn1.weight", "bn1.bias"], "bn2"),
        (["*bn1*"], "bn2"),
        (["conv1"], "bn1 bn2"),
        (["bn1.weight"], "bn1 bn2"),
    ],
)
def test_frozen_batch_norm_does_not_move(names: list[str], moves: str) -> None:
    """Neither its parameters nor its statistics, although `train()` is called after it."""
    model = network()
    frozen = freeze(model, *names)
    before = values(model)
    train_a_little(model)
    for name, value in values(model).items():
        layer = name.split(".")[0]
        if layer.startswith("bn") and "running" in name:
            assert (value != before[name]).any() == (layer in moves.split()), name
        if name in frozen:
            assert (value == before[name]).all(), name
        elif name.endswith("weight"):
            assert (value != before[name]).any(), name
    unfreeze(model)
    before = values(model)
    train_a_little(model)
    assert all((value != before[name]).any() for name, value in values(model).items())


def test_frozen_survives_copies_and_modes() -> None:
    model = network()
    freeze(model, depth=-1)
    last = ["relu2", "flatten", "dropout", "fc"]  # the head's group
    for m in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        m.eval()
        m.train()
        assert [n for n, module in m.named_children() if module.training] == last
    single = nn.BatchNorm2d(3)
    freeze(single)
    single.train()(minidl.randn(4, 3, 2, 2))
    assert (single.running_mean.numpy() == 0).all()


def test_freeze_refuses_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"nothing called 'conv3'.*did you mean 'conv\d'.*bn1"):
        freeze(network(), "conv3")
    with pytest.raises(ValueError, match=r"from -5 to 5.*conv1, bn1, conv2, bn2, fc.*got 6"):
        freeze(network(), depth=6)
    with pytest.raises(ValueError, match="not both"):
        freeze(network(), "conv1", depth=1)
    model = network()
    with pytest.raises(ValueError):
        freeze(model, "conv1", "nothing")
    assert len(learning(model)) == 10  # nothing was frozen


class Counted(nn.Module):
    """Counts how often a gradient comes back through here."""

    def __init__(self) -> None:
        super().__init__()
        self.gradients = 0

    def forward(self, x: minidl.Tensor) -> minidl.Tensor:
        if x.requires_grad:
            x.register_hook(self.count)
        return x

    def count(self, g: minidl.Tensor) -> None:
        self.gradients += 1


def test_frozen_layers_cost_no_backward_and_no_memory() -> None:
    minidl.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), Counted()]
    model = nn.Sequential(*layers, nn.Linear(16, 3))
    counters = [m for m in model if isinstance(m, Counted)]
    x, y = minidl.randn(8, 16), minidl.tensor(np.arange(8) % 3)

    F.cross_entropy(model(x), y).backward()
    assert [c.gradients for c in counters] == [1, 1, 1, 1]
    model.zero_grad()
    freeze(model, depth=4)  # two of the four blocks
    inside = []
    hooks = [m.register_forward_hook(lambda m, a, out: inside.append(out)) for m in model]
    F.cross_entropy(model(x), y).backward()
    # Nothing in the frozen half is on the tape: no node keeps an array, none is walked.
    recorded = [out.grad_fn is not None for out in inside]
    assert recorded == [False] * 8 + [True] * 9
    assert [c.gradients for c in counters] == [1, 1, 2, 2]
    assert [p.grad is not None for p in model.parameters()] == [False] * 8 + [True] * 10
    for hook in hooks:
        hook.remove()
    # Frozen layers above one that learns pass the gradient on, and compute none of their own.
    model.zero_grad()
    unfreeze(model)
    freeze(model, *[str(i) for i in range(4, 17)])
    F.cross_entropy(model(x), y).backward()
    assert [p.grad is not None for p in model.parameters()] == [True] * 4 + [False] * 14


# The head, and fine-tuning ----------------------------------------------------------------


def test_replace_head() -> None:
    vgg = models.VGG((4, 0), 10, hidden=8, in_channels=1)
    for model in (network(), models.resnet8(10, 1), vgg):
        freeze(model)
        head = transfer.replace_head(model, 3)
        assert model(minidl.randn(2, 1, 8, 8)).shape == (2, 3)
        assert [p.requires_grad for p in head.parameters()] == [True, True]
        assert len(learning(model)) == 2 and head.training
    with pytest.raises(ValueError, match="no linear layer"):
        transfer.replace_head(nn.Sequential(nn.Conv2d(1, 1, 3)), 3)
    with pytest.raises(ValueError, match="at least 1"):
        transfer.replace_head(network(), 0)


def test_gradual_unfreezing() -> None:
    model = network()
    seen = [transfer.gradual_unfreeze(model, epoch, every=2) for epoch in range(5)]
    assert seen[0] == seen[1] == ["fc"]
    assert seen[2] == seen[3] == ["bn2", "fc"] and seen[4] == ["conv2", "bn2", "fc"]
    assert {n.split(".")[0] for n in learning(model)} == set(seen[4])
    model.train()
    assert not model.bn1.training and model.bn2.training
    assert len(transfer.gradual_unfreeze(model, 99)) == 5 and len(learning(model)) == 10


def test_discriminative_learning_rates() -> None:
    model = network()
    groups = transfer.discriminative_lr(model, 0.1, factor=2)
    assert [g["lr"] for g in groups] == pytest.approx([0.1 / 16, 0.1 / 8, 0.1 / 4, 0.1 / 2, 0.1])
    optimizer = optim.SGD(groups)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 10
    before = values(model)
    for p in model.parameters():
        p.grad = minidl.ones(*p.shape)
    optimizer.step()
    moved = {n: before[n] - v for n, v in values(model).items() if n.endswith("weight")}
    assert moved["conv1.weight"] == pytest.approx(0.1 / 16, rel=1e-3)
    assert moved["fc.weight"] == pytest.approx(0.1, rel=1e-3)
    with pytest.raises(ValueError, match="above 0"):
        transfer.discriminative_lr(model, 0)


# Cached features --------------------------------------------------------------------------


def digits(n: int = 40, **kwargs: Any) -> Subset:
    return Subset(Digits(**kwargs), range(n))


@pytest.mark.parametrize(
    "make, depth, head",
    [
        (network, -1, ["dropout", "fc"]),
        (network, 3, ["bn2", "relu2", "flatten", "dropout", "fc"]),
        (lambda: models.resnet8(10, 1), -1, None),
        (lambda: models.VGG((4, 0), 10, in_channels=1, hidden=8), 1, ["0", "1", "2", "3", "4", "5",
                                                                      "6"]),
    ],
)  # fmt: skip
def test_features_are_what_the_head_would_get(make: Any, depth: int, head: Any) -> None:
    model = make()
    train_a_little(model)
    freeze(model, depth=depth)
    flags = [m.training for m in model.modules()]
    features, tail = transfer.cache_features(model, digits(), batch_size=16)
    assert [m.training for m in model.modules()] == flags
    assert head is None or [n for n, _ in tail.named_children()] == head
    assert len(features) == 40 and not features.tensors[0].requires_grad
    model.eval()
    x, y = next(iter(DataLoader(digits(), 40)))
    cached = tail.eval()(features.tensors[0])
    np.testing.assert_allclose(cached.numpy(), model(x).numpy(), rtol=1e-5, atol=1e-5)
    assert (features.tensors[1].numpy() == y.numpy()).all()


def test_training_the_head_trains_the_model() -> None:
    """And to the same weights as without a cache."""
    one, other = network(), network()
    for model in (one, other):
        model.dropout.p = 0.0  # masks would differ
        freeze(model, depth=-1)
        model.train()
    features, head = transfer.cache_features(one, digits())
    for model, data in ((head, features), (other, digits())):
        optimizer = optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        for x, y in DataLoader(data, 10, shuffle=True, seed=3):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    for a, b in zip(one.parameters(), other.parameters()):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-4, atol=1e-6)


class HiddenDropout(nn.Module):
    def forward(self, x: minidl.Tensor) -> minidl.Tensor:
        return F.dropout(x, 0.5, self.training)


@pytest.mark.parametrize(
    "prepare, data, head, message",
    [
        ("frozen", {"transform": RandomCrop(8, padding=1)}, None, "augmented .RandomCrop"),
        ("frozen", {"transform": Compose([RandomCrop(8, padding=1)])}, None, "augmented"),
        ("frozen", {"transform": transforms.Lambda(lambda x: x + np.float32(np.random.rand()))},
         None, "differ from one time"),
        ("learns", {}, "fc", "conv1 comes before the head 'fc' and learns"),
        ("by hand", {}, "fc", "bn1 comes before.*batch norm in training"),
        ("frozen", {}, "fc", "dropout comes before the head 'fc' and drops"),
        ("frozen", {}, "fcc", "head='fcc' is no layer: did you mean 'fc'"),
        ("everything", {}, None, "nothing in Sequential learns"),
        ("hidden", {}, "fc", "differ from one time"),
    ],
)  # fmt: skip
def test_refuses_features_that_change(prepare: str, data: Any, head: Any, message: str) -> None:
    model = network()
    if prepare == "frozen":
        freeze(model, depth=-1)
    elif prepare == "by hand":
        for name in ("conv1", "bn1", "conv2", "bn2"):
            getattr(model, name).requires_grad_(False)
    elif prepare == "everything":
        freeze(model)
    elif prepare == "hidden":
        model = nn.Sequential({"flatten": nn.Flatten(), "hidden": HiddenDropout(),
                               "fc": nn.Linear(64, 10)})  # fmt: skip
    with pytest.raises(ValueError, match=message):
        transfer.cache_features(model, ConcatDataset([digits(**data)]), head)


def test_refuses_a_head_that_is_not_the_end() -> None:
    model = models.resnet8(10, 1)
    freeze(model, "conv1", "bn1", "layer1", "layer2")
    with pytest.raises(ValueError, match="'layer3' is not the end of CifarResNet"):
        transfer.cache_features(model, digits())
    with pytest.raises(ValueError, match="dataset is empty"):
        transfer.cache_features(model, TensorDataset(minidl.zeros(0, 1, 8, 8), minidl.zeros(0)))


# Checkpoints ------------------------------------------------------------------------------


def test_load_weights_names_what_does_not_fit(tmp_path: Any) -> None:
    path = tmp_path / "weights.safetensors"
    trained = models.resnet8(10, 1)
    train_a_little(trained)
    minidl.save(trained.state_dict(), path)
    model = models.resnet8(3, 1)
    before = values(model)
    with pytest.raises(RuntimeError, match=r"size mismatch for fc.weight: expected \(3, 64\), rec"):
        transfer.load_weights(model, path)
    assert all((v == before[n]).all() for n, v in values(model).items())
    loaded = transfer.load_weights(model, path, skip="fc.*")
    assert set(loaded) == {n for n in before if not n.startswith("fc.")}
    after = values(model)
    assert all((after[n] == v).all() for n, v in values(trained).items() if n in loaded)
    assert (after["fc.weight"] == before["fc.weight"]).all()
    with pytest.raises(ValueError, match=r"skip='head\.\*' fits no name.*fc"):
        transfer.load_weights(model, path, skip="head.*")
    with pytest.raises(RuntimeError, match=r"Missing.*'layer1.2.conv1.weight'"):
        transfer.load_weights(models.resnet20(10, 1), path)
    with pytest.raises(RuntimeError, match="Unexpected"):
        transfer.load_weights(nn.Sequential({"fc": nn.Linear(64, 10)}), path)
    minidl.save({"epoch": 3}, path)
    with pytest.raises(ValueError, match="holds no state_dict"):
        transfer.load_weights(model, path)


def test_old_checkpoints_have_no_count_of_batches(tmp_path: Any) -> None:
    model = models.resnet8(10, 1)
    state = {n: t for n, t in model.state_dict().items() if "num_batches" not in n}
    minidl.save({"state_dict": state}, tmp_path / "old.safetensors")
    assert transfer.load_weights(model, tmp_path / "old.safetensors") == list(state)


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("code was run",))


@pytest.mark.parametrize("content", [Evil(), {"weight": Evil()}, [np.arange(3), Evil()]])
def test_a_pth_runs_no_code(tmp_path: Any, capsys: Any, content: Any) -> None:
    path = tmp_path / "evil.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content, 2))
    with pytest.raises(ValueError, match=r"evil.pth.*asks for \w*builtins\w*.print|__builtin__"):
        minidl.load(path)
    assert "code was run" not in capsys.readouterr().out


def test_a_damaged_pth_is_refused(tmp_path: Any) -> None:
    path = tmp_path / "damaged.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/version", "3")
    with pytest.raises(ValueError, match=r"no data\.pkl"):
        minidl.load(path)
    path.write_bytes(b"PK\3\4" + b"\0" * 100)
    with pytest.raises(ValueError, match="not a file of tensors"):
        minidl.load(path)


# VGG --------------------------------------------------------------------------------------


def test_vgg_names_are_torchvisions() -> None:
    names = list(models.VGG(models.vgg.D, 10, batch_norm=True, hidden=4).state_dict())
    assert names[:2] == ["features.0.weight", "features.0.bias"]
    assert "features.41.running_var" in names and "features.40.weight" in names
    assert names[-6:] == [f"classifier.{i}.{p}" for i in (0, 3, 6) for p in ("weight", "bias")]
    plain = list(models.VGG(models.vgg.A, 10, hidden=4).state_dict())
    convolutions = [n for n in plain if n.startswith("features") and n.endswith("weight")]
    assert [int(n.split(".")[1]) for n in convolutions] == [0, 3, 6, 8, 11, 13, 16, 18]
