"""`minidl.nn.functional` against PyTorch's: values, first and second derivatives, in float64."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as TF

import minidl
import minidl.nn.functional as F
from minidl.tensor import Tensor

pytestmark = pytest.mark.torch


class Call(NamedTuple):
    """A function's name with positional arguments (arrays become tensors) and settings."""

    name: str
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]
    kinks: bool = False  # inputs lie at kinks, where second derivatives differ

    def __str__(self) -> str:
        return f"{self.name} {self.kwargs}"


def calls() -> list[Call]:
    rng = np.random.default_rng(0)
    found: list[Call] = []

    def n(*shape: int) -> np.ndarray:
        return rng.normal(size=shape)

    def add(name: str, *inputs: Any, **kwargs: Any) -> None:
        found.append(Call(name, inputs, kwargs))

    x = n(2, 4, 7, 6)
    for stride, padding, dilation, groups in [
        (1, 0, 1, 1), (2, 1, 1, 2), ((1, 2), (2, 0), (1, 2), 1), (1, "same", (2, 1), 4),
        (1, "valid", 1, 1),
    ]:  # fmt: skip
        how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        add("conv2d", x, n(4, 4 // groups, 3, 2), n(4), **how)
    add("conv2d", x[0], n(3, 4, 3, 3))
    for stride, padding, dilation, groups in [(1, 0, 1, 1), (2, 1, 1, 2), ((2,), (2,), (2,), 1),
                                              (1, "same", 3, 4)]:  # fmt: skip
        how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        add("conv1d", n(2, 4, 9), n(4, 4 // groups, 2), n(4), **how)
    add("conv_transpose2d", x, n(4, 3, 3, 2), n(3))
    add("conv_transpose2d", x, n(4, 3, 3, 2), n(6), stride=2, padding=1, output_padding=1, groups=2)
    add("conv_transpose2d", x, n(4, 3, 3, 2), None, stride=(2, 3), output_padding=(0, 2),
        dilation=(2, 1))  # fmt: skip
    add("linear", n(2, 3, 4), n(5, 4), n(5))
    add("linear", n(4), n(5, 4))

    for how in (
        {"kernel_size": 2},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 3, "stride": 2, "ceil_mode": True},
        {"kernel_size": (2, 3), "stride": (3, 1), "padding": (1, 0)},
    ):
        add("max_pool2d", x, **how)
        add("avg_pool2d", x, **how)
        add("avg_pool2d", x, **how, count_include_pad=False)
        add("avg_pool2d", x, **how, divisor_override=3)
    add("max_pool2d", x, kernel_size=2, dilation=(2, 3))
    add("max_pool2d", x, kernel_size=2, return_indices=True)
    for size in (1, 3, (2, 5), (None, 2)):
        add("adaptive_avg_pool2d", x, size)
        add("adaptive_max_pool2d", x, size)

    z, kinks = n(30) * 5, np.array([0.0, -1, 1, 6, 3, -3, 30])
    for name, settings in {
        "relu": {}, "leaky_relu": {"negative_slope": 0.2}, "elu": {"alpha": 2.0}, "gelu": {},
        "silu": {}, "softplus": {"beta": 2.0, "threshold": 3.0}, "logsigmoid": {},
        "hardtanh": {"min_val": -1.0, "max_val": 3.0}, "relu6": {}, "sigmoid": {}, "tanh": {},
    }.items():  # fmt: skip
        add(name, z)
        add(name, z, **settings)
        found.append(Call(name, (kinks,), {}, kinks=True))
    add("gelu", z, approximate="tanh")
    add("softmax", x, dim=1)
    add("log_softmax", x, dim=-1)

    w, b = n(4), n(4)
    add("batch_norm", x, None, None, w, b, training=True)
    add("batch_norm", n(5, 3), None, None, training=True, eps=0.1)
    add("layer_norm", x, (7, 6), n(7, 6), n(7, 6))
    add("layer_norm", x, (6,))
    add("group_norm", x, 2, w, b)
    add("instance_norm", x, None, None, w, b)
    add("normalize", x)
    add("normalize", x, p=1.0, dim=2)
    add("cosine_similarity", x, n(*x.shape))
    add("cosine_similarity", x, n(*x.shape), dim=-1)

    scores, labels = n(5, 4), rng.integers(0, 4, 5)
    some = np.where(np.arange(5) == 1, -100, labels)
    weight = np.abs(n(4))
    p, q = rng.uniform(size=(5, 4)), rng.uniform(size=(5, 4))
    logp, probabilities = np.log(p / p.sum(1, keepdims=True)), q / q.sum(1, keepdims=True)
    maps, marked = n(2, 3, 2, 2), rng.integers(0, 3, (2, 2, 2))
    for reduction in ("mean", "sum", "none"):
        for smoothing in (0.0, 0.2):
            how = {"reduction": reduction, "label_smoothing": smoothing}
            add("cross_entropy", scores, some, **how)
            add("cross_entropy", maps, marked, **how)
            add("cross_entropy", scores, probabilities, **how)
        add("nll_loss", logp, some, reduction=reduction)
        add("nll_loss", maps, marked, reduction=reduction)
        for name in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"):
            add(name, scores, logp, reduction=reduction)
        add("smooth_l1_loss", scores, logp, reduction=reduction, beta=0.3)
        add("huber_loss", scores, logp, reduction=reduction, delta=0.3)
        add("binary_cross_entropy_with_logits", scores, q, reduction=reduction)
        add("kl_div", logp, probabilities, reduction=reduction)
        add("kl_div", logp, logp[::-1].copy(), reduction=reduction, log_target=True)
    add("kl_div", logp, probabilities, reduction="batchmean")
    add("cross_entropy", scores[0], np.array(2))

    for mode, border in [("constant", (1, 2)), ("constant", (1, 2, 0, 3)),
                         ("constant", (-1, 2, 0, -2)), ("reflect", (2, 3, 1, 0)),
                         ("replicate", (2, 9, 1, 0)), ("circular", (2, 3, 7, 0))]:  # fmt: skip
        add("pad", x, border, mode)
    add("pad", x, (1, 1), value=2.5)
    for how in (
        {"size": (5, 9)}, {"scale_factor": 2}, {"scale_factor": (1.7, 0.6)},
        {"size": 13, "mode": "bilinear"}, {"scale_factor": 1.6, "mode": "bilinear"},
        {"size": (3, 9), "mode": "bilinear", "align_corners": True},
    ):  # fmt: skip
        add("interpolate", x, **how)
    add("one_hot", labels)
    add("one_hot", labels, num_classes=9)
    add("embedding", rng.integers(0, 6, (3, 4)), n(6, 3), padding_idx=2)
    add("embedding", rng.integers(0, 6, (3, 4)), n(6, 3), padding_idx=-1)
    # What takes class weights does not differentiate them: they are arrays that are closed over.
    found.append(Call("cross_entropy", (scores, some), {"weight": weight}))
    found.append(Call("nll_loss", (logp, some), {"weight": weight}))
    found.append(Call("binary_cross_entropy", (p,), {"target": q}))
    found.append(
        Call("binary_cross_entropy_with_logits", (scores,), {"target": q, "pos_weight": weight})
    )
    return found


CALLS = calls()


def run(call: Call, module: Any, lift: Any, grad: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """Values, gradients, and gradients of gradients, as Tensors of one library."""
    floats = [isinstance(x, np.ndarray) and x.dtype.kind == "f" for x in call.inputs]
    xs = [
        lift(x, wanted) if isinstance(x, np.ndarray) else x
        for x, wanted in zip(call.inputs, floats, strict=True)
    ]
    kwargs = {k: lift(v, False) if isinstance(v, np.ndarray) else v for k, v in call.kwargs.items()}
    ys = getattr(module, call.name)(*xs, **kwargs)
    ys = list(ys) if isinstance(ys, tuple) else [ys]
    leaves = [x for x, wanted in zip(xs, floats, strict=True) if wanted]
    if not ys[0].requires_grad:
        return ys, [], []
    rng = np.random.default_rng(1)
    u = lift(np.asarray(rng.normal(size=tuple(ys[0].shape))), False)
    first = grad((ys[0] * u).sum(), leaves, True)
    weights = [lift(np.asarray(rng.normal(size=tuple(x.shape))), False) for x in leaves]
    terms = [
        (g * v).sum()
        for g, v in zip(first, weights, strict=True)
        if g is not None and g.requires_grad
    ]
    second = grad(sum(terms[1:], terms[0]), leaves, False) if terms else [None] * len(leaves)
    return ys, list(first), list(second)


def assert_equal(ours: Any, theirs: Any, shape: Any) -> None:
    """None is zero."""
    a = np.zeros(shape) if ours is None else ours.numpy()
    b = np.zeros(shape) if theirs is None else theirs.detach().numpy(force=True)
    assert a.shape == b.shape and a.dtype == b.dtype
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_equals_pytorch(call: Call) -> None:
    ours = run(
        call,
        F,
        lambda x, wanted: Tensor(x.copy(), requires_grad=wanted),
        lambda y, xs, create: minidl.grad(y, xs, create_graph=create, allow_unused=True),
    )
    theirs = run(
        call,
        TF,
        lambda x, wanted: torch.tensor(x, requires_grad=wanted),
        lambda y, xs, create: torch.autograd.grad(y, xs, create_graph=create, allow_unused=True),
    )
    orders = (
        zip(ours[:2], theirs[:2], strict=True) if call.kinks else zip(ours, theirs, strict=True)
    )
    for mine, other in orders:
        assert len(mine) == len(other)
        for a, b in zip(mine, other, strict=True):
            shape = next((v.shape for v in (a, b) if v is not None), ())
            assert_equal(a, b, shape)


OURS = {"locked_dropout"}  # PyTorch has no such function


def test_every_function_is_compared() -> None:
    """Or is tested elsewhere: dropout is random, recurrent layers go through torch.nn."""
    elsewhere = {"dropout", "dropout2d", "rnn", "lstm", "gru"}
    assert set(F.__all__) == {call.name for call in CALLS} | elsewhere | OURS


@pytest.mark.parametrize("name", sorted(set(F.__all__) - {"rnn", "lstm", "gru"} - OURS))
def test_names_and_defaults(name: str) -> None:
    """Every parameter is called as PyTorch's, comes in its order, and has its default."""
    try:
        theirs = inspect.signature(getattr(TF, name)).parameters
    except ValueError:
        return  # a builtin of PyTorch, without a signature
    ours = inspect.signature(getattr(F, name)).parameters
    if not {p.name for p in theirs.values()} - {"args", "kwargs"}:
        return  # PyTorch's is a dispatcher
    order = [p for p in theirs if p in ours]
    assert [p for p in ours if p in theirs] == order
    for p in ours:
        assert p in theirs, f"PyTorch's {name} has no {p!r}"
        assert ours[p].default == theirs[p].default or name in ("softplus", "interpolate")


STATES = {"rnn": 1, "lstm": 2, "gru": 1}


@pytest.mark.parametrize("lengths", [None, [5, 2, 4]])
@pytest.mark.parametrize("name", ["rnn", "lstm", "gru"])
def test_recurrent_layers(name: str, lengths: list[int] | None) -> None:
    """Against torch.nn's layers over packed sequences; gradients of both orders."""
    rng = np.random.default_rng(0)
    gates, states = {"rnn": 1, "lstm": 4, "gru": 3}[name] * 2, STATES[name]
    shapes = [(5, 3, 4), *[(3, 2)] * states, (gates, 4), (gates, 2), (gates,), (gates,)]
    arrays = [rng.normal(size=shape) for shape in shapes]

    def theirs(x: Any, *rest: Any) -> Any:
        layer = getattr(torch.nn, name.upper())(4, 2).double()
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        first = tuple(s[None] for s in rest[:states])
        if lengths is not None:
            x = torch.nn.utils.rnn.pack_padded_sequence(
                x, torch.tensor(lengths), enforce_sorted=False
            )
        weights = dict(zip(names, rest[states:], strict=True))
        out, last = torch.func.functional_call(
            layer, weights, (x, first if states == 2 else first[0])
        )
        if lengths is not None:
            out, _ = torch.nn.utils.rnn.pad_packed_sequence(out, total_length=5)
        last = last if states == 2 else (last,)
        return torch.cat([out.flatten(), *(s.flatten() for s in last)])

    def ours(x: Any, *rest: Any) -> Any:
        results = getattr(F, name)(x, *rest, lengths=lengths)
        return minidl.cat([r.flatten() for r in results])

    call = Call("f", tuple(arrays), {})
    mine = run(
        call,
        type("", (), {"f": staticmethod(ours)}),
        lambda x, wanted: Tensor(x.copy(), requires_grad=wanted),
        lambda y, xs, create: minidl.grad(y, xs, create_graph=create, allow_unused=True),
    )
    other = run(
        call,
        type("", (), {"f": staticmethod(theirs)}),
        lambda x, wanted: torch.tensor(x, requires_grad=wanted),
        lambda y, xs, create: torch.autograd.grad(y, xs, create_graph=create, allow_unused=True),
    )
    for a_list, b_list in zip(mine, other, strict=True):
        for a, b in zip(a_list, b_list, strict=True):
            assert_equal(a, b, next((v.shape for v in (a, b) if v is not None), ()))
