"""Every kernel against its formula on random shapes, beside the samples of tests/test_ops.py.

Products and convolutions are drawn in test_native.py, test_native_winograd.py and
test_native_lowp.py, with a bound for each element; here is all that else has a kernel in C++.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("minidl._native", reason="the C++ kernels are not built")
from minidl.backend.random import Key
from minidl.ops.conv import output_size
from tests import registry as reg
from tests import test_ops
from tests.registry import OPS, Case

Draw = Callable[[st.DataObject], tuple[tuple[Any, ...], dict[str, Any]]]
DRAWS: dict[str, Draw] = {}
ELSEWHERE = {
    "matmul", "linear", "linear_weight_only", "matmul_integer", "conv_integer", "conv2d",
    "conv2d_input", "conv2d_weight", "warp_affine", "warp_affine_input", "quantize_linear",
    "add_integer", "adaptive_avg_pool2d_integer",
}  # fmt: skip


def drawn(*names: str) -> Callable[[Draw], Draw]:
    def register(draw: Draw) -> Draw:
        DRAWS.update(dict.fromkeys(names, draw))
        return draw

    return register


def integer(data: st.DataObject, least: int, most: int) -> int:
    return data.draw(st.integers(least, most))


def shape(data: st.DataObject, least: int, most: int, longest: int = 40) -> tuple[int, ...]:
    """A shape of so many dimensions; the last one may be longer than some vectors."""
    *front, last = (integer(data, 1, 6) for _ in range(integer(data, least, most)))
    return (*front, last if data.draw(st.booleans()) else integer(data, 1, longest))


def numbers(data: st.DataObject, *shape: int) -> np.ndarray:
    return np.random.default_rng(integer(data, 0, 2**32 - 1)).normal(size=shape)


@drawn("relu")
def _(data):
    return (numbers(data, *shape(data, 1, 4, 200)),), {}


@drawn("clone")
def _(data):
    order = data.draw(st.permutations(range(3)))
    x = numbers(data, integer(data, 1, 20), integer(data, 15, 40), integer(data, 15, 40))
    return (x.transpose(order)[:, :: data.draw(st.sampled_from([1, 2, -1]))],), {}


@drawn("conv2d_relu")
def _(data):
    x, how = window(data)
    w = numbers(data, integer(data, 1, 9), x.shape[1], *how.pop("kernel_size"))
    bias = numbers(data, len(w)) if data.draw(st.booleans()) else None
    if data.draw(st.booleans()):  # Winograd's
        channels = integer(data, 16, 20)
        x, w = np.repeat(x[:, :1], channels, axis=1), numbers(data, 17, channels, 3, 3)
        how, bias = {"padding": (1, 1), "stride": (1, 1)}, None
    return (x, w / np.sqrt(w[0].size), bias), {**how, "groups": 1}


@drawn("softmax", "log_softmax")
def _(data):
    x = numbers(data, *shape(data, 1, 4)) * integer(data, 1, 30)
    return (x,), {"dim": integer(data, -x.ndim, x.ndim - 1)}


@drawn("additive_scores")
def _(data):
    n, places, size = integer(data, 1, 6), integer(data, 1, 9), integer(data, 1, 40)
    return (numbers(data, n, places, size), numbers(data, n, size), numbers(data, 1, size)), {}


@drawn("linear_int4")
def _(data):
    columns, rows, out = integer(data, 1, 200), integer(data, 1, 9), integer(data, 1, 20)
    group = data.draw(st.sampled_from([32, 64, columns]))
    scale = np.abs(numbers(data, out, -(-columns // group))) / 8
    w = np.random.default_rng(columns).integers(0, 256, (out, -(-columns // 2)), np.uint8)
    if columns % 2:
        w[:, -1] &= 15  # as `pack_int4` leaves the last half
    bias = numbers(data, out) if data.draw(st.booleans()) else None
    return (numbers(data, rows, columns), w, scale, bias), {"group_size": group}


@drawn("cross_entropy")
def _(data):
    n, classes, *rest = integer(data, 1, 9), integer(data, 1, 40), *shape(data, 1, 2)[:-1]
    x = numbers(data, n, classes, *rest) * 3
    labels = np.random.default_rng(0).integers(0, classes, (n, *rest))
    ignored = data.draw(st.booleans())
    if ignored:
        labels.flat[:: integer(data, 2, 5)] = -100
    weight = np.linspace(0.5, 2, classes) if data.draw(st.booleans()) else None
    reduction = data.draw(st.sampled_from(["sum", "none"] if ignored else ["mean", "sum", "none"]))
    smoothing = data.draw(st.sampled_from([0.0, 0.1]))
    how = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
    return (x, labels), how


@drawn("standardize")
def _(data):
    x = numbers(data, *shape(data, 2, 5)) * 2 + 1
    kind = data.draw(st.sampled_from(["batch", "layer", "instance", "any"]))
    if kind == "batch":
        dim: tuple[int, ...] = (0, *range(2, x.ndim))
    elif kind == "layer":
        dim = tuple(range(-integer(data, 1, x.ndim - 1), 0))
    elif kind == "instance" and x.ndim > 2:
        dim = tuple(range(2, x.ndim))
    else:
        dim = tuple(sorted(data.draw(st.sets(st.integers(0, x.ndim - 1), min_size=1))))
    along = {d % x.ndim for d in dim}
    of_set = tuple(1 if d in along else n for d, n in enumerate(x.shape))
    of_inner = tuple(n if d in along else 1 for d, n in enumerate(x.shape))
    each = data.draw(st.sampled_from([None, of_set, of_inner]))
    weight, bias = (None if each is None else numbers(data, *each) for _ in range(2))
    return (x, weight, bias), {"dim": dim, "eps": 1e-2}  # a set may be a single number


@drawn("scale_shift")
def _(data):
    n, channels, *rest = shape(data, 2, 4)
    x = numbers(data, n, channels, *rest)
    return (x, numbers(data, channels), numbers(data, channels)), {}


@drawn("dropout")
def _(data):
    x = numbers(data, *shape(data, 1, 4))
    mask = tuple(data.draw(st.sampled_from([n, 1])) for n in x.shape)
    p = data.draw(st.sampled_from([0.0, 0.2, 0.5, 1.0]))
    key = Key(integer(data, 0, 2**70), integer(data, 0, 2**40))
    return (x,), {"p": p, "key": key, "mask_shape": data.draw(st.sampled_from([None, mask]))}


def window(data: st.DataObject) -> tuple[np.ndarray, dict[str, Any]]:
    kernel = integer(data, 1, 4), integer(data, 1, 4)
    padding = integer(data, 0, kernel[0] // 2), integer(data, 0, kernel[1] // 2)
    h, w = (k + integer(data, 0, 20) for k in kernel)
    x = numbers(data, integer(data, 1, 3), integer(data, 1, 4), h, w)
    stride = integer(data, 1, 3), integer(data, 1, 3)
    return x, {"kernel_size": kernel, "stride": stride, "padding": padding}


@drawn("max_pool2d", "max_pool2d_index")
def _(data):
    x, how = window(data)
    return (x,), how


@drawn("max_pool2d_input")
def _(data):
    x, how = window(data)
    index = OPS["max_pool2d_index"].op.formula(x, **how)
    return (numbers(data, *index.shape), index), {"input_size": x.shape[2:]}


@drawn("avg_pool2d")
def _(data):
    x, how = window(data)
    return (x,), {**how, "count_include_pad": data.draw(st.booleans())}


@drawn("avg_pool2d_input")
def _(data):
    x, how = window(data)
    size = output_size(x.shape[2:], *how.values(), (1, 1))
    y = numbers(data, *x.shape[:2], *size)
    include = data.draw(st.booleans())
    return (y,), {**how, "input_size": x.shape[2:], "count_include_pad": include}


@drawn("adaptive_avg_pool2d")
def _(data):
    x = window(data)[0]
    return (x,), {"output_size": tuple(integer(data, 1, n) for n in x.shape[2:])}


@drawn("adaptive_avg_pool2d_input")
def _(data):
    x = window(data)[0]
    y = numbers(data, *x.shape[:2], *(integer(data, 1, n) for n in x.shape[2:]))
    return (y,), {"input_size": x.shape[2:]}


@drawn("rnn", "lstm", "gru")
def _(data):
    return (), {}  # the number of gates tells them apart: see `recurrent`


def recurrent(data: st.DataObject, name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    gates, states = {"rnn": (1, 1), "gru": (3, 1), "lstm": (4, 2)}[name]
    t, n, i, h = (
        integer(data, 1, 5),
        integer(data, 1, 20),
        integer(data, 1, 9),
        integer(data, 1, 20),
    )
    first = [numbers(data, n, h) for _ in range(states)]
    weights = [numbers(data, gates * h, k) / np.sqrt(k) for k in (i, h)]
    given = data.draw(st.booleans())
    biases = [numbers(data, gates * h) if given else None for _ in range(2)]
    lengths = np.random.default_rng(0).integers(1, t + 1, n) if data.draw(st.booleans()) else None
    inputs = (numbers(data, t, n, i), *first, *weights, *biases, lengths)
    how = {"nonlinearity": data.draw(st.sampled_from(["tanh", "relu"]))} if name == "rnn" else {}
    return inputs, how


def close(actual: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    largest = max(1.0, np.abs(expected).max(initial=0))
    bound = test_ops.OF_KERNELS.get(dtype, 0) * largest
    np.testing.assert_allclose(actual.astype(np.float64), expected, rtol=0, atol=bound)


WITH_NATIVE = sorted(
    name for name, f in OPS.items() if any(k.name == "native" for k in f.op.kernels)
)


def test_every_kernel_is_drawn_somewhere() -> None:
    assert set(WITH_NATIVE) <= set(DRAWS) | ELSEWHERE
    assert not set(DRAWS) & ELSEWHERE and set(DRAWS) <= set(WITH_NATIVE)


@pytest.mark.parametrize("name", [name for name in WITH_NATIVE if name in DRAWS])
@settings(max_examples=60)
@given(data=st.data())
def test_random_shapes(name: str, data: st.DataObject) -> None:
    """The formula in float64 is the truth. The bound is that of the registry's samples, in units of
    the largest number of the result or of the inputs, which are around 1: what cancels out is small
    beside what it was made of."""
    recurrent_ = name in ("rnn", "lstm", "gru")
    inputs, how = recurrent(data, name) if recurrent_ else DRAWS[name](data)
    case = Case(OPS[name], inputs, how)
    for kernel, dtype in reg.kernels(case.op):
        if kernel.name == "native":
            call = case.cast(dtype)
            expected = case.op.formula(*call.cast("float64").inputs, **case.settings)
            actual = np.asarray(kernel.function(*call.inputs, **case.settings))
            assert actual.dtype == dtype or actual.dtype.kind != "f"
            close(actual, expected, dtype)
    for kernel, dtype in reg.gradient_kernels(case.op):
        call = case.cast(dtype)
        expected_ = reg.gradients(case.op.rule, call.cast("float64"))
        actual_ = reg.gradients(kernel.function, call)
        for a, b in zip(actual_, expected_, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                close(a, b, dtype)
