"""Recurrent layers whose matrices are narrow: the products change, the gates stay in float32.

A layer of a recurrent network has two products, W_ih x and W_hh h; all else (gates, state, biases)
is little work. So each matrix becomes a linear layer without a bias, of whichever kind (int8
products, or only the weights narrow), and stands in the formula of `minidl.ops.rnn` where the
matrix stood.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minidl import nn
from minidl.backend import to_device
from minidl.nn.rnn import RNNBase, RNNCellBase
from minidl.op import Op
from minidl.ops import rnn as ops
from minidl.tensor import Tensor, raw

Narrow = Callable[[Tensor, Any], nn.Module]  # a weight (out, in) and a bias -> a linear layer


class Matrix:
    """A linear layer in place of its matrix W: ``x @ matrix.T`` is the layer's output, x Wᵀ."""

    __array_ufunc__ = None  # so that arrays leave the product to `__rmatmul__`

    def __init__(self, layer: Any) -> None:
        self.layer, self.T = layer, self
        self.shape = layer.out_features, layer.in_features

    def __rmatmul__(self, x: Any) -> Any:
        return self.layer(Tensor(x)).array


class NarrowRecurrent(nn.Module):
    """What the narrow layers share. Each matrix is a linear layer of the matrix's name; they are
    for inference: no gradient passes through."""

    op: Op

    @classmethod
    def from_float(cls, layer: nn.Module, narrow: Narrow) -> NarrowRecurrent:
        """The same layer, its matrices as `narrow` makes them; the rest is the layer's own."""
        new = cls.__new__(cls)
        matrices = {name: p for name, p in layer._own_parameters() if p.ndim == 2}
        vars(new).update((k, v) for k, v in vars(layer).items() if k not in matrices)
        for name, weight in matrices.items():
            try:
                setattr(new, name, narrow(weight, None))
            except ValueError as error:
                error.add_note(f"in {name}")
                raise
        return new

    def compute(self, x: Any, state: Any, weights: Any, lengths: Any) -> Any:
        """The formula: the states (T, N, H), or (2, T, N, H) of an LSTM."""
        w_ih, w_hh, *biases = weights
        how = {name: getattr(self, name) for name in self.op.defaults}  # nonlinearity
        given = raw((x, *state)), map(Matrix, (w_ih, w_hh)), raw(tuple(biases))
        return self.op.formula(*(a for some in given for a in some), lengths, **how)


class NarrowLayer(NarrowRecurrent, RNNBase):
    """`nn.RNN`, `nn.LSTM` or `nn.GRU` with narrow matrices."""

    def run(self, x: Tensor, state: list[Any], weights: Any, lengths: Any) -> Any:
        if lengths is not None:
            lengths = to_device(lengths, x.device)
        states = self.compute(x, state, weights, lengths)
        out = states if states.ndim == 4 else states[None]
        return Tensor(out[0]), *(Tensor(s[-1]) for s in out)


class NarrowCell(NarrowRecurrent, RNNCellBase):
    """`nn.RNNCell`, `nn.LSTMCell` or `nn.GRUCell` with narrow matrices: one step of a layer."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        pair = isinstance(self, nn.LSTMCell)
        first = (hx or (None, None)) if pair else (hx,)
        state = [self.start(input, h).reshape((-1, self.hidden_size)) for h in first]
        x = input.reshape((1, -1, self.input_size))
        weights = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        states = self.compute(x, state, weights, None)[..., 0, :, :]
        shape = (*input.shape[:-1], self.hidden_size)
        if pair:
            return tuple(Tensor(s.reshape(shape)) for s in states)
        return Tensor(states.reshape(shape))


class NarrowRNN(NarrowLayer, nn.RNN):
    """`nn.RNN` with narrow matrices."""

    op = ops.rnn.op


class NarrowLSTM(NarrowLayer, nn.LSTM):
    """`nn.LSTM` with narrow matrices."""

    op = ops.lstm.op


class NarrowGRU(NarrowLayer, nn.GRU):
    """`nn.GRU` with narrow matrices."""

    op = ops.gru.op


class NarrowRNNCell(NarrowCell, nn.RNNCell):
    """`nn.RNNCell` with narrow matrices."""

    op = ops.rnn.op


class NarrowLSTMCell(NarrowCell, nn.LSTMCell):
    """`nn.LSTMCell` with narrow matrices."""

    op = ops.lstm.op


class NarrowGRUCell(NarrowCell, nn.GRUCell):
    """`nn.GRUCell` with narrow matrices."""

    op = ops.gru.op


RECURRENT: dict[type[nn.Module], type[NarrowRecurrent]] = {
    kind.__bases__[1]: kind for base in (NarrowLayer, NarrowCell) for kind in base.__subclasses__()
}
