"""Tests of the tests: whatever tests/test_ops.py looks for is done wrong here, and must be caught.

Every mutation is derived too: for every sample of every op, each gradient is scaled by 1.001 or
replaced by zero, each argument of each gradient rule is taken as a constant in the second
derivative, and each kernel is scaled by 1.001 (of 16 bits: by a little more than their rounding).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from minidl import autograd
from minidl.op import op, registry, sample
from minidl.tensor import Tensor, bfloat16
from tests import oracles, test_ops
from tests import registry as reg
from tests.registry import Case, every_differentiable_case

FACTORS = {"float16": np.float16(1.02), "bfloat16": bfloat16.type(1.1)}  # instead of 1.001


@contextmanager
def fails(what: str) -> Iterator[None]:
    """The block must fail as a test fails."""
    try:
        yield
    except (AssertionError, RuntimeError):
        return
    raise AssertionError(f"not noticed: {what}")


def second_order(case: Case) -> list[Any]:
    """Gradients of a random projection of the gradients, with respect to g and to the inputs."""
    xs = reg.leaves(case)
    y = case.function(*xs, **case.kwargs)
    g = Tensor(reg.cotangent(y), requires_grad=True)
    inputs = [xs[i] for i in case.floats]
    first = autograd.grad(y, inputs, g, create_graph=True, allow_unused=True)
    first = [gx for gx in first if gx is not None and gx.requires_grad]
    weights = [Tensor(reg.cotangent(gx)) for gx in first]
    found = autograd.grad(first, [g, *inputs], weights, allow_unused=True)
    return [np.zeros(x.shape) if a is None else a.array for a, x in zip(found, [g, *inputs])]


@every_differentiable_case
def test_a_wrong_gradient_is_caught(case: Case) -> None:
    for i, g in zip(case.floats, reg.outcome(case)[1:], strict=True):
        if g is None or not np.any(g):
            continue
        for factor in (1.001, 0.0):
            wrong = reg.scaled(case.op.rule, i, factor)
            said = f"{case.op.name}: the gradient of input {i} times {factor}"
            with reg.replaced(case.op, rule=wrong, gradient_kernels=[]), fails(said):
                test_ops.test_gradient(case, 1)


@every_differentiable_case
def test_a_wrong_second_derivative_is_caught(case: Case) -> None:
    """A rule that treats what it was given (a statistic, say) as a constant is right only once."""
    right = second_order(case)
    largest = max(np.abs(a).max(initial=0) for a in right)
    outcome = reg.outcome(case)
    y = case.function(*reg.leaves(case), **case.kwargs)
    for i in range(1 + len(y.node.saved)):
        with reg.replaced(case.op, rule=reg.forgetful(case.op.rule, i)):
            reg.assert_same_bits(reg.outcome(case), outcome)
            wrong = second_order(case)
            if max(np.abs(a - b).max(initial=0) for a, b in zip(right, wrong)) > 1e-3 * largest:
                with fails(f"{case.op.name}: argument {i} of the rule as a constant"):
                    test_ops.test_gradient(case, 2)


@pytest.mark.parametrize("name", [name for name, f in reg.OPS.items() if f.op.kernels])
def test_a_wrong_kernel_is_caught(name: str) -> None:
    this = reg.OPS[name].op
    for kernel in this.kernels:
        if kernel.missing or kernel.device != "cpu":
            continue
        for dtype in kernel.dtypes or ("float32", "float64"):
            factor = FACTORS.get(dtype, 1.001)
            wrong = replace(
                kernel, function=lambda *x, k=kernel, f=factor, **s: k.function(*x, **s) * f
            )
            caught = 0
            with reg.replaced(this, kernels=[replace(wrong, dtypes=(dtype,))]):
                for case in reg.CASES.values():
                    if case.op is this:
                        try:
                            test_ops.test_kernels(case)
                        except AssertionError:
                            caught += 1
            assert caught, f"{name}: kernel {kernel.name!r} times {factor}"


@pytest.mark.parametrize("name", [name for name, f in reg.OPS.items() if f.op.gradient_kernels])
def test_a_wrong_gradient_kernel_is_caught(name: str) -> None:
    """For each kernel and each input, some sample tells the gradient times 1.001 from the right."""
    this = reg.OPS[name].op
    cases = [case for case in reg.DIFFERENTIABLE.values() if case.op is this]
    for kernel, dtype in reg.gradient_kernels(this):
        factor = FACTORS.get(dtype, 1.001)
        for i in set().union(*(case.floats for case in cases)):
            wrong = replace(
                kernel, function=reg.scaled(kernel.function, i, factor), dtypes=(dtype,)
            )
            with reg.replaced(this, gradient_kernels=[wrong]):
                caught = 0
                for case in cases:
                    try:
                        test_ops.test_gradient_kernels(case)
                    except AssertionError:
                        caught += 1
            assert caught, f"{name}: input {i} of gradient kernel {kernel.name!r} times {factor}"


def test_empty_inputs_are_tried() -> None:
    """The length of a batch is free to change in nearly every op."""
    tried = {
        case.op.name
        for case in reg.DIFFERENTIABLE.values()
        if case.inputs[case.floats[0]].ndim and test_ops.check_empty(case, 0, case.floats[:1])
    }
    assert {"relu", "conv2d", "linear", "mean", "softmax", "standardize", "rnn"} <= tried
    assert len(tried) > len({case.op.name for case in reg.DIFFERENTIABLE.values()}) / 2


def test_every_gradient_is_tried() -> None:
    """For each op, some sample has a gradient that is not zero."""
    tried = {
        case.op.name
        for case in reg.DIFFERENTIABLE.values()
        if any(g is not None and np.any(g) for g in reg.outcome(case)[1:])
    }
    assert {name for name, f in reg.OPS.items() if f.op.rule} - tried == set()


@pytest.mark.parametrize("name", ["add", "mul", "where"])
def test_a_wrong_unbroadcast_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = autograd.unbroadcast
    monkeypatch.setattr(autograd, "unbroadcast", lambda g, shape: right(g, shape) * 1.001)
    with fails("broadcasting undone with sums times 1.001"):
        test_ops.test_broadcasting(reg.CASES[f"{name}-0"])


# Ops made wrong on purpose ------------------------------------------------------------------


@pytest.fixture
def scratch() -> Iterator[None]:
    """Ops defined in the test are forgotten after it."""
    before = dict(registry)
    yield
    for name in set(registry) - set(before):
        del registry[name]


def case_of(function: Any) -> Case:
    return Case(function, *reg.samples(function)[0])


@pytest.mark.usefixtures("scratch")
class TestBadOps:
    def test_without_samples(self) -> None:
        @op
        def nothing(x):
            return x

        assert len(reg.missing(nothing)) == 4
        with fails("an op without samples, oracles and rule"):
            test_ops.test_is_complete(nothing)

    def test_gradient_never_tried(self) -> None:
        @op
        def round_trip(x):
            return x

        @round_trip.gradient
        def _(g):
            return (g,)

        @round_trip.samples
        def _(rng):
            yield sample(np.arange(3))

        assert any("float64" in lack for lack in reg.missing(round_trip))

    def test_statistic_as_a_constant(self) -> None:
        """DeZero's batch norm: the first order is right, the second silently wrong."""

        @op
        def whiten(x):
            return (x - x.mean()) / x.std()

        @whiten.gradient
        def _(g, x):
            values = x.array if isinstance(x, Tensor) else x
            mean, std = float(values.mean()), float(values.std())
            h = (x - mean) * (1 / std)
            return ((g - g.mean() - h * (g * h).mean()) * (1 / std),)

        @whiten.samples
        def _(rng):
            yield sample(rng.normal(size=(4, 5)))

        test_ops.test_gradient(case_of(whiten), 1)
        with fails("a statistic taken as a constant"):
            test_ops.test_gradient(case_of(whiten), 2)

    def test_wrong_formula(self, monkeypatch: pytest.MonkeyPatch) -> None:
        @op(constant=True)
        def twice(x):
            return 2.0000001 * x

        @twice.samples
        def _(rng):
            yield sample(rng.normal(size=3))

        monkeypatch.setitem(oracles.LOOPS, "twice", lambda x: np.array([2 * v for v in x]))
        with fails("a wrong formula"):
            test_ops.test_formula(case_of(twice))

    def test_writes_to_its_input(self) -> None:
        @op(constant=True)
        def sneaky(x):
            x *= 2
            return x.copy()

        @sneaky.samples
        def _(rng):
            yield sample(rng.normal(size=3))

        with pytest.raises((AssertionError, ValueError)):
            test_ops.test_read_only(case_of(sneaky))

    def test_reads_memory_in_the_wrong_order(self) -> None:
        @op(constant=True)
        def flat(x):
            return x.ravel(order="K").copy()

        @flat.samples
        def _(rng):
            yield sample(rng.normal(size=(2, 3)))

        with fails("an op that depends on the memory layout"):
            test_ops.test_layout(case_of(flat))

    def test_empty_shape(self) -> None:
        @op(constant=True)
        def at_least_one(x):
            return np.zeros((max(len(x), 1), 2))

        @at_least_one.samples
        def _(rng):
            yield sample(rng.normal(size=(4, 2)))

        with fails("a wrong shape for an empty batch"):
            test_ops.test_empty(case_of(at_least_one))

    def test_becomes_float64(self) -> None:
        @op
        def promote(x, y):
            return x * np.float64(2.0) + y

        @promote.samples
        def _(rng):
            yield sample(rng.normal(size=3), rng.normal(size=3))

        with fails("float32 in, float64 out"):
            test_ops.test_dtype(case_of(promote), "float32")

    def test_rule_differs_on_tensors(self) -> None:
        @op
        def triple(x):
            return x * 3.0

        @triple.gradient
        def _(g):
            return (g * (3.0 + 1e-15 * isinstance(g, Tensor)),)

        @triple.samples
        def _(rng):
            yield sample(rng.normal(size=3))

        with fails("a rule that knows whether it is recorded"):
            test_ops.test_arrays_are_tensors(case_of(triple))

    def test_one_array_for_two_gradients(self) -> None:
        @op
        def double_sum(x, y):
            return 2.0 * (x + y)

        @double_sum.gradient
        def _(g):
            h = 2.0 * g
            return h, h

        @double_sum.samples
        def _(rng):
            yield sample(rng.normal(size=3), rng.normal(size=3))

        with fails("one array for two gradients"):
            test_ops.test_rule_returns_no_saved_array(case_of(double_sum))
        with fails("one array for two gradients"):
            test_ops.test_gradients_share_no_memory(case_of(double_sum))

    def test_saved_array_as_gradient(self) -> None:
        @op
        def square_half(x):
            return x * x * 0.5

        @square_half.gradient
        def _(g, x):
            return (x,)

        @square_half.samples
        def _(rng):
            yield sample(rng.normal(size=3))

        with fails("a rule that returns its input"):
            test_ops.test_rule_returns_no_saved_array(case_of(square_half))

    def test_tape_keeps_too_much(self) -> None:
        hoard = []

        @op
        def hoarder(x):
            hoard.append(x)
            return x * 2.0

        @hoarder.gradient
        def _(g):
            return (g * 2.0,)

        @hoarder.samples
        def _(rng):
            yield sample(rng.normal(size=3))

        with fails("an input that stays alive"):
            test_ops.test_tape_keeps_what_the_rule_names(case_of(hoarder))


def test_gradcheck_says_what_is_wrong() -> None:
    x = Tensor(np.ones(3), requires_grad=True)
    assert autograd.gradcheck(lambda x: reg.OPS["mul"](x, x), x, order=3)
    with pytest.raises(TypeError, match="float64"):
        autograd.gradcheck(lambda x: x, Tensor(np.ones(3, np.float32), requires_grad=True))
    with pytest.raises(ValueError, match="requires a gradient"):
        autograd.gradcheck(lambda x: x, Tensor(np.ones(3)))

    def detached(x: Tensor) -> Tensor:
        return reg.OPS["mul"](x, x.detach())

    assert not autograd.gradcheck(detached, x, raise_exception=False)
    with pytest.raises(RuntimeError, match=r"inputs\[0\]"):
        autograd.gradcheck(detached, x)
