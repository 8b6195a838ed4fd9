"""The CUDA kernels, beside the formulas that they replace.

Every formula runs on CuPy arrays as it is, step by step: a kernel for each operator, each reading
and writing the memory of the GPU. Here are the ops for which one kernel does it all
(`minidl.backend.cuda_launch`, `csrc/cuda`), all in float32 unless they say otherwise. A shape that
a kernel does not cover is left to the formula, as each docstring says.

For a matrix product the formula calls cuBLAS, which is the default; our own is "cuda", and the way
there, rung by rung, is "cuda_naive" ... "cuda_tensor" (`csrc/cuda/ladder.cu`).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from minidl import backend
from minidl.backend import cuda_launch
from minidl.ops.conv import conv2d, conv2d_input, conv2d_weight, im2col
from minidl.ops.dropout import dropout
from minidl.ops.linalg import matmul
from minidl.ops.norm import standardize
from minidl.ops.quantized import conv_integer, expect_bytes, finish, matmul_integer
from minidl.ops.rnn import gru, lstm
from minidl.ops.softmax import log_softmax, softmax

FLOAT32 = ("float32",)

# Convolution ------------------------------------------------------------------------------

for each in (conv2d, conv2d_input, conv2d_weight):
    each.kernel("cuda", device="cuda", dtypes=FLOAT32)(getattr(cuda_launch, each.__name__))

# Matrix products --------------------------------------------------------------------------


def of_matrices(kernel: Any, x: Any, y: Any) -> Any:
    """A kernel for two matrices of one dtype, the formula for anything else."""
    fits = x.ndim == y.ndim == 2 and x.dtype == y.dtype
    return kernel(x, y) if fits else matmul.op.formula(x, y)


for rung in cuda_launch.LADDER:
    matmul.kernel(
        f"cuda_{rung}", device="cuda", default=False,
        dtypes=("float16",) if rung == "tensor" else FLOAT32,
    )(functools.partial(of_matrices, functools.partial(cuda_launch.ladder, rung)))  # fmt: skip


@matmul.kernel("cuda", device="cuda", dtypes=("float32", "float16"), default=False)
def _(x, y):
    """Batches of matrices too in float32; the formula for vectors, and for batches in float16."""
    if x.ndim < 2 or y.ndim < 2 or x.dtype != y.dtype:
        return matmul.op.formula(x, y)
    if x.dtype == np.float32:
        return cuda_launch.matmul(x, y)
    return of_matrices(cuda_launch.matmul_f16, x, y)


# Normalisation, softmax, dropout ----------------------------------------------------------


@standardize.kernel("cuda", device="cuda", dtypes=FLOAT32)
def _(x, weight, bias, *, dim, eps=1e-5, statistics=None):
    """The formula where the dimensions that are kept do not lie side by side."""
    if not cuda_launch.can_standardize(x, weight, bias, dim):
        return standardize.op.formula(x, weight, bias, dim=dim, eps=eps, statistics=statistics)
    return cuda_launch.standardize(x, weight, bias, dim=dim, eps=eps)


@standardize.gradient_kernel("cuda", device="cuda", dtypes=FLOAT32)
def _(g, x, weight, bias_shape, *, dim, eps, statistics):
    """dx by the kernel, where the forward kernel is one; the sums over g where it gives them."""
    rule = functools.partial(standardize.op.rule, g, x, weight, bias_shape, dim=dim, eps=eps)
    to_x, to_weight, to_bias = rule(statistics=statistics)
    if not cuda_launch.can_standardize(x, weight, None, dim):
        return to_x, to_weight, to_bias
    dx, dweight, dbias = cuda_launch.standardize_gradient(g, x, weight, dim=dim, eps=eps)
    if weight is None or dweight is None or dweight.size != weight.size:
        return dx, to_weight, to_bias
    if bias_shape == weight.shape:
        to_bias = dbias.reshape(weight.shape)
    return dx, dweight.reshape(weight.shape), to_bias


for each in (softmax, log_softmax):
    each.kernel("cuda", device="cuda", dtypes=FLOAT32)(getattr(cuda_launch, each.__name__))


@softmax.gradient_kernel("cuda", device="cuda", dtypes=FLOAT32)
def _(g, out, *, dim):
    return (cuda_launch.softmax_gradient(g, out, dim=dim),)


@log_softmax.gradient_kernel("cuda", device="cuda", dtypes=FLOAT32)
def _(g, out, *, dim):
    return (cuda_launch.log_softmax_gradient(g, out, dim=dim),)


@dropout.kernel("cuda", device="cuda", dtypes=FLOAT32)
def _(x, *, p, key, mask_shape=None):
    """With a mask of another shape, the mask alone is made by a kernel."""
    if mask_shape is None or mask_shape == x.shape:
        return cuda_launch.dropout(x, p=p, key=key)
    keep = cuda_launch.uniform(key, math.prod(mask_shape), x).reshape(mask_shape) >= p
    return np.where(keep, x * (1 / (1 - p) if p < 1 else 1.0), 0)


# Recurrent layers -------------------------------------------------------------------------


@lstm.kernel("cuda", device="cuda", dtypes=FLOAT32)
def _(x, h0, c0, w_ih, w_hh, b_ih, b_hh, lengths):
    return cuda_launch.lstm(x, h0, c0, w_ih, w_hh, b_ih, b_hh, as_int64(lengths))


@lstm.gradient_kernel("cuda", device="cuda", dtypes=FLOAT32)
def _(g, out, x, h0, c0, w_ih, w_hh, b_ih, b_hh, lengths):
    return cuda_launch.lstm_gradient(
        g, out, x, h0, c0, w_ih, w_hh, b_ih, b_hh, as_int64(lengths)
    )  # fmt: skip


@gru.kernel("cuda", device="cuda", dtypes=FLOAT32)
def _(x, h0, w_ih, w_hh, b_ih, b_hh, lengths):
    return cuda_launch.gru(x, h0, w_ih, w_hh, b_ih, b_hh, as_int64(lengths))


@gru.gradient_kernel("cuda", device="cuda", dtypes=FLOAT32)
def _(g, out, x, h0, w_ih, w_hh, b_ih, b_hh, lengths):
    return cuda_launch.gru_gradient(g, out, x, h0, w_ih, w_hh, b_ih, b_hh, as_int64(lengths))


def as_int64(lengths: Any) -> Any:
    """What the kernels read."""
    return None if lengths is None else lengths.astype(np.int64, copy=False)


# Integer products -------------------------------------------------------------------------
#
#   Σ (a - z_a)(b - z_b)  =  Σ a b  -  z_a Σ b  -  z_b Σ a  +  K z_a z_b
#
# The tensor cores do the first sum, on int8; the others are of one row or column each. What
# overflows 32 bits on the way comes back: the whole fits, and integers wrap around.


def as_int8(q: Any, zero_point: Any) -> tuple[Any, Any]:
    """The same numbers as int8 with an int32 zero point (uint8 is moved by 128), None for 0."""
    zero = None if zero_point is None else zero_point.astype(np.int32)
    if q.dtype == np.int8:
        return q, zero
    return (q ^ np.uint8(128)).view(np.int8), (0 if zero is None else zero) - np.int32(128)


def integer_sums(a: Any, b: Any, a_zero: Any, b_zero: Any) -> Any:
    """int8 (M, K), (N, K), and zero points that broadcast to (M, 1) and (N,) -> int32 (M, N)."""
    total = cuda_launch.matmul_s8(a, b)
    if a_zero is not None:
        total -= a_zero * b.sum(axis=1, dtype=np.int32)
    if b_zero is not None:
        total -= a.sum(axis=1, dtype=np.int32, keepdims=True) * b_zero
        if a_zero is not None:
            total += np.int32(a.shape[1]) * a_zero * b_zero
    return total


@matmul_integer.kernel("cuda", device="cuda")
def _(a, b, a_zero_point, b_zero_point, scale, bias, zero_point, *, relu=False):
    """On the int8 tensor cores; the formula where b is a batch, or a type is wrong."""
    bytes_ = all(x.dtype.name in ("int8", "uint8") for x in (a, b))
    if a.ndim < 2 or b.ndim != 2 or not bytes_ or a.shape[-1] != b.shape[0]:
        return matmul_integer.op.formula(
            a, b, a_zero_point, b_zero_point, scale, bias, zero_point, relu=relu
        )
    a8, a_zero = as_int8(a.reshape(-1, a.shape[-1]), a_zero_point)
    b8, b_zero = as_int8(b.T, b_zero_point)
    if a_zero is not None and np.size(a_zero) > 1:  # one for each row
        a_zero = np.broadcast_to(a_zero.reshape(-1, 1), (*a.shape[:-1], 1)).reshape(-1, 1)
    total = integer_sums(a8, b8, a_zero, b_zero).reshape(*a.shape[:-1], b.shape[1])
    return finish(total, scale, bias, zero_point, relu, -1)


@conv_integer.kernel("cuda", device="cuda")
def _(
    x, w, x_zero_point, w_zero_point, scale, bias, zero_point, *,
    stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, relu=False,
):  # fmt: skip
    """The columns of `im2col`, multiplied on the int8 tensor cores."""
    expect_bytes("x", x)
    expect_bytes("w", w)
    x8, x_zero = as_int8(x, x_zero_point)
    w8, w_zero = as_int8(w, w_zero_point)
    if x_zero is not None and any(padding):  # beyond the edges lies x_zero, and not 0
        wide = [(0, 0), (0, 0), *((p, p) for p in padding)]
        x8 = np.pad(x8, wide, constant_values=x_zero.item())
        padding = (0, 0)
    columns, size = im2col(x8, w.shape[2:], stride, padding, dilation, groups)
    w8 = w8.reshape(groups, w.shape[0] // groups, -1)
    zeros = [None] * groups if w_zero is None else list(per_group(w_zero, w.shape[0], groups))
    xp = backend.array_module(x)
    sums = xp.stack([integer_sums(w8[i], columns[i].T, zeros[i], x_zero) for i in range(groups)])
    total = sums.reshape(w.shape[0], x.shape[0], *size).swapaxes(0, 1)
    return finish(total, scale, bias, zero_point, relu, 1)


def per_group(zero: Any, channels: int, groups: int) -> Any:
    """Zero points of the output channels, one or one for each, as (groups, O / groups, 1)."""
    return np.broadcast_to(zero.reshape(-1), (channels,)).reshape(groups, -1, 1)
