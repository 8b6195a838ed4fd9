"""Oracle of `minidl.ops.norm`."""

import math

import numpy as np

from tests.oracles import loops, pytorch


@loops("standardize")
def _(x, weight, bias, *, dim, eps, statistics):
    dims = {d % x.ndim for d in dim}
    y = np.zeros(x.shape)
    kept = [1 if d in dims else n for d, n in enumerate(x.shape)]
    for corner in np.ndindex(*kept):
        spans = [range(n) if d in dims else [corner[d]] for d, n in enumerate(x.shape)]
        places = [()]
        for span in spans:
            places = [(*at, i) for at in places for i in span]
        mean = sum(x[at] for at in places) / len(places)
        variance = sum((x[at] - mean) ** 2 for at in places) / len(places)
        for at in places:
            y[at] = (x[at] - mean) / math.sqrt(variance + eps)
            for factor in () if weight is None else (np.broadcast_to(weight, x.shape),):
                y[at] *= factor[at]
            for term in () if bias is None else (np.broadcast_to(bias, x.shape),):
                y[at] += term[at]
    return y


@pytorch("standardize")
def _(x, weight, bias, *, dim, eps, statistics):
    import torch

    away = x - x.mean(dim, keepdim=True)
    y = away / torch.sqrt((away**2).mean(dim, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


@loops("scale_shift")
def _(x, scale, shift):
    y = np.zeros(x.shape)
    for at in np.ndindex(*x.shape):
        y[at] = x[at] * scale[at[1]] + shift[at[1]]
    return y


@pytorch("scale_shift")
def _(x, scale, shift):
    along = (-1,) + (1,) * (x.ndim - 2)
    return x * scale.reshape(along) + shift.reshape(along)
