"""The networks that the tutorials, the command line and the benchmarks use."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from minidl.models.resnet import resnet8, resnet18, resnet20, resnet34
from minidl.models.small import cnn, lenet, linear, mlp
from minidl.nn import Module

registry: dict[str, Callable[..., Module]] = {
    f.__name__: f for f in (linear, mlp, lenet, cnn, resnet8, resnet20, resnet18, resnet34)
}

__all__ = ["get", "registry", *registry]


def get(name: str, **kwargs: Any) -> Module:
    """A network by its name: ``models.get("cnn", num_classes=10)``.

    Raises:
        ValueError: there is none of that name; lists those that there are.
    """
    if name not in registry:
        close = difflib.get_close_matches(name, registry, 1)
        raise ValueError(
            f"no model is called {name!r}" + (f", did you mean {close[0]!r}?" if close else "")
            + f" Choose one of: {', '.join(registry)}"
        )  # fmt: skip
    return registry[name](**kwargs)
