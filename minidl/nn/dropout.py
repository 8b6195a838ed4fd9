"""Dropout layers (Srivastava et al. 2014): which numbers are set to zero together.

    Dropout           each number by itself
    Dropout2d         whole channels: neighbouring pixels tell the same, so one of them is no loss
    LockedDropout     a feature at all steps of a sequence
    DropConnectLinear weights in place of their inputs

All are *inverted*: what stays is divided by 1 - p while training, so that in eval mode there is
nothing to do, and the layer is the identity to the bit.
"""

from __future__ import annotations

from typing import Any

import minidl.nn.functional as F
from minidl.nn.linear import Linear
from minidl.nn.module import Module
from minidl.tensor import Tensor


class DropoutNd(Module):
    """What the dropout layers share."""

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        """
        Args:
            p: the probability of a zero.
            inplace: for PyTorch's sake; changes nothing.
        """
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"p is a probability, in [0, 1]; got {p}")
        self.p, self.inplace = p, inplace

    def extra_repr(self) -> str:
        return f"p={self.p}, inplace={self.inplace}"


class Dropout(DropoutNd):
    """While training, zero each number with probability p, and divide the others by 1 - p."""

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(input, self.p, self.training)


class Dropout2d(DropoutNd):
    """While training, zero each channel of each image with probability p: (N, C, H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout2d(input, self.p, self.training)


class LockedDropout(DropoutNd):
    """While training, zero each feature of each sequence with probability p, at all its steps.

    (T, N, features), or (N, T, features) with `batch_first`. A fresh mask at every step would be
    noise that a recurrent network averages away, or that wipes out what it remembers; with one
    mask for all steps, dropout is the same average over networks as elsewhere (Gal & Ghahramani
    2016, section 4; the name is AWD-LSTM's, Merity et al. 2018).
    """

    def __init__(self, p: float = 0.5, inplace: bool = False, batch_first: bool = False) -> None:
        """
        Args:
            p, inplace: see `Dropout`.
            batch_first: the steps are the second dimension, not the first.
        """
        super().__init__(p, inplace)
        self.batch_first = batch_first

    def forward(self, input: Tensor) -> Tensor:
        return F.locked_dropout(input, self.p, self.training, self.batch_first)


class DropConnectLinear(Linear):
    """A linear layer that, while training, drops each weight with probability p (Wan et al. 2013).

    One mask serves the whole batch. (The paper draws one an image, and samples its answers from a
    Gaussian fitted to the sums; in eval mode this layer takes their mean: all weights.)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        p: float = 0.5,
        device: str | None = None,
        dtype: Any = None,
    ) -> None:
        """
        Args:
            in_features, out_features, bias: see `Linear`.
            p: the probability that a weight is 0; the bias is never dropped.
        """
        super().__init__(in_features, out_features, bias, device, dtype)
        if not 0 <= p <= 1:
            raise ValueError(f"p is a probability, in [0, 1]; got {p}")
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, F.dropout(self.weight, self.p, self.training), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}"
