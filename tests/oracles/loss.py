"""Oracles of `minidl.ops.loss`."""

import math

import numpy as np

from tests.oracles import loops, pytorch


@loops("cross_entropy")
def _(x, target, *, weight, ignore_index, reduction, label_smoothing):
    classes = x.shape[1]
    losses, total = np.zeros(target.shape), 0.0
    for at in np.ndindex(target.shape):
        label = target[at]
        if label == ignore_index:
            continue
        scores = [x[(at[0], c, *at[1:])] for c in range(classes)]
        logp = [s - math.log(sum(map(math.exp, scores))) for s in scores]
        w = [1.0] * classes if weight is None else weight.tolist()
        total += w[label]
        losses[at] -= (1 - label_smoothing) * w[label] * logp[label]
        for c in range(classes):
            losses[at] -= label_smoothing / classes * w[c] * logp[c]
    if reduction == "none":
        return losses
    return np.array(math.fsum(losses.ravel()) / (total if reduction == "mean" else 1.0))


@pytorch("cross_entropy")
def _(x, target, *, weight, **settings):
    import torch

    weight = None if weight is None else torch.from_numpy(weight)
    return torch.nn.functional.cross_entropy(x, target, weight, **settings)


@loops("bce")
def _(p, y):
    losses = np.zeros(p.shape)
    for at in np.ndindex(*p.shape):
        losses[at] = -y[at] * math.log(p[at]) - (1 - y[at]) * math.log(1 - p[at])
    return losses


@pytorch("bce")
def _(p, y):
    import torch

    return -y * torch.log(p) - (1 - y) * torch.log(1 - p)
