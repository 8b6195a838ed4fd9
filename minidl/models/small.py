"""Small networks: softmax regression, a multilayer perceptron, LeNet, and the default CNN."""

from __future__ import annotations

from collections.abc import Sequence

from minidl import nn


def linear(num_classes: int = 10, in_channels: int = 1, image_size: int = 28) -> nn.Sequential:
    """Softmax regression: one linear layer on the pixels."""
    return nn.Sequential({
        "flatten": nn.Flatten(),
        "fc": nn.Linear(in_channels * image_size**2, num_classes),
    })  # fmt: skip


def mlp(
    num_classes: int = 10,
    in_channels: int = 1,
    image_size: int = 28,
    hidden: Sequence[int] = (240, 240),
    dropout: float = 0.0,
) -> nn.Sequential:
    """A multilayer perceptron: linear layers of the sizes `hidden`, ReLU after each."""
    layers: list[nn.Module] = [nn.Flatten()]
    size = in_channels * image_size**2
    for width in hidden:
        layers += [nn.Linear(size, width), nn.ReLU()]
        layers += [nn.Dropout(dropout)] if dropout else []
        size = width
    return nn.Sequential(*layers, nn.Linear(size, num_classes))


def lenet(num_classes: int = 10, in_channels: int = 1, image_size: int = 28) -> nn.Sequential:
    """LeNet-5 (LeCun et al. 1998, figure 2), with ReLU and max pooling.

    The paper's images are 32×32; smaller ones are padded at the first layer, as is usual.

    Raises:
        ValueError: the images are smaller than 12×12.
    """
    padding = 2 if image_size < 32 else 0
    size = ((image_size + 2 * padding - 4) // 2 - 4) // 2
    if size < 1:
        raise ValueError(f"lenet needs images of at least 12×12, got {image_size}×{image_size}")
    return nn.Sequential({
        "conv1": nn.Conv2d(in_channels, 6, 5, padding=padding),
        "relu1": nn.ReLU(),
        "pool1": nn.MaxPool2d(2),
        "conv2": nn.Conv2d(6, 16, 5),
        "relu2": nn.ReLU(),
        "pool2": nn.MaxPool2d(2),
        "flatten": nn.Flatten(),
        "fc1": nn.Linear(16 * size**2, 120),
        "relu3": nn.ReLU(),
        "fc2": nn.Linear(120, 84),
        "relu4": nn.ReLU(),
        "fc3": nn.Linear(84, num_classes),
    })  # fmt: skip


def cnn(num_classes: int = 10, in_channels: int = 1, image_size: int = 28) -> nn.Sequential:
    """The default network: two convolutions, each halved by max pooling, two linear layers.

    Args:
        num_classes: the size of the output.
        in_channels: 1 for grey images, 3 for colour.
        image_size: height and width; 28 gives 64·7·7 = 3,136 features, 8 (Digits) 64·2·2 = 256.

    Raises:
        ValueError: the images are smaller than 4×4.
    """
    if image_size < 4:
        raise ValueError(f"cnn needs images of at least 4×4, got {image_size}×{image_size}")
    return nn.Sequential({
        "conv1": nn.Conv2d(in_channels, 32, 3, padding=1),
        "relu1": nn.ReLU(),
        "pool1": nn.MaxPool2d(2),
        "conv2": nn.Conv2d(32, 64, 3, padding=1),
        "relu2": nn.ReLU(),
        "pool2": nn.MaxPool2d(2),
        "flatten": nn.Flatten(),
        "fc1": nn.Linear(64 * (image_size // 4) ** 2, 128),
        "relu3": nn.ReLU(),
        "dropout": nn.Dropout(0.5),
        "fc2": nn.Linear(128, num_classes),
    })  # fmt: skip
