"""Embedding: a table of vectors."""

from __future__ import annotations

from typing import Any

import minidl.nn.functional as F
from minidl.autograd import written
from minidl.nn import init
from minidl.nn.module import Module
from minidl.nn.parameter import Parameter, empty
from minidl.tensor import Tensor


class Embedding(Module):
    """Look up a vector for each index: (...) of integers -> (..., embedding_dim).

    Args:
        num_embeddings: how many vectors there are; indices are below it.
        embedding_dim: their length.
        padding_idx: this one starts at zero and does not learn.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        device: str | None = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if padding_idx is not None:
            if not -num_embeddings <= padding_idx < num_embeddings:
                raise ValueError(
                    f"padding_idx {padding_idx}: there are {num_embeddings} embeddings"
                )
            padding_idx %= num_embeddings
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx
        self.weight = Parameter(empty(num_embeddings, embedding_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.normal_(self.weight)
        if self.padding_idx is not None:
            self.weight.array[self.padding_idx] = 0.0
            written(self.weight.array)

    @classmethod
    def from_pretrained(
        cls, embeddings: Tensor, freeze: bool = True, padding_idx: int | None = None
    ) -> Embedding:
        """An Embedding with given vectors, (num_embeddings, embedding_dim); frozen by default."""
        if embeddings.ndim != 2:
            raise ValueError(f"embeddings are a matrix, got shape {embeddings.shape}")
        rows, columns = embeddings.shape
        layer = cls(rows, columns, padding_idx)
        layer.weight = Parameter(embeddings.detach(), requires_grad=not freeze)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.weight, self.padding_idx)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}"
