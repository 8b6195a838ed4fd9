"""Weights of 16 bits, everything else in float32: half the bytes on disk and in memory.

              sign, exponent, fraction   largest    smallest (subnormal)   step at 1
    float32          1,  8, 23           3.4e38     1.4e-45                1.2e-7
    float16          1,  5, 10           65504      6.0e-8                 9.8e-4
    bfloat16         1,  8,  7           3.4e38     9.2e-41                7.8e-3

Weights are few thousandths to few units, so float16 has room for them and rounds eight times less.
bfloat16 is the upper half of a float32: nothing overflows, and widening it is a shift. Activations
stay float32 and sums are kept in it, so the weights' rounding is the only error.

A linear layer reads its weights narrow (`WeightOnlyLinear`): it waits for memory, and half the
bytes are half the time. Other layers widen theirs when they are called, one layer at a time: they
are smaller, not faster.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minidl import nn
from minidl.autograd import no_grad
from minidl.nn import functional as F
from minidl.nn.norm import BatchNorm
from minidl.ops.norm import scale_shift
from minidl.quantization.weight_only import DTYPES, WeightOnlyLinear, narrowed, replaced
from minidl.tensor import Tensor


class HalfLayer(nn.Module):
    """A layer of `nn` with its matrices in 16 bits (buffers of the same names), for inference."""

    @classmethod
    def from_float(cls, layer: nn.Module, weights: dict[str, Tensor]) -> HalfLayer:
        """A layer with narrow weights, given by their names, in place of its own."""
        half = cls.__new__(cls)
        vars(half).update((k, v) for k, v in vars(layer).items() if k not in weights)
        for name, weight in weights.items():
            half.register_buffer(name, weight)
        return half

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the layer of `nn`, which sees float32 weights: they live as long as this call."""
        wide = object.__new__(type(self))
        vars(wide).update(vars(self))
        vars(wide).update((name, weight.float()) for name, weight in self._own_buffers())
        return super(HalfLayer, wide).forward(*args, **kwargs)

    def extra_repr(self) -> str:
        dtype = next(weight.dtype for _, weight in self._own_buffers())
        return f"{super().extra_repr()}, dtype={dtype}"


class HalfConv1d(HalfLayer, nn.Conv1d):
    """`nn.Conv1d` with a weight of 16 bits."""


class HalfConv2d(HalfLayer, nn.Conv2d):
    """`nn.Conv2d` with a weight of 16 bits."""


class HalfConvTranspose2d(HalfLayer, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` with a weight of 16 bits."""


class HalfRNN(HalfLayer, nn.RNN):
    """`nn.RNN` with weights of 16 bits."""


class HalfLSTM(HalfLayer, nn.LSTM):
    """`nn.LSTM` with weights of 16 bits."""


class HalfGRU(HalfLayer, nn.GRU):
    """`nn.GRU` with weights of 16 bits."""


class HalfRNNCell(HalfLayer, nn.RNNCell):
    """`nn.RNNCell` with weights of 16 bits."""


class HalfLSTMCell(HalfLayer, nn.LSTMCell):
    """`nn.LSTMCell` with weights of 16 bits."""


class HalfGRUCell(HalfLayer, nn.GRUCell):
    """`nn.GRUCell` with weights of 16 bits."""


class HalfEmbedding(HalfLayer, nn.Embedding):
    """`nn.Embedding` with a table of 16 bits, of which only the rows that are asked for widen."""

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.weight).float()


class ScaleShift(nn.Module):
    """A batch norm at inference, x · scale + shift: two float32 vectors in place of four.

    Attributes:
        scale, shift: (C,); buffers.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    @classmethod
    def from_float(cls, norm: BatchNorm, weights: Any = None) -> nn.Module:
        """What the norm does with its statistics; one that keeps none stays as it is."""
        if norm.running_mean is None:
            return norm
        with no_grad():
            mean, var = norm.running_mean, norm.running_var
            return cls(*F.scale_and_shift(mean, var, norm.weight, norm.bias, norm.eps))

    def forward(self, input: Tensor) -> Tensor:
        channels = self.scale.shape[0]
        if input.ndim < 2 or input.shape[1] != channels:
            raise ValueError(f"ScaleShift takes (N, {channels}, ...), got {tuple(input.shape)}")
        return scale_shift(input, self.scale, self.shift)

    def extra_repr(self) -> str:
        return str(self.scale.shape[0])


LAYERS: dict[type[nn.Module], Any] = {
    nn.Linear: WeightOnlyLinear,
    nn.BatchNorm1d: ScaleShift,
    nn.BatchNorm2d: ScaleShift,
    **{half.__bases__[1]: half for half in HalfLayer.__subclasses__()},
}


def half(model: nn.Module, dtype: Any = "float16") -> nn.Module:
    """A copy of a model, in eval mode, with the weights of its layers in 16 bits.

    It takes and gives float32. Narrow become the matrices of the layers in `LAYERS`, which then
    print with their dtype; their names in the `state_dict` are the model's. All else stays float32:
    biases, norms, and the parameters of layers that are not in the list; of a batch norm, whose
    four vectors and counter weigh in a small network, remain `scale` and `shift`. The copy is for
    inference: its parameters need no gradient (one for its input passes through).

    Args:
        dtype: "float16" or "bfloat16".

    Raises:
        ValueError: another dtype; no such layer; a weight that is not finite, or beyond float16's
            65504 (with the layer's name).
    """
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in ("float16", "bfloat16"):
        raise ValueError(f"dtype must be float16 or bfloat16, got {name!r}; for int8, weight_only")
    stored: dict[Tensor, Tensor] = {}  # a weight that two layers share stays one

    def narrow(layer: nn.Module) -> nn.Module:
        weights = {}
        for key, weight in layer._own_parameters():
            if weight.ndim > 1:
                if weight not in stored:
                    stored[weight] = narrowed(weight, DTYPES[name])
                weights[key] = stored[weight]
        if isinstance(layer, nn.Linear):
            bias = None if layer.bias is None else layer.bias.detach()
            return WeightOnlyLinear(weights["weight"], None, bias)
        made: nn.Module = LAYERS[type(layer)].from_float(layer, weights)
        return made

    return replaced(model, LAYERS, narrow).requires_grad_(False)
