"""Losses: how far an output is from what was wanted, as one number (or one a sample).

`cross_entropy` is an op of its own, since it is in every training step; the others are made of
simpler ops. `reduction` is "mean", "sum" or "none" everywhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minidl import backend
from minidl.backend.native import native, why_missing
from minidl.op import op, sample
from minidl.ops.elementwise import abs_, clamp, log, softplus, where
from minidl.ops.reduce import mean, sum_
from minidl.ops.softmax import log_softmax, softmax
from minidl.tensor import raw


def reduced(losses: Any, reduction: str) -> Any:
    if reduction == "mean":
        return mean(losses)
    if reduction == "sum":
        return sum_(losses)
    if reduction == "none":
        return losses
    raise ValueError(f"reduction is 'mean', 'sum' or 'none', got {reduction!r}")


def check_labels(target: Any, shape: tuple[int, ...], ignore_index: int) -> None:
    """Labels (N, d1, ...) for scores (N, C, d1, ...), every one in [0, C) or `ignore_index`.

    Raises:
        TypeError: labels are not integers.
        ValueError: their shape does not fit, or a label does not: which, where, and what does.
    """
    if target.dtype.kind not in "iu":
        raise TypeError(
            f"class labels are integers, got {target.dtype} of shape {target.shape} for scores of "
            f"shape {shape} (class probabilities are floating and have the scores' shape)"
        )
    expected, classes = shape[:1] + shape[2:], shape[1]
    if target.shape != expected:
        raise ValueError(
            f"scores of shape {shape} (N, C, ...) need labels of shape {expected}, "
            f"got {target.shape}"
        )
    if not target.size or (target.min() >= 0 and target.max() < classes):
        return
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if wrong.any():
        where_ = tuple(int(i[0]) for i in wrong.nonzero())
        raise ValueError(
            f"label {int(target[where_])} at {list(where_)} is outside [0, {classes}): the scores "
            f"have {classes} classes (ignore_index is {ignore_index})"
        )


def wanted(target, weight, shape, dtype, ignore_index, label_smoothing):
    """q with loss_n = -Σ_c q_nc log p_nc, shaped as the scores; and what "mean" divides by.

    q is w_c at the label, 0 elsewhere and where the label is ignored; smoothing moves a share of
    it to all classes evenly (Szegedy et al. 2016, section 7).
    """
    xp = backend.array_module(target)
    counted = target != ignore_index
    label = xp.expand_dims(xp.where(counted, target, 0), 1)
    at_label = counted.astype(dtype)
    if weight is not None:
        at_label = at_label * weight.astype(dtype)[label[:, 0]]
    q = xp.zeros(shape, dtype)
    np.put_along_axis(q, label, xp.expand_dims(at_label, 1) * (1 - label_smoothing), 1)
    if label_smoothing:
        classes = shape[1]
        share = xp.full(classes, label_smoothing / classes, dtype)
        if weight is not None:
            share = share * weight.astype(dtype)
        share = share.reshape((1, classes) + (1,) * (len(shape) - 2))
        q += share * xp.expand_dims(counted, 1)
    return q, at_label.sum()


@op
def cross_entropy(
    x, target, *, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0
):
    """-log softmax(x)[label]: scores (N, C, d1, ...), labels (N, d1, ...) of integers.

    Args:
        weight: array (C,), a factor for each class; "mean" is then the weighted mean.

    Raises:
        TypeError, ValueError: labels that do not fit, see `check_labels`.
    """
    check_labels(target, x.shape, ignore_index)
    logp = log_softmax.op.formula(x, dim=1)
    q, total = wanted(target, weight, x.shape, x.dtype, ignore_index, label_smoothing)
    losses = -(np.where(q == 0, 0, logp) * q).sum(axis=1)
    return losses.sum() / total if reduction == "mean" else reduced(losses, reduction)


@cross_entropy.gradient
def _(g, x, target, *, weight, ignore_index, reduction, label_smoothing):
    """d loss_n / dx = p_n Σ_c q_nc - q_n."""
    q, total = wanted(target, weight, x.shape, x.dtype, ignore_index, label_smoothing)
    if reduction == "mean":
        g = g / np.where(total == 0, 1, total)  # none counted: loss NaN, gradient 0
    elif reduction == "none":
        g = g.reshape((x.shape[0], 1, *x.shape[2:]))
    return g * (softmax(x, dim=1) * q.sum(axis=1, keepdims=True) - q), None


@cross_entropy.kernel("native", dtypes=("float32", "float64"), missing=why_missing)
def _(x, target, *, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0):
    check_labels(target, x.shape, ignore_index)
    labels, weight = counted_labels(x, target, weight, ignore_index)
    losses = native.cross_entropy(x, labels, weight, label_smoothing)
    if reduction == "mean":
        return losses.sum() / total_weight(labels, weight, x.dtype)
    return reduced(losses, reduction)


@cross_entropy.gradient_kernel("native", dtypes=("float32", "float64"), missing=why_missing)
def _(g, x, target, *, weight, ignore_index, reduction, label_smoothing):
    labels, weight = counted_labels(x, target, weight, ignore_index)
    if reduction == "mean":
        g = g / (total_weight(labels, weight, x.dtype) or 1)
    g = np.asarray(g, x.dtype)
    return native.cross_entropy_gradient(g, x, labels, weight, label_smoothing), None


def counted_labels(x: Any, target: Any, weight: Any, ignore_index: int) -> tuple[Any, Any]:
    """Labels with -1 for those that do not count, and the weights typed as the scores."""
    labels = np.where(target == ignore_index, -1, target).astype(np.int64, copy=False)
    return labels, None if weight is None else weight.astype(x.dtype, copy=False)


def total_weight(labels: Any, weight: Any, dtype: Any) -> Any:
    """What "mean" divides by: how many labels count, or the sum of their weights."""
    counted = labels >= 0
    total = np.count_nonzero(counted) if weight is None else weight[labels[counted]].sum()
    return np.asarray(total, dtype)[()]


def cross_entropy_loss(
    x: Any,
    target: Any,
    weight: Any = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """PyTorch's: scores (N, C, d1, ...) or (C,); labels, or probabilities shaped as the scores."""
    if target.dtype.kind == "f" and target.shape == x.shape:
        dim = 1 if x.ndim > 1 else 0
        classes = x.shape[dim]
        if label_smoothing:
            target = target * (1 - label_smoothing) + label_smoothing / classes
        logp = log_softmax(x, dim=dim)
        if weight is not None:
            logp = logp * weight.reshape((classes,) + (1,) * (x.ndim - dim - 1))
        losses = -sum_(target * logp, dim=dim)
        if reduction == "mean":  # over samples, whatever the weights
            return sum_(losses) / max(losses.shape[0] if x.ndim == 2 else np.prod(losses.shape), 1)
        return reduced(losses, reduction)
    single = x.ndim == 1
    if single:
        x, target = x.reshape((1, -1)), target.reshape((1,)) if target.ndim == 0 else target
    loss = cross_entropy(
        x, target, weight=raw(weight), ignore_index=ignore_index, reduction=reduction,
        label_smoothing=label_smoothing,
    )  # fmt: skip
    return loss.reshape(()) if single and reduction == "none" else loss


def nll_loss(
    logp: Any, target: Any, weight: Any = None, ignore_index: int = -100, reduction: str = "mean"
) -> Any:
    """-w_label · logp[label]: log-probabilities (N, C, d1, ...) or (C,), labels of integers."""
    single = logp.ndim == 1
    if single:
        logp, target = logp.reshape((1, -1)), target.reshape((1,))
    labels, w = raw(target), raw(weight)
    check_labels(labels, logp.shape, ignore_index)
    q, total = wanted(labels, w, logp.shape, logp.dtype, ignore_index, 0.0)
    losses = -sum_(where(q == 0, 0, logp) * q, dim=1)
    if reduction == "mean":
        return sum_(losses) / total.item()
    return reduced(losses.reshape(()) if single else losses, reduction)


def check_shapes(name: str, x: Any, y: Any) -> None:
    """PyTorch warns of a broadcast in a loss, as it is nearly always a mistake; here: refused."""
    if x.shape != y.shape:
        raise ValueError(f"{name}: input has shape {x.shape}, target {y.shape}: make them equal")


def mse_loss(x: Any, y: Any, reduction: str = "mean") -> Any:
    """(x - y)²."""
    check_shapes("mse_loss", x, y)
    d = x - y
    return reduced(d * d, reduction)


def l1_loss(x: Any, y: Any, reduction: str = "mean") -> Any:
    """|x - y|."""
    check_shapes("l1_loss", x, y)
    return reduced(abs_(x - y), reduction)


def huber_loss(x: Any, y: Any, reduction: str = "mean", delta: float = 1.0) -> Any:
    """d²/2 where |d| < δ, δ(|d| - δ/2) beyond (Huber 1964)."""
    check_shapes("huber_loss", x, y)
    if delta <= 0:
        raise ValueError(f"huber_loss: delta is above 0, got {delta}")
    d = x - y
    size = abs_(d)
    return reduced(where(size < delta, d * d * 0.5, (size - 0.5 * delta) * delta), reduction)


def smooth_l1_loss(x: Any, y: Any, reduction: str = "mean", beta: float = 1.0) -> Any:
    """Huber's loss / β; for β = 0, |x - y| (Girshick 2015)."""
    if beta < 0:
        raise ValueError(f"smooth_l1_loss: beta is at least 0, got {beta}")
    if beta == 0:
        return l1_loss(x, y, reduction)
    return huber_loss(x, y, reduction, beta) / beta


@op
def bce(p, y):
    """-(y log p + (1 - y) log(1 - p)), an element each; logarithms are at least -100."""
    with np.errstate(divide="ignore"):
        log_p, log_q = np.log(p), np.log(1 - p)
    return -(y * np.maximum(log_p, -100) + (1 - y) * np.maximum(log_q, -100))


@bce.gradient
def _(g, p, y):
    """At p = 0 and 1 finite, as in PyTorch."""
    return (
        lambda: g * (p - y) / clamp(p * (1 - p), min=1e-12),
        lambda: g * (clamp(log(1 - p), min=-100) - clamp(log(p), min=-100)),
    )


def binary_cross_entropy(p: Any, y: Any, weight: Any = None, reduction: str = "mean") -> Any:
    """Of probabilities in [0, 1]."""
    check_shapes("binary_cross_entropy", p, y)
    probabilities = raw(p)
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError(
            "binary_cross_entropy takes probabilities in [0, 1], got values from "
            f"{probabilities.min()} to {probabilities.max()}; of scores take the sigmoid, or "
            "better binary_cross_entropy_with_logits"
        )
    losses = bce(p, y)
    return reduced(losses if weight is None else losses * weight, reduction)


def binary_cross_entropy_with_logits(
    x: Any, y: Any, weight: Any = None, reduction: str = "mean", pos_weight: Any = None
) -> Any:
    """-[w₊ y log σ(x) + (1 - y) log(1 - σ(x))], where log σ(x) = -softplus(-x)."""
    check_shapes("binary_cross_entropy_with_logits", x, y)
    if pos_weight is None:
        losses = softplus(x) - x * y
    else:
        losses = (1 - y) * x + (1 + (pos_weight - 1) * y) * softplus(-x)
    return reduced(losses if weight is None else losses * weight, reduction)


@cross_entropy.samples
def _(rng):
    x, labels, weight = rng.normal(size=(5, 4)) * 2, rng.integers(0, 4, size=5), rng.random(4) + 0.5
    for reduction in ("mean", "sum", "none"):
        yield sample(x, labels, reduction=reduction)
        yield sample(x, labels, reduction=reduction, label_smoothing=0.2)
    yield sample(x, np.array([0, -100, 3, -100, 1]))
    yield sample(rng.normal(size=(2, 3, 4)), rng.integers(0, 3, size=(2, 4)))
    yield sample(rng.normal(size=(2, 3, 2, 2)), rng.integers(0, 3, size=(2, 2, 2)))
    yield sample(rng.normal(size=(0, 4)), np.zeros(0, int), reduction="sum")
    yield sample(rng.normal(size=(3, 37)) * 9, rng.integers(0, 37, size=3), label_smoothing=0.1)
    wide = rng.integers(0, 3, size=(2, 37))
    yield sample(rng.normal(size=(2, 3, 37)), wide, weight=weight[:3], label_smoothing=0.1)
    yield sample(rng.normal(size=(2, 3, 37)), wide, ignore_index=1, reduction="none")
    yield sample(x, np.array([0, 1, 3, 2, 1]), weight=weight, ignore_index=1, label_smoothing=0.1)


@bce.samples
def _(rng):
    yield sample(rng.uniform(0.1, 0.9, size=(3, 4)), rng.uniform(size=(3, 4)))
    yield sample(rng.uniform(0.1, 0.9, size=(0, 4)), rng.uniform(size=(0, 4)))
