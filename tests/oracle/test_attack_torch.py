"""The attacks against an independent implementation in PyTorch, with the same weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import minidl
from minidl import nn
from minidl.attack import bim, fgsm, pgd


def networks() -> tuple[Any, Any]:
    """The same network twice, in float64: the sign of a tiny gradient is then no matter of luck."""
    minidl.manual_seed(0)
    ours, theirs = (
        n.Sequential(
            n.Conv2d(1, 6, 3, padding=1), n.BatchNorm2d(6), n.ReLU(), n.MaxPool2d(2), n.Flatten(),
            n.Linear(96, 10),
        )
        for n in (nn, torch.nn)
    )  # fmt: skip
    ours.double(), theirs.double()
    theirs.load_state_dict({k: torch.tensor(v.numpy()) for k, v in ours.state_dict().items()})
    return ours, theirs.eval()


def torch_attack(
    model: Any, x: Any, y: Any, epsilon: float, alpha: float, steps: int, norm: str, sign: int
) -> np.ndarray:
    x0 = torch.tensor(x)
    x_t = x0.clone()
    for _ in range(steps):
        x_t.requires_grad_(True)
        torch.nn.functional.cross_entropy(model(x_t), torch.tensor(y)).backward()
        with torch.no_grad():
            g, delta = x_t.grad, x_t - x0
            if norm == "inf":
                delta = (delta + sign * alpha * g.sign()).clamp(-epsilon, epsilon)
            else:
                delta = delta + sign * alpha * g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
                length = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
                delta = torch.where(length > epsilon, delta / length * epsilon, delta)
            x_t = (x0 + delta).clamp(0, 1)
    return x_t.numpy()


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("name", ["fgsm", "bim", "pgd", "pgd_l2"])
def test_same_images(name: str, targeted: bool) -> None:
    ours, theirs = networks()
    rng = np.random.default_rng(0)
    x, y = rng.uniform(size=(8, 1, 8, 8)), rng.integers(0, 10, 8)
    call = {"model": ours, "x": minidl.tensor(x), "y": minidl.tensor(y), "targeted": targeted}
    sign = -1 if targeted else 1
    if name == "fgsm":
        actual = fgsm(epsilon=0.1, **call)
        expected = torch_attack(theirs, x, y, 0.1, 0.1, 1, "inf", sign)
    elif name == "bim":
        actual = bim(epsilon=0.1, steps=5, **call)
        expected = torch_attack(theirs, x, y, 0.1, 0.02, 5, "inf", sign)
    else:
        norm, epsilon = ("inf", 0.1) if name == "pgd" else ("2", 1.0)
        actual = pgd(epsilon=epsilon, steps=5, norm=norm, random_start=False, **call)
        expected = torch_attack(theirs, x, y, epsilon, epsilon / 2, 5, norm, sign)
    assert np.abs(actual.numpy() - x).max() > 0.05
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=1e-9)
