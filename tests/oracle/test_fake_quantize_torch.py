"""Fake quantization, and the gradients of its numbers and scales, against PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import minidl
from minidl.quantization.fake_quantize import fake_quantize, scale_gradient
from minidl.quantization.observers import quant_range

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("learned", [False, True])
def test_fake_quantize(bits: int, unsigned: bool, axis: int | None, learned: bool) -> None:
    rng = np.random.default_rng(bits)
    low, high = quant_range(bits, unsigned=unsigned)
    # An even zero point: PyTorch rounds x / scale + zero_point, ONNX x / scale, half to even.
    # Powers of two for scales: PyTorch multiplies by 1 / scale.
    zero = np.full(3, (low + high + 1) // 2 // 2 * 2, np.float32)
    scale = np.array([0.25, 0.5, 0.125], np.float32)
    if axis is None:
        zero, scale = zero[:1], scale[:1]
    x = rng.normal(size=(4, 3, 50)).astype(np.float32) * scale.max() * high
    g = rng.normal(size=x.shape).astype(np.float32)

    a = torch.tensor(x, requires_grad=True)
    s, z = torch.tensor(scale, requires_grad=learned), torch.tensor(zero)
    factor = (x.size // len(scale) * high) ** -0.5
    if learned and axis is None:
        y = torch._fake_quantize_learnable_per_tensor_affine(a, s, z, low, high, factor)
    elif learned:
        y = torch._fake_quantize_learnable_per_channel_affine(a, s, z, axis, low, high, factor)
    elif axis is None:
        y = torch.fake_quantize_per_tensor_affine(a, s[0].item(), int(zero[0]), low, high)
    else:
        y = torch.fake_quantize_per_channel_affine(a, s, z.int(), axis, low, high)
    y.backward(torch.tensor(g))

    b = minidl.tensor(x, requires_grad=True)
    t: Any = minidl.tensor(scale, requires_grad=learned)
    y2 = fake_quantize(
        b, scale_gradient(t, factor) if learned else t, minidl.tensor(zero), quant_min=low,
        quant_max=high, axis=axis,
    )  # fmt: skip
    y2.backward(minidl.tensor(g))
    np.testing.assert_array_equal(y2.numpy(), y.detach().numpy())
    np.testing.assert_array_equal(b.grad.numpy(), a.grad.numpy())
    assert 0 < (b.grad.numpy() == 0).mean() < 1
    if learned:
        np.testing.assert_allclose(t.grad.numpy(), s.grad.numpy(), rtol=1e-5, atol=1e-5)
