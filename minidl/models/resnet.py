"""Residual networks (He et al. 2016, "Deep residual learning for image recognition").

Parameters are called as torchvision calls them, so that its weights load.
"""

from __future__ import annotations

import minidl.nn.functional as F
from minidl import nn
from minidl.tensor import Tensor


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


class Shortcut(nn.Module):
    """Option A of section 3.3: every second pixel, and zeros for the new channels."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels, self.stride = new_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.new_channels))

    def extra_repr(self) -> str:
        return f"new_channels={self.new_channels}, stride={self.stride}"


class BasicBlock(nn.Module):
    """relu(F(x) + x), F two 3×3 convolutions (figure 2); the shortcut adapts x where it must."""

    expansion = 1  # output channels / channels

    def __init__(
        self, in_channels: int, channels: int, stride: int = 1, downsample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """relu(F(x) + x), F a 3×3 convolution between two of 1×1 that narrow and widen (figure 5).

    The stride is in the 3×3 convolution, as in torchvision ("v1.5"), not in the first 1×1.
    """

    expansion = 4

    def __init__(
        self, in_channels: int, channels: int, stride: int = 1, downsample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


Block = type[BasicBlock] | type[Bottleneck]


def stage(
    block: Block, in_channels: int, channels: int, blocks: int, stride: int, option: str
) -> nn.Sequential:
    """Blocks of one width; the first one has the stride."""
    downsample: nn.Module | None = None
    out_channels = channels * block.expansion
    if stride != 1 or in_channels != out_channels:
        if option == "A":
            downsample = Shortcut(out_channels - in_channels, stride)
        else:  # "B": a 1×1 convolution
            downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )
    first = block(in_channels, channels, stride, downsample)
    return nn.Sequential(first, *[block(out_channels, channels) for _ in range(blocks - 1)])


def initialize(module: nn.Module) -> None:
    """He et al. 2015 for the convolutions; batch norm starts as 1 and 0 anyway."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class ResNet(nn.Module):
    """The ImageNet network of section 3.3, table 1: (N, C, H, W) -> logits.

    Args:
        block: what it is made of: `BasicBlock`, or `Bottleneck` from 50 layers on.
        blocks: how many blocks each of the four stages has.
        num_classes: the size of the output.
        stem: "imagenet": 7×7, stride 2, then max pooling; "cifar": 3×3, stride 1, no pooling.
        in_channels: C.
    """

    def __init__(
        self, block: Block, blocks: tuple[int, int, int, int], num_classes: int, stem: str,
        in_channels: int,
    ) -> None:  # fmt: skip
        super().__init__()
        if stem not in ("imagenet", "cifar"):
            raise ValueError(f"stem {stem!r}: expected 'imagenet' or 'cifar'")
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        else:
            self.conv1 = conv3x3(in_channels, 64)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()
        wide = block.expansion
        self.layer1 = stage(block, 64, 64, blocks[0], 1, "B")
        self.layer2 = stage(block, 64 * wide, 128, blocks[1], 2, "B")
        self.layer3 = stage(block, 128 * wide, 256, blocks[2], 2, "B")
        self.layer4 = stage(block, 256 * wide, 512, blocks[3], 2, "B")
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * wide, num_classes)
        self.apply(initialize)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


class CifarResNet(nn.Module):
    """The CIFAR-10 network of section 4.2: 6n + 2 layers of 16, 32, 64 channels, shortcuts A."""

    def __init__(self, n: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = stage(BasicBlock, 16, 16, n, 1, "A")
        self.layer2 = stage(BasicBlock, 16, 32, n, 2, "A")
        self.layer3 = stage(BasicBlock, 32, 64, n, 2, "A")
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(64, num_classes)
        self.apply(initialize)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))


def resnet18(num_classes: int = 1000, stem: str = "imagenet", in_channels: int = 3) -> ResNet:
    """18 layers."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, stem, in_channels)


def resnet34(num_classes: int = 1000, stem: str = "imagenet", in_channels: int = 3) -> ResNet:
    """34 layers."""
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes, stem, in_channels)


def resnet50(num_classes: int = 1000, stem: str = "imagenet", in_channels: int = 3) -> ResNet:
    """50 layers, in bottlenecks; 25.6 M parameters."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, stem, in_channels)


def resnet101(num_classes: int = 1000, stem: str = "imagenet", in_channels: int = 3) -> ResNet:
    """101 layers, in bottlenecks; 44.5 M parameters."""
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes, stem, in_channels)


def resnet8(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """8 layers, 0.08 M parameters."""
    return CifarResNet(1, num_classes, in_channels)


def resnet20(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """20 layers, 0.27 M parameters."""
    return CifarResNet(3, num_classes, in_channels)
