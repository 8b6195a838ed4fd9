"""Initial values for parameters, in place: PyTorch's names and distributions.

All random numbers come from minidl's generator, on the CPU: the same seed gives the same bits on
every device.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minidl import backend
from minidl.autograd import written
from minidl.backend import random
from minidl.tensor import Tensor

Generator = np.random.Generator | None


def fill(tensor: Tensor, values: Any) -> Tensor:
    """Write values of any floating dtype into a tensor; return it."""
    if isinstance(values, np.ndarray):
        values = backend.to_device(values.astype(tensor.dtype), tensor.device)
    tensor.array[...] = values
    written(tensor.array)
    return tensor


def uniform_(tensor: Tensor, a: float = 0.0, b: float = 1.0, generator: Generator = None) -> Tensor:
    """Uniform in [a, b)."""
    return fill(tensor, (generator or random.generator()).uniform(a, b, tensor.shape))


def normal_(
    tensor: Tensor, mean: float = 0.0, std: float = 1.0, generator: Generator = None
) -> Tensor:
    """Normal with a mean and a standard deviation."""
    return fill(tensor, (generator or random.generator()).normal(mean, std, tensor.shape))


def trunc_normal_(
    tensor: Tensor,
    mean: float = 0.0,
    std: float = 1.0,
    a: float = -2.0,
    b: float = 2.0,
    generator: Generator = None,
) -> Tensor:
    """Normal, with what falls outside [a, b] drawn again.

    Raises:
        ValueError: [a, b] lies so far out that drawing again would not end.
    """
    lower, upper = (a - mean) / std, (b - mean) / std
    inside = (math.erf(upper / math.sqrt(2)) - math.erf(lower / math.sqrt(2))) / 2
    if not inside > 1e-3:
        raise ValueError(f"[{a}, {b}] holds {inside:.1e} of a normal({mean}, {std}): widen it")
    rng = generator or random.generator()
    values = rng.normal(mean, std, tensor.shape)
    while (outside := (values < a) | (values > b)).any():
        values[outside] = rng.normal(mean, std, int(outside.sum()))
    return fill(tensor, values)


def constant_(tensor: Tensor, val: float) -> Tensor:
    return fill(tensor, val)


def ones_(tensor: Tensor) -> Tensor:
    return fill(tensor, 1.0)


def zeros_(tensor: Tensor) -> Tensor:
    return fill(tensor, 0.0)


def eye_(tensor: Tensor) -> Tensor:
    """The identity matrix, of any (rows, columns)."""
    if tensor.ndim != 2:
        raise ValueError(f"eye_ fills a matrix, got shape {tensor.shape}")
    return fill(tensor, np.eye(tensor.shape[0], tensor.shape[1]))


def calculate_gain(nonlinearity: str, param: float | None = None) -> float:
    """The factor by which a weight's standard deviation makes up for what an activation loses.

    Args:
        nonlinearity: "linear", "conv2d", ..., "sigmoid", "tanh", "relu", "leaky_relu", "selu".
        param: the negative slope of "leaky_relu" (default .01).

    Raises:
        ValueError: an unknown name.
    """
    gains = {"sigmoid": 1.0, "tanh": 5 / 3, "relu": math.sqrt(2), "selu": 0.75}
    if nonlinearity in gains:
        return gains[nonlinearity]
    if nonlinearity == "linear" or nonlinearity.startswith("conv"):
        return 1.0
    if nonlinearity == "leaky_relu":
        slope = 0.01 if param is None else param
        return math.sqrt(2 / (1 + slope**2))
    raise ValueError(
        f"no gain for {nonlinearity!r}: expected linear, conv2d, leaky_relu, {', '.join(gains)}"
    )


def fans(tensor: Tensor) -> tuple[int, int]:
    """How many inputs feed one output of a weight (out, in, *kernel), and the other way round."""
    if tensor.ndim < 2:
        raise ValueError(f"fan in and fan out need at least 2 dimensions, got {tensor.shape}")
    kernel = math.prod(tensor.shape[2:])
    return tensor.shape[1] * kernel, tensor.shape[0] * kernel


def fan(tensor: Tensor, mode: str) -> int:
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"mode {mode!r}: expected 'fan_in' or 'fan_out'")
    return fans(tensor)[mode == "fan_out"]


def xavier_uniform_(tensor: Tensor, gain: float = 1.0, generator: Generator = None) -> Tensor:
    """Glorot and Bengio 2010: the variance 2 / (fan_in + fan_out), uniform."""
    bound = gain * math.sqrt(6 / sum(fans(tensor)))
    return uniform_(tensor, -bound, bound, generator)


def xavier_normal_(tensor: Tensor, gain: float = 1.0, generator: Generator = None) -> Tensor:
    """Glorot and Bengio 2010, normal."""
    return normal_(tensor, 0.0, gain * math.sqrt(2 / sum(fans(tensor))), generator)


def kaiming_uniform_(
    tensor: Tensor,
    a: float = 0.0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    generator: Generator = None,
) -> Tensor:
    """He et al. 2015: the variance gain² / fan, uniform; `a` is the slope of leaky_relu."""
    bound = calculate_gain(nonlinearity, a) * math.sqrt(3 / max(fan(tensor, mode), 1))
    return uniform_(tensor, -bound, bound, generator)


def kaiming_normal_(
    tensor: Tensor,
    a: float = 0.0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    generator: Generator = None,
) -> Tensor:
    """He et al. 2015, normal."""
    std = calculate_gain(nonlinearity, a) / math.sqrt(max(fan(tensor, mode), 1))
    return normal_(tensor, 0.0, std, generator)


def orthogonal_(tensor: Tensor, gain: float = 1.0, generator: Generator = None) -> Tensor:
    """A random (semi-)orthogonal matrix (Saxe et al. 2013), (first dimension, all others)."""
    if tensor.ndim < 2:
        raise ValueError(f"orthogonal_ needs at least 2 dimensions, got {tensor.shape}")
    rows, columns = tensor.shape[0], math.prod(tensor.shape[1:])
    a = (generator or random.generator()).normal(size=(rows, columns))
    q, r = np.linalg.qr(a.T if rows < columns else a)
    q = q * np.sign(np.diag(r))  # without it the distribution is not uniform
    return fill(tensor, gain * (q.T if rows < columns else q).reshape(tensor.shape))


def default_(weight: Tensor, bias: Tensor | None) -> None:
    """How PyTorch starts linear and convolution layers: both uniform in ±1 / sqrt(fan_in)."""
    kaiming_uniform_(weight, a=math.sqrt(5))
    if bias is not None:
        bound = 1 / math.sqrt(max(fan(weight, "fan_in"), 1))
        uniform_(bias, -bound, bound)
