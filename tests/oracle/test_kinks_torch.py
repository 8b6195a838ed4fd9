"""The table of tests/kinks.py is PyTorch's behaviour."""

from __future__ import annotations

import numpy as np
import torch

from tests.kinks import Kink
from tests.test_kinks import every_kink


@every_kink
def test_kink(kink: Kink) -> None:
    xs = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in kink.points]
    y = kink.function(torch, *xs)
    y.backward(torch.ones_like(y))
    for x, expected in zip(xs, kink.gradients, strict=True):
        found = np.zeros(x.shape) if x.grad is None else x.grad.numpy()
        np.testing.assert_allclose(found, np.array(expected, float), rtol=1e-12)
