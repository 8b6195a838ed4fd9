"""Oracles of `minidl.ops.pool`."""

import math

import numpy as np

from tests.oracles import loops, pytorch


def windows(size, kernel_size, stride, padding=(0, 0), dilation=(1, 1), ceil_mode=False):
    """Each (p, q), with the pixels of its window in the image, and its size with the padding."""
    counts = []
    for axis in (0, 1):
        count, span = 0, dilation[axis] * (kernel_size[axis] - 1) + 1
        padded = size[axis] + 2 * padding[axis]
        while count * stride[axis] + span <= padded:
            count += 1
        hangs_over = (count - 1) * stride[axis] + span < padded
        if ceil_mode and hangs_over and count * stride[axis] < size[axis] + padding[axis]:
            count += 1
        counts.append(count)
    for p, q in np.ndindex(*counts):
        inside, area = [], 0
        for i, j in np.ndindex(*kernel_size):
            h = p * stride[0] - padding[0] + i * dilation[0]
            w = q * stride[1] - padding[1] + j * dilation[1]
            area += h < size[0] + padding[0] and w < size[1] + padding[1]
            if 0 <= h < size[0] and 0 <= w < size[1]:
                inside.append((h, w))
        yield p, q, counts, inside, area


def winners(x, **how):
    """Each (n, c, p, q) with the position of its window's maximum, and the output's shape."""
    for p, q, counts, inside, _ in windows(x.shape[2:], **how):
        for n, c in np.ndindex(*x.shape[:2]):
            best = inside[0]
            for at in inside:
                if x[n, c][at] > x[n, c][best]:
                    best = at
            yield (n, c, p, q), best, counts


def size_of(x, **how):
    return next(counts for _, _, counts, _, _ in windows(x.shape[2:], **how))


@loops("max_pool2d")
def _(x, **how):
    y = np.zeros((*x.shape[:2], *size_of(x, **how)))
    for at, best, _ in winners(x, **how):
        y[at] = x[at[0], at[1]][best]
    return y


@loops("max_pool2d_index")
def _(x, **how):
    y = np.zeros((*x.shape[:2], *size_of(x, **how)), dtype=np.int32)
    for at, (h, w), _ in winners(x, **how):
        y[at] = h * x.shape[3] + w
    return y


@loops("max_pool2d_input")
def _(y, index, *, input_size):
    x = np.zeros((*y.shape[:2], *input_size))
    for n, c, p, q in np.ndindex(*y.shape):
        h, w = divmod(int(index[n, c, p, q]), input_size[1])
        x[n, c, h, w] += y[n, c, p, q]
    return x


def shares(size, count_include_pad=True, divisor_override=None, **how):
    for p, q, _, inside, area in windows(size, **how):
        yield p, q, inside, divisor_override or (area if count_include_pad else len(inside))


def sliding(settings):
    return {k: v for k, v in settings.items() if k not in ("count_include_pad", "divisor_override")}


@loops("avg_pool2d")
def _(x, **how):
    y = np.zeros((*x.shape[:2], *size_of(x, **sliding(how))))
    for p, q, inside, divisor in shares(x.shape[2:], **how):
        for n, c in np.ndindex(*x.shape[:2]):
            y[n, c, p, q] = sum(x[n, c][at] for at in inside) / divisor
    return y


@loops("avg_pool2d_input")
def _(y, *, input_size, **how):
    x = np.zeros((*y.shape[:2], *input_size))
    for p, q, inside, divisor in shares(input_size, **how):
        for n, c in np.ndindex(*y.shape[:2]):
            for at in inside:
                x[n, c][at] += y[n, c, p, q] / divisor
    return x


def adaptive(size, output_size):
    for p, q in np.ndindex(*output_size):
        rows = range(
            math.floor(p * size[0] / output_size[0]), math.ceil((p + 1) * size[0] / output_size[0])
        )
        columns = range(
            math.floor(q * size[1] / output_size[1]), math.ceil((q + 1) * size[1] / output_size[1])
        )
        yield p, q, [(h, w) for h in rows for w in columns]


@loops("adaptive_avg_pool2d")
def _(x, *, output_size):
    y = np.zeros((*x.shape[:2], *output_size))
    for p, q, inside in adaptive(x.shape[2:], output_size):
        for n, c in np.ndindex(*x.shape[:2]):
            y[n, c, p, q] = sum(x[n, c][at] for at in inside) / len(inside)
    return y


@loops("adaptive_avg_pool2d_input")
def _(y, *, input_size):
    x = np.zeros((*y.shape[:2], *input_size))
    for p, q, inside in adaptive(input_size, y.shape[2:]):
        for n, c in np.ndindex(*y.shape[:2]):
            for at in inside:
                x[n, c][at] += y[n, c, p, q] / len(inside)
    return x


@loops("adaptive_max_pool2d_index")
def _(x, *, output_size):
    y = np.zeros((*x.shape[:2], *output_size), dtype=np.int64)
    for p, q, inside in adaptive(x.shape[2:], output_size):
        for n, c in np.ndindex(*x.shape[:2]):
            h, w = max(inside, key=lambda at, plane=x[n, c]: plane[at])
            y[n, c, p, q] = h * x.shape[3] + w
    return y


@pytorch("max_pool2d")
def _(x, **how):
    import torch.nn.functional as F

    return F.max_pool2d(x, **how)


@pytorch("max_pool2d_index")
def _(x, **how):
    import torch.nn.functional as F

    return F.max_pool2d(x, **how, return_indices=True)[1].int()


@pytorch("max_pool2d_input")
def _(y, index, *, input_size):
    import torch

    zeros = torch.zeros(*y.shape[:2], input_size[0] * input_size[1], dtype=y.dtype)
    x = zeros.scatter_add(2, index.flatten(2).long(), y.flatten(2))
    return x.unflatten(2, tuple(input_size))


@pytorch("avg_pool2d")
def _(x, **how):
    import torch.nn.functional as F

    return F.avg_pool2d(x, **how)


@pytorch("avg_pool2d_input")
def _(y, *, input_size, **how):
    import torch.nn.functional as F

    return transposed(lambda x: F.avg_pool2d(x, **how), y, input_size)


@pytorch("adaptive_avg_pool2d")
def _(x, *, output_size):
    import torch.nn.functional as F

    return F.adaptive_avg_pool2d(x, output_size)


@pytorch("adaptive_avg_pool2d_input")
def _(y, *, input_size):
    import torch.nn.functional as F

    return transposed(lambda x: F.adaptive_avg_pool2d(x, tuple(y.shape[2:])), y, input_size)


@pytorch("adaptive_max_pool2d_index")
def _(x, *, output_size):
    import torch.nn.functional as F

    return F.adaptive_max_pool2d(x, output_size, return_indices=True)[1]


def transposed(f, y, input_size):
    """The transpose of a linear map f of images, applied to y (differentiable in y)."""
    import torch

    x = torch.zeros(*y.shape[:2], *input_size, dtype=y.dtype, requires_grad=True)
    return torch.autograd.grad(f(x), x, y, create_graph=True)[0]
