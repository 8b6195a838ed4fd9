"""Fake quantization: its value is that of the integers, its gradients are those of the papers.

Finite differences know nothing of a straight-through estimator: the formulas, in loops.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import minidl
from minidl.ops.quantized import dequantize_linear, quantize_linear
from minidl.quantization.fake_quantize import fake_quantize, round_pass, scale_gradient
from minidl.quantization.observers import quant_range

BITS = range(2, 9)


def numbers(quant_min: int, quant_max: int, scale: Any) -> np.ndarray:
    """Some inside and some outside the range; none within half a step beyond it, where the papers
    clip and PyTorch (and minidl) round."""
    rng = np.random.default_rng(0)
    v = rng.uniform(1.6 * quant_min - 2, 1.6 * quant_max + 2, (3, 40))
    v[(v > quant_max) & (v < quant_max + 0.6)] += 0.6
    v[(v < quant_min) & (v > quant_min - 0.6)] -= 0.6
    return v * scale


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("unsigned", [False, True])
def test_value_is_that_of_the_integers(axis: int | None, unsigned: bool) -> None:
    dtype = np.uint8 if unsigned else np.int8
    scale = np.array([0.1, 0.02, 3.0]) if axis == 0 else np.array(0.1)
    zero = np.array([7, 0, 100] if axis == 0 else 7, dtype)
    low, high = quant_range(8, unsigned=unsigned)
    x = numbers(low, high, scale[:, None] if axis == 0 else scale)
    q = quantize_linear(x, scale, zero, axis=0)
    expected = dequantize_linear(q, scale, zero, axis=0)
    tensors = [minidl.tensor(a.astype(x.dtype)) for a in (x, scale, zero)]
    actual = fake_quantize(*tensors, quant_min=low, quant_max=high, axis=axis)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-15)
    assert len(np.unique(q)) > 30


@pytest.mark.parametrize("bits", BITS)
def test_at_most_two_to_the_bits_values(bits: int) -> None:
    low, high = quant_range(bits)
    x = minidl.tensor(numbers(low, high, 0.3).astype(np.float32))
    y = fake_quantize(x, minidl.tensor(np.float32(0.3)), quant_min=low, quant_max=high).numpy()
    on_grid = {np.float32(0.3) * np.float32(q) for q in range(low, high + 1)}
    assert set(y.ravel().tolist()) <= {float(v) for v in on_grid}
    assert y.dtype == np.float32 and {y.min(), y.max()} == {min(on_grid), max(on_grid)}


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("unsigned", [False, True])
def test_gradients_are_the_papers(bits: int, unsigned: bool, axis: int | None) -> None:
    """Jacob et al. 2018 (straight through) and Esser et al. 2020, equations 2 and 3."""
    low, high = quant_range(bits, unsigned=unsigned)
    scale = np.array([0.3, 0.7, 2.0]) if axis == 0 else np.array(0.3)
    x = numbers(low, high, scale[:, None] if axis == 0 else scale)
    g = np.random.default_rng(1).normal(size=x.shape)
    to_x, to_scale = np.zeros(x.shape), np.zeros(scale.shape)
    for i in np.ndindex(x.shape):
        s = i[:1] if axis == 0 else ()
        v = x[i] / scale[s]
        inside = low < v < high
        to_x[i] = g[i] if inside else 0
        to_scale[s] += g[i] * (round(v) - v if inside else low if v <= low else high)
    xs = [minidl.tensor(a, requires_grad=True) for a in (x, scale)]
    fake_quantize(*xs, quant_min=low, quant_max=high, axis=axis).backward(minidl.tensor(g))
    for found, expected in zip(xs, (to_x, to_scale)):
        np.testing.assert_allclose(found.grad.numpy(), expected, rtol=1e-12, atol=1e-13)
    assert 0 < (to_x != 0).mean() < 1


def test_the_end_of_a_min_max_range_learns() -> None:
    """Its quotient may be a little more than quant_max in floats."""
    x = np.linspace(0.9, 1.1, 1000, dtype=np.float32)
    scale = x / np.float32(127)
    assert (x / scale > 127).any()
    for v, s in zip(x[x / scale > 127], scale[x / scale > 127]):
        t = minidl.tensor(v, requires_grad=True)
        fake_quantize(t, minidl.tensor(s), quant_min=-127, quant_max=127).backward()
        assert t.grad.item() == 1


def test_roundpass_and_gradscale() -> None:
    x = minidl.tensor(np.array([0.5, 1.5, -2.4, 2.6]), requires_grad=True)
    y = round_pass(x)
    assert y.tolist() == [0, 2, -2, 3]
    z = scale_gradient(y, 0.25)
    assert z.tolist() == y.tolist()
    z.sum().backward()
    assert x.grad.tolist() == [0.25] * 4
