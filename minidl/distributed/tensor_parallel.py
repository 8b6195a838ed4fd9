"""Tensor parallel: one layer, cut over ranks (Shoeybi et al. 2019, "Megatron-LM").

All ranks have the same input and get the same output, and each does a part of the work. Between
them lie four ops, two pairs of conjugates: the gradient of the one is the other.

    copy_to_ranks      x -> x            reduce_from_ranks   x -> the sum of all ranks' x
    (the paper's f)    gradient: summed  (the paper's g)     gradient: as it is
    scatter_to_ranks   x -> my part      gather_from_ranks   my part -> x
                       gradient: put together                gradient: cut

So a gradient rule that communicates is a rule like any other, and has derivatives of any order. A
column-parallel layer, a function of each number by itself, and a row-parallel layer make a block
with one all-reduce forward (g) and one backward (f):

    nn.Sequential(
        dist.ColumnParallelLinear(512, 2048, gather_output=False),     # x -> my 2048 / p features
        nn.GELU(),
        dist.RowParallelLinear(2048, 512, input_is_parallel=True),     # -> the sum over ranks
    )

Each layer draws all of its parameters and keeps a part: with the same seed it is the unsplit layer
to the bit. (Ranks must have the same seed; dropout between the two layers draws the same mask for
each rank's part.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

import minidl.nn.functional as F
from minidl import backend, nn
from minidl import distributed as dist
from minidl.distributed.communicator import Communicator
from minidl.distributed.simulation import SimulatedCommunicator, Simulation
from minidl.nn import Module, Parameter
from minidl.nn.conv import Sizes
from minidl.op import Sample, op, sample
from minidl.ops.embedding import check_indices
from minidl.tensor import Tensor

# The conjugate ops ------------------------------------------------------------------------------
#
# `dim` is the dimension that is cut; `communicator` has the ranks.


@op
def copy_to_ranks(x: Any, *, communicator: Communicator) -> Any:
    """f: every rank has x already, and uses it in its own way."""
    return x


@copy_to_ranks.gradient
def _(g, *, communicator):  # type: ignore[no-untyped-def]
    return (reduce_from_ranks(g, communicator=communicator),)


@op
def reduce_from_ranks(x: Any, *, communicator: Communicator) -> Any:
    """g: the sum over all ranks."""
    total = backend.array_module(x).array(x, order="C")  # a copy: the sum is made in place
    return communicator.allreduce(total)


@reduce_from_ranks.gradient
def _(g, *, communicator):  # type: ignore[no-untyped-def]
    return (copy_to_ranks(g, communicator=communicator),)


@op
def scatter_to_ranks(x: Any, *, dim: int, communicator: Communicator) -> Any:
    """This rank's part of a dimension: (..., n, ...) -> (..., n / p, ...).

    Raises:
        ValueError: n is not a multiple of the number of ranks.
    """
    return cut(x, dim, communicator, "a dimension that is scattered")


@scatter_to_ranks.gradient
def _(g, *, dim, communicator):  # type: ignore[no-untyped-def]
    return (gather_from_ranks(g, dim=dim, communicator=communicator),)


@op
def gather_from_ranks(x: Any, *, dim: int, communicator: Communicator) -> Any:
    """All ranks' parts, one behind the other: (..., n / p, ...) -> (..., n, ...)."""
    parts = communicator.all_gather(x)
    return backend.array_module(x).concatenate(list(parts), axis=dim)


@gather_from_ranks.gradient
def _(g, *, dim, communicator):  # type: ignore[no-untyped-def]
    return (scatter_to_ranks(g, dim=dim, communicator=communicator),)


@copy_to_ranks.samples
@reduce_from_ranks.samples
def _(rng: np.random.Generator) -> Iterator[Sample]:
    yield sample(rng.normal(size=(3, 4)), communicator=alone())


@scatter_to_ranks.samples
@gather_from_ranks.samples
def _(rng: np.random.Generator) -> Iterator[Sample]:
    yield sample(rng.normal(size=(3, 4)), dim=-1, communicator=alone())


def alone() -> Communicator:
    return SimulatedCommunicator(Simulation(1), [0], 0, ())


def cut(x: Any, dim: int, communicator: Communicator, what: str) -> Any:
    """This rank's part of an array."""
    n, p = x.shape[dim], communicator.world_size
    if n % p:
        raise ValueError(
            f"{what} must be a multiple of the {p} ranks that share it, got {n} (rank "
            f"{communicator.rank}, shape {tuple(x.shape)})"
        )
    part = [slice(None)] * x.ndim
    part[dim] = slice(communicator.rank * n // p, (communicator.rank + 1) * n // p)
    return x[tuple(part)]


# Layers that are cut ----------------------------------------------------------------------------


class TensorParallel(Module):
    """What the layers below share: a layer of `minidl.nn`, of which this rank has a part.

    Attributes:
        split: the dimension along which each parameter is cut; those not named are whole.
        communicator: of the ranks that have the other parts.
    """

    split: dict[str, int]
    communicator: Communicator

    def keep_part(self, communicator: Communicator | None, **split: int) -> None:
        self.communicator = c = communicator or dist.communicator()
        self.split = split
        for name, dim in split.items():
            whole = getattr(self, name)
            if whole is not None:
                what = f"dimension {dim} of {type(self).__name__}.{name}"
                setattr(self, name, Parameter(cut(whole.array, dim, c, what).copy()))

    def extra_repr(self) -> str:
        c = self.communicator
        return f"{super().extra_repr()}, rank {c.rank} of {c.world_size}"


class ColumnParallelLinear(TensorParallel, nn.Linear):
    """y = x Wᵀ + b, each rank having some of the outputs (the paper's W is the transpose of ours).

    Args:
        in_features, out_features, bias: of the whole layer, as `nn.Linear`.
        gather_output: put all outputs together on every rank; False: (..., out_features / p), for
            a `RowParallelLinear` to go on with.
        communicator: of the ranks that share the layer; None: all.

    Raises:
        ValueError: out_features is not a multiple of the number of ranks.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, gather_output: bool = True,
        communicator: Communicator | None = None, device: str | None = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias, device, dtype)
        self.keep_part(communicator, weight=0, bias=0)
        self.gather_output = gather_output

    def forward(self, input: Tensor) -> Tensor:
        c = self.communicator
        y = F.linear(copy_to_ranks(input, communicator=c), self.weight, self.bias)
        return gather_from_ranks(y, dim=-1, communicator=c) if self.gather_output else y


class RowParallelLinear(TensorParallel, nn.Linear):
    """y = x Wᵀ + b, each rank having some of the inputs; the sum over ranks is the output.

    Args:
        in_features, out_features, bias: of the whole layer, as `nn.Linear`.
        input_is_parallel: the input is this rank's part already, (..., in_features / p); False:
            it is whole, and cut here.
        communicator: of the ranks that share the layer; None: all.

    Raises:
        ValueError: in_features is not a multiple of the number of ranks.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True,
        input_is_parallel: bool = False, communicator: Communicator | None = None,
        device: str | None = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias, device, dtype)
        self.keep_part(communicator, weight=1)
        self.input_is_parallel = input_is_parallel

    def forward(self, input: Tensor) -> Tensor:
        c = self.communicator
        if not self.input_is_parallel:
            input = scatter_to_ranks(input, dim=-1, communicator=c)
        y = reduce_from_ranks(F.linear(input, self.weight), communicator=c)
        return y if self.bias is None else y + self.bias


class ColumnParallelConv2d(TensorParallel, nn.Conv2d):
    """A convolution of which each rank has some of the output channels; see `nn.Conv2d`.

    Args:
        gather_output: put all channels together on every rank; False: (N, out_channels / p, H, W).
        communicator: of the ranks that share the layer; None: all.

    Raises:
        ValueError: out_channels is not a multiple of the number of ranks.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Sizes, stride: Sizes = 1,
        padding: Sizes | str = 0, dilation: Sizes = 1, bias: bool = True,
        gather_output: bool = True, communicator: Communicator | None = None,
        device: str | None = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, bias=bias,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.keep_part(communicator, weight=0, bias=0)
        self.gather_output = gather_output

    def forward(self, input: Tensor) -> Tensor:
        c = self.communicator
        y = nn.Conv2d.forward(self, copy_to_ranks(input, communicator=c))
        return gather_from_ranks(y, dim=1, communicator=c) if self.gather_output else y


class RowParallelConv2d(TensorParallel, nn.Conv2d):
    """A convolution of which each rank has some of the input channels; see `nn.Conv2d`.

    Args:
        input_is_parallel: the input is this rank's part, (N, in_channels / p, H, W); False: it is
            whole, and cut here.
        communicator: of the ranks that share the layer; None: all.

    Raises:
        ValueError: in_channels is not a multiple of the number of ranks.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Sizes, stride: Sizes = 1,
        padding: Sizes | str = 0, dilation: Sizes = 1, bias: bool = True,
        input_is_parallel: bool = False, communicator: Communicator | None = None,
        device: str | None = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, bias=bias,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.keep_part(communicator, weight=1)
        self.input_is_parallel = input_is_parallel

    def forward(self, input: Tensor) -> Tensor:
        c = self.communicator
        if not self.input_is_parallel:
            input = scatter_to_ranks(input, dim=1, communicator=c)
        y = F.conv2d(input, self.weight, None, self.stride, self.padding, self.dilation)
        y = reduce_from_ranks(y, communicator=c)
        return y if self.bias is None else y + self.bias.reshape((-1, 1, 1))


class VocabParallelEmbedding(TensorParallel, nn.Embedding):
    """A table of vectors of which each rank has some rows: (...) of integers -> (..., D).

    A rank looks up what it has, and zeros for the rest; the sum over ranks has them all.

    Args:
        num_embeddings, embedding_dim, padding_idx: of the whole table, as `nn.Embedding`.
        communicator: of the ranks that share the table; None: all.

    Raises:
        ValueError: num_embeddings is not a multiple of the number of ranks.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None,
        communicator: Communicator | None = None, device: str | None = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self.keep_part(communicator, weight=0)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> nn.Embedding:
        raise RuntimeError(
            "make a VocabParallelEmbedding, and load_full_state_dict gives it vectors"
        )

    def forward(self, input: Tensor) -> Tensor:
        """
        Raises:
            IndexError: an index is outside the whole table.
        """
        check_indices(input.array, self.num_embeddings)
        rows = len(self.weight)
        mine = input.array.astype(np.int64) - self.communicator.rank * rows
        inside = (mine >= 0) & (mine < rows)
        y = F.embedding(Tensor(np.where(inside, mine, 0)), self.weight)
        y = F.where(Tensor(inside[..., None]), y, 0.0)
        if self.padding_idx is not None:  # this row does not learn
            y = F.where(Tensor(input.array == self.padding_idx).unsqueeze(-1), y.detach(), y)
        return reduce_from_ranks(y, communicator=self.communicator)


# The whole layer's state ------------------------------------------------------------------------


def full_state_dict(module: Module) -> dict[str, np.ndarray]:
    """The state of the network that was cut, on every rank: all ranks call it together.

    Returns:
        Arrays on the CPU by name, as the unsplit network's `state_dict` has them.
    """
    named = module.state_dict().items()
    state = {name: np.array(backend.to_device(t.array, "cpu")) for name, t in named}
    for name, dim, c in parts(module):
        state[name] = np.concatenate(c.all_gather(state[name]), axis=dim)
    return state


def load_full_state_dict(module: Module, state_dict: Mapping[str, Any]) -> None:
    """Give each rank its part of the state of an unsplit network.

    Raises:
        RuntimeError: names or shapes do not fit, as `Module.load_state_dict`.
        ValueError: a dimension that is cut is not a multiple of the number of ranks.
    """
    state = dict(state_dict)
    for name, dim, c in parts(module):
        if name in state:
            whole = state[name]
            whole = whole.array if isinstance(whole, Tensor) else whole
            state[name] = cut(whole, dim, c, f"dimension {dim} of {name!r}")
    module.load_state_dict(state)


def parts(module: Module) -> Iterator[tuple[str, int, Communicator]]:
    """The names of all parameters that are cut, along which dimension, and for which ranks."""
    for path, layer in module.named_modules():
        if isinstance(layer, TensorParallel):
            for name, dim in layer.split.items():
                if getattr(layer, name) is not None:
                    yield f"{path}.{name}" if path else name, dim, layer.communicator
