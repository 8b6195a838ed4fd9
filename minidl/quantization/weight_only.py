"""Weight-only quantization: weights of 16, 8 or 4 bits, everything else in float32.

    y_j = s_j · Σ_k x_k q_jk + b_j,   q_jk = round(w_jk / s_j),   s_j = max_k |w_jk| / 127

A product with few rows (one sentence, one image) reads every weight once and does little with it:
it takes as long as the weights take to come from memory. Half the bytes, half the time. Nothing is
calibrated, for the activations stay as they are; int8 is symmetric with a scale for each output
channel (Krishnamoorthi 2018, section 2.2.2). Four bits are in `int4.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from minidl import nn
from minidl.nn import functional as F
from minidl.ops.narrow import linear_weight_only, pack_linear
from minidl.quantization.int4 import Int4Embedding, Int4Linear
from minidl.quantization.packed import Packed, takes_packed
from minidl.quantization.recurrent import RECURRENT, Narrow
from minidl.quantization.rounding import finite, int8_rows
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
        return cls.of(linear.weight, linear.bias, dtype)

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, dtype: str = "int8") -> WeightOnlyLinear:
        """As `from_float`, from a float weight (out_features, in_features) and a bias."""
        q, scale = narrow_rows(weight, dtype)
        return cls(q, scale, None if bias is None else Tensor(bias.array.copy()))

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


class NarrowEmbedding(nn.Module):
    """`nn.Embedding` with a narrow table, of which only the rows that are asked for widen.

    Attributes:
        weight: (num_embeddings, embedding_dim), float16, bfloat16 or int8; a buffer.
        scale: (num_embeddings,), what one unit of an int8 row is worth; None for floats.
    """

    weight: Tensor
    scale: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor | None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    @classmethod
    def from_float(cls, embedding: nn.Embedding, dtype: str = "int8") -> NarrowEmbedding:
        """The same table in 8 or 16 bits; arguments and errors as `WeightOnlyLinear.from_float`."""
        return cls(*narrow_rows(embedding.weight, dtype))

    def forward(self, input: Tensor) -> Tensor:
        rows = F.embedding(input, self.weight).float()
        return rows if self.scale is None else rows * self.scale[input].unsqueeze(-1)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, dtype={self.weight.dtype}"


def narrow_rows(weight: Tensor, dtype: str) -> tuple[Tensor, Tensor | None]:
    """A weight in 8 or 16 bits, and the scale of each row if it is int8."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if dtype == "int8":
        return int8_rows(weight)
    return narrowed(weight, DTYPES[dtype]), None


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
    model: nn.Module,
    kinds: Collection[type],
    narrow: Callable[[Any], nn.Module],
    skip: Sequence[str] = (),
) -> nn.Module:
    """A copy of a model, in eval mode, with each layer of some types as `narrow` makes it.

    Args:
        skip: dotted names of layers that stay as they are, with all that is in them.

    Raises:
        ValueError: there is none; no such layer to skip; or as `narrow`, with the layer's name.
    """
    made: dict[nn.Module, nn.Module] = {}  # a layer that occurs twice stays one layer

    def new(name: str, layer: nn.Module) -> nn.Module:
        if type(layer) not in kinds or layer in kept:
            return layer
        if layer not in made:
            try:
                made[layer] = narrow(layer)
            except ValueError as error:
                error.add_note(f"in layer {name or type(layer).__name__!r}")
                raise
        return made[layer]

    copied = copy.deepcopy(model)
    named = dict(copied.named_modules())
    if unknown := [name for name in skip if name not in named]:
        raise ValueError(f"skip: {type(model).__name__} has no layer {unknown[0]!r}")
    kept = {layer for name in skip for layer in named[name].modules()}
    model = new("", copied)
    for path, module in list(model.named_modules()):
        for name, child in list(vars(module).items()):
            if isinstance(child, nn.Module):
                setattr(module, name, new(f"{path}.{name}".lstrip("."), child))
    if not made:
        names = ", ".join(f"nn.{kind.__name__}" for kind in kinds)
        raise ValueError(f"{type(model).__name__} has no {names} whose weights could be narrowed")
    return model.eval()


def narrow_layers(
    model: nn.Module, narrow: Narrow, embedding: Any, skip: Sequence[str]
) -> nn.Module:
    """A copy with narrow linear and recurrent layers and embeddings, the rest as it was."""

    def change(layer: Any) -> nn.Module:
        if type(layer) is nn.Linear:
            return narrow(layer.weight, layer.bias)
        if type(layer) is nn.Embedding:
            return embedding(layer)
        return RECURRENT[type(layer)].from_float(layer, narrow)

    return replaced(model, (nn.Linear, nn.Embedding, *RECURRENT), change, skip)


def weight_only(
    model: nn.Module,
    dtype: str = "int8",
    *,
    group_size: int | None = 32,
    skip: Sequence[str] = (),
) -> nn.Module:
    """A copy of a model, in eval mode, whose linear and recurrent layers and embeddings have
    narrow weights. Convolutions stay as they are: they do not wait for theirs.

    Args:
        dtype: "int8", "int4", "float16" or "bfloat16".
        group_size: of int4: how many weights of a row share a scale; None: all of them.
        skip: dotted names of layers that stay as they are.

    Raises:
        ValueError: another dtype; the model has no such layer; no such layer to skip; a weight
            that is not finite, or too large for float16 (with the layer's name).
    """
    if dtype == "int4":
        return narrow_layers(
            model,
            lambda weight, bias: Int4Linear.of(weight, bias, group_size),
            lambda layer: Int4Embedding.from_float(layer, group_size),
            skip,
        )
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of int4, {', '.join(DTYPES)}, got {dtype!r}")
    return narrow_layers(
        model,
        lambda weight, bias: WeightOnlyLinear.of(weight, bias, dtype),
        lambda layer: NarrowEmbedding.from_float(layer, dtype),
        skip,
    )
