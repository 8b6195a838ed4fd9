"""Weights of 4 bits: two in a byte, and a scale for every few of them.

    w_jk ≈ s_jg q_jk,   g = ⌊k / group⌋,   q_jk = round(w_jk / s_jg) in -7 ... 7,
    s_jg = max |w_jk| over the group / 7

Fifteen levels are few: one large weight makes those of its row coarse. So a scale is shared by a
group only, 32 weights say (as in GPTQ, Frantar et al. 2023, section 4, or llama.cpp's Q4_0), which
costs one bit a weight more: 4 bits, and 32 for the scale of 32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minidl import nn
from minidl.nn import functional as F
from minidl.ops.narrow import linear_int4, pack_int4, widened_int4
from minidl.quantization.rounding import finite, steps
from minidl.tensor import Tensor

MOST = 7


def int4_groups(weight: Tensor, group_size: int | None) -> tuple[Tensor, Tensor, int]:
    """A weight in 4 bits: (weight uint8 (out, ⌈in / 2⌉), scale (out, groups), group size).

    Args:
        weight: (out, in), floats.
        group_size: None: all of a row.

    Raises:
        ValueError: a row is not finite; the group size is not positive.
    """
    w, _ = finite(weight)
    columns = w.shape[1]
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size is at least 1, or None for a whole row, got {group_size}")
    size = min(group_size or columns, columns)
    starts = range(0, columns, size)
    s = steps(np.maximum.reduceat(np.abs(w), starts, axis=1) if w.size else w[:, :0], MOST)
    q = np.clip(np.rint(w / s.repeat(size, axis=1)[:, :columns]), -MOST, MOST).astype(np.int8)
    return Tensor(pack_int4(q)).to(weight.device), Tensor(s).to(weight.device), size


class Int4Linear(nn.Module):
    """`nn.Linear` with weights of 4 bits, for inference: (..., in_features) -> (..., out_features).

    Attributes:
        weight: (out_features, ⌈in_features / 2⌉), uint8; a buffer.
        scale: (out_features, groups), what one unit of a weight is worth.
        bias: (out_features,) or None.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self, weight: Tensor, scale: Tensor, bias: Tensor | None, in_features: int, group_size: int
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = len(weight), in_features
        self.group_size = group_size
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, group_size: int | None = 32) -> Int4Linear:
        """From a float weight (out_features, in_features) and a bias.

        Args:
            group_size: how many weights of a row share a scale; None: all of them.

        Raises:
            ValueError: as `int4_groups`.
        """
        q, scale, size = int4_groups(weight, group_size)
        bias = None if bias is None else Tensor(bias.array.copy())
        return cls(q, scale, bias, weight.shape[1], size)

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[-1:] != (self.in_features,):
            raise ValueError(
                f"Int4Linear takes (..., {self.in_features}), got {tuple(input.shape)}"
            )
        w, scale = self.weight, self.scale
        return linear_int4(input, w, scale, self.bias, group_size=self.group_size)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, dtype=int4, group_size={self.group_size}"
        )


class Int4Embedding(nn.Module):
    """`nn.Embedding` with a table of 4 bits, of which only the rows that are asked for widen.

    Attributes:
        weight: (num_embeddings, ⌈embedding_dim / 2⌉), uint8; a buffer.
        scale: (num_embeddings, groups), what one unit of a weight is worth.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, embedding_dim: int, group_size: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = len(weight), embedding_dim
        self.group_size = group_size
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    @classmethod
    def from_float(cls, embedding: nn.Embedding, group_size: int | None = 32) -> Int4Embedding:
        """The same table in 4 bits; arguments and errors as `Int4Linear.of`."""
        q, scale, size = int4_groups(embedding.weight, group_size)
        return cls(q, scale, embedding.embedding_dim, size)

    def forward(self, input: Tensor) -> Tensor:
        at = input.reshape(-1)
        q, scale = (F.embedding(at, table).array for table in (self.weight, self.scale))
        rows: Any = widened_int4(q, scale, self.embedding_dim, self.group_size)
        return Tensor(rows.reshape(*input.shape, self.embedding_dim))

    def extra_repr(self) -> str:
        size = f"{self.num_embeddings}, {self.embedding_dim}"
        return f"{size}, dtype=int4, group_size={self.group_size}"
