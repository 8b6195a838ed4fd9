"""Weight-only quantization: weights of 16 or 8 bits, everything else in float32.

    y_j = s_j · Σ_k x_k q_jk + b_j,   q_jk = round(w_jk / s_j),   s_j = max_k |w_jk| / 127

A product with few rows (one sentence, one image) reads every weight once and does little with it:
it takes as long as the weights take to come from memory. Half the bytes, half the time. Nothing is
calibrated, for the activations stay as they are; int8 is symmetric with a scale for each output
channel (Krishnamoorthi 2018, section 2.2.2).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

import ml_dtypes
import numpy as np

from minidl import nn
from minidl.ops.quantized import linear_weight_only, pack_linear
from minidl.quantization.packed import Packed, takes_packed
from minidl.tensor import Tensor

DTYPES: dict[str, Any] = {
    "int8": np.dtype(np.int8),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


class WeightOnlyLinear(nn.Module):
    """`nn.Linear` with narrow weights, for inference: (..., in_features) -> (..., out_features).

    Attributes:
        weight: (out_features, in_features), float16, bfloat16 or int8; a buffer.
        scale: (out_features,), what one unit of an int8 weight is worth; None for floats.
        bias: (out_features,) or None.
    """

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.packed = Packed()

    @classmethod
    def from_float(cls, linear: nn.Linear, dtype: str = "int8") -> WeightOnlyLinear:
        """The same layer with its weights in 8 or 16 bits; they are copied.

        Args:
            dtype: "int8", "float16" or "bfloat16".

        Raises:
            ValueError: another dtype; or a weight that is not finite, or too large for float16.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        device, scale = linear.weight.device, None
        if dtype == "int8":
            w, largest = finite(linear.weight)
            s = np.where(largest > 0, largest / np.float32(127), np.float32(1)).astype(np.float32)
            s = np.maximum(s, np.finfo(np.float32).tiny)  # a row of subnormal numbers
            q = np.rint(w / s[:, None]).astype(DTYPES[dtype])
            weight, scale = Tensor(q).to(device), Tensor(s).to(device)
        else:
            weight = narrowed(linear.weight, DTYPES[dtype])
        bias = None if linear.bias is None else Tensor(linear.bias.array.copy())
        return cls(weight, scale, bias)

    def forward(self, input: Tensor) -> Tensor:
        w: Any = self.weight
        if takes_packed(linear_weight_only, input):
            w = self.packed.of(self.weight, pack_linear)
        return linear_weight_only(input, w, self.scale, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, dtype={self.weight.dtype}"
        )


def finite(weight: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """A weight in float32, and the largest |w| of each row.

    Raises:
        ValueError: a row is not finite.
    """
    w = weight.numpy().astype(np.float32)
    largest = np.abs(w).max(axis=tuple(range(1, w.ndim)), initial=0)
    if not np.isfinite(largest).all():
        raise ValueError(f"row {int(np.argmin(np.isfinite(largest)))} of weight is not finite")
    return w, largest


def narrowed(weight: Tensor, dtype: Any) -> Tensor:
    """A weight rounded to float16 or bfloat16.

    Raises:
        ValueError: it is not finite, or too large for float16.
    """
    w, largest = finite(weight)
    if dtype == np.float16 and largest.max(initial=0) > np.finfo(np.float16).max:
        raise ValueError(
            f"a weight of {largest.max():g} is too large for float16, which ends at 65504: "
            "take bfloat16 or int8"
        )
    return Tensor(w.astype(dtype)).to(weight.device)


def replaced(
    model: nn.Module, kinds: Collection[type], narrow: Callable[[Any], nn.Module]
) -> nn.Module:
    """A copy of a model, in eval mode, with each layer of some types as `narrow` makes it.

    Raises:
        ValueError: there is none; or as `narrow`, with the layer's name.
    """
    made: dict[nn.Module, nn.Module] = {}  # a layer that occurs twice stays one layer

    def new(name: str, layer: nn.Module) -> nn.Module:
        if type(layer) not in kinds:
            return layer
        if layer not in made:
            try:
                made[layer] = narrow(layer)
            except ValueError as error:
                error.add_note(f"in layer {name or type(layer).__name__!r}")
                raise
        return made[layer]

    model = new("", copy.deepcopy(model))
    for path, module in list(model.named_modules()):
        for name, child in list(vars(module).items()):
            if isinstance(child, nn.Module):
                setattr(module, name, new(f"{path}.{name}".lstrip("."), child))
    if not made:
        names = ", ".join(f"nn.{kind.__name__}" for kind in kinds)
        raise ValueError(f"{type(model).__name__} has no {names} whose weights could be narrowed")
    return model.eval()


def weight_only(model: nn.Module, dtype: str = "int8") -> nn.Module:
    """A copy of a model, in eval mode, with every `nn.Linear` as a `WeightOnlyLinear`.

    Raises:
        ValueError: the model has no linear layer; or as `WeightOnlyLinear.from_float`, with the
            layer's name.
    """
    return replaced(model, (nn.Linear,), lambda layer: WeightOnlyLinear.from_float(layer, dtype))
