"""VGG (Simonyan and Zisserman 2015): nothing but 3×3 convolutions, pooling, three linear layers.

Parameters are called as torchvision calls them, so that its weights load.
"""

from __future__ import annotations

from collections.abc import Sequence

from minidl import nn
from minidl.tensor import Tensor

POOL = 0
# Table 1: the channels of each convolution, POOL where the image is halved.
A = (64, POOL, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL)
D = (
    64, 64, POOL, 128, 128, POOL, 256, 256, 256, POOL, 512, 512, 512, POOL, 512, 512, 512, POOL,
)  # fmt: skip


class VGG(nn.Module):
    """(N, C, H, W) -> logits; made for 224×224, other sizes are averaged or repeated to 7×7.

    Args:
        layers: the channels of each convolution, POOL for max pooling.
        num_classes: the size of the output.
        batch_norm: normalise after each convolution.
        in_channels: C.
        hidden: the width of the two hidden linear layers.
        dropout: of their outputs.
    """

    def __init__(
        self,
        layers: Sequence[int] = A,
        num_classes: int = 1000,
        batch_norm: bool = False,
        in_channels: int = 3,
        hidden: int = 4096,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        features: list[nn.Module] = []
        channels = in_channels
        for out_channels in layers:
            if out_channels == POOL:
                features.append(nn.MaxPool2d(2, stride=2))
                continue
            features.append(nn.Conv2d(channels, out_channels, 3, padding=1))
            features += [nn.BatchNorm2d(out_channels)] if batch_norm else []
            features.append(nn.ReLU(inplace=True))
            channels = out_channels
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(
            nn.Linear(channels * 7 * 7, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )
        self.apply(initialize)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def initialize(module: nn.Module) -> None:
    """He et al. 2015 for the convolutions, small normal numbers for the linear layers."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0, 0.01)
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def vgg11(num_classes: int = 1000, in_channels: int = 3) -> VGG:
    """11 layers with weights (configuration A), 133 M parameters."""
    return VGG(A, num_classes, False, in_channels)


def vgg11_bn(num_classes: int = 1000, in_channels: int = 3) -> VGG:
    """`vgg11` with batch norm."""
    return VGG(A, num_classes, True, in_channels)


def vgg16(num_classes: int = 1000, in_channels: int = 3) -> VGG:
    """16 layers with weights (configuration D), 138 M parameters."""
    return VGG(D, num_classes, False, in_channels)


def vgg16_bn(num_classes: int = 1000, in_channels: int = 3) -> VGG:
    """`vgg16` with batch norm."""
    return VGG(D, num_classes, True, in_channels)
