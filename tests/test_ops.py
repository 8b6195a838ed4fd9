"""Every op against its formula, its oracle and finite differences: all derived from the registry.

An op needs only its samples and two oracles (tests/oracles) to be tested here, in:
completeness, formula, gradients of first and second order, arrays as Tensors, read-only inputs,
memory layouts, empty inputs, dtypes, kernels, and what the tape keeps and computes.
tests/test_harness.py shows that these tests can fail.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import hypothesis.extra.numpy as nps
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minidl import autograd
from minidl.op import OUT, use
from minidl.tensor import Tensor
from tests import oracles
from tests import registry as reg
from tests.registry import (
    Case,
    every_case,
    every_case_with_floats,
    every_differentiable_case,
    every_op,
)

# Bounds, in units of max |expected|. The samples are small, so rounding stays at a few hundred ulp
# at most; a factor of 1.001 is far outside (see test_harness).
EXACT = 1e-12  # float64, the same numbers added in another order
OF_KERNELS = {
    "float64": EXACT, "float32": 64 * 2.0**-23, "float16": 4 * 2.0**-10, "bfloat16": 4 * 2.0**-7,
}  # fmt: skip


@every_op
def test_is_complete(function: Any) -> None:
    assert reg.missing(function) == []


def test_oracles_name_ops() -> None:
    assert set(oracles.LOOPS) | set(oracles.PYTORCH) <= set(reg.OPS)


@every_case
def test_formula(case: Case) -> None:
    expected = oracles.LOOPS[case.op.name](*case.inputs, **case.settings)
    actual = case.op.formula(*case.inputs, **case.kwargs)
    reg.assert_close(actual, expected, EXACT)


@every_differentiable_case
@pytest.mark.parametrize("order", [1, 2])
def test_gradient(case: Case, order: int) -> None:
    autograd.gradcheck(lambda *xs: case.function(*xs, **case.kwargs), reg.leaves(case), order=order)


@every_case
def test_arrays_are_tensors(case: Case) -> None:
    """Bare arrays, Tensors, and both together: the same bits; so also the gradient rule."""
    plain = case.function(*case.inputs, **case.kwargs)
    assert not isinstance(plain, Tensor)
    expected = reg.outcome(case)
    reg.assert_same_bits([plain], expected[:1])
    for i in case.floats:
        xs = list(case.inputs)
        xs[i] = Tensor(xs[i])
        y = case.function(*xs, **case.kwargs)
        assert isinstance(y, Tensor)
        reg.assert_same_bits([y.array], expected[:1])
    with reg.replaced(case.op, gradient_kernels=[]):  # the rule, not a kernel in its place
        expected = reg.outcome(case)
    reg.assert_same_bits(reg.outcome(case, create_graph=True), expected)


@every_case
def test_read_only(case: Case) -> None:
    """Inputs and g are not written to."""
    expected = reg.outcome(case)
    frozen = case.map(reg.read_only)
    reg.assert_same_bits(reg.outcome(frozen, change_g=reg.read_only), expected)

    kept = case.map(np.copy)
    reg.outcome(kept)
    for x, before in zip(kept.inputs, case.inputs, strict=True):
        if isinstance(x, np.ndarray):
            np.testing.assert_array_equal(x, before)


@every_case
def test_layout(case: Case) -> None:
    """How an array lies in memory is no matter."""
    expected = reg.outcome(case)
    for layout in reg.LAYOUTS:
        reg.assert_all_close(reg.outcome(case.map(layout), change_g=layout), expected, EXACT)


@every_differentiable_case
def test_broadcast_g(case: Case) -> None:
    """A gradient of stride 0, as the gradient of a sum is."""

    def stride_0(g: np.ndarray) -> np.ndarray:
        return np.broadcast_to(np.asarray(0.5, g.dtype), g.shape)

    actual = reg.outcome(case, change_g=stride_0)
    expected = reg.outcome(case, change_g=lambda g: stride_0(g).copy())
    reg.assert_all_close(actual, expected, EXACT)


@every_case
def test_empty(case: Case) -> None:
    """An input dimension of 0: the right shapes or a clear error."""
    first = case.inputs[case.floats[0]] if case.floats else np.zeros(())
    for axis, length in enumerate(first.shape):
        sharing = [
            i
            for i, x in enumerate(case.inputs)
            if isinstance(x, np.ndarray) and x.ndim > axis and x.shape[axis] == length
        ]
        check_empty(case, axis, sharing)
        check_empty(case, axis, case.floats[:1])


def check_empty(case: Case, axis: int, which: list[int]) -> bool:
    """Give some inputs length 0 along an axis; False if that length is not free to change.

    The shapes expected are read off the lengths 2 to 5: a line through them ends at 0.
    """

    def of_length(n: int) -> list[Any]:
        inputs = list(case.inputs)
        for i in which:
            inputs[i] = reg.with_length(inputs[i], axis, n)
        return reg.outcome(case._replace(inputs=tuple(inputs)))

    try:
        others = [of_length(n) for n in (2, 3, 4, 5)]
    except Exception:
        return False  # a weight's length, or a setting's
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the mean of nothing
            empty = of_length(0)
    except (ValueError, IndexError, RuntimeError) as error:
        assert str(error)
        return True
    for a, *bs in zip(empty, *others, strict=True):
        if a is not None:
            two, *steps = np.diff([b.shape for b in bs], axis=0, prepend=0)
            assert a.ndim == len(two)
            if not np.ptp(steps, axis=0).any():  # else there is no line: windows with a stride
                assert a.shape == tuple(np.maximum(two - 2 * steps[0], 0))
    return True


@every_case_with_floats
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dtype(case: Case, dtype: str) -> None:
    """float32 in, float32 out, and float32 gradients; float16 likewise."""
    expected = reg.outcome(case)
    actual = reg.outcome(case.cast(dtype))
    settings = {k: np.float64(v) if isinstance(v, float) else v for k, v in case.kwargs.items()}
    again = reg.outcome(case.cast(dtype)._replace(kwargs=settings))
    for a, b, c in zip(actual, expected, again, strict=True):
        if a is not None and b.dtype == np.float64 and "dtype" not in case.kwargs:
            assert a.dtype == c.dtype == dtype
    if dtype == "float32":
        reg.assert_all_close(actual, expected, 1e-4)
    if len(case.floats) > 1 and case.function.__module__ == "minidl.ops.elementwise":
        for i in case.floats:
            for scalar in (float, np.float64):
                check_scalar(case.cast(dtype), i, scalar)


def check_scalar(case: Case, i: int, scalar: Any) -> None:
    """A scalar for an input, where the op takes one, does not change the dtype either."""
    inputs = list(case.inputs)
    inputs[i] = np.asarray(inputs[i]).flat[0] if inputs[i].size else 1.0
    try:
        expected = np.asarray(case.op.formula(*inputs, **case.kwargs))
    except Exception:
        return
    inputs[i] = scalar(inputs[i])
    actual = reg.outcome(case._replace(inputs=tuple(inputs)))
    if len(actual) > 1:
        assert {a.dtype for a in actual if a is not None} == {expected.dtype}


ELEMENTWISE = {  # of several inputs that broadcast together
    name: case
    for name, case in reg.CASES.items()
    if case.function.__module__ == "minidl.ops.elementwise"
    and name.endswith("-0")
    and len(case.floats) > 1
}


@reg.parametrize("case", ELEMENTWISE)
@given(data=st.data())
def test_broadcasting(case: Case, data: st.DataObject) -> None:
    """For any shapes: the same as with inputs expanded first and their gradients summed after."""
    count = len(case.inputs)
    shapes = data.draw(nps.mutually_broadcastable_shapes(num_shapes=count, min_side=0, max_side=3))
    rng = np.random.default_rng(0)
    inputs = [
        np.asarray(rng.uniform(0.5, 2.0, shape) if reg.is_float(x) else rng.random(shape) < 0.5)
        for x, shape in zip(case.inputs, shapes.input_shapes, strict=True)
    ]
    case = case._replace(inputs=tuple(inputs))
    expanded = case.map(lambda x: np.broadcast_to(x, shapes.result_shape).copy())
    actual, expected = reg.outcome(case), reg.outcome(expanded)
    for k, i in enumerate(case.floats, 1):
        if expected[k] is not None:
            ones = (1,) * (expanded.inputs[i].ndim - inputs[i].ndim) + inputs[i].shape
            axes = [a for a, n in enumerate(ones) if n == 1]
            expected[k] = expected[k].sum(axis=tuple(axes), keepdims=True).reshape(inputs[i].shape)
    reg.assert_all_close(actual, expected, EXACT)


@every_case
def test_kernels(case: Case) -> None:
    """Every kernel that runs here gives what the formula gives in float64, in any memory layout."""
    for kernel, dtype in reg.kernels(case.op):
        kwargs = case.settings
        call = case.cast(dtype)
        expected = case.op.formula(*call.cast("float64").inputs, **kwargs)
        for layout in (np.copy, reg.read_only, *reg.LAYOUTS):
            actual = np.asarray(kernel.function(*call.map(layout).inputs, **kwargs))
            if actual.dtype.kind in "fV":
                assert actual.dtype == dtype
            reg.assert_close(actual, expected, OF_KERNELS.get(dtype, EXACT))


@every_differentiable_case
def test_gradient_kernels(case: Case) -> None:
    """Every gradient kernel gives what the rule gives in float64, in any memory layout."""
    for kernel, dtype in reg.gradient_kernels(case.op):
        call = case.cast(dtype)
        expected = reg.gradients(case.op.rule, call.cast("float64"))
        for layout in (np.copy, reg.read_only, *reg.LAYOUTS):
            actual = reg.gradients(kernel.function, call.map(layout), layout)
            assert all(a is None or a.dtype == dtype for a in actual)
            reg.assert_all_close(actual, expected, OF_KERNELS[dtype])


@every_op
def test_use(function: Any) -> None:
    """`minidl.use` swaps the implementation, and says why where it cannot."""
    op = function.op
    for kernel in op.kernels:
        if kernel.missing:
            with pytest.raises(ValueError, match="cannot run here"):
                use(op.name, kernel.name)
            continue
        dtype = (kernel.dtypes or ("float32",))[0]
        before = op.select(kernel.device, dtype)
        with use(op.name, kernel.name):
            assert op.select(kernel.device, dtype)[1] is kernel.function
            gradients = {k.function for k in op.gradient_kernels if k.name == kernel.name}
            if gradients and kernel.device == "cpu":
                assert op.array_rule(np.zeros(1, dtype)) in gradients
        with use(op.name, "formula"):
            assert op.select(kernel.device, dtype)[1] is op.formula
            if kernel.device == "cpu":
                assert op.array_rule(np.zeros(1, dtype)) is op.rule
        assert op.select(kernel.device, dtype) == before


@every_differentiable_case
def test_tape_keeps_what_the_rule_names(case: Case) -> None:
    inputs = [  # not leaves, which the tape holds: they get its gradients
        autograd_copy(x) if isinstance(x, np.ndarray) else x for x in case.inputs
    ]
    y = case.function(*inputs, **case.kwargs)
    named = case.op.sources
    kept = range(len(inputs)) if named is None else [i for i in named if i is not None]
    arrays = {i: x.array for i, x in enumerate(inputs) if isinstance(x, Tensor)} | {OUT: y.array}
    held = [arrays[i] for i in kept if i in arrays]
    free = [  # an array may live on because a kept one is a view of it
        weakref.ref(a)
        for i, a in arrays.items()
        if i not in kept and not any(np.shares_memory(a, h) for h in held)
    ]
    node = y.node
    del y, inputs, arrays, held
    assert node.saved is not None
    assert all(array() is None for array in free)


def autograd_copy(x: np.ndarray) -> Tensor:
    """An array as the result of an op on the tape, if it can be one."""
    if x.dtype.kind != "f":
        return Tensor(x.copy())
    return reg.OPS["add"](Tensor(x, requires_grad=True), 0.0)


@every_differentiable_case
def test_gradients_share_no_memory(case: Case) -> None:
    """Writing to one gradient (clipping, say) changes nothing else."""
    xs = reg.leaves(case)
    y = case.function(*xs, **case.kwargs)
    g = reg.cotangent(y)
    y.backward(Tensor(g))
    gradients = [x.grad.array for x in xs if isinstance(x, Tensor) and x.grad is not None]
    others = [g, y.array, *(x.array for x in xs if isinstance(x, Tensor))]
    for i, a in enumerate(gradients):
        assert a.flags.writeable
        assert not any(np.shares_memory(a, b) for b in gradients[:i] + others)


@every_differentiable_case
def test_rule_returns_no_saved_array(case: Case) -> None:
    """Neither an input, nor the output, nor one array twice; only g may come back as it is."""
    xs = reg.leaves(case)
    y = case.function(*xs, **case.kwargs)
    g = reg.cotangent(y)
    entries = case.op.rule(g, *y.node.saved, **y.node.kwargs)  # type: ignore[misc]
    assert len(entries) == len(case.inputs)
    entries = [entries[i]() if callable(entries[i]) else entries[i] for i in case.floats]
    fresh = [e for e in entries if e is not None and not np.shares_memory(e, g)]
    saved = [y.array, *(x.array for x in xs if isinstance(x, Tensor))]
    for i, entry in enumerate(fresh):
        assert not any(np.shares_memory(entry, b) for b in fresh[:i] + saved)


@every_differentiable_case
def test_unwanted_gradients_are_not_computed(case: Case) -> None:
    """The thunk of an input that requires no gradient is not called."""
    rule, called = case.op.rule, set()

    def watched(*args: Any, **kwargs: Any) -> list[Any]:
        def watch(i: int, entry: Any) -> Any:
            return (lambda: called.add(i) or entry()) if callable(entry) else entry

        return [watch(i, entry) for i, entry in enumerate(rule(*args, **kwargs))]  # type: ignore

    for i in case.floats:
        called.clear()
        xs = reg.leaves(case, wanted=[i])
        with reg.replaced(case.op, rule=rule and watched, gradient_kernels=[]):
            y = case.function(*xs, **case.kwargs)
            if y.requires_grad:
                y.backward(Tensor(reg.cotangent(y)))
        assert called <= {i}
