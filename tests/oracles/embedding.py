"""Oracles of `minidl.ops.embedding`."""

import numpy as np

from tests.oracles import loops, pytorch


@loops("embedding")
def _(weight, indices):
    y = np.zeros((*indices.shape, weight.shape[1]))
    for at in np.ndindex(*indices.shape):
        for d in range(weight.shape[1]):
            y[(*at, d)] = weight[int(indices[at]), d]
    return y


@loops("embedding_weight")
def _(y, indices, *, rows):
    weight = np.zeros((rows, y.shape[-1]))
    for at in np.ndindex(*indices.shape):
        for d in range(y.shape[-1]):
            weight[int(indices[at]), d] += y[(*at, d)]
    return weight


@pytorch("embedding")
def _(weight, indices):
    import torch.nn.functional as F

    return F.embedding(indices, weight)


@pytorch("embedding_weight")
def _(y, indices, *, rows):
    import torch

    zeros = torch.zeros(rows, y.shape[-1], dtype=y.dtype)
    return zeros.index_add(0, indices.flatten(), y.reshape(-1, y.shape[-1]))
