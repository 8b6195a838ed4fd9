"""Checkpoints that PyTorch wrote: they load, and the networks answer alike.

The PyTorch networks are written out here, as torchvision has them; names and numbers must agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import minidl
from minidl import models, transfer


class BasicBlock(nn.Module):
    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = None
        if stride != 1 or inplanes != planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)
            )

    def forward(self, x: Any) -> Any:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inplanes != planes * 4:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, planes * 4, 1, stride, bias=False), nn.BatchNorm2d(planes * 4)
            )

    def forward(self, x: Any) -> Any:
        out = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        out = self.bn3(self.conv3(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    def __init__(
        self, layers: Sequence[int], num_classes: int, block: Any = BasicBlock, wide: int = 1
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        planes = 64
        for i, blocks in enumerate(layers):
            width, stride = 64 * 2**i, 1 if i == 0 else 2
            stage = [block(planes, width, stride)]
            stage += [block(width * wide, width) for _ in range(blocks - 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
            planes = width * wide
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * wide, num_classes)

    def forward(self, x: Any) -> Any:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class VGG(nn.Module):
    def __init__(
        self, config: Sequence[int | str], batch_norm: bool, num_classes: int, hidden: int
    ) -> None:
        super().__init__()
        layers: list[Any] = []
        channels = 3
        for v in config:
            if v == "M":
                layers.append(nn.MaxPool2d(2, 2))
            else:
                layers.append(nn.Conv2d(channels, v, 3, padding=1))
                layers += [nn.BatchNorm2d(v)] if batch_norm else []
                layers.append(nn.ReLU(inplace=True))
                channels = v
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(
            nn.Linear(channels * 49, hidden), nn.ReLU(True), nn.Dropout(),
            nn.Linear(hidden, hidden), nn.ReLU(True), nn.Dropout(),
            nn.Linear(hidden, num_classes),
        )  # fmt: skip

    def forward(self, x: Any) -> Any:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


CONFIG_A = [64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"]
CONFIG_D = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M"] + [512, 512, 512, "M"] * 2
# (PyTorch's, ours), with VGG's hidden layers narrowed: 4,096 of them take half a gigabyte.
NETWORKS: dict[str, tuple[Any, Any]] = {
    "resnet18": (lambda: ResNet([2, 2, 2, 2], 7), lambda: models.resnet18(7)),
    "resnet34": (lambda: ResNet([3, 4, 6, 3], 7), lambda: models.resnet34(7)),
    "resnet50": (
        lambda: ResNet([3, 4, 6, 3], 7, Bottleneck, wide=4),
        lambda: models.resnet50(7),
    ),
    "vgg11": (
        lambda: VGG(CONFIG_A, False, 7, 32),
        lambda: models.VGG(models.vgg.A, 7, False, hidden=32),
    ),
    "vgg16_bn": (
        lambda: VGG(CONFIG_D, True, 7, 32),
        lambda: models.VGG(models.vgg.D, 7, True, hidden=32),
    ),
}


def pretrained(make: Any) -> Any:
    """With random weights, and statistics that are not those of the start."""
    torch.manual_seed(0)
    model = make()
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(2, 3, 64, 64) * 2 + 1)
    return model.eval()


def write(state: Any, path: Path, kind: str) -> None:
    if kind == "safetensors":
        save_file(dict(state), path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")


@pytest.mark.parametrize("kind", ["safetensors", "zip", "older"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_checkpoint_loads_and_answers_alike(name: str, kind: str, tmp_path: Path) -> None:
    make_theirs, make_ours = NETWORKS[name]
    theirs = pretrained(make_theirs)
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    write(theirs.state_dict(), path, kind)
    ours = make_ours()
    assert transfer.load_weights(ours, path) == list(theirs.state_dict())
    x = np.random.default_rng(0).normal(size=(2, 3, 64, 64)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(x)).numpy()
    with minidl.no_grad(), minidl.use("conv2d", "formula"):
        actual = ours.eval()(minidl.tensor(x)).numpy()
    scale = np.abs(expected).max()
    assert expected.std() > 0.01 * scale
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("kind", ["zip", "older"])
def test_what_torch_save_writes_comes_as_it_was(kind: str, tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float64).reshape(4, 6)
    content = {
        "transposed": base.T,
        "part": base[1:3, ::2],
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 3),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "half": torch.ones(2, dtype=torch.float16),
        "bools": torch.tensor([True, False]),
        "parameter": nn.Parameter(torch.ones(2, 2)),
        "nested": {"epoch": 7, "list": [1.5, "text", None, (base[0], True)]},
    }
    path = tmp_path / "content.pt"
    write(content, path, kind)
    loaded = minidl.load(path)
    assert list(loaded) == list(content)
    for name, tensor in content.items():
        if name != "nested":
            expected = tensor.detach().numpy()
            assert loaded[name].dtype == expected.dtype
            np.testing.assert_array_equal(loaded[name].numpy(), expected)
    epoch, values = loaded["nested"]["epoch"], loaded["nested"]["list"]
    assert epoch == 7 and values[:3] == [1.5, "text", None]
    np.testing.assert_array_equal(values[3][0].numpy(), base[0].numpy())
    loaded["part"].array[:] = 0  # its own memory
    assert (loaded["transposed"].numpy() == base.T.numpy()).all()


@pytest.mark.parametrize("kind", ["zip", "older"])
def test_a_whole_module_is_refused(kind: str, tmp_path: Path) -> None:
    """`torch.save(model)` names classes, to be imported and called."""
    path = tmp_path / "module.pth"
    write(nn.Linear(2, 2), path, kind)
    with pytest.raises(ValueError, match=r"module\.pth.*asks for torch\.nn.*Linear.*refused"):
        minidl.load(path)


@pytest.mark.parametrize("kind", ["zip", "older"])
def test_truncated_and_foreign_dtypes_are_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    write({"w": torch.ones(1000)}, path, kind)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match="not a file of tensors"):
        minidl.load(path)
    write({"w": torch.ones(3, dtype=torch.bfloat16)}, path, kind)
    with pytest.raises(ValueError, match="BFloat16, which NumPy lacks"):
        minidl.load(path)
    write({"model": {"w": torch.ones(3)}}, path, kind)
    with pytest.raises(RuntimeError, match=r"weights\.pth(.|\n)*Missing(.|\n)*'weight'"):
        transfer.load_weights(minidl.nn.Linear(2, 2), path)


def test_frozen_batch_norm_is_evaluated_batch_norm() -> None:
    """The same step as in PyTorch with `bn.eval()` and `requires_grad_(False)`."""
    theirs = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3))
    ours = minidl.nn.Sequential(
        minidl.nn.Conv2d(1, 3, 3), minidl.nn.BatchNorm2d(3), minidl.nn.Conv2d(3, 2, 3)
    )
    torch.manual_seed(0)
    theirs[1].running_mean.normal_()
    ours.load_state_dict({k: v.numpy() for k, v in theirs.state_dict().items()})
    theirs.train()
    theirs[1].eval().requires_grad_(False)
    transfer.freeze(ours, "1")
    ours.train()
    x = torch.randn(4, 1, 8, 8)
    theirs(x).square().sum().backward()
    (ours(minidl.tensor(x.numpy())) ** 2).sum().backward()
    assert (ours[1].running_mean.numpy() == theirs[1].running_mean.numpy()).all()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            np.testing.assert_allclose(a.grad.numpy(), b.grad.numpy(), rtol=1e-4, atol=1e-3)
