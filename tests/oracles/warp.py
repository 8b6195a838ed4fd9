"""Oracles of `minidl.ops.warp`."""

import math

import numpy as np

from tests.oracles import loops, pytorch
from tests.oracles.pool import transposed


def mirrored(place, length):
    while not -0.5 <= place <= length - 0.5:
        place = -1 - place if place < -0.5 else 2 * length - 1 - place
    return place


def sources(m, size, out_size, mode, padding):
    """Each (n, i, j) of a result with its [(pixel or None, share)]."""
    for n, i, j in np.ndindex(len(m), *out_size):
        (a, b, c), (d, e, f) = m[n]
        place = [d * j + e * i + f, a * j + b * i + c]
        if not all(math.isfinite(p) for p in place):
            yield (n, i, j), [(None, 1.0)]
            continue
        if padding == "reflection":
            place = [mirrored(p, length) for p, length in zip(place, size)]
        if padding != "zeros":
            place = [min(max(p, 0), length - 1) for p, length in zip(place, size)]
        if mode == "nearest":
            found = [((round(place[0]), round(place[1])), 1.0)]
        else:
            found = [
                ((h, w), (1 - abs(place[0] - h)) * (1 - abs(place[1] - w)))
                for h in (math.floor(place[0]), math.floor(place[0]) + 1)
                for w in (math.floor(place[1]), math.floor(place[1]) + 1)
            ]
        yield (
            (n, i, j),
            [
                ((h, w) if 0 <= h < size[0] and 0 <= w < size[1] else None, share)
                for (h, w), share in found
            ],
        )


@loops("warp_affine")
def _(x, m, *, size, mode, padding, fill):
    size = size or x.shape[2:]
    y = np.zeros((*x.shape[:2], *size))
    for (n, i, j), found in sources(m, x.shape[2:], size, mode, padding):
        for c in range(x.shape[1]):
            y[n, c, i, j] = sum(s * (fill if at is None else x[n, c][at]) for at, s in found)
    return y


@loops("warp_affine_input")
def _(y, m, *, input_size, mode, padding):
    x = np.zeros((*y.shape[:2], *input_size))
    for (n, i, j), found in sources(m, input_size, y.shape[2:], mode, padding):
        for c in range(y.shape[1]):
            for at, share in found:
                if at is not None:
                    x[n, c][at] += share * y[n, c, i, j]
    return x


@pytorch("warp_affine")
def _(x, m, *, size, mode, padding, fill):
    """`grid_sample` counts from -1 to 1, from one outer edge to the other."""
    import torch
    import torch.nn.functional as F

    h, w = x.shape[2:]
    m = torch.as_tensor(m, dtype=x.dtype)
    i, j = (torch.arange(length, dtype=x.dtype) for length in (size or (h, w)))
    homogeneous = torch.stack([*torch.meshgrid(j, i, indexing="xy"), torch.ones(len(i), len(j))], 2)
    places = torch.einsum("nkl,ijl->nijk", m, homogeneous.to(x.dtype))
    finite = places.isfinite().all(-1)
    grid = (2 * places.nan_to_num() + 1) / torch.tensor([w, h], dtype=x.dtype) - 1
    y = F.grid_sample(x - fill, grid, mode, padding, align_corners=False) + fill
    return torch.where(finite[:, None], y, fill)


@pytorch("warp_affine_input")
def _(y, m, *, input_size, **how):
    from tests.oracles import PYTORCH

    forward = PYTORCH["warp_affine"]
    return transposed(lambda x: forward(x, m, size=y.shape[2:], fill=0.0, **how), y, input_size)
