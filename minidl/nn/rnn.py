"""Recurrent layers over sequences: several layers, both directions, sequences of unequal length.

One layer in one direction is `F.rnn`, `F.lstm`, `F.gru`; here are only the weights' names and the
stacking. A sequence is (T, N, features): time, batch.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

import minidl
import minidl.nn.functional as F
from minidl.backend import array_module
from minidl.nn import init
from minidl.nn.module import Module
from minidl.nn.parameter import Parameter, empty
from minidl.nn.utils.rnn import PackedSequence, on_device_of, pad_packed_sequence, repack
from minidl.tensor import Tensor

Weights = tuple[Any, Any, Any, Any]  # w_ih, w_hh, b_ih, b_hh


class RNNBase(Module):
    """What RNN, LSTM and GRU share.

    The weights are called as PyTorch calls them: ``weight_ih_l0``, ``weight_hh_l0``,
    ``bias_ih_l0``, ``bias_hh_l0``, then ``..._l0_reverse``, then ``..._l1``. Gates lie one after
    the other in the first dimension: (gates · hidden_size, ...).
    """

    gates: int
    states = 1  # an LSTM has two: h and c

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: str | None = None,
        dtype: Any = None,
        *,
        locked_dropout: bool = False,
    ) -> None:
        """
        Args:
            input_size: features of the input.
            hidden_size: H, features of the state.
            num_layers: L, each fed with the output of the one below.
            bias: whether gates have biases.
            batch_first: sequences are (N, T, features) instead of (T, N, features).
            dropout: the probability of a zero between two layers, while training.
            bidirectional: a second network reads from the end; the outputs are concatenated.
            locked_dropout: drop the same features at all steps (`LockedDropout`; Gal & Ghahramani
                2016), not others at each, as PyTorch does.
        """
        super().__init__()
        if hidden_size < 1 or num_layers < 1:
            raise ValueError(
                f"hidden_size and num_layers must be at least 1, got {hidden_size} and {num_layers}"
            )
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout is a probability, in [0, 1]; got {dropout}")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, dropout
        self.bidirectional, self.locked_dropout = bidirectional, locked_dropout
        self.directions = 2 if bidirectional else 1
        rows = self.gates * hidden_size
        for layer in range(num_layers):
            columns = input_size if layer == 0 else self.directions * hidden_size
            for direction in range(self.directions):
                shapes = [(rows, columns), (rows, hidden_size), (rows,), (rows,)]
                for name, shape in zip(self.names(layer, direction), shapes):
                    if len(shape) == 2 or bias:
                        setattr(self, name, Parameter(empty(*shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def names(self, layer: int, direction: int) -> list[str]:
        end = f"_l{layer}" + "_reverse" * direction
        return [name + end for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            init.uniform_(parameter, -bound, bound)

    def run(self, x: Tensor, state: list[Any], weights: Weights, lengths: Any) -> Any:
        """One layer in one direction: the output and the states after the last step."""
        raise NotImplementedError

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        """
        Args:
            input: (T, N, input_size), or (N, T, input_size) with `batch_first`, or (T, input_size)
                of one sequence, or a PackedSequence.
            hx: the states to start from, (L · directions, N, H), zeros by default; for an LSTM
                the pair (h, c).

        Returns:
            The last layer's output, (T, N, directions · H), in the form of the input; and the
            states after each sequence's last step, in the form of `hx`.

        Raises:
            ValueError: the input or a state has the wrong shape.
        """
        lengths = order = None
        unbatched, shape = False, getattr(input, "shape", None)
        if isinstance(input, PackedSequence):
            in_order = input._replace(sorted_indices=None, unsorted_indices=None)
            x, lengths = pad_packed_sequence(in_order)
            lengths, order = lengths.array, input.sorted_indices
        else:
            x = input
            unbatched = x.ndim == 2
            if unbatched:
                x = x.unsqueeze(1)
            elif self.batch_first:
                x = x.transpose(0, 1)
        if x.ndim != 3 or x.shape[2] != self.input_size:
            raise ValueError(
                f"{type(self).__name__} takes (T, N, {self.input_size}), or (N, T, ...) with "
                f"batch_first=True, or (T, {self.input_size}); got {shape or x.shape}"
            )
        states = self.initial(hx, x, unbatched)
        if order is not None and hx is not None:
            states = [s[:, order] for s in states]

        finals: list[list[Tensor]] = []  # for each layer and direction, its states at the end
        for layer in range(self.num_layers):
            if layer > 0 and self.dropout:
                drop = F.locked_dropout if self.locked_dropout else F.dropout
                x = drop(x, self.dropout, self.training)
            outputs = []
            for direction in range(self.directions):
                w_ih, w_hh, *b = (getattr(self, n, None) for n in self.names(layer, direction))
                start = [s[len(finals)] for s in states]
                steps = reverse(x, lengths) if direction else x
                out, *final = self.run(steps, start, (w_ih, w_hh, b[0], b[1]), lengths)
                outputs.append(reverse(out, lengths) if direction else out)
                finals.append(final)
            x = outputs[0] if len(outputs) == 1 else minidl.cat(outputs, dim=2)

        ends = [minidl.stack(list(s), dim=0) for s in zip(*finals)]
        if isinstance(input, PackedSequence):
            if input.unsorted_indices is not None:
                ends = [s[:, input.unsorted_indices] for s in ends]
            output: Any = repack(x, input)
        elif unbatched:
            output, ends = x.squeeze(1), [s.squeeze(1) for s in ends]
        else:
            output = x.transpose(0, 1) if self.batch_first else x
        return output, ends[0] if self.states == 1 else tuple(ends)

    def initial(self, hx: Any, x: Tensor, unbatched: bool) -> list[Tensor]:
        """The states to start from, checked: each (L · directions, N, H)."""
        shape = (self.num_layers * self.directions, x.shape[1], self.hidden_size)
        if hx is None:
            return [Tensor(zeros_like(x, shape))] * self.states
        states = [hx] if self.states == 1 else list(hx)
        if unbatched:
            states = [s.unsqueeze(1) if s.ndim == 2 else s for s in states]
        if len(states) != self.states or any(s.shape != shape for s in states):
            raise ValueError(
                f"hx: expected {' and '.join(['a state of shape ' + str(shape)] * self.states)}, "
                f"got {[s.shape for s in states]}"
            )
        return states

    def extra_repr(self) -> str:
        parts = [f"{self.input_size}, {self.hidden_size}"]
        parts += [f"num_layers={self.num_layers}"] if self.num_layers != 1 else []
        parts += ["bias=False"] if not self.bias else []
        parts += ["batch_first=True"] if self.batch_first else []
        parts += [f"dropout={self.dropout}"] if self.dropout else []
        parts += ["locked_dropout=True"] if self.locked_dropout else []
        parts += ["bidirectional=True"] if self.bidirectional else []
        return ", ".join(parts)


def zeros_like(x: Tensor, shape: tuple[int, ...]) -> Any:
    return array_module(x.array).zeros(shape, x.dtype)


def reverse(x: Tensor, lengths: Any) -> Tensor:
    """Each sequence of (T, N, ...) from its end to its start; what follows its end stays."""
    if lengths is None:
        return x.flip(0)
    t = np.arange(x.shape[0])[:, None]
    t = np.where(t < lengths, lengths - 1 - t, t)
    return x[on_device_of(x, t), on_device_of(x, np.arange(x.shape[1]))]


class RNN(RNNBase):
    """h ← tanh(W_ih x + b_ih + W_hh h + b_hh) at every step (Elman 1990)."""

    gates = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: str | None = None,
        dtype: Any = None,
        *,
        locked_dropout: bool = False,
    ) -> None:
        """See `RNNBase`; `nonlinearity` is "tanh" or "relu"."""
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity {nonlinearity!r}: expected 'tanh' or 'relu'")
        self.nonlinearity = nonlinearity
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            device, dtype, locked_dropout=locked_dropout,
        )  # fmt: skip

    def run(self, x: Tensor, state: list[Any], weights: Weights, lengths: Any) -> Any:
        return F.rnn(x, state[0], *weights, self.nonlinearity, lengths)


class LSTM(RNNBase):
    """Long short-term memory (Hochreiter and Schmidhuber 1997, with forget gates: Gers 2000).

    i, f, o = σ(...), g = tanh(...), each of W_ih x + b_ih + W_hh h + b_hh, in the order i f g o;
    c ← f ∘ c + i ∘ g;  h ← o ∘ tanh(c).
    """

    gates, states = 4, 2

    def run(self, x: Tensor, state: list[Any], weights: Weights, lengths: Any) -> Any:
        return F.lstm(x, state[0], state[1], *weights, lengths)


class GRU(RNNBase):
    """Gated recurrent unit (Cho et al. 2014), with the reset gate inside, as in cuDNN.

    r, z = σ(W_ih x + b_ih + W_hh h + b_hh);  n = tanh(W_in x + b_in + r ∘ (W_hn h + b_hn));
    h ← (1 - z) ∘ n + z ∘ h. The gates' order is r z n.
    """

    gates = 3

    def run(self, x: Tensor, state: list[Any], weights: Weights, lengths: Any) -> Any:
        return F.gru(x, state[0], *weights, lengths)


# One step -----------------------------------------------------------------------------------


class RNNCellBase(Module):
    """What the cells share: one step of a recurrent layer, (N, input_size) -> (N, hidden_size)."""

    gates: int

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: str | None = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        rows = self.gates * hidden_size
        self.weight_ih = Parameter(empty(rows, input_size, device=device, dtype=dtype))
        self.weight_hh = Parameter(empty(rows, hidden_size, device=device, dtype=dtype))
        self.bias_ih = Parameter(empty(rows, device=device, dtype=dtype)) if bias else None
        self.bias_hh = Parameter(empty(rows, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            init.uniform_(parameter, -bound, bound)

    def start(self, input: Tensor, h: Tensor | None) -> Tensor:
        """The state to start from; checks shapes."""
        if input.ndim not in (1, 2) or input.shape[-1] != self.input_size:
            raise ValueError(
                f"{type(self).__name__} takes (N, {self.input_size}), got {input.shape}"
            )
        shape = (*input.shape[:-1], self.hidden_size)
        if h is None:
            return Tensor(zeros_like(input, shape))
        if h.shape != shape:
            raise ValueError(f"a state of shape {shape} is expected, got {h.shape}")
        return h

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}" + ", bias=False" * (self.bias_ih is None)


class RNNCell(RNNCellBase):
    """One step of `RNN`."""

    gates = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: str | None = None,
        dtype: Any = None,
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity {nonlinearity!r}: expected 'tanh' or 'relu'")
        self.nonlinearity = nonlinearity
        super().__init__(input_size, hidden_size, bias, device, dtype)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        h = self.start(input, hx)
        a = F.linear(input, self.weight_ih, self.bias_ih)
        a = a + F.linear(h, self.weight_hh, self.bias_hh)
        return F.tanh(a) if self.nonlinearity == "tanh" else F.relu(a)

    def extra_repr(self) -> str:
        tail = f", nonlinearity={self.nonlinearity}" if self.nonlinearity != "tanh" else ""
        return super().extra_repr() + tail


class LSTMCell(RNNCellBase):
    """One step of `LSTM`; takes and returns the states (h, c)."""

    gates = 4

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        h, c = hx or (None, None)
        h, c = self.start(input, h), self.start(input, c)
        a = F.linear(input, self.weight_ih, self.bias_ih)
        a = a + F.linear(h, self.weight_hh, self.bias_hh)
        i, f, g, o = a.chunk(4, dim=-1)
        c = F.sigmoid(f) * c + F.sigmoid(i) * F.tanh(g)
        return F.sigmoid(o) * F.tanh(c), c


class GRUCell(RNNCellBase):
    """One step of `GRU`."""

    gates = 3

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        h = self.start(input, hx)
        r, z, n = F.linear(input, self.weight_ih, self.bias_ih).chunk(3, dim=-1)
        hr, hz, hn = F.linear(h, self.weight_hh, self.bias_hh).chunk(3, dim=-1)
        r, z = F.sigmoid(r + hr), F.sigmoid(z + hz)
        n = F.tanh(n + r * hn)
        return (1 - z) * n + z * h
