"""Synchronised batch norm: the mean and variance of all ranks' samples, not of each rank's own.

    μ = (1/m) Σ_r Σ_i x_ri        σ² = (1/m) Σ_r Σ_i (x_ri - μ)²        (m values in all)

Two sums over ranks, and the gradient goes back through both (`sum_over_ranks`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

import minidl.distributed as dist
import minidl.nn.functional as F
from minidl import backend
from minidl.distributed.communicator import Communicator
from minidl.nn.module import Module
from minidl.nn.norm import BatchNorm, BatchNorm1d, BatchNorm2d
from minidl.op import Sample, op, sample
from minidl.tensor import Tensor


@op
def sum_over_ranks(x: Any, *, samples: int, communicator: Communicator | None = None) -> Any:
    """Σ_r x_r over all ranks, the same on each. (Without a communicator: x.)

    On rank r a gradient is that of r's own loss, the mean over its n_r `samples`; what all ranks
    together minimize is Σ_r n_r loss_r / N, and `DataParallel` multiplies by n_r. So the gradient
    of the sum is on rank r  Σ_s n_s g_s / n_r.
    """
    if communicator is None:
        return x.copy()
    return communicator.allreduce(backend.array_module(x).array(x, order="C"))


@sum_over_ranks.gradient
def _(g: Any, *, samples: int, communicator: Communicator | None) -> Any:
    n = max(samples, 1)  # a rank without samples gets a gradient that nothing depends on
    return (sum_over_ranks(g * samples, samples=n, communicator=communicator) / n,)


@sum_over_ranks.samples
def _(rng: np.random.Generator) -> Iterator[Sample]:
    yield sample(rng.normal(size=(3, 4)), samples=1)
    yield sample(rng.normal(size=5), samples=7)
    yield sample(rng.normal(size=(0, 2)), samples=2)


class SyncBatchNorm(BatchNorm):
    """Batch norm with the statistics of all ranks' samples: (N, C) or (N, C, ...).

    In evaluation, and with one rank, it is `BatchNorm1d` and `BatchNorm2d`. It is made for
    `DataParallel`: parts of the batch may differ in size, and be empty.
    """

    dims = (2, 3, 4, 5)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        communicator: Communicator | None = None,
        device: str | None = None,
        dtype: Any = None,
        *,
        bias: bool = True,
    ) -> None:
        """
        Args:
            communicator: of the ranks (default: all there are when it is called).
        """
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias
        )
        self.communicator = communicator

    def forward(self, input: Tensor) -> Tensor:
        ranks = self.communicator or dist.communicator()
        if ranks.world_size == 1 or not self.training:
            return super().forward(input)
        self.check(input)
        n, channels = input.shape[:2]
        m = float(ranks.allreduce(np.array([input.numel() / channels]))[0])
        if m < 2:
            raise ValueError(
                f"batch_norm: {m:g} values a channel on all ranks together have no variance to "
                "train with: use a larger batch, or call eval()"
            )
        dims, along = (0, *range(2, input.ndim)), (1, channels) + (1,) * (input.ndim - 2)

        def mean_of(x: Tensor) -> Tensor:
            return sum_over_ranks(x.sum(dims), samples=n, communicator=ranks) / m

        mean = mean_of(input)
        away = input - mean.reshape(along)
        var = mean_of(away * away)
        if self.track_running_stats:
            momentum = self.count_batch()
            F.follow(self.running_mean, mean.array, momentum)
            F.follow(self.running_var, var.array * (m / (m - 1)), momentum)
        return F.rescale(input, mean, var, self.weight, self.bias, self.eps)

    @classmethod
    def convert_sync_batchnorm(
        cls, module: Module, communicator: Communicator | None = None
    ) -> Module:
        """Put a SyncBatchNorm, with the same parameters, in place of each batch norm in a network.

        Returns:
            The network (or a SyncBatchNorm, if it is nothing but a batch norm).
        """
        known: dict[Module, Module] = {}

        def convert(old: Module) -> Module:
            if old in known:
                return known[old]
            known[old] = new = old
            if isinstance(old, BatchNorm1d | BatchNorm2d):
                new = known[old] = cls(
                    old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats,
                    communicator, bias=old.bias is not None,
                )  # fmt: skip
                for name in ("weight", "bias", "running_mean", "running_var"):
                    setattr(new, name, getattr(old, name))
                new.num_batches_tracked = old.num_batches_tracked
                new.training, new.frozen = old.training, old.frozen
            for name, child in list(vars(old).items()):
                if isinstance(child, Module):
                    setattr(old, name, convert(child))
            return new

        return convert(module)
