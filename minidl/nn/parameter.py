"""Parameter: a tensor that a module learns."""

from __future__ import annotations

from typing import Any

import numpy as np

from minidl import backend
from minidl.tensor import Tensor


class Parameter(Tensor):
    """A tensor that counts among `Module.parameters()` when it is a module's attribute."""

    def __init__(self, data: Any, requires_grad: bool = True) -> None:
        """Wrap a tensor's array (not a copy).

        Raises:
            TypeError: not a tensor or array.
            RuntimeError: the numbers are not floating, so they cannot be learned.
        """
        super().__init__(data, requires_grad)

    def __repr__(self) -> str:
        return "Parameter containing:\n" + super().__repr__()

    # A copy starts anew: without gradient and without hooks.
    def __reduce__(self) -> Any:
        return type(self), (self.array, self.requires_grad), vars(self) or None


def empty(*shape: int, device: str | None = None, dtype: Any = None) -> Tensor:
    """A tensor to be filled by `nn.init`; float32 on the CPU unless said otherwise."""
    return Tensor(backend.to_device(np.empty(shape, dtype or np.float32), device or "cpu"))
