"""Dropout layers (Srivastava et al. 2014)."""

from __future__ import annotations

import minidl.nn.functional as F
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
