"""The gradient where there is no derivative: minidl against the table in tests/kinks.py.

tests/oracle/test_kinks_torch.py holds the same table against PyTorch.
"""

from __future__ import annotations

import numpy as np
import pytest

import minidl
from tests.kinks import KINKS, Kink

every_kink = pytest.mark.parametrize("kink", KINKS, ids=[kink.name for kink in KINKS])


@every_kink
def test_kink(kink: Kink) -> None:
    with np.errstate(all="ignore"):
        xs = [minidl.tensor(np.array(x), requires_grad=True) for x in kink.points]
        y = kink.function(minidl, *xs)
        y.backward(minidl.tensor(np.ones(y.shape)))
    for x, expected in zip(xs, kink.gradients, strict=True):
        found = np.zeros(x.shape) if x.grad is None else x.grad.numpy()
        np.testing.assert_allclose(found, np.array(expected, float), rtol=1e-12)


@every_kink
def test_kink_in_float32(kink: Kink) -> None:
    """The same in the precision that networks are trained in."""
    with np.errstate(all="ignore"):
        xs = [minidl.tensor(np.array(x, np.float32), requires_grad=True) for x in kink.points]
        y = kink.function(minidl, *xs)
        y.backward(minidl.tensor(np.ones(y.shape, np.float32)))
    for x, expected in zip(xs, kink.gradients, strict=True):
        if x.grad is not None:
            assert x.grad.dtype == np.float32
            np.testing.assert_allclose(x.grad.numpy(), np.array(expected, np.float32), rtol=1e-6)
