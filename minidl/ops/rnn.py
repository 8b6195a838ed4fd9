"""Recurrent layers: one layer, one direction, a whole batch of sequences x (T, N, I).

The loop over time has only what must wait for the step before. All else is one matrix product
over all steps: the inputs' share of the gates; and, in backpropagation through time, the gates
themselves: the states are known then, so nothing is sequential about them. They are computed
again rather than kept, which costs little, and makes the second order right.

``lengths`` (N,) or None: after its end a sequence's state stays as it is, whatever x is there.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np

from minidl import backend
from minidl.autograd import mode
from minidl.backend.native import native, why_missing
from minidl.op import Sample, op, sample
from minidl.ops.elementwise import sigmoid, tanh, where
from minidl.ops.shape import cat_, stack_


def flat(x: Any) -> Any:
    """(T, N, D) -> (T*N, D), so that one matrix product serves all steps."""
    return x.reshape((x.shape[0] * x.shape[1], x.shape[2]))


def project(x: Any, w: Any, *biases: Any) -> Any:
    """x wᵀ + b for all steps: (T,N,D), (K,D) -> (T,N,K)."""
    given = [b for b in biases if b is not None]
    y = flat(x) @ w.T
    if given:
        y = y + sum(given)
    return y.reshape((x.shape[0], x.shape[1], w.shape[0]))


def split(a: Any, gates: int) -> list[Any]:
    """The gates, which lie side by side in the last dimension."""
    h = a.shape[-1] // gates
    return [a[..., k * h : (k + 1) * h] for k in range(gates)]


def keep_ended(lengths: Any, t: int, new: Any, old: Any) -> Any:
    """new for the sequences that have a step t, old for those that have ended."""
    return new if lengths is None else where((lengths > t).reshape((-1, 1)), new, old)


def before(first: Any, states: Any) -> Any:
    """The state that each step starts from: (N,H), (T,N,H) -> (T,N,H)."""
    return cat_(first.reshape((1, *first.shape)), states[:-1])


# Elman 1990 -------------------------------------------------------------------------------


@op
def rnn(
    x: Any,
    h0: Any,
    w_ih: Any,
    w_hh: Any,
    b_ih: Any,
    b_hh: Any,
    lengths: Any,
    *,
    nonlinearity: str = "tanh",
) -> Any:
    """h = tanh(W_ih x + b_ih + W_hh h + b_hh), or relu of it: the states (T,N,H)."""
    a = project(x, w_ih, b_ih, b_hh)
    h, states = h0, backend.array_module(x).empty_like(a)
    for t in range(len(a)):
        z = a[t] + h @ w_hh.T
        z = np.tanh(z) if nonlinearity == "tanh" else np.maximum(z, 0)
        h = states[t] = keep_ended(lengths, t, z, h)
    return states


@rnn.gradient
def _(g, out, x, h0, w_ih, w_hh, lengths, *, nonlinearity):
    slope = 1 - out * out if nonlinearity == "tanh" else out > 0

    dh, das = 0.0, []
    for t in reversed(range(x.shape[0])):
        dh = dh + g[t]
        da = keep_ended(lengths, t, dh * slope[t], 0)
        dh = keep_ended(lengths, t, da @ w_hh, dh)
        das.append(da)
    da = flat(stack_(*reversed(das)))

    return (
        lambda: (da @ w_ih).reshape(x.shape),
        dh,
        lambda: da.T @ flat(x),
        lambda: da.T @ flat(before(h0, out)),
        lambda: da.sum(axis=0),
        lambda: da.sum(axis=0),
        None,
    )


# Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000 -------------------


@op
def lstm(x: Any, h0: Any, c0: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any, lengths: Any) -> Any:
    """The hidden and the cell states: (2,T,N,H).

    i, f, o = σ(W_ih x + b_ih + W_hh h + b_hh) and g = tanh(…), rows in the order i, f, g, o;
    c = f c + i g;  h = o tanh(c).
    """
    a = project(x, w_ih, b_ih, b_hh)
    h, c = h0, c0
    states = backend.array_module(x).empty((2, *a.shape[:2], h0.shape[1]), dtype=a.dtype)
    for t in range(len(a)):
        i, f, g, o = split(a[t] + h @ w_hh.T, 4)
        cell = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        c = states[1, t] = keep_ended(lengths, t, cell, c)
        h = states[0, t] = keep_ended(lengths, t, sigmoid(o) * np.tanh(cell), h)
    return states


@lstm.gradient
def _(g, out, x, h0, c0, w_ih, w_hh, b_ih, b_hh, lengths):
    g_h, g_c = g[0], g[1]
    h_before, c_before, tanh_c = before(h0, out[0]), before(c0, out[1]), tanh(out[1])
    a = project(x, w_ih, b_ih, b_hh) + project(h_before, w_hh)
    i, f, z, o = split(a, 4)
    i, f, z, o = sigmoid(i), sigmoid(f), tanh(z), sigmoid(o)

    # How c depends on h, and h and c on what the gates are computed from.
    dh_dc = o * (1 - tanh_c * tanh_c)
    slopes = cat_(
        z * i * (1 - i), c_before * f * (1 - f), i * (1 - z * z), tanh_c * o * (1 - o), dim=2
    )

    dh, dc, das = 0.0, 0.0, []
    for t in reversed(range(x.shape[0])):
        dh, dc = dh + g_h[t], dc + g_c[t]
        through_c = dc + dh * dh_dc[t]
        da = cat_(through_c, through_c, through_c, dh, dim=1) * slopes[t]
        da = keep_ended(lengths, t, da, 0)
        dh = keep_ended(lengths, t, da @ w_hh, dh)
        dc = keep_ended(lengths, t, through_c * f[t], dc)
        das.append(da)
    da = flat(stack_(*reversed(das)))

    return (
        lambda: (da @ w_ih).reshape(x.shape),
        dh,
        dc,
        lambda: da.T @ flat(x),
        lambda: da.T @ flat(h_before),
        lambda: da.sum(axis=0),
        lambda: da.sum(axis=0),
        None,
    )


# Cho et al. 2014, as in cuDNN: r times (W_hh h + b_hh), not W_hh (r h) ---------------------


@op
def gru(x: Any, h0: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any, lengths: Any) -> Any:
    """The states (T,N,H).

    r, z = σ(W_ih x + b_ih + W_hh h + b_hh);  n = tanh(W_ih x + b_ih + r (W_hh h + b_hh)), rows
    in the order r, z, n;  h = (1 - z) n + z h.
    """
    a = project(x, w_ih, b_ih)
    h, states = h0, backend.array_module(x).empty((*a.shape[:2], h0.shape[1]), dtype=a.dtype)
    for t in range(len(a)):
        b = h @ w_hh.T
        if b_hh is not None:
            b += b_hh
        (a_r, a_z, a_n), (b_r, b_z, b_n) = split(a[t], 3), split(b, 3)
        n = np.tanh(a_n + sigmoid(a_r + b_r) * b_n)
        h = states[t] = keep_ended(lengths, t, n + sigmoid(a_z + b_z) * (h - n), h)
    return states


@gru.gradient
def _(g, out, x, h0, w_ih, w_hh, b_ih, b_hh, lengths):
    h_before = before(h0, out)
    a_r, a_z, a_n = split(project(x, w_ih, b_ih), 3)
    b_r, b_z, b_n = split(project(h_before, w_hh, b_hh), 3)
    r, z = sigmoid(a_r + b_r), sigmoid(a_z + b_z)
    n = tanh(a_n + r * b_n)

    # How h depends on a and on b.
    to_n = (1 - z) * (1 - n * n)
    to_r, to_z = to_n * b_n * r * (1 - r), (h_before - n) * z * (1 - z)
    slopes = cat_(to_r, to_z, to_n * r, dim=2)

    dh, dhs, dbs = 0.0, [], []
    for t in reversed(range(x.shape[0])):
        dh = dh + g[t]
        now = keep_ended(lengths, t, dh, 0)
        db = cat_(now, now, now, dim=1) * slopes[t]
        dh = keep_ended(lengths, t, now * z[t] + db @ w_hh, dh)
        dhs.append(now)
        dbs.append(db)
    db = flat(stack_(*reversed(dbs)))
    dn = flat(stack_(*reversed(dhs)) * to_n)
    da = cat_(db[:, : 2 * h0.shape[1]], dn, dim=1)

    return (
        lambda: (da @ w_ih).reshape(x.shape),
        dh,
        lambda: da.T @ flat(x),
        lambda: db.T @ flat(h_before),
        lambda: da.sum(axis=0),
        lambda: db.sum(axis=0),
        None,
    )


# Kernels ----------------------------------------------------------------------------------
#
# In C++ is the loop over time alone (csrc/cpu/recurrent.h), with the batch in the last dimension;
# the products over all steps are made here, and only those that are wanted. Unlike the rule, the
# kernel of the gradient does not compute the gates again, which would be a quarter of all products:
# that of the formula has kept them.

kept: dict[int, tuple[Any, Any]] = {}  # id of an output -> a weak reference to it, what was kept


def forwards(
    cell: str, keep: bool, x: Any, first: list[Any], w_ih: Any, w_hh: Any, *rest: Any
) -> tuple[Any, Any]:
    """The states (S,T,N,H) of a layer, and what `backwards` needs if `keep`; (None, None): an
    empty layer is left to the formula."""
    if not first[0].size or not len(x):
        return None, None
    a = native.matmul(w_ih, flat(x).T)  # type: ignore[union-attr]
    return native.recurrent(cell, a, w_hh, *rest[:2], np.stack(first), rest[2], keep)  # type: ignore[union-attr]


def forwards_keeping(cell: str, *inputs: Any) -> Any:
    """The states, with `kept` for as long as they live: (T,N,H), or (S,T,N,H) if S > 1."""
    states, what = forwards(cell, mode.enabled, *inputs)
    if states is None:
        return None
    out = states if len(states) > 1 else states[0]
    if mode.enabled:
        key = id(out)
        kept[key] = weakref.ref(out, lambda _: kept.pop(key, None)), what
    return out


def recall(out: Any, cell: str, *inputs: Any) -> Any:
    """What was kept with an output, computed again if it came from elsewhere (`minidl.use`)."""
    return kept[id(out)][1] if id(out) in kept else forwards(cell, True, *inputs)[1]


def backwards(
    cell: str, what: Any, g: Any, states: Any, x: Any, h0: Any, w_ih: Any, w_hh: Any, lengths: Any
) -> tuple[Any, ...] | None:
    """The gradients of x, of the first states, and of the weights and biases; as `forwards`."""
    if not h0.size or not len(x):
        return None
    matmul = native.matmul  # type: ignore[union-attr]
    da, db, d_first = native.recurrent_gradient(cell, g, what, w_hh, lengths)  # type: ignore[union-attr]
    return (
        lambda: matmul(da.T, w_ih).reshape(x.shape),
        *d_first,
        lambda: matmul(da, flat(x)),
        lambda: matmul(db, flat(before(h0, states[0]))),
        lambda: da.sum(axis=1),
        lambda: db.sum(axis=1),
        None,
    )


@rnn.kernel("native", dtypes=("float32", "float64"), missing=why_missing)
def _(x, h0, w_ih, w_hh, b_ih, b_hh, lengths, *, nonlinearity="tanh"):
    states, _ = forwards(nonlinearity, False, x, [h0], w_ih, w_hh, b_ih, b_hh, lengths)
    if states is None:
        formula = rnn.op.formula
        return formula(x, h0, w_ih, w_hh, b_ih, b_hh, lengths, nonlinearity=nonlinearity)
    return states[0]


@rnn.gradient_kernel("native", dtypes=("float32", "float64"), missing=why_missing)
def _(g, out, x, h0, w_ih, w_hh, lengths, *, nonlinearity):
    what = flat(out).T  # the slope is known from the states: nothing else is needed
    return backwards(
        nonlinearity, what, g[None], out[None], x, h0, w_ih, w_hh, lengths
    ) or rnn.op.rule(g, out, x, h0, w_ih, w_hh, lengths, nonlinearity=nonlinearity)


@lstm.kernel("native", dtypes=("float32", "float64"), missing=why_missing)
def _(x, h0, c0, w_ih, w_hh, b_ih, b_hh, lengths):
    out = forwards_keeping("lstm", x, [h0, c0], w_ih, w_hh, b_ih, b_hh, lengths)
    return lstm.op.formula(x, h0, c0, w_ih, w_hh, b_ih, b_hh, lengths) if out is None else out


@lstm.gradient_kernel("native", dtypes=("float32", "float64"), missing=why_missing)
def _(g, out, x, h0, c0, w_ih, w_hh, b_ih, b_hh, lengths):
    what = recall(out, "lstm", x, [h0, c0], w_ih, w_hh, b_ih, b_hh, lengths)
    return backwards("lstm", what, g, out, x, h0, w_ih, w_hh, lengths) or lstm.op.rule(
        g, out, x, h0, c0, w_ih, w_hh, b_ih, b_hh, lengths
    )


@gru.kernel("native", dtypes=("float32", "float64"), missing=why_missing)
def _(x, h0, w_ih, w_hh, b_ih, b_hh, lengths):
    out = forwards_keeping("gru", x, [h0], w_ih, w_hh, b_ih, b_hh, lengths)
    return gru.op.formula(x, h0, w_ih, w_hh, b_ih, b_hh, lengths) if out is None else out


@gru.gradient_kernel("native", dtypes=("float32", "float64"), missing=why_missing)
def _(g, out, x, h0, w_ih, w_hh, b_ih, b_hh, lengths):
    what = recall(out, "gru", x, [h0], w_ih, w_hh, b_ih, b_hh, lengths)
    return backwards("gru", what, g[None], out[None], x, h0, w_ih, w_hh, lengths) or gru.op.rule(
        g, out, x, h0, w_ih, w_hh, b_ih, b_hh, lengths
    )


# Samples ----------------------------------------------------------------------------------


def problems(rng: np.random.Generator, gates: int, states: int) -> Iterator[tuple[Any, ...]]:
    """Inputs: with and without biases and lengths."""
    for t, n, i, h, lengths in [
        (3, 2, 3, 2, None), (4, 3, 2, 3, [2, 4, 1]), (2, 0, 2, 2, None), (2, 19, 3, 9, None),
    ]:  # fmt: skip
        x, *first = rng.normal(size=(t, n, i)), *rng.normal(size=(states, n, h))
        w_ih, w_hh = rng.normal(size=(gates * h, i)), rng.normal(size=(gates * h, h))
        biases = rng.normal(size=(2, gates * h))
        yield x, *first, w_ih, w_hh, *biases, None if lengths is None else np.array(lengths)
        if lengths:
            yield x, *first, w_ih, w_hh, None, None, np.array(lengths)


@rnn.samples
def _(rng: np.random.Generator) -> Iterator[Sample]:
    for inputs in problems(rng, gates=1, states=1):
        yield sample(*inputs)
    for inputs in problems(rng, gates=1, states=1):
        yield sample(*inputs, nonlinearity="relu")


@lstm.samples
def _(rng: np.random.Generator) -> Iterator[Sample]:
    for inputs in problems(rng, gates=4, states=2):
        yield sample(*inputs)


@gru.samples
def _(rng: np.random.Generator) -> Iterator[Sample]:
    for inputs in problems(rng, gates=3, states=1):
        yield sample(*inputs)
