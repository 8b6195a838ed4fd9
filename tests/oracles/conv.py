"""Oracles of `minidl.ops.conv`."""

import numpy as np

from tests.oracles import LOOPS, loops, pytorch


def terms(x_shape, w_shape, y_size, stride, padding, dilation, groups):
    """Every (x index, w index, y index) whose product the convolution's sum contains."""
    n, _, height, width = x_shape
    o, c, kh, kw = w_shape
    for m, k, p, q, d, i, j in np.ndindex(n, o, *y_size, c, kh, kw):
        row = p * stride[0] - padding[0] + i * dilation[0]
        column = q * stride[1] - padding[1] + j * dilation[1]
        if 0 <= row < height and 0 <= column < width:
            group = k // (o // groups)
            yield (m, group * c + d, row, column), (k, d, i, j), (m, k, p, q)


def length(size, kernel, stride, padding, dilation):
    """Count the windows by trying."""
    count = 0
    while count * stride + dilation * (kernel - 1) < size + 2 * padding:
        count += 1
    return count


@loops("conv2d")
def _(x, w, b, *, stride, padding, dilation, groups):
    size = [
        length(x.shape[2 + a], w.shape[2 + a], stride[a], padding[a], dilation[a]) for a in (0, 1)
    ]
    y = np.zeros((x.shape[0], w.shape[0], *size))
    if b is not None:
        y += b.reshape(-1, 1, 1)
    for at_x, at_w, at_y in terms(x.shape, w.shape, size, stride, padding, dilation, groups):
        y[at_y] += x[at_x] * w[at_w]
    return y


@loops("conv2d_relu")
def _(x, w, b, **settings):
    y = LOOPS["conv2d"](x, w, b, **settings)
    for at in np.ndindex(y.shape):
        y[at] = y[at] if y[at] > 0 else 0.0
    return y


@loops("conv2d_input")
def _(y, w, *, input_size, stride, padding, dilation, groups):
    x = np.zeros((y.shape[0], w.shape[1] * groups, *input_size))
    for at_x, at_w, at_y in terms(x.shape, w.shape, y.shape[2:], stride, padding, dilation, groups):
        x[at_x] += y[at_y] * w[at_w]
    return x


@loops("conv2d_weight")
def _(y, x, *, kernel_size, stride, padding, dilation, groups):
    w = np.zeros((y.shape[1], x.shape[1] // groups, *kernel_size))
    for at_x, at_w, at_y in terms(x.shape, w.shape, y.shape[2:], stride, padding, dilation, groups):
        w[at_w] += y[at_y] * x[at_x]
    return w


@pytorch("conv2d")
def _(x, w, b, **settings):
    import torch.nn.functional as F

    return F.conv2d(x, w, b, **settings)


@pytorch("conv2d_relu")
def _(x, w, b, **settings):
    import torch.nn.functional as F

    return F.relu(F.conv2d(x, w, b, **settings))


@pytorch("conv2d_input")
def _(y, w, *, input_size, **settings):
    import torch
    import torch.nn.functional as F

    shape = (y.shape[0], w.shape[1] * settings["groups"], *input_size)
    x = torch.zeros(shape, dtype=y.dtype, requires_grad=True)
    return torch.autograd.grad(F.conv2d(x, w, **settings), x, y, create_graph=True)[0]


@pytorch("conv2d_weight")
def _(y, x, *, kernel_size, **settings):
    import torch
    import torch.nn.functional as F

    shape = (y.shape[1], x.shape[1] // settings["groups"], *kernel_size)
    w = torch.zeros(shape, dtype=y.dtype, requires_grad=True)
    return torch.autograd.grad(F.conv2d(x, w, **settings), w, y, create_graph=True)[0]
