"""Rounding that can be trained through: quantize and dequantize at once, in floats.

The derivative of rounding is 0 almost everywhere, so nothing would be learned. The straight-through
estimator (Bengio et al. 2013; Jacob et al. 2018, section 3) rounds on the way forward and takes the
gradient of not rounding on the way back. It needs no rule of its own: `round_pass` keeps the
rounding off the tape. The rest is division, clamping and multiplication, and their gradients give

    dy/dx = 1 inside the range, 0 where x is clipped
    dy/ds = round(x/s) - x/s inside, quant_min or quant_max (less zero_point) where x is clipped

the second of which is how a step is learned (LSQ: Esser et al. 2020, equations 1 to 3).
"""

from __future__ import annotations

from typing import Any

from minidl.ops.quantized import along
from minidl.tensor import Tensor


def round_pass(x: Tensor) -> Tensor:
    """x rounded, half to even; with the gradient of x (Esser et al. 2020, function roundpass)."""
    rounding = x.detach().round() - x.detach()
    return x + rounding


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x, with its gradient times a factor (Esser et al. 2020, function gradscale)."""
    scaled = x * factor
    return scaled + (x - scaled).detach()


def fake_quantize(
    x: Tensor,
    scale: Any,
    zero_point: Any = None,
    *,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
) -> Tensor:
    """scale * (q - zero_point) with q = clamp(round(x / scale) + zero_point).

    The value is what `quantize_linear` and `dequantize_linear` give. Whether x counts as clipped is
    decided after rounding, as in PyTorch (the papers do it before): so the extreme number of a
    min-max range, which is quant_max · scale but for an error in the last digit, learns for sure.

    Args:
        scale: positive; one, or one for each index along ``axis``. If it requires a gradient, it
            gets that of LSQ.
        zero_point: as many whole numbers (in floats), or None: 0.
        quant_min, quant_max: the range of q.
        axis: None for one scale.
    """
    if axis is not None:
        scale = along(scale, axis, x.ndim)
        zero_point = None if zero_point is None else along(zero_point, axis, x.ndim)
    q = round_pass(x / scale)
    if zero_point is None:
        return q.clamp(quant_min, quant_max) * scale
    return ((q + zero_point).clamp(quant_min, quant_max) - zero_point) * scale
