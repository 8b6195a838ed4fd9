"""Normalisation layers."""

from __future__ import annotations

from typing import Any

import numpy as np

import minidl.nn.functional as F
from minidl.autograd import written
from minidl.nn import init
from minidl.nn.module import Module
from minidl.nn.parameter import Parameter, empty
from minidl.tensor import Tensor


def initialize(layer: Any) -> None:
    """Start with weights 1 and biases 0: nothing but the normalisation."""
    if layer.weight is not None:
        init.ones_(layer.weight)
    if layer.bias is not None:
        init.zeros_(layer.bias)


class BatchNorm(Module):
    """What the norms with running statistics share; a subclass sets `dims`.

    While training, the running mean and variance move towards the batch's by `momentum` (None:
    they are the average over all batches). In evaluation they are used, and never moved.
    """

    dims: tuple[int, ...]  # what an input's number of dimensions may be
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: str | None = None,
        dtype: Any = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats

        def vector() -> Tensor:
            return empty(num_features, device=device, dtype=dtype)

        self.weight = Parameter(vector()) if affine else None
        self.bias = Parameter(vector()) if affine and bias else None
        self.register_buffer("running_mean", vector() if track_running_stats else None)
        self.register_buffer("running_var", vector() if track_running_stats else None)
        count = empty(device=device, dtype=np.int64)
        self.register_buffer("num_batches_tracked", count if track_running_stats else None)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        if self.track_running_stats:
            init.zeros_(self.running_mean)
            init.ones_(self.running_var)
            init.zeros_(self.num_batches_tracked)

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        initialize(self)

    def check(self, input: Tensor) -> None:
        if input.ndim not in self.dims:
            dims = " or ".join(f"{d}-D" for d in self.dims)
            raise ValueError(f"{type(self).__name__} takes {dims} input, got shape {input.shape}")

    def count_batch(self) -> float:
        """Note that a batch was seen; how far its statistics move the running ones."""
        self.num_batches_tracked.array += 1
        written(self.num_batches_tracked.array)
        if self.momentum is None:
            return float(1 / self.num_batches_tracked.item())
        return self.momentum

    def forward(self, input: Tensor) -> Tensor:
        self.check(input)
        momentum = self.momentum
        if self.training and self.track_running_stats:
            momentum = self.count_batch()
        return F.batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or self.running_mean is None,
            momentum or 0.0,
            self.eps,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"bias={self.bias is not None}, track_running_stats={self.track_running_stats}"
        )


class BatchNorm1d(BatchNorm):
    """Normalise each feature over the batch: (N, C) or (N, C, L) (Ioffe and Szegedy 2015)."""

    dims = (2, 3)


class BatchNorm2d(BatchNorm):
    """Normalise each channel over the batch and the image: (N, C, H, W)."""

    dims = (4,)


class InstanceNorm2d(BatchNorm):
    """Normalise each channel of each image: (N, C, H, W) (Ulyanov et al. 2016)."""

    dims = (4,)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: str | None = None,
        dtype: Any = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias
        )

    def forward(self, input: Tensor) -> Tensor:
        self.check(input)
        return F.instance_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            self.momentum or 0.0,
            self.eps,
        )


class LayerNorm(Module):
    """Normalise over the last dimensions, of shape `normalized_shape` (Ba et al. 2016)."""

    def __init__(
        self,
        normalized_shape: int | tuple[int, ...] | list[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: str | None = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        shape = normalized_shape
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.normalized_shape, self.eps, self.elementwise_affine = shape, eps, elementwise_affine

        def array() -> Parameter:
            return Parameter(empty(*shape, device=device, dtype=dtype))

        self.weight = array() if elementwise_affine else None
        self.bias = array() if elementwise_affine and bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        initialize(self)

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        shape, affine = self.normalized_shape, self.elementwise_affine
        bias = self.bias is not None
        return f"{shape}, eps={self.eps}, elementwise_affine={affine}, bias={bias}"


class GroupNorm(Module):
    """Normalise over groups of channels of each sample: (N, C, ...) (Wu and He 2018)."""

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: str | None = None,
        dtype: Any = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if num_channels % num_groups:
            raise ValueError(f"{num_channels} channels cannot be cut into {num_groups} groups")
        self.num_groups, self.num_channels, self.eps = num_groups, num_channels, eps
        self.affine = affine

        def vector() -> Parameter:
            return Parameter(empty(num_channels, device=device, dtype=dtype))

        self.weight = vector() if affine else None
        self.bias = vector() if affine and bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        initialize(self)

    def forward(self, input: Tensor) -> Tensor:
        return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        sizes = f"{self.num_groups}, {self.num_channels}, eps={self.eps}"
        return f"{sizes}, affine={self.affine}, bias={self.bias is not None}"
