"""Oracles of `minidl.ops.rnn`: number by number, and PyTorch's cells step by step."""

import math

import numpy as np

from tests.oracles import loops, pytorch


def logistic(x):
    return 1 / (1 + math.exp(-x))


def row(w, v, b, k):
    """(W v + b)_k."""
    return sum(w[k, j] * v[j] for j in range(len(v))) + (0 if b is None else b[k])


def steps(x, lengths):
    for t, n in np.ndindex(*x.shape[:2]):
        yield t, n, lengths is None or t < lengths[n]


@loops("rnn")
def _(x, h0, w_ih, w_hh, b_ih, b_hh, lengths, *, nonlinearity):
    act = {"tanh": math.tanh, "relu": lambda v: max(v, 0.0)}[nonlinearity]
    h, y = h0.copy(), np.zeros((*x.shape[:2], h0.shape[1]))
    for t, n, runs in steps(x, lengths):
        if runs:
            h[n] = [
                act(row(w_ih, x[t, n], b_ih, k) + row(w_hh, h[n], b_hh, k))
                for k in range(h0.shape[1])
            ]
        y[t, n] = h[n]
    return y


@loops("lstm")
def _(x, h0, c0, w_ih, w_hh, b_ih, b_hh, lengths):
    size = h0.shape[1]
    h, c, y = h0.copy(), c0.copy(), np.zeros((2, *x.shape[:2], size))
    for t, n, runs in steps(x, lengths):
        if runs:
            a = [row(w_ih, x[t, n], b_ih, k) + row(w_hh, h[n], b_hh, k) for k in range(4 * size)]
            for k in range(size):
                i, f, g, o = a[k], a[size + k], a[2 * size + k], a[3 * size + k]
                c[n, k] = logistic(f) * c[n, k] + logistic(i) * math.tanh(g)
                h[n, k] = logistic(o) * math.tanh(c[n, k])
        y[0, t, n], y[1, t, n] = h[n], c[n]
    return y


@loops("gru")
def _(x, h0, w_ih, w_hh, b_ih, b_hh, lengths):
    size = h0.shape[1]
    h, y = h0.copy(), np.zeros((*x.shape[:2], size))
    for t, n, runs in steps(x, lengths):
        if runs:
            a = [row(w_ih, x[t, n], b_ih, k) for k in range(3 * size)]
            b = [row(w_hh, h[n], b_hh, k) for k in range(3 * size)]
            for k in range(size):
                r, z = logistic(a[k] + b[k]), logistic(a[size + k] + b[size + k])
                new = math.tanh(a[2 * size + k] + r * b[2 * size + k])
                h[n, k] = (1 - z) * new + z * h[n, k]
        y[t, n] = h[n]
    return y


def unrolled(cell, x, state, lengths):
    """The states after each step of a cell, each (T, N, H)."""
    import torch

    collected = [[] for _ in state]
    for t in range(len(x)):
        new = cell(x[t], state)
        if lengths is not None:
            runs = (lengths > t)[:, None]
            new = [torch.where(runs, a, b) for a, b in zip(new, state, strict=True)]
        state = new
        for states, s in zip(collected, state, strict=True):
            states.append(s)
    return [torch.stack(states) for states in collected]


@pytorch("rnn")
def _(x, h0, *weights, nonlinearity):
    import torch

    cell = torch.rnn_tanh_cell if nonlinearity == "tanh" else torch.rnn_relu_cell
    *weights, lengths = weights
    return unrolled(lambda x, s: [cell(x, s[0], *weights)], x, [h0], lengths)[0]


@pytorch("lstm")
def _(x, h0, c0, *weights):
    import torch

    *weights, lengths = weights
    return torch.stack(unrolled(lambda x, s: torch.lstm_cell(x, s, *weights), x, [h0, c0], lengths))


@pytorch("gru")
def _(x, h0, *weights):
    import torch

    *weights, lengths = weights
    return unrolled(lambda x, s: [torch.gru_cell(x, s[0], *weights)], x, [h0], lengths)[0]
