"""Which range should the integers cover? Observers watch numbers go by and answer.

    observer = OBSERVERS["mse"](bits=8, unsigned=True)
    for batch in calibration:
        observer.observe(activation(batch))
    scale, zero_point = observer.qparams()

b bits are 2ᵇ levels. Spread over all that occurs they are coarse where most numbers lie; spread
over less they are finer there, and what lies outside is clipped. An observer finds the threshold T,
and the range is what was seen of [-T, T], so the longer tail is the first to be cut:

    minmax      T = max |x|: nothing is clipped (Jacob et al. 2018, section 3.1)
    percentile  a share of the numbers is clipped (Wu et al. 2020, section 4.1)
    mse         the mean squared error of the rounded numbers is smallest (Nagel et al. 2021,
                section 3.1)
    entropy     the rounded numbers' distribution is closest to that of the numbers, in the sense of
                Kullback and Leibler (Migacz 2017: TensorRT)

All but the first need the distribution: a `Histogram` of fixed size. It is exact, so neither the
order of the batches nor their sizes matter to any observer.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from minidl.tensor import Tensor

LOG_BINS = 12
BINS = 2**LOG_BINS  # on each side of 0
SHRINK = 0.97 ** np.arange(160)  # the thresholds tried, as shares of max |x|: 1 to 0.0079


def quant_range(bits: int, symmetric: bool = False, unsigned: bool = False) -> tuple[int, int]:
    """The smallest and the largest integer of `bits` bits: (quant_min, quant_max).

    Symmetric signed integers leave out the one that has no negative: -127 to 127, so that the
    negative of a number that fits always fits.

    Raises:
        ValueError: bits is no integer from 2 to 8.
    """
    try:
        count = operator.index(bits)
    except TypeError:
        count = 0
    if not 2 <= count <= 8 or isinstance(bits, bool):
        raise ValueError(f"bits must be an integer from 2 to 8, got {bits!r}")
    if unsigned:
        return 0, 2**count - 1
    return -(2 ** (count - 1)) + symmetric, 2 ** (count - 1) - 1


class Observer:
    """What observers share: the extremes seen so far, and from a threshold to integers.

    Args:
        bits: of the integers, 2 to 8.
        symmetric: zero_point is 0. (Unsigned and symmetric is for numbers that are never negative.)
        unsigned: the integers start at 0 rather than at -2ᵇ⁻¹.
        axis: a range for each index along this axis (for each channel); None: one for all.

    Attributes:
        quant_min, quant_max: the integers' range; with fewer than 8 bits narrower than its dtype.
    """

    def __init__(
        self,
        *,
        bits: int = 8,
        symmetric: bool = False,
        unsigned: bool = False,
        axis: int | None = None,
    ) -> None:
        self.quant_min, self.quant_max = quant_range(bits, symmetric, unsigned)
        self.bits, self.symmetric, self.unsigned, self.axis = bits, symmetric, unsigned, axis
        self.dtype = np.dtype(np.uint8 if unsigned else np.int8)
        self.low = self.high = np.zeros(0)  # (channels,); of 0 and what was seen; empty: nothing

    def observe(self, array: Any) -> None:
        """Take in one batch: an array or a Tensor; kept is only what the range depends on.

        Raises:
            ValueError: it has NaN or infinite numbers, no such axis, or other channels than before.
        """
        x = array.detach().cpu().numpy() if isinstance(array, Tensor) else array
        with np.errstate(over="ignore"):  # too large for float32: infinite, and reported as such
            x = np.asarray(x, np.float32)
        finite = np.isfinite(x)
        if not finite.all():
            nan, at = np.isnan(x).sum(), np.unravel_index(np.argmin(finite), x.shape)
            raise ValueError(
                f"{nan} NaN and {(~finite).sum() - nan} infinite of {x.size} numbers, the first at "
                f"index {tuple(map(int, at))}: no scale fits them; look for what made them"
            )
        if self.axis is None:
            x = x.reshape(1, -1)
        elif not -x.ndim <= self.axis < x.ndim:
            raise ValueError(f"an array of shape {x.shape} has no axis {self.axis}")
        else:
            x = np.moveaxis(x, self.axis, 0)
            x = x.reshape(len(x), -1)
        if len(self.low) and len(x) != len(self.low):
            raise ValueError(f"{len(x)} channels along axis {self.axis}, {len(self.low)} before")
        if x.size:
            self.take(x)

    def take(self, x: np.ndarray) -> None:
        """One batch as (channels, numbers)."""
        if not len(self.low):
            self.low = self.high = np.zeros(len(x))
        self.low = np.minimum(self.low, x.min(axis=1))
        self.high = np.maximum(self.high, x.max(axis=1))

    def threshold(self) -> np.ndarray:
        """T for each channel; a subclass says how."""
        raise NotImplementedError

    def qparams(self) -> tuple[np.ndarray, np.ndarray]:
        """(scale, zero_point): float32, and int8 or uint8; of shape () or (channels,).

        0 is always among the numbers that are represented exactly: padding and ReLU make many.
        Where nothing but 0 was seen any scale would do: it is 1.

        Raises:
            ValueError: nothing was observed; or negative numbers, by integers that have none.
        """
        if not len(self.low):
            raise ValueError("nothing was observed: run at least one batch of calibration data")
        if self.symmetric and self.unsigned and self.low.min() < 0:
            raise ValueError(
                f"numbers down to {self.low.min():g} need negative integers or a zero point: "
                "symmetric=False or unsigned=False"
            )
        T = self.threshold()
        scale, zero = self.affine(np.maximum(self.low, -T), np.minimum(self.high, T))
        shape = () if self.axis is None else scale.shape
        return scale.reshape(shape), zero.reshape(shape).astype(self.dtype)

    def affine(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The scale and zero point for ranges low <= 0 <= high (Jacob et al. 2018, section 3.1)."""
        if self.symmetric:
            scale = np.maximum(-low, high) / self.quant_max
        else:
            scale = (high - low) / (self.quant_max - self.quant_min)
        scale = np.where(scale > 0, np.maximum(scale, np.finfo(np.float32).tiny), 1)
        scale = scale.astype(np.float32)
        return scale, self.rounded(-low, scale, self.quant_min) * (not self.symmetric)

    def rounded(self, x: Any, scale: Any, zero: Any) -> Any:
        """The integers that stand for x, as floats."""
        return np.clip(np.rint(x / scale) + zero, self.quant_min, self.quant_max)


class MinMaxObserver(Observer):
    """All that was seen: nothing is clipped, and one outlier makes all levels coarse."""

    def threshold(self) -> np.ndarray:
        return np.full(len(self.low), np.inf)


class Histogram(Observer):
    """An observer that counts the numbers other than 0 (which is exact whatever the range).

    The bins cover (-2ᵉ, 2ᵉ), and each channel has the smallest e that was needed so far. When a
    larger number comes, pairs of bins become one: the edges of the coarse bins are among those of
    the fine ones, so the counts are the same as if e had been right from the beginning. T cannot
    be found more finely than a bin: 2⁻¹² of 2ᵉ.
    """

    counts: np.ndarray  # int64, (channels, 2 BINS); bin j begins at (j - BINS) · 2ᵉ / BINS
    exponent: np.ndarray  # e, (channels,)

    def take(self, x: np.ndarray) -> None:
        super().take(x)
        channels = len(x)
        if not hasattr(self, "counts"):
            self.counts = np.zeros((channels, 2 * BINS), np.int64)
            self.exponent = np.full(channels, np.finfo(np.float32).minexp)
        needed = np.frexp(np.maximum(-self.low, self.high))[1]
        for c in np.flatnonzero(needed > self.exponent):
            merged = (np.arange(-BINS, BINS) >> min(needed[c] - self.exponent[c], 63)) + BINS
            # weights are summed as float64, exact below 2⁵³
            self.counts[c] = np.bincount(merged, self.counts[c], minlength=2 * BINS)
            self.exponent[c] = needed[c]
        bins = np.floor(np.ldexp(x.astype(np.float64), LOG_BINS - self.exponent[:, None]))
        bins += BINS + 2 * BINS * np.arange(channels)[:, None]
        counts = np.bincount(bins[x != 0].astype(np.int64), minlength=self.counts.size)
        self.counts += counts.reshape(self.counts.shape)

    def threshold(self) -> np.ndarray:
        found = np.zeros(len(self.counts))
        for c, counts in enumerate(self.counts):
            (there,) = np.nonzero(counts)
            if len(there):
                width = 2.0 ** (self.exponent[c] - LOG_BINS)
                found[c] = self.threshold_of(
                    (there - BINS + 0.5) * width, counts[there].astype(np.float64), width,
                    self.low[c], self.high[c],
                )  # fmt: skip
        return found

    def threshold_of(
        self, x: np.ndarray, n: np.ndarray, width: float, low: float, high: float
    ) -> float:
        """T, where n numbers lie near x, in bins of a width; a subclass says how."""
        raise NotImplementedError

    def candidates(self, low: float, high: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Thresholds to try, and the scale and zero point that each would give."""
        T = max(-low, high) * SHRINK
        return T, *self.affine(np.maximum(low, -T), np.minimum(high, T))


class PercentileObserver(Histogram):
    """`percentile` per cent of the numbers (other than 0) are kept, the largest are clipped."""

    def __init__(self, percentile: float = 99.99, **how: Any) -> None:
        super().__init__(**how)
        if not 0 < percentile <= 100:
            raise ValueError(f"percentile must be above 0 and at most 100, got {percentile}")
        self.percentile = percentile

    def threshold_of(
        self, x: np.ndarray, n: np.ndarray, width: float, low: float, high: float
    ) -> float:
        order = np.argsort(np.abs(x), kind="stable")
        kept = np.cumsum(n[order])
        wanted = self.percentile / 100 * kept[-1]
        # where a bin is reached in the middle, its numbers are taken as evenly spread
        return float(np.interp(wanted, kept, np.abs(x)[order] + width / 2))


class MSEObserver(Histogram):
    """The smallest sum of (x - dequantized(quantized(x)))²: rounding and clipping in balance."""

    def threshold_of(
        self, x: np.ndarray, n: np.ndarray, width: float, low: float, high: float
    ) -> float:
        T, scale, zero = self.candidates(low, high)
        s, z = scale[:, None].astype(np.float64), zero[:, None]
        error = (self.rounded(x, s, z) - z) * s - x
        return float(T[np.argmin(np.square(error) @ n)])


class EntropyObserver(Histogram):
    """The smallest KL divergence of the rounded numbers' distribution from the clipped numbers'.

    P are the counts with what is clipped added to the outermost bins. Q are the counts as the
    integers tell them: all bins (in which anything is) that round to one integer share its count
    evenly. What is clipped is not in Q, so that clipping too has its price.
    """

    def threshold_of(
        self, x: np.ndarray, n: np.ndarray, width: float, low: float, high: float
    ) -> float:
        divergences = []
        for T, scale, zero in zip(*self.candidates(low, high)):
            inside = np.flatnonzero(np.abs(x) - width / 2 < T)
            if not len(inside) or scale < width:
                break  # steps finer than the bins would seem to round without an error
            first, last = inside[0], inside[-1]
            P, q = n[inside], self.rounded(x[inside], scale, zero) - self.quant_min
            q = q.astype(np.int64)
            shared = np.bincount(q, P) / np.maximum(np.bincount(q), 1)
            Q = shared[q] / P.sum()
            P[0] += n[:first].sum()
            P[-1] += n[last + 1 :].sum()
            P /= P.sum()
            divergences.append(P @ np.log(P / Q))
        return float(max(-low, high) * SHRINK[np.argmin(divergences)])


OBSERVERS: dict[str, type[Observer]] = {
    "minmax": MinMaxObserver,
    "percentile": PercentileObserver,
    "mse": MSEObserver,
    "entropy": EntropyObserver,
}
