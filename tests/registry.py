"""What the tests derive from the op registry: every op, every sample, and what a call does."""

from __future__ import annotations

import importlib
import pkgutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest

import minidl.distributed
import minidl.ops
from minidl import autograd
from minidl.op import Kernel, Op, OpFunction, Sample, registry
from minidl.tensor import Tensor
from tests import oracles

for package in (minidl.ops, oracles):
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")

OPS: dict[str, OpFunction] = dict(sorted(registry.items()))


class Case(NamedTuple):
    """One sample call of one op."""

    function: OpFunction
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def op(self) -> Op:
        return self.function.op

    @property
    def settings(self) -> dict[str, Any]:
        """All of them, with the defaults."""
        return self.op.defaults | self.kwargs

    @property
    def floats(self) -> list[int]:
        """Positions of the inputs that can be differentiated."""
        return [i for i, x in enumerate(self.inputs) if is_float(x)]

    def map(self, change: Any) -> Case:
        """The same call with every array input changed by a function."""
        inputs = tuple(change(x) if isinstance(x, np.ndarray) else x for x in self.inputs)
        return self._replace(inputs=inputs)

    def cast(self, dtype: str) -> Case:
        """The same call with its floating inputs in another dtype."""
        return self.map(lambda x: x.astype(dtype) if is_float(x) else x)


def is_float(x: Any) -> bool:
    return isinstance(x, np.ndarray) and x.dtype.kind in "fV"


def samples(function: OpFunction) -> list[Sample]:
    """An op's samples, the same in every run."""
    op = function.op
    rng = np.random.default_rng(zlib.crc32(op.name.encode()))
    return list(op.draw_samples(rng)) if op.draw_samples else []


def cases() -> dict[str, Case]:
    """Every op with every sample of it, by name."""
    found = {}
    for name, function in OPS.items():
        try:
            drawn = samples(function)
        except Exception:
            continue  # test_is_complete draws them again, and fails
        found |= {f"{name}-{i}": Case(function, *sample) for i, sample in enumerate(drawn)}
    return found


CASES = cases()
DIFFERENTIABLE = {k: case for k, case in CASES.items() if case.op.rule and case.floats}


def parametrize(name: str, values: dict[str, Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(name, list(values.values()), ids=list(values))


every_op = parametrize("function", OPS)
every_case = parametrize("case", CASES)
every_case_with_floats = parametrize("case", {k: c for k, c in CASES.items() if c.floats})
every_differentiable_case = parametrize("case", DIFFERENTIABLE)


def kernels(op: Op, of: str = "kernels") -> list[tuple[Kernel, str]]:
    """The kernels that can run here, with each dtype that they take."""
    return [
        (kernel, dtype)
        for kernel in getattr(op, of)
        if kernel.device == "cpu" and not kernel.missing
        for dtype in kernel.dtypes or ("float32", "float64")
    ]


def gradient_kernels(op: Op) -> list[tuple[Kernel, str]]:
    """The same of the kernels for the gradient."""
    return kernels(op, "gradient_kernels")


def gradients(rule: Any, case: Case, layout: Any = np.copy) -> list[Any]:
    """What a gradient rule, or a kernel in its place, gives for each floating input of a call."""
    y = case.function(*leaves(case), **case.kwargs)
    entries = rule(layout(cotangent(y)), *y.node.saved, **y.node.kwargs)  # type: ignore[union-attr]
    found = [entries[i]() if callable(entries[i]) else entries[i] for i in case.floats]
    shapes = [case.inputs[i].shape for i in case.floats]
    return [
        None if a is None else a if a.shape == s else autograd.unbroadcast(a, s)
        for a, s in zip(found, shapes, strict=True)
    ]


def missing(function: OpFunction) -> list[str]:
    """What an op lacks before it can be tested; an empty list for every op of minidl."""
    op = function.op
    absent = []
    if not samples(function):
        absent.append("samples: @op.samples in its file")
    if op.name not in oracles.LOOPS:
        absent.append(f'a plain-loop oracle: @loops("{op.name}") in tests/oracles')
    if op.name not in oracles.PYTORCH:
        absent.append(f'a PyTorch oracle: @pytorch("{op.name}") in tests/oracles')
    if op.rule is None and not op.constant:
        absent.append("a gradient rule: @op.gradient, or @op(constant=True)")
    if op.rule is not None and not any(is_float(x) for s in samples(function) for x in s.inputs):
        absent.append("a sample with a float64 input: its gradient rule is never tried")
    return absent


# Calls ------------------------------------------------------------------------------------


def leaves(case: Case, wanted: list[int] | None = None) -> list[Any]:
    """The inputs as Tensors; the wanted ones (default: all floating ones) require gradients."""
    wanted = case.floats if wanted is None else wanted
    return [
        Tensor(x, requires_grad=i in wanted) if isinstance(x, np.ndarray) else x
        for i, x in enumerate(case.inputs)
    ]


def cotangent(y: Tensor) -> np.ndarray:
    """A gradient for an output: random, the same for the same shape."""
    return np.asarray(np.random.default_rng(1).standard_normal(y.shape)).astype(y.dtype)


def outcome(case: Case, create_graph: bool = False, change_g: Any = None) -> list[Any]:
    """The output of a call, and the gradient of each floating input (None: it has none)."""
    xs = leaves(case)
    y = case.function(*xs, **case.kwargs)
    assert isinstance(y, Tensor), f"{case.op.name} of Tensors gave a {type(y).__name__}"
    if not y.requires_grad:
        return [y.array] + [None] * len(case.floats)
    g = cotangent(y)
    g = g if change_g is None else change_g(g)
    inputs = [xs[i] for i in case.floats]
    gs = autograd.grad(y, inputs, Tensor(g), create_graph=create_graph, allow_unused=True)
    return [y.array, *(None if g is None else g.array for g in gs)]


def assert_close(actual: Any, expected: Any, bound: float) -> None:
    """|actual - expected| <= bound * max |expected|, same shape, same NaN; integers are equal."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    if expected.dtype.kind != "f":
        assert actual.dtype.kind != "f"
        np.testing.assert_array_equal(actual, expected)
        return
    expected = expected.astype(np.float64)
    largest = np.abs(expected[np.isfinite(expected)]).max(initial=0)
    np.testing.assert_allclose(actual.astype(np.float64), expected, rtol=0, atol=bound * largest)


def assert_all_close(actual: list[Any], expected: list[Any], bound: float) -> None:
    """`assert_close` for two outcomes."""
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, bound)


def assert_same_bits(actual: list[Any], expected: list[Any]) -> None:
    """Two outcomes are the same to the bit."""
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            a, b = np.asarray(a), np.asarray(b)
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


# The same values, other memory -------------------------------------------------------------


def read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


def transposed(x: np.ndarray) -> np.ndarray:
    return x.T.copy(order="C").T


def strided(x: np.ndarray) -> np.ndarray:
    """Every second element of a larger array, with NaN in between."""
    larger = np.full([2 * n for n in x.shape], np.nan if x.dtype.kind == "f" else 0, x.dtype)
    view = larger[..., *(slice(None, None, 2),) * x.ndim]
    view[...] = x
    return view


def backwards(x: np.ndarray) -> np.ndarray:
    """Negative strides."""
    flip = (..., *(slice(None, None, -1),) * x.ndim)
    return x[flip].copy()[flip]


def unaligned(x: np.ndarray) -> np.ndarray:
    """At an odd address, as in a file mapped into memory."""
    shifted = np.empty(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    shifted[...] = x
    return shifted


LAYOUTS = (transposed, strided, backwards, unaligned)


def with_length(x: np.ndarray, axis: int, n: int) -> np.ndarray:
    """The array with another length along an axis, its elements repeated where needed."""
    return np.take(x, np.arange(n) % max(x.shape[axis], 1), axis)


# Mutations ---------------------------------------------------------------------------------


@contextmanager
def replaced(op: Op, **fields: Any) -> Iterator[None]:
    """Other attributes for an op, inside a ``with`` block."""
    before = {name: getattr(op, name) for name in fields}
    try:
        for name, value in fields.items():
            setattr(op, name, value)
        op.table.clear()
        yield
    finally:
        for name, value in before.items():
            setattr(op, name, value)
        op.table.clear()


def scaled(rule: Any, i: int, factor: float) -> Any:
    """A gradient rule whose i-th entry is multiplied by a factor."""

    def wrong(*args: Any, **kwargs: Any) -> list[Any]:
        entries = list(rule(*args, **kwargs))
        if i >= len(entries):  # of another number of inputs
            return entries
        right = entries[i]
        if callable(right):
            entries[i] = lambda: right() * factor
        elif right is not None:
            entries[i] = right * factor
        return entries

    return wrong


def forgetful(rule: Any, i: int) -> Any:
    """A gradient rule that, when it is itself differentiated, takes one argument as a constant."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        arguments = list(args)
        if isinstance(arguments[i], Tensor):
            arguments[i] = arguments[i].detach()
        elif isinstance(arguments[i], list):
            arguments[i] = [a.detach() if isinstance(a, Tensor) else a for a in arguments[i]]
        return rule(*arguments, **kwargs)

    return wrong
