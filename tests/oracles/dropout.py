"""Oracle of `minidl.ops.dropout`: the mask from NumPy's own Philox, number by number."""

import numpy as np

from tests.oracles import loops, pytorch


def masks(shape, p, key):
    """The factor of each number of the mask: 0, or 1 / (1 - p)."""
    stream = np.random.Philox(key=key.seed, counter=[0, key.call, 0, 0])
    words = []
    for _ in range((int(np.prod(shape)) + 1) // 2):
        bits = int(stream.random_raw())
        words += [bits & 0xFFFFFFFF, bits >> 32]
    factors = np.zeros(shape)
    for word, at in zip(words, np.ndindex(*shape), strict=False):
        factors[at] = 1 / (1 - p) if (word >> 8) / 2**24 >= p else 0
    return factors


@loops("dropout")
def _(x, *, p, key, mask_shape):
    factors = np.broadcast_to(masks(mask_shape or x.shape, p, key), x.shape)
    y = np.zeros(x.shape)
    for at in np.ndindex(*x.shape):
        y[at] = x[at] * factors[at]
    return y


@pytorch("dropout")
def _(x, *, p, key, mask_shape):
    import torch

    return x * torch.tensor(masks(mask_shape or tuple(x.shape), p, key))
