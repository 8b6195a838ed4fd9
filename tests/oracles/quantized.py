"""Oracles of `minidl.ops.quantized` and `minidl.ops.narrow`."""

import numpy as np

from tests.oracles import LOOPS, loops, pytorch


def at(v, i):
    """The i-th of a vector; the one of a scalar; 0 of None."""
    if v is None:
        return 0
    v = np.asarray(v)
    return v.reshape(-1)[0 if v.size == 1 else i].item()


def half_to_even(x):
    return round(float(x))  # Python's rule


def saturated(x, dtype):
    limits = np.iinfo(dtype)
    return min(max(x, limits.min), limits.max)


@loops("quantize_linear")
def _(x, scale, zero_point, axis):
    y = np.zeros(x.shape, zero_point.dtype)
    for i in np.ndindex(x.shape):
        q = half_to_even(x[i] / at(scale, i[axis])) + at(zero_point, i[axis])
        y[i] = saturated(q, y.dtype)
    return y


@loops("dequantize_linear")
def _(q, scale, zero_point, axis):
    y = np.zeros(q.shape)
    for i in np.ndindex(q.shape):
        y[i] = (int(q[i]) - at(zero_point, i[axis])) * at(scale, i[axis])
    return y


def finish(total, channel, scale, bias, zero_point, relu):
    if scale is None:
        y = total + at(bias, channel)
        return max(y, 0) if relu else y
    if bias is None or bias.dtype.kind == "i":
        y = (total + at(bias, channel)) * at(scale, channel)
    else:
        y = total * at(scale, channel) + at(bias, channel)
    y = max(y, 0) if relu else y
    if zero_point is None:
        return y
    return saturated(half_to_even(y) + int(zero_point), zero_point.dtype)


def result_dtype(scale, zero_point):
    return np.int32 if scale is None else np.float64 if zero_point is None else zero_point.dtype


@loops("matmul_integer")
def _(a, b, a_zero_point, b_zero_point, scale, bias, zero_point, relu):
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = np.broadcast_to(a, batch + a.shape[-2:]), np.broadcast_to(b, batch + b.shape[-2:])
    y = np.zeros(batch + (a.shape[-2], b.shape[-1]), result_dtype(scale, zero_point))
    for i in np.ndindex(y.shape):
        *of, m, n = i
        total = 0
        for k in range(a.shape[-1]):
            left = int(a[(*of, m, k)]) - at(a_zero_point, m)
            total += left * (int(b[(*of, k, n)]) - at(b_zero_point, n))
        y[i] = finish(total, n, scale, bias, zero_point, relu)
    return y


@loops("conv_integer")
def _(x, w, x_zero_point, w_zero_point, scale, bias, zero_point, relu, **geometry):
    x = x.astype(float) - at(x_zero_point, 0)
    zeros = [at(w_zero_point, o) for o in range(len(w))]
    w = np.stack([of.astype(float) - zero for of, zero in zip(w, zeros)])
    total = LOOPS["conv2d"](x, w, None, **geometry)
    y = np.zeros(total.shape, result_dtype(scale, zero_point))
    for i in np.ndindex(y.shape):
        y[i] = finish(int(total[i]), i[1], scale, bias, zero_point, relu)
    return y


@loops("add_integer")
def _(a, b, a_scale, b_scale, a_zero_point, b_zero_point, zero_point, relu):
    y = np.zeros(a.shape, zero_point.dtype)
    for i in np.ndindex(a.shape):
        x = (int(a[i]) - int(a_zero_point)) * a_scale + (int(b[i]) - int(b_zero_point)) * b_scale
        x = max(x, 0) if relu else x
        y[i] = saturated(half_to_even(x) + int(zero_point), y.dtype)
    return y


@loops("adaptive_avg_pool2d_integer")
def _(x, scale, x_zero_point, zero_point, output_size):
    mean = LOOPS["adaptive_avg_pool2d"](
        x.astype(float) - int(x_zero_point), output_size=output_size
    )
    y = np.zeros(mean.shape, zero_point.dtype)
    for i in np.ndindex(y.shape):
        y[i] = saturated(half_to_even(mean[i] * scale) + int(zero_point), y.dtype)
    return y


@loops("linear_weight_only")
def _(x, w, scale, b):
    y = np.zeros((*x.shape[:-1], w.shape[0]))
    for i in np.ndindex(y.shape):
        for k in range(w.shape[1]):
            y[i] += x[(*i[:-1], k)] * w[i[-1], k]
        y[i] = y[i] * (1 if scale is None else scale[i[-1]]) + at(b, i[-1])
    return y


def bytes_by_loops(x):
    """ONNX's DynamicQuantizeLinear, number by number."""
    numbers = [0.0, *x.ravel().tolist()]
    low, high = min(numbers), max(numbers)
    scale = (high - low) / 255 or 1.0
    zero = saturated(half_to_even(-low / scale), np.uint8)
    q = [saturated(half_to_even(v / scale) + zero, np.uint8) for v in numbers[1:]]
    return np.array(q, np.uint8).reshape(x.shape), scale, np.uint8(zero)


@loops("linear_dynamic")
def _(x, w, w_scale, b):
    q, scale, zero = bytes_by_loops(x)
    how = scale * w_scale, b, None, False
    y = LOOPS["matmul_integer"](q.reshape(-1, q.shape[-1]), w.T, zero, None, *how)
    return y.reshape(*x.shape[:-1], len(w))


@loops("conv2d_dynamic")
def _(x, w, w_scale, b, relu, **geometry):
    q, scale, zero = bytes_by_loops(x)
    return LOOPS["conv_integer"](q, w, zero, None, scale * w_scale, b, None, relu, **geometry)


@loops("linear_int4")
def _(x, w, scale, b, group_size):
    y = np.zeros((*x.shape[:-1], len(w)))
    for i in np.ndindex(y.shape):
        for k in range(x.shape[-1]):
            byte = int(w[i[-1], k // 2])
            half = byte // 16 if k % 2 else byte % 16
            q = half - 16 if half > 7 else half
            y[i] += x[(*i[:-1], k)] * q * scale[i[-1], k // group_size]
        y[i] += at(b, i[-1])
    return y


# PyTorch ----------------------------------------------------------------------------------


def expand(v, x, axis):
    """A vector along an axis of x."""
    if v is None:
        return 0
    return v.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])


@pytorch("quantize_linear")
def _(x, scale, zero_point, axis):
    import torch

    limits = torch.iinfo(zero_point.dtype)
    scale = scale.double().expand(x.shape[axis]) if scale.numel() == 1 else scale.double()
    zero = zero_point.int().expand(x.shape[axis]) if zero_point.numel() == 1 else zero_point.int()
    q = torch.round(x / expand(scale, x, axis)) + expand(zero, x, axis)
    return q.clamp(limits.min, limits.max).to(zero_point.dtype)


@pytorch("dequantize_linear")
def _(q, scale, zero_point, axis):
    zero = 0 if zero_point is None else expand(zero_point.int(), q, axis)
    return (q.int() - zero) * expand(scale, q, axis)


def finish_torch(total, scale, bias, zero_point, relu, axis):
    import torch

    bias = expand(bias, total, axis)
    if scale is None:
        y = (total + bias).int()
        return y.clamp(min=0) if relu else y
    scale = expand(scale, total, axis)
    whole = not (torch.is_tensor(bias) and bias.is_floating_point())
    y = (total + bias) * scale if whole else total * scale + bias
    y = y.clamp(min=0) if relu else y
    if zero_point is None:
        return y
    limits = torch.iinfo(zero_point.dtype)
    y = torch.round(y) + zero_point.int()
    return y.clamp(limits.min, limits.max).to(zero_point.dtype)


@pytorch("matmul_integer")
def _(a, b, a_zero_point, b_zero_point, scale, bias, zero_point, relu):
    a_zero = 0 if a_zero_point is None else expand(a_zero_point.long(), a, -2)
    b_zero = 0 if b_zero_point is None else expand(b_zero_point.long(), b, -1)
    total = (a.long() - a_zero) @ (b.long() - b_zero)
    return finish_torch(total, scale, bias, zero_point, relu, -1)


@pytorch("conv_integer")
def _(x, w, x_zero_point, w_zero_point, scale, bias, zero_point, relu, **geometry):
    import torch

    x_zero = 0 if x_zero_point is None else x_zero_point.double()
    w_zero = 0 if w_zero_point is None else expand(w_zero_point.double(), w, 0)
    total = torch.nn.functional.conv2d(x.double() - x_zero, w.double() - w_zero, **geometry)
    return finish_torch(total.round().long(), scale, bias, zero_point, relu, 1)


def bytes_of(y, zero_point):
    import torch

    limits = torch.iinfo(zero_point.dtype)
    y = torch.round(y) + zero_point.int()
    return y.clamp(limits.min, limits.max).to(zero_point.dtype)


@pytorch("add_integer")
def _(a, b, a_scale, b_scale, a_zero_point, b_zero_point, zero_point, relu):
    y = (a.int() - a_zero_point.int()) * a_scale + (b.int() - b_zero_point.int()) * b_scale
    return bytes_of(y.clamp(min=0) if relu else y, zero_point)


@pytorch("adaptive_avg_pool2d_integer")
def _(x, scale, x_zero_point, zero_point, output_size):
    import torch

    mean = torch.nn.functional.adaptive_avg_pool2d(x.double() - x_zero_point.int(), output_size)
    return bytes_of(mean * scale, zero_point)


@pytorch("linear_weight_only")
def _(x, w, scale, b):
    y = x @ w.to(x.dtype).T
    y = y if scale is None else y * scale
    return y if b is None else y + b


def rounded_torch(x):
    """What `dynamic_quantize_linear` makes of x, as the numbers that its bytes stand for."""
    import torch

    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low) / 255 if high > low else torch.ones(())
    zero = torch.round(-low / scale)
    return ((torch.round(x / scale) + zero).clamp(0, 255) - zero) * scale


@pytorch("linear_dynamic")
def _(x, w, w_scale, b):
    import torch

    w = w.double() * w_scale[:, None]
    return torch.nn.functional.linear(rounded_torch(x), w, b)


@pytorch("conv2d_dynamic")
def _(x, w, w_scale, b, relu, **geometry):
    import torch

    w = w.double() * w_scale[:, None, None, None]
    y = torch.nn.functional.conv2d(rounded_torch(x), w, b, **geometry)
    return y.clamp(min=0) if relu else y


@pytorch("linear_int4")
def _(x, w, scale, b, group_size):
    import torch

    halves = torch.stack([w % 16, w // 16], -1).flatten(1)[:, : x.shape[-1]].to(x.dtype)
    q = torch.where(halves > 7, halves - 16, halves)
    w = q * scale.repeat_interleave(group_size, 1)[:, : x.shape[-1]]
    return torch.nn.functional.linear(x, w, b)
