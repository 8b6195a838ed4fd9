"""Constant weights in the order in which a kernel reads them: packed once, kept by a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minidl.autograd import mode, owner, tick, writes
from minidl.backend.native import native
from minidl.op import OpFunction
from minidl.tensor import Tensor


class Packed:
    """Packs a tensor at its first use, and again only after it was changed.

        self.packed = Packed()                        # in a layer's __init__
        w = self.packed.of(self.weight, pack_linear)  # in its forward

    It notes what in-place ops, ``load_state_dict`` and ``to`` change. It is for this processor and
    this process: a copied, pickled or saved layer packs anew.
    """

    def __init__(self) -> None:
        self.array: Any = None
        self.value: Any = None
        self.time = 0

    def of(self, weight: Tensor, pack: Callable[..., Any], *arguments: Any) -> Any:
        """``pack(array of weight, *arguments)``, the same object as long as the weight is."""
        array = weight.array
        if self.array is not array or writes.get(owner(array), 0) > self.time:
            self.value, self.array, self.time = pack(array, *arguments), array, tick()
        return self.value

    def __reduce__(self) -> Any:
        return Packed, ()


def takes_packed(op: OpFunction, x: Tensor) -> bool:
    """Whether ``op(x, weight, ...)`` runs the kernel that packed weights are for.

    It does not where x wants a gradient, which needs the weights as they are, or has no elements.
    """
    if native is None or (x.requires_grad and mode.enabled) or not x.array.size:
        return False
    function = op.op.table.get((type(x.array), x.dtype)) or op.op.implementation(x.array)
    return any(k.function is function and k.name == "native" for k in op.op.kernels)
