"""Quantization-aware training: the network learns to live with its rounding.

    qat = prepare_qat(model, bits=4)  # a copy, in train mode
    ...                               # train it as any model, at a small learning rate
    low = convert(qat)                # ordinary layers: weights on the grid, ranges beside them

What will be integers, the input and the weights of each matrix product, is rounded on the way
forward; the gradient goes straight through to float weights (Jacob et al. 2018, section 3). Sums,
biases and what lies between the products stay in floats: they are not of few bits in integer
inference either.

A batch norm stays as it is, and is folded after training. Jacob et al. fold it while training
(section 3.2), since their weights have one scale for all channels, which has to suit the folded
ones. With a scale for each channel there is nothing to suit: folding multiplies row j of the
weights by some a_j, and

    a_j · s_j · q_j  =  (a_j s_j) · q_j:

the integers are the same, the scale becomes a_j s_j. (With one scale for all, it is a scale for
each channel that results, still with the same integers.)
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np

import minidl
from minidl import nn
from minidl.autograd import written
from minidl.nn import functional as F
from minidl.quantization.fake_quantize import fake_quantize, scale_gradient
from minidl.quantization.observers import OBSERVERS, quant_range
from minidl.tensor import Tensor

TINY = float(np.finfo(np.float32).tiny)


class Grid(NamedTuple):
    """The numbers scale · (q - zero_point), for integers q from quant_min to quant_max.

    Attributes:
        scale: float32, of shape () or, for the weights of each output channel, (channels,).
        zero_point: integers (int8 or uint8) of the same shape.
    """

    scale: np.ndarray
    zero_point: np.ndarray
    quant_min: int
    quant_max: int


def learned_step(scale: Tensor, count: int, quant_max: int) -> Tensor:
    """A learned scale as it is computed with (Esser et al. 2020, section 2.2).

    Its gradient is divided by √(N Q_P), so that steps, of which each has the gradients of N numbers
    in it, move as weights do. And it is positive, wherever the optimizer takes it.
    """
    return scale_gradient(scale, (count * quant_max) ** -0.5).abs().clamp(min=TINY)


class FakeQuantize(nn.Module):
    """Rounds a layer's input to the grid of unsigned integers that suits its first batches.

    The first `batches` of training pass as they are, and are observed; then the range is frozen. A
    learned step starts at 2⟨|x|⟩/√Q_P of the first batch (Esser et al. 2020, section 2.1), with the
    zero point in the middle if there are negative numbers in it, else 0, and learns from then on.

    Attributes:
        scale, zero_point: (), floats; scale is 0 until something was observed.
        batches_left: how many are still to be observed.
    """

    scale: Tensor
    zero_point: Tensor
    batches_left: Tensor

    def __init__(self, bits: int, observer: str, batches: int, learned: bool) -> None:
        super().__init__()
        self.quant_min, self.quant_max = quant_range(bits, unsigned=True)
        self.observer = OBSERVERS[observer](bits=bits, unsigned=True)
        self.learned = learned
        if learned:
            self.scale = nn.Parameter(Tensor(np.float32(0)))
        else:
            self.register_buffer("scale", Tensor(np.float32(0)))
        self.register_buffer("zero_point", Tensor(np.float32(0)))
        self.register_buffer("batches_left", Tensor(np.int64(1 if learned else batches)))

    def forward(self, input: Tensor) -> Tensor:
        if self.training and self.batches_left.item():
            self.observe(input)
            return input
        self.expect_range()
        scale = self.scale
        if self.learned:
            positive = self.quant_max - int(self.zero_point.item())
            scale = learned_step(scale, input.numel() // len(input), positive)
        return fake_quantize(
            input, scale, self.zero_point, quant_min=self.quant_min, quant_max=self.quant_max
        )

    def observe(self, input: Tensor) -> None:
        self.observer.observe(input)
        scale, zero = self.observer.qparams()
        if self.learned:
            x = np.abs(input.detach().cpu().numpy())
            zero = np.array((self.quant_max + 1) // 2 * bool(self.observer.low[0] < 0))
            scale = 2 * x.mean(dtype=np.float64) / np.sqrt(self.quant_max - zero) or scale
        for tensor, value in ((self.scale, scale), (self.zero_point, zero)):
            tensor.array[...] = float(value)
            written(tensor.array)
        self.batches_left.array -= 1
        written(self.batches_left.array)

    def expect_range(self) -> None:
        if not self.scale.item():
            raise RuntimeError(
                "no input was observed yet: run some batches in train mode first (without an "
                "optimizer step that is calibration, and what follows is rounding after training)"
            )

    def grid(self) -> Grid:
        self.expect_range()
        scale = np.abs(self.scale.detach().cpu().numpy()).astype(np.float32)
        zero = self.zero_point.cpu().numpy().astype(np.uint8)
        return Grid(scale, zero, self.quant_min, self.quant_max)


class WeightFakeQuantize(nn.Module):
    """Rounds a layer's weights to a grid around 0.

    The step is that of the largest weight of the moment (Jacob et al. 2018, section 3.1), or
    learned, from 2⟨|w|⟩/√Q_P on (Esser et al. 2020).

    Attributes:
        scale: the learned step, or None.
    """

    scale: nn.Parameter | None

    def __init__(self, weight: Tensor, bits: int, per_channel: bool, learned: bool) -> None:
        super().__init__()
        self.bits, self.axis = bits, 0 if per_channel else None
        self.quant_min, self.quant_max = quant_range(bits, symmetric=not learned)
        self.scale = None
        if learned:
            w = np.abs(weight.numpy().astype(np.float64))
            mean = w.mean(axis=tuple(range(1, w.ndim)) if per_channel else None)
            step = 2 * np.where(mean > 0, mean, 1) / np.sqrt(self.quant_max)
            self.scale = nn.Parameter(Tensor(step.astype(np.float32)).to(weight.device))

    def step(self, weight: Tensor) -> Tensor:
        if self.scale is not None:
            return learned_step(self.scale, weight.numel() // self.scale.numel(), self.quant_max)
        observer = OBSERVERS["minmax"](bits=self.bits, symmetric=True, axis=self.axis)
        observer.observe(weight)
        return Tensor(observer.qparams()[0]).to(weight.device)

    def forward(self, weight: Tensor) -> Tensor:
        return fake_quantize(
            weight, self.step(weight), quant_min=self.quant_min, quant_max=self.quant_max,
            axis=self.axis,
        )  # fmt: skip

    def grid(self, weight: Tensor) -> Grid:
        scale = self.step(weight).detach().cpu().numpy()
        return Grid(scale, np.zeros(scale.shape, np.int8), self.quant_min, self.quant_max)


class QATConv2d(nn.Conv2d):
    """`nn.Conv2d` of rounded numbers."""

    input_fake_quantize: FakeQuantize
    weight_fake_quantize: WeightFakeQuantize

    def forward(self, input: Tensor) -> Tensor:
        x, w = self.input_fake_quantize(input), self.weight_fake_quantize(self.weight)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class QATLinear(nn.Linear):
    """`nn.Linear` of rounded numbers."""

    input_fake_quantize: FakeQuantize
    weight_fake_quantize: WeightFakeQuantize

    def forward(self, input: Tensor) -> Tensor:
        x, w = self.input_fake_quantize(input), self.weight_fake_quantize(self.weight)
        return F.linear(x, w, self.bias)


KINDS: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: QATConv2d, nn.Linear: QATLinear}
FLOATS: dict[type[nn.Module], type[nn.Module]] = {qat: kind for kind, qat in KINDS.items()}


def prepare_qat(
    model: nn.Module,
    bits: int | tuple[int, int] = 8,
    per_channel: bool = True,
    learned: bool = False,
    observer: str = "minmax",
    batches: int = 20,
) -> nn.Module:
    """A copy of a float model, in train mode, whose `Conv2d` and `Linear` layers round.

    All names stay; the layers get two more modules, ``input_fake_quantize`` and
    ``weight_fake_quantize``. Layers of other kinds, subclasses of the two among them, compute as
    they did.

    Args:
        model: trained already; a few epochs at a small learning rate then do.
        bits: 2 to 8; or (of the weights, of the inputs).
        per_channel: a scale for each output channel's weights; False: one for all of a layer's.
        learned: the steps are learned (LSQ) rather than observed. Make the optimizer afterwards:
            they are parameters.
        observer: of the inputs: "minmax", "percentile", "mse" or "entropy".
        batches: how many of the first training batches are observed.

    Raises:
        ValueError: the model has no such layer, or is prepared already; no such observer; bits
            or batches out of range.
    """
    if observer not in OBSERVERS:
        raise ValueError(f"observer must be one of {', '.join(OBSERVERS)}, got {observer!r}")
    if batches < 1:
        raise ValueError(f"batches must be at least 1, got {batches}")
    of_weights, of_inputs = bits if isinstance(bits, tuple) else (bits, bits)

    def rounding(layer: Any) -> Any:
        vars(layer).update(
            input_fake_quantize=FakeQuantize(of_inputs, observer, batches, learned),
            weight_fake_quantize=WeightFakeQuantize(layer.weight, of_weights, per_channel, learned),
        )
        layer.input_fake_quantize.to(layer.weight.device)
        return layer

    return remade(model, KINDS, rounding, "Conv2d or Linear to prepare").train()


@minidl.no_grad()
def convert(model: nn.Module) -> nn.Module:
    """What `prepare_qat` made, after training: a copy with ordinary layers, in eval mode.

    Weights are exactly scale · q, in floats. Each layer has the attributes ``weight_grid`` and
    ``input_grid``, the `Grid` of its weights and of its input, for what makes integers of it.
    The inputs themselves are no longer rounded.

    Raises:
        ValueError: the model has no layer that `prepare_qat` made.
        RuntimeError: a layer has not seen any input.
    """

    def plain(layer: Any) -> Any:
        of_input, of_weight = layer.input_fake_quantize, layer.weight_fake_quantize
        layer.input_grid = of_input.grid()
        layer.weight_grid = of_weight.grid(layer.weight)
        layer.weight = nn.Parameter(of_weight(layer.weight))
        del layer.input_fake_quantize, layer.weight_fake_quantize
        return layer

    return remade(model, FLOATS, plain, "layer that prepare_qat made").eval()


def remade(model: nn.Module, kinds: Any, change: Any, what: str) -> nn.Module:
    """A copy of a model whose layers of some kinds are of others; `change` does the rest."""
    model = copy.deepcopy(model)
    found = [(name, layer) for name, layer in model.named_modules() if type(layer) in kinds]
    if not found:
        raise ValueError(f"{type(model).__name__} has no {what}")
    for name, layer in found:
        try:
            change(layer)
        except (ValueError, RuntimeError) as error:
            error.add_note(f"in layer {name or type(layer).__name__!r}")
            raise
        layer.__class__ = kinds[type(layer)]
    return model
