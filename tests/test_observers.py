"""Observers against brute force, and what they have in common."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from minidl import tensor
from minidl.quantization.observers import OBSERVERS, SHRINK, Observer, quant_range

NAMES = list(OBSERVERS)
HOW: list[dict[str, Any]] = [
    {"unsigned": True}, {"symmetric": True}, {}, {"bits": 4}, {"bits": 2, "symmetric": True},
    {"bits": 3, "unsigned": True},
]  # fmt: skip


def heavy(seed: int = 0, n: int = 20_000) -> np.ndarray:
    """Most numbers small, a few large."""
    return np.random.default_rng(seed).standard_t(3, n).astype(np.float32)


def observed(name: str, *batches: Any, **how: Any) -> Observer:
    observer = OBSERVERS[name](**how)
    for batch in batches:
        observer.observe(batch)
    return observer


def rounded(x: np.ndarray, observer: Observer, scale: Any, zero: Any) -> np.ndarray:
    q = np.rint(x / scale.astype(np.float64)) + zero.astype(np.int64)
    return (np.clip(q, observer.quant_min, observer.quant_max) - zero) * scale.astype(np.float64)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", HOW)
def test_zero_is_exact_and_the_range_is_covered(name: str, how: dict[str, Any]) -> None:
    for x in (heavy(), abs(heavy()), heavy() + 20, -abs(heavy()), abs(heavy()) * 1e-42):
        observer = observed(name, x, **how)
        scale, zero = observer.qparams()
        assert scale.dtype == np.float32 and scale.shape == zero.shape == ()
        assert zero.dtype == (np.uint8 if how.get("unsigned") else np.int8)
        assert observer.quant_min <= zero <= observer.quant_max and scale > 0
        assert not how.get("symmetric") or zero == 0
        assert rounded(np.zeros(1), observer, scale, zero) == 0
        if name == "minmax":  # nothing clipped: half a step at most, one where zero was moved
            worst = abs(rounded(x, observer, scale, zero) - x).max()
            assert worst <= (0.5001 if how.get("symmetric") else 1.0001) * scale


@pytest.mark.parametrize("name", NAMES)
def test_neither_order_nor_size_of_the_batches_matters(name: str) -> None:
    x = heavy() * np.geomspace(1e-3, 1e3, 20_000, dtype=np.float32)
    whole = observed(name, x).qparams()
    for batches in (np.split(x, 10), np.split(x[::-1], 4), [x[:1], x[1:]], [tensor(x)]):
        assert observed(name, *batches).qparams() == whole


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_per_channel_is_per_tensor_on_each(name: str, axis: int) -> None:
    x = heavy(1, 6000).reshape(20, 30, 10) * 10.0 ** np.arange(10, dtype=np.float32)
    x = np.moveaxis(x, -1, axis)
    scale, zero = observed(name, x, x / 2, axis=axis, bits=6).qparams()
    for c, channel in enumerate(np.moveaxis(x, axis, 0)):
        assert (scale[c], zero[c]) == observed(name, channel, channel / 2, bits=6).qparams()


def test_minmax() -> None:
    batches = np.array([-1.0, 0.5]), np.array([4.1])
    scale, zero = observed("minmax", *batches, unsigned=True).qparams()
    assert scale == np.float32(5.1 / 255) and zero == 50
    scale, zero = observed("minmax", np.array([-3.0, 1.0]), symmetric=True).qparams()
    assert scale == np.float32(3 / 127)
    scale, zero = observed("minmax", np.array([2.0, 3.0])).qparams()  # 0 is in the range, always
    assert scale == np.float32(3 / 255) and zero == -128


@pytest.mark.parametrize("percentile", [50, 99, 99.9, 100])
def test_percentile(percentile: float) -> None:
    x = np.concatenate([heavy(), np.zeros(30_000, np.float32)])
    scale, _ = observed("percentile", x, symmetric=True, percentile=percentile).qparams()
    expected = np.percentile(abs(heavy()), percentile)  # zeros do not count
    assert scale * 127 == pytest.approx(expected, abs=float(abs(x).max()) / 2**10)


@pytest.mark.parametrize("how", HOW)
def test_mse_against_brute_force(how: dict[str, Any]) -> None:
    x = abs(heavy(2)) if how.get("unsigned") else heavy(2)
    observer = observed("mse", x, **how)

    def error(scale: Any, zero: Any) -> float:
        return float(np.square(rounded(x, observer, scale, zero) - x).sum())

    grid = []
    for share in np.linspace(0.002, 1, 500):
        clipped = np.clip(x, -share * abs(x).max(), share * abs(x).max())
        grid.append(error(*observed("minmax", clipped, **how).qparams()))
    assert error(*observer.qparams()) <= 1.01 * min(grid) < grid[-1]


def test_entropy_on_a_distribution_by_hand() -> None:
    """Two bits, unsigned, all in (0, 4): steps of T / 3.

    Nearly all lie close to 0, 1/3, 2/3 and 1, more and less often, and three at 3. With T = 1 the
    four are told apart. The KL divergence of each T is computed here from the numbers themselves.
    """
    width = 2.0**-10  # of a bin: 2² / 4096
    centres = (np.repeat([0, 341, 683, 1023], 3) + np.tile([1, 2, 3], 4) + 0.5) * width
    many = np.repeat(centres, np.outer([100, 10, 60, 20], [3, 2, 3]).ravel())
    x = np.concatenate([many, np.full(3, 3 + width / 2)])
    scale, zero = observed("entropy", x, bits=2, unsigned=True).qparams()

    values, counts = np.unique(x, return_counts=True)
    divergences = []
    for share in SHRINK:
        T = share * values[-1]
        inside = values - width / 2 < T
        levels = np.minimum(np.rint(values[inside] * 3 / T), 3)
        P = counts[inside].astype(float)
        Q = np.array([P[levels == k].mean() for k in levels])
        Q /= Q.sum()
        P[-1] += counts[~inside].sum()
        P /= P.sum()
        divergences.append(sum(p * np.log(p / q) for p, q in zip(P, Q)))
    found = divergences[np.argmin(abs(SHRINK * values[-1] - scale * 3))]
    assert found == pytest.approx(min(divergences), rel=1e-9) and found < 0.5 * divergences[0]
    assert zero == 0 and scale * 3 < 1.2  # the three at 3 are clipped


@pytest.mark.parametrize("name", ["percentile", "mse", "entropy"])
def test_one_outlier_is_clipped(name: str) -> None:
    x = np.random.default_rng(0).standard_normal(100_000, np.float32)
    x[123] = 100
    bits = 4 if name == "mse" else 8  # with 8 its error is more than that of all the others
    scale, _ = observed(name, x, bits=bits).qparams()
    wide, _ = observed("minmax", x, bits=bits).qparams()
    alone, _ = observed("minmax", np.delete(x, 123), bits=bits).qparams()
    assert alone / 3 < scale < 2 * alone < wide / 4


@pytest.mark.parametrize("name", NAMES)
def test_constant_numbers(name: str) -> None:
    for how in HOW:
        scale, zero = observed(name, np.zeros((2, 3)), **how).qparams()
        assert scale == 1 and (zero == 0 or not how.get("symmetric"))
        x = np.full(7, 0.3)
        observer = observed(name, x, **how)
        assert rounded(x, observer, *observer.qparams()) == pytest.approx(x, rel=1e-3)
    scale, _ = observed(name, np.array([[0.0, 0.0], [1.0, -2.0]]), axis=0).qparams()
    assert scale[0] == 1 and scale[1] != 1


@pytest.mark.parametrize("name", NAMES)
def test_bad_input(name: str) -> None:
    with pytest.raises(ValueError, match="nothing was observed"):
        OBSERVERS[name]().qparams()
    with pytest.raises(ValueError, match="nothing was observed"):
        observed(name, np.zeros((0, 3))).qparams()
    observer = observed(name, heavy())
    before = copy.deepcopy(observer).qparams()
    for bad, words in (
        ([[1, np.nan], [np.inf, 2]], r"1 NaN and 1 infinite of 4 .* first at index \(0, 1\)"),
        ([1e39], "1 infinite"),
    ):
        with pytest.raises(ValueError, match=words):
            observer.observe(np.array(bad))
    assert observer.qparams() == before  # a refused batch leaves no trace
    for bits in (1, 9, 0, 2.5, True, "8"):
        with pytest.raises(ValueError, match="bits must be an integer from 2 to 8"):
            OBSERVERS[name](bits=bits)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no axis 1"):
        observed(name, heavy(), axis=1)
    with pytest.raises(ValueError, match="3 channels along axis 0, 2 before"):
        observed(name, np.ones((2, 4)), np.ones((3, 4)), axis=0)
    with pytest.raises(ValueError, match="need negative integers"):
        observed(name, heavy(), symmetric=True, unsigned=True).qparams()
    for percentile in (0, 101, np.nan):
        with pytest.raises(ValueError, match="percentile"):
            OBSERVERS["percentile"](percentile=percentile)


def test_integers_of_every_width() -> None:
    assert quant_range(8) == (-128, 127) and quant_range(8, unsigned=True) == (0, 255)
    assert quant_range(2, symmetric=True) == (-1, 1) and quant_range(4) == (-8, 7)
