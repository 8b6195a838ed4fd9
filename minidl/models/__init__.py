"""The networks that the tutorials, the command line and the benchmarks use."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from minidl.models.resnet import resnet8, resnet18, resnet20, resnet34, resnet50, resnet101
from minidl.models.small import cnn, lenet, linear, mlp
from minidl.models.vgg import VGG, vgg11, vgg11_bn, vgg16, vgg16_bn
from minidl.nn import Module

registry: dict[str, Callable[..., Module]] = {
    f.__name__: f
    for f in (
        linear, mlp, lenet, cnn, resnet8, resnet20, resnet18, resnet34, resnet50, resnet101,
        vgg11, vgg11_bn, vgg16, vgg16_bn,
    )
}  # fmt: skip

__all__ = ["VGG", "get", "registry", *registry]


def get(name: str, **kwargs: Any) -> Module:
    """A network by its name: ``models.get("cnn", num_classes=10, in_channels=1, image_size=28)``.

    `image_size` is left out for a network that takes images of any size.

    Raises:
        ValueError: there is none of that name; lists those that there are.
    """
    if name not in registry:
        close = difflib.get_close_matches(name, registry, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"no model is called {name!r}: {hint}choose one of {', '.join(registry)}")
    if "image_size" not in inspect.signature(registry[name]).parameters:
        kwargs.pop("image_size", None)
    return registry[name](**kwargs)
