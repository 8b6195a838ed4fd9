"""Every sample of every op against PyTorch, in float64: the value, first and second derivatives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from minidl import autograd
from minidl.tensor import Tensor
from tests import oracles
from tests import registry as reg
from tests.registry import Case, every_case, every_differentiable_case

pytestmark = pytest.mark.torch

BOUND = 1e-10


def torch_leaves(case: Case) -> list[Any]:
    return [
        torch.tensor(x, requires_grad=i in case.floats) if isinstance(x, np.ndarray) else x
        for i, x in enumerate(case.inputs)
    ]


def torch_call(case: Case, xs: list[Any]) -> torch.Tensor:
    return oracles.PYTORCH[case.op.name](*xs, **case.settings)


def derivatives(y: Any, xs: list[Any], lift: Any, grad: Any) -> list[list[Any]]:
    """In minidl or PyTorch: gradients of <g, y>, then of <weights, those gradients> and g's.

    `lift` makes a leaf of an array; `grad` takes outputs, inputs, weights and create_graph.
    """
    g = lift(np.random.default_rng(1).standard_normal(tuple(y.shape)))
    first = grad([y], xs, [g], True)
    rng = np.random.default_rng(2)
    weights = [lift(rng.standard_normal(tuple(x.shape))) for x in xs]
    smooth = [i for i, gx in enumerate(first) if gx is not None and gx.requires_grad]
    if not smooth or 0 in y.shape:
        return [first, [None] * (1 + len(xs))]
    second = grad([first[i] for i in smooth], [g, *xs], [weights[i] for i in smooth], False)
    return [first, second]


def ours(case: Case) -> list[list[Any]]:
    xs = reg.leaves(case)
    y = case.function(*xs, **case.kwargs)
    found = derivatives(
        y,
        [xs[i] for i in case.floats],
        lambda a: Tensor(np.asarray(a), requires_grad=True),
        lambda ys, xs, gs, create: autograd.grad(
            ys, xs, gs, create_graph=create, allow_unused=True
        ),
    )
    return [[None if a is None else a.array for a in part] for part in found]


def theirs(case: Case) -> list[list[Any]]:
    xs = torch_leaves(case)
    y = torch_call(case, xs)
    found = derivatives(
        y,
        [xs[i] for i in case.floats],
        lambda a: torch.tensor(a, requires_grad=True),
        lambda ys, xs, gs, create: torch.autograd.grad(
            ys, xs, gs, create_graph=create, allow_unused=True
        ),
    )
    return [[None if a is None else a.numpy(force=True) for a in part] for part in found]


@every_case
def test_value(case: Case) -> None:
    expected = torch_call(case, torch_leaves(case)).detach().numpy()
    actual = case.op.formula(*case.inputs, **case.kwargs)
    reg.assert_close(actual, expected, BOUND)


@every_differentiable_case
def test_derivatives(case: Case) -> None:
    shapes = [[case.inputs[i].shape for i in case.floats]]
    shapes.append([np.shape(case.op.formula(*case.inputs, **case.kwargs)), *shapes[0]])
    for order in (0, 1):
        parts = zip(ours(case)[order], theirs(case)[order], shapes[order], strict=True)
        for actual, expected, shape in parts:  # None and zeros mean the same
            actual = np.zeros(shape) if actual is None else actual
            expected = np.zeros(shape) if expected is None else expected
            largest = np.abs(expected).max(initial=0)
            np.testing.assert_allclose(actual, expected, rtol=0, atol=BOUND * (1 + largest))
