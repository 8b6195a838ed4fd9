"""Dynamic quantization: int8 weights, and activations whose range is found when they come.

    q_x = round(x / s_x) + z_x,     s_x = (max x - min x) / 255,     0 always exact
    y_j = s_x s_j · Σ_k (q_x,k - z_x) q_jk  +  b_j

The sum is one of small integers, exact in 32 bits; between the layers there are floats. Against
`static.py` there is nothing to calibrate, and no range that was measured on other data than what
comes: the way for recurrent networks, whose values differ from step to step and from sentence to
sentence. The price is a look at x before each product, and that all of a batch share one s_x (as in
ONNX's DynamicQuantizeLinear): what a row becomes depends a little on the others.

    small = quantize(model, scheme="dynamic")
    minidl.save(small.state_dict(), "small.safetensors")
    again = quantize(Model(), scheme="dynamic")           # any weights: they are loaded
    again.load_state_dict(minidl.load("small.safetensors"))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minidl import nn
from minidl.nn import functional as F
from minidl.op import OpFunction
from minidl.ops.quantized import (
    conv2d_dynamic,
    conv_integer,
    expect_sum_fits,
    linear_dynamic,
    matmul_integer,
    pack_conv_integer,
    pack_matmul_integer,
)
from minidl.quantization.fuse import ConvReLU2d
from minidl.quantization.packed import Packed, takes_packed
from minidl.quantization.recurrent import RECURRENT
from minidl.quantization.rounding import int8_rows
from minidl.quantization.weight_only import NarrowEmbedding, replaced
from minidl.tensor import Tensor


class DynamicLinear(nn.Module):
    """`nn.Linear` as a product of integers: (..., in_features) -> (..., out_features).

    Attributes:
        weight: (out_features, in_features), int8; a buffer.
        scale: (out_features,), what one unit of a weight is worth.
        bias: (out_features,) or None.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        expect_room(weight)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.packed = Packed()

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[-1:] != (self.in_features,):
            raise ValueError(
                f"DynamicLinear takes (..., {self.in_features}), got {tuple(input.shape)}"
            )
        w: Any = self.weight
        if packs(matmul_integer, input):
            w = self.packed.of(w, pack_matmul_integer)
        return linear_dynamic(input, w, self.scale, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, dtype={self.weight.dtype}"
        )


class DynamicConv2d(nn.Conv2d):
    """`nn.Conv2d`, perhaps with ReLU, as a convolution of integers; buffers as `DynamicLinear`."""

    scale: Tensor
    relu: bool
    packed: Packed

    @classmethod
    def from_float(cls, conv: nn.Conv2d, weight: Tensor, scale: Tensor) -> DynamicConv2d:
        new = cls.__new__(cls)
        expect_room(weight)
        vars(new).update((k, v) for k, v in vars(conv).items() if k not in ("weight", "bias"))
        new.register_buffer("weight", weight)
        new.register_buffer("scale", scale)
        new.register_buffer("bias", None if conv.bias is None else Tensor(conv.bias.array.copy()))
        new.relu, new.packed = isinstance(conv, ConvReLU2d), Packed()
        return new

    def forward(self, input: Tensor) -> Tensor:
        x, had_batch = F.with_batch("DynamicConv2d", input, 4, "(N, C, H, W) or (C, H, W)")
        if x.shape[1] != self.in_channels:
            raise ValueError(
                f"DynamicConv2d takes (N, {self.in_channels}, H, W), got {tuple(x.shape)}"
            )
        w: Any = self.weight
        x, how = F.window("DynamicConv2d", x, w.shape[2:], self.stride, self.padding, self.dilation)
        if packs(conv_integer, x):
            w = self.packed.of(w, lambda array: pack_conv_integer(array, groups=self.groups))
        y = conv2d_dynamic(x, w, self.scale, self.bias, **how, groups=self.groups, relu=self.relu)
        return y if had_batch else y.squeeze(0)

    def extra_repr(self) -> str:
        return super().extra_repr() + f", dtype={self.weight.dtype}" + ", relu=True" * self.relu


def packs(op: OpFunction, x: Tensor) -> bool:
    """Whether the native product runs, for which weights are packed beforehand."""
    return x.dtype == np.float32 and takes_packed(op, x.detach())


def expect_room(weight: Tensor) -> None:
    """Raises ValueError unless any sum of a row's products fits in 32 bits."""
    zero = np.array([0, 255], np.uint8)  # of activations: whatever it will be
    expect_sum_fits(int(np.prod(weight.shape[1:])), zero, zero, weight.array, None)


def dynamic(
    model: nn.Module,
    *,
    per_channel: bool = True,
    weight_bits: int = 8,
    skip: Sequence[str] = (),
) -> nn.Module:
    """A copy of a model, in eval mode, with products of integers in its linear, convolutional and
    recurrent layers, and int8 embeddings. It is for inference: no gradient passes through.

    Batch norms stay in float; where they lie in a Sequential, `fuse(model)` puts them into the
    convolutions first.

    Args:
        per_channel: a scale for each row of a weight, else one for all.
        weight_bits: 2 to 8: fewer levels for weights (they are stored in 8 bits all the same).
        skip: dotted names of layers that stay in float.

    Raises:
        ValueError: a layer with a matrix that has no int8 form (it is named); no layer that has
            one; no such layer to skip; a weight that is not finite; sums that may not fit in 32
            bits.
    """

    def int8(weight: Tensor) -> tuple[Tensor, Tensor]:
        return int8_rows(weight, weight_bits, per_channel)

    def linear(weight: Tensor, bias: Any) -> nn.Module:
        return DynamicLinear(*int8(weight), None if bias is None else Tensor(bias.array.copy()))

    def change(layer: Any) -> nn.Module:
        if type(layer) is nn.Linear:
            return linear(layer.weight, layer.bias)
        if type(layer) is nn.Embedding:
            return NarrowEmbedding(*int8(layer.weight))
        if isinstance(layer, nn.Conv2d):
            return DynamicConv2d.from_float(layer, *int8(layer.weight))
        return RECURRENT[type(layer)].from_float(layer, linear)

    kinds = nn.Linear, nn.Conv2d, ConvReLU2d, nn.Embedding, *RECURRENT
    for name, layer in model.named_modules():
        left = any(name == s or name.startswith(s + ".") for s in skip)
        if (
            type(layer) not in kinds
            and not left
            and any(p.ndim > 1 for _, p in layer._own_parameters())
        ):
            raise ValueError(
                f"{type(layer).__name__} {name!r} has no int8 form: leave it in float with "
                f"skip=[{name!r}]"
            )
    return replaced(model, kinds, change, skip).requires_grad_(False)
