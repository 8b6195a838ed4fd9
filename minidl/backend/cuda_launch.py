"""The host's side of the CUDA kernels: shapes in, grids and arguments out.

A function here checks nothing that an op has checked: it allocates the result, chooses the tiles
and launches. On CuPy arrays the kernels run on their GPU; on NumPy arrays the same kernels run on
the CPU, on fibers (`csrc/cuda/cuda_on_cpu.h`): for tests, and for stepping through them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from minidl import backend
from minidl.backend import cuda_kernels

i32, i64, f32 = np.int32, np.int64, np.float32
null = np.uintp(0)
STAGES = 3  # as in gemm.cuh
BUSY = 100  # blocks that keep a GPU busy: if large tiles make fewer, take small ones


def function(file: str, name: str, array: Any) -> Callable[..., None]:
    """A kernel, compiled for where `array` is."""
    on_gpu = backend.device_type(array) == "cuda"
    load = cuda_kernels.load if on_gpu else cuda_kernels.load_on_cpu
    return load(file).get_function(name)


def tiles(length: int, tile: int) -> int:
    return -(-length // tile)


def slab_bytes(size: int, item: int, along_k: bool) -> int:
    """Shared memory of one slab of a tile of gemm.cuh."""
    if item == 4:
        return 16 * (size + 4) * 4
    return size * 64 if along_k else 32 * (size * 2 + 16)


def shared_bytes(size: int, item: int, a_along_k: bool = True, b_along_k: bool = True) -> int:
    return STAGES * (slab_bytes(size, item, a_along_k) + slab_bytes(size, item, b_along_k))


def element_strides(x: Any) -> list[int]:
    return [stride // x.itemsize for stride in x.strides]


def float_tile(m: int, n: int, batch: int) -> tuple[str, int, int]:
    """Which float32 kernel: the end of its name, the side of its tile, its threads."""
    if tiles(m, 128) * tiles(n, 128) * batch >= BUSY:
        return "large", 128, 256
    return "small", 64, 64


def check_size(*arrays: Any) -> None:
    """Kernels count elements in 31 bits."""
    for x in arrays:
        if x.size >= 2**31:
            raise ValueError(f"a CUDA kernel takes fewer than 2³¹ elements, got {x.shape}")


# Matrix products --------------------------------------------------------------------------


def matmul(a: Any, b: Any) -> Any:
    """float32 (..., M, K) @ (..., K, N), any strides, in exact float32 (no TF32)."""
    xp = backend.array_module(a)
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    batch_shape = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    y = xp.empty((*batch_shape, m, n), np.float32)
    if y.size == 0:
        return y
    check_size(a, b, y)
    batch = math.prod(batch_shape)
    a, b = (
        xp.broadcast_to(x, (*batch_shape, *x.shape[-2:])).reshape(batch, *x.shape[-2:])
        for x in (a, b)
    )
    size, tile, threads = float_tile(m, n, batch)
    launch = function("matmul.cu", f"matmul_f32_{size}", y)
    a_batch, a_m, a_k = element_strides(a)
    b_batch, b_k, b_n = element_strides(b)
    launch(
        (tiles(n, tile), tiles(m, tile), batch),
        (threads,),
        (i32(m), i32(n), i32(k), a, i32(a_m), i32(a_k), i64(a_batch))
        + (b, i32(b_k), i32(b_n), i64(b_batch), y),
        shared_mem=shared_bytes(tile, 4),
    )
    return y


def aligned_rows(x: Any) -> tuple[Any, np.int32]:
    """A matrix whose rows begin at multiples of 16 bytes, x or a copy; and their pitch."""
    pointer = x.ctypes.data if backend.device_type(x) == "cpu" else x.data.ptr
    if x.strides[1] == x.itemsize and x.strides[0] % 16 == 0 and pointer % 16 == 0:
        return x, i32(x.strides[0] // x.itemsize)
    vector = 16 // x.itemsize
    pitch = tiles(x.shape[1], vector) * vector
    copy = backend.array_module(x).empty((x.shape[0], pitch), x.dtype)
    copy[:, : x.shape[1]] = x
    return copy, i32(pitch)


def matmul_f16(a: Any, b: Any) -> Any:
    """float16 (M, K) @ (K, N) -> float16, on the tensor cores, with float32 sums."""
    (m, k), n = a.shape, b.shape[1]
    y = backend.array_module(a).empty((m, n), np.float16)
    if y.size:
        (a, a_pitch), (b, b_pitch) = aligned_rows(a), aligned_rows(b)
        function("matmul.cu", "matmul_f16_nn", y)(
            (tiles(n, 128), tiles(m, 128)), (128,),
            (i32(m), i32(n), i32(k), a, a_pitch, b, b_pitch, y),
            shared_mem=shared_bytes(128, 2, b_along_k=False),
        )  # fmt: skip
    return y


def linear_f16(x: Any, w: Any, bias: Any | None = None) -> Any:
    """float16 x (M, K), w (N, K), float32 bias (N,) -> float32 x wᵀ + bias."""
    (m, k), n = x.shape, w.shape[0]
    y = backend.array_module(x).empty((m, n), np.float32)
    if y.size:
        (x, x_pitch), (w, w_pitch) = aligned_rows(x), aligned_rows(w)
        function("matmul.cu", "matmul_f16_nt", y)(
            (tiles(n, 128), tiles(m, 128)), (128,),
            (i32(m), i32(n), i32(k), x, x_pitch, w, w_pitch, null if bias is None else bias, y),
            shared_mem=shared_bytes(128, 2),
        )  # fmt: skip
    return y


def matmul_f16_tn(a: Any, b: Any) -> Any:
    """float16 aᵀ b: (K, M), (K, N) -> float32 (M, N)."""
    (k, m), n = a.shape, b.shape[1]
    y = backend.array_module(a).empty((m, n), np.float32)
    if y.size:
        (a, a_pitch), (b, b_pitch) = aligned_rows(a), aligned_rows(b)
        function("matmul.cu", "matmul_f16_tn", y)(
            (tiles(n, 128), tiles(m, 128)), (128,),
            (i32(m), i32(n), i32(k), a, a_pitch, b, b_pitch, y),
            shared_mem=shared_bytes(128, 2, False, False),
        )  # fmt: skip
    return y


def matmul_s8(x: Any, w: Any) -> Any:
    """int8 x wᵀ, exact: (M, K), (N, K) -> int32 (M, N)."""
    (m, k), n = x.shape, w.shape[0]
    y = backend.array_module(x).empty((m, n), np.int32)
    if y.size:
        (x, x_pitch), (w, w_pitch) = aligned_rows(x), aligned_rows(w)
        function("matmul.cu", "matmul_s8", y)(
            (tiles(n, 128), tiles(m, 128)), (128,),
            (i32(m), i32(n), i32(k), x, x_pitch, w, w_pitch, y),
            shared_mem=shared_bytes(128, 1),
        )  # fmt: skip
    return y


def linear_s8(x: Any, w: Any, x_scale: Any, w_scale: Any, bias: Any | None = None) -> Any:
    """A linear layer in int8: x (M, K), w (N, K) -> float32 x_scale · w_scale · (x wᵀ) + bias.

    Args:
        x_scale: float32, (M,) or (1,).
        w_scale: float32 (N,).
        bias: float32 (N,), or None.
    """
    (m, k), n = x.shape, w.shape[0]
    y = backend.array_module(x).empty((m, n), np.float32)
    if y.size:
        (x, x_pitch), (w, w_pitch) = aligned_rows(x), aligned_rows(w)
        function("matmul.cu", "linear_s8", y)(
            (tiles(n, 128), tiles(m, 128)), (128,),
            (i32(m), i32(n), i32(k), x, x_pitch, w, w_pitch, x_scale, i32(x_scale.size))
            + (w_scale, null if bias is None else bias, y),
            shared_mem=shared_bytes(128, 1),
        )  # fmt: skip
    return y


# Of ladder.cu: what a block is, and how many rows and columns of the result it computes.
LADDER = {
    "naive": ((32, 32), 32),
    "coalesced": ((32, 32), 32),
    "shared": ((32, 32), 32),
    "register": ((256,), 128),
    "vector": ((256,), 128),
    "tensor": ((128,), 64),
}


def ladder(rung: str, a: Any, b: Any) -> Any:
    """(M, K) @ (K, N) by a rung of ladder.cu; "tensor" takes float16, the others float32."""
    a, b = contiguous(a, b)
    (m, k), n = a.shape, b.shape[1]
    y = backend.array_module(a).empty((m, n), a.dtype)
    if y.size:
        check_size(a, b, y)
        block, tile = LADDER[rung]
        grid = tiles(n, tile), tiles(m, tile)
        if rung == "naive":  # x counts the rows
            grid = grid[::-1]
        function("ladder.cu", f"matmul_{rung}", y)(grid, block, (i32(m), i32(n), i32(k), a, b, y))
    return y


# Convolution ------------------------------------------------------------------------------

Pair = tuple[int, int]


def geometry(
    x_shape: Any, w_shape: Any, y_shape: Any, stride: Pair, padding: Pair, dilation: Pair,
    groups: int,
) -> tuple[np.int32, ...]:  # fmt: skip
    """conv.cu's GEOMETRY."""
    n, c, h, w = x_shape
    o, _, r, s = w_shape
    numbers = (n, c // groups, h, w, o // groups, r, s, *y_shape[2:], *stride, *padding, *dilation)
    return tuple(map(i32, numbers))


def out_shape(x: Any, w: Any, stride: Pair, padding: Pair, dilation: Pair) -> tuple[int, ...]:
    size = (
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (w.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    )
    return (x.shape[0], w.shape[0], *size)


def contiguous(*arrays: Any) -> list[Any]:
    return [backend.array_module(x).ascontiguousarray(x) for x in arrays]


def conv2d(
    x: Any, w: Any, b: Any | None = None, *, stride: Pair = (1, 1), padding: Pair = (0, 0),
    dilation: Pair = (1, 1), groups: int = 1,
) -> Any:  # fmt: skip
    """The op `conv2d` in float32."""
    x, w = contiguous(x, w)
    y = backend.array_module(x).empty(out_shape(x, w, stride, padding, dilation), np.float32)
    if y.size == 0:
        return y
    check_size(x, w, y)
    m, n = w.shape[0] // groups, y.shape[0] * y.shape[2] * y.shape[3]
    size, tile, threads = float_tile(m, n, groups)
    function("conv.cu", f"conv2d_f32_{size}", y)(
        (tiles(n, tile), tiles(m, tile), groups), (threads,),
        (*geometry(x.shape, w.shape, y.shape, stride, padding, dilation, groups),
         x, w, null if b is None else contiguous(b)[0], y),
        shared_mem=shared_bytes(tile, 4),
    )  # fmt: skip
    return y


def conv2d_input(
    y: Any, w: Any, *, input_size: Pair, stride: Pair = (1, 1), padding: Pair = (0, 0),
    dilation: Pair = (1, 1), groups: int = 1,
) -> Any:  # fmt: skip
    """The op `conv2d_input` in float32."""
    y, w = contiguous(y, w)
    channels = w.shape[1] * groups
    x = backend.array_module(y).empty((y.shape[0], channels, *input_size), np.float32)
    if x.size == 0:
        return x
    check_size(x, w, y)
    m, n = w.shape[1], x.shape[0] * x.shape[2] * x.shape[3]
    size, tile, threads = float_tile(m, n, groups)
    function("conv.cu", f"conv2d_input_f32_{size}", x)(
        (tiles(n, tile), tiles(m, tile), groups), (threads,),
        (*geometry(x.shape, w.shape, y.shape, stride, padding, dilation, groups), y, w, x),
        shared_mem=shared_bytes(tile, 4),
    )  # fmt: skip
    return x


def conv2d_weight(
    y: Any, x: Any, *, kernel_size: Pair, stride: Pair = (1, 1), padding: Pair = (0, 0),
    dilation: Pair = (1, 1), groups: int = 1,
) -> Any:  # fmt: skip
    """The op `conv2d_weight` in float32."""
    y, x = contiguous(y, x)
    shape = (y.shape[1], x.shape[1] // groups, *kernel_size)
    pixels = y.shape[0] * y.shape[2] * y.shape[3]
    if math.prod(shape) == 0 or pixels == 0:
        return backend.array_module(x).zeros(shape, np.float32)
    check_size(x, y)
    m, n = shape[0] // groups, math.prod(shape[1:])
    size, tile, threads = float_tile(m, n, groups)
    blocks = tiles(n, tile) * tiles(m, tile) * groups

    def launch(splits: int, part: int, w: Any) -> None:
        function("conv.cu", f"conv2d_weight_f32_{size}", w)(
            (tiles(n, tile), tiles(m, tile), groups * splits), (threads,),
            (*geometry(x.shape, shape, y.shape, stride, padding, dilation, groups),
             i32(splits), i32(part), y, x, w),
            shared_mem=shared_bytes(tile, 4),
        )  # fmt: skip

    return in_parts(launch, shape, pixels, blocks, x)


def in_parts(
    launch: Callable[[int, int, Any], None], shape: tuple[int, ...], length: int, blocks: int,
    like: Any,
) -> Any:  # fmt: skip
    """A sum over `length` pixels, cut into parts if `blocks` alone would not keep the GPU busy.

    How it is cut depends on the shape alone, so the bits are the same every time.
    """
    xp = backend.array_module(like)
    # A part is a multiple of 32, a slab of k, and at least 8 of them: shorter ones do not pay.
    splits = max(1, min(4 * BUSY // blocks, length // 256))
    part = tiles(tiles(length, splits), 32) * 32
    splits = tiles(length, part)
    w = xp.empty(shape, np.float32)
    if splits == 1:
        launch(1, part, w)
        return w
    parts = xp.empty((splits, *shape), np.float32)
    launch(splits, part, parts)
    function("reduce.cu", "sum_parts", w)(
        (tiles(w.size, 256),), (256,), (i32(splits), i32(w.size), parts, w)
    )
    return w


def channels_last(x: Any, groups: int, dtype: Any, scale: Any | None = None) -> Any:
    """float32 (N, C, H, W) -> (N, H, W, groups, C / groups padded), float16 or int8.

    Args:
        scale: for int8: float32, (1,) or one for each image, (N,).
    """
    n, c, h, w = x.shape
    vector = 16 // np.dtype(dtype).itemsize
    padded = tiles(c // groups, vector) * vector
    (x,) = contiguous(x)
    y = backend.array_module(x).empty((n, h, w, groups, padded), dtype)
    grid = tiles(h * w, 32), tiles(padded, 32), n * groups
    sizes = i32(groups), i32(c // groups), i32(h * w), i32(padded)
    if scale is None:
        function("quantize.cu", "channels_last_f16", y)(grid, (32, 8), (*sizes, x, y))
    else:
        function("quantize.cu", "channels_last_s8", y)(
            grid, (32, 8), (*sizes, x, scale, i32(scale.size), y)
        )
    return y


def conv2d_f16(
    x: Any, w: Any, *, stride: Pair = (1, 1), padding: Pair = (0, 0), dilation: Pair = (1, 1),
    groups: int = 1, bias: Any | None = None,
) -> Any:  # fmt: skip
    """conv2d of float32 arrays rounded to float16, on the tensor cores, with float32 sums."""
    y = backend.array_module(x).empty(out_shape(x, w, stride, padding, dilation), np.float32)
    if y.size:
        check_size(x, w, y)
        m, n = w.shape[0] // groups, y.shape[0] * y.shape[2] * y.shape[3]
        function("conv.cu", "conv2d_f16", y)(
            (tiles(n, 128), tiles(m, 128), groups), (128,),
            (*geometry(x.shape, w.shape, y.shape, stride, padding, dilation, groups),
             channels_last(x, groups, np.float16), channels_last(w, 1, np.float16),
             null if bias is None else bias, y),
            shared_mem=shared_bytes(128, 2),
        )  # fmt: skip
    return y


def conv2d_input_f16(
    y: Any, w: Any, *, input_size: Pair, stride: Pair = (1, 1), padding: Pair = (0, 0),
    dilation: Pair = (1, 1), groups: int = 1,
) -> Any:  # fmt: skip
    """conv2d_input of float32 arrays rounded to float16, on the tensor cores."""
    x_shape = (y.shape[0], w.shape[1] * groups, *input_size)
    x = backend.array_module(y).empty(x_shape, np.float32)
    if x.size:
        check_size(x, w, y)
        m, n = w.shape[1], x.shape[0] * x.shape[2] * x.shape[3]
        function("conv.cu", "conv2d_input_f16", x)(
            (tiles(n, 128), tiles(m, 128), groups), (128,),
            (*geometry(x.shape, w.shape, y.shape, stride, padding, dilation, groups),
             channels_last(y, groups, np.float16), channels_last(w, 1, np.float16), x),
            shared_mem=shared_bytes(128, 2, a_along_k=False),
        )  # fmt: skip
    return x


def conv2d_weight_f16(
    y: Any, x: Any, *, kernel_size: Pair, stride: Pair = (1, 1), padding: Pair = (0, 0),
    dilation: Pair = (1, 1), groups: int = 1,
) -> Any:  # fmt: skip
    """conv2d_weight of float32 arrays rounded to float16, on the tensor cores."""
    shape = (y.shape[1], x.shape[1] // groups, *kernel_size)
    pixels = y.shape[0] * y.shape[2] * y.shape[3]
    if math.prod(shape) == 0 or pixels == 0:
        return backend.array_module(x).zeros(shape, np.float32)
    check_size(x, y)
    y_half, x_half = channels_last(y, groups, np.float16), channels_last(x, groups, np.float16)
    m, n = shape[0] // groups, math.prod(kernel_size) * x_half.shape[-1]

    def launch(splits: int, part: int, w: Any) -> None:
        function("conv.cu", "conv2d_weight_f16", w)(
            (tiles(n, 128), tiles(m, 128), groups * splits), (128,),
            (*geometry(x.shape, shape, y.shape, stride, padding, dilation, groups),
             i32(splits), i32(part), y_half, x_half, w),
            shared_mem=shared_bytes(128, 2, False, False),
        )  # fmt: skip

    return in_parts(launch, shape, pixels, tiles(n, 128) * tiles(m, 128) * groups, x)


def conv2d_s8(
    x: Any, w: Any, x_scale: Any, w_scale: Any, *, stride: Pair = (1, 1), padding: Pair = (0, 0),
    dilation: Pair = (1, 1), groups: int = 1, bias: Any | None = None,
) -> Any:  # fmt: skip
    """conv2d of float32 arrays rounded to int8 with these scales, (1,) and (O,); float32."""
    y = backend.array_module(x).empty(out_shape(x, w, stride, padding, dilation), np.float32)
    if y.size:
        check_size(x, w, y)
        m, n = w.shape[0] // groups, y.shape[0] * y.shape[2] * y.shape[3]
        function("conv.cu", "conv2d_s8", y)(
            (tiles(n, 128), tiles(m, 128), groups), (128,),
            (*geometry(x.shape, w.shape, y.shape, stride, padding, dilation, groups),
             channels_last(x, groups, np.int8, x_scale), channels_last(w, 1, np.int8, w_scale),
             x_scale, w_scale, null if bias is None else bias, y),
            shared_mem=shared_bytes(128, 1),
        )  # fmt: skip
    return y


# Quantization -----------------------------------------------------------------------------


def absmax(x: Any) -> Any:
    """max |x| of each row: float32 (rows, columns) -> (rows,)."""
    (x,) = contiguous(x)
    largest = backend.array_module(x).empty(x.shape[0], np.float32)
    if largest.size:
        function("quantize.cu", "absmax", x)(
            (x.shape[0],), (256,), (i32(x.shape[0]), i32(x.shape[1]), x, largest)
        )
    return largest


def quantize_s8(x: Any, scale: Any) -> Any:
    """round(x / scale) to int8, float32 (rows, columns), scale (rows,) or (1,).

    Its rows begin at multiples of 16 bytes: it is a view of an array with zeros behind each row.
    """
    return padded_rows("quantize_s8", x, np.int8, (scale, i32(scale.size)))


def to_f16(x: Any) -> Any:
    """float32 (rows, columns) -> float16, with rows that begin at multiples of 16 bytes."""
    return padded_rows("to_f16", x, np.float16, ())


def padded_rows(kernel: str, x: Any, dtype: Any, more: tuple[Any, ...]) -> Any:
    (x,) = contiguous(x)
    rows, columns = x.shape
    vector = 16 // np.dtype(dtype).itemsize
    pitch = tiles(columns, vector) * vector
    y = backend.array_module(x).empty((rows, pitch), dtype)
    if y.size:
        function("quantize.cu", kernel, x)(
            (tiles(pitch, 256), min(rows, 65535)), (256,),
            (i32(rows), i32(columns), i32(pitch), x, *more, y),
        )  # fmt: skip
    return y[:, :columns]


# Element by element -----------------------------------------------------------------------

ACTIVATIONS = ("linear", "relu", "tanh", "sigmoid")  # as elementwise.cu numbers them


def over(length: int) -> tuple[tuple[int], tuple[int]]:
    """Grid and block for so many numbers, one a thread up to a GPU full."""
    return (max(1, min(tiles(length, 256), 32 * 132)),), (256,)


def elementwise(name: str, like: Any, length: int, *args: Any) -> None:
    """Launch a kernel of elementwise.cu whose first argument is the number of elements."""
    function("elementwise.cu", name, like)(*over(length), (i64(length), *args))


def bias_activation(x: Any, bias: Any, activation: str = "relu") -> Any:
    """f(x + bias), x (N, C, ...), bias (C,)."""
    (x,) = contiguous(x)
    y = backend.array_module(x).empty_like(x)
    channels, area = i32(x.shape[1]), i32(math.prod(x.shape[2:]))
    kind = i32(ACTIVATIONS.index(activation))
    if y.size:
        elementwise("bias_activation", x, x.size, channels, area, kind, x, bias, y)
    return y


def activation_gradient(g: Any, y: Any, activation: str = "relu") -> Any:
    """g · f'(x), from y = f(x)."""
    g, y = contiguous(g, y)
    dx = backend.array_module(y).empty_like(y)
    if dx.size:
        kind = i32(ACTIVATIONS.index(activation))
        elementwise("activation_gradient", y, y.size, kind, g, y, dx)
    return dx


def sets(shape: tuple[int, ...], dim: tuple[int, ...]) -> tuple[int, int, int] | None:
    """(outer, sets, inner) of elementwise.cu for statistics along `dim`, or None: the dimensions
    that are kept must lie side by side."""
    along = {d % len(shape) for d in dim}
    kept = [d for d in range(len(shape)) if d not in along]
    if not kept:
        return 1, 1, math.prod(shape)
    if kept != list(range(kept[0], kept[-1] + 1)):
        return None
    first, last = kept[0], kept[-1] + 1
    return math.prod(shape[:first]), math.prod(shape[first:last]), math.prod(shape[last:])


def parameter_index(x_shape: Any, dim: tuple[int, ...], parameters: list[Any]) -> int | None:
    """0: weight and bias have an entry a set; 1: one an inner index; None: neither."""
    if sets(x_shape, dim) is None:
        return None
    ndim = len(x_shape)
    along = {d % ndim for d in dim}
    by_set = tuple(1 if d in along else n for d, n in enumerate(x_shape))
    by_inner = tuple(n if d in along else 1 for d, n in enumerate(x_shape))
    shapes = {(1,) * (ndim - p.ndim) + p.shape for p in parameters}
    if shapes <= {by_set}:
        return 0
    return 1 if shapes == {by_inner} and 0 not in along else None


def can_standardize(x: Any, weight: Any, bias: Any, dim: tuple[int, ...]) -> bool:
    """Whether `standardize` has a kernel for these shapes: batch, layer, group, instance norm."""
    given = [p for p in (weight, bias) if p is not None]
    return parameter_index(x.shape, dim, given) is not None


def standardize(x: Any, weight: Any, bias: Any, *, dim: tuple[int, ...], eps: float = 1e-5) -> Any:
    """The op `standardize` in float32, where `can_standardize` says so."""
    (x,) = contiguous(x)
    y = backend.array_module(x).empty_like(x)
    given = contiguous(*(p for p in (weight, bias) if p is not None))
    by_inner, layout = parameter_index(x.shape, dim, given), sets(x.shape, dim)
    assert by_inner is not None and layout is not None
    weight, bias = (null if p is None else contiguous(p)[0] for p in (weight, bias))
    if y.size:
        function("elementwise.cu", "standardize", x)(
            (layout[1],), (512,), (*map(i32, layout), f32(eps), i32(by_inner), x, weight, bias, y)
        )
    return y


def standardize_gradient(
    g: Any, x: Any, weight: Any, *, dim: tuple[int, ...], eps: float = 1e-5
) -> tuple[Any, Any, Any]:
    """dx, and with an entry of weight for each set dweight and dbias, (sets,); else None."""
    g, x = contiguous(g, x)
    xp = backend.array_module(x)
    given = contiguous(*(p for p in (weight,) if p is not None))
    by_inner, layout = parameter_index(x.shape, dim, given), sets(x.shape, dim)
    assert by_inner is not None and layout is not None
    dx = xp.empty_like(x)
    dweight, dbias = (None if by_inner else xp.empty(layout[1], np.float32) for _ in range(2))
    if x.size:
        function("elementwise.cu", "standardize_gradient", x)(
            (layout[1],), (512,),
            (*map(i32, layout), f32(eps), i32(by_inner), g, x, given[0] if given else null, dx,
             null if dweight is None else dweight, null if dbias is None else dbias),
        )  # fmt: skip
    return dx, dweight, dbias


def key_arguments(key: Any) -> tuple[np.uint64, np.uint64, np.uint64]:
    low = 2**64 - 1
    return np.uint64(key.seed & low), np.uint64(key.seed >> 64), np.uint64(key.call)


def uniform(key: Any, size: int, like: Any) -> Any:
    """`minidl.backend.random.uniform` on the device of the array `like`: the same bits."""
    y = backend.array_module(like).empty(size, np.float32)
    if size:
        function("elementwise.cu", "uniform", y)(
            *over(tiles(size, 8)), (i64(size), *key_arguments(key), y)
        )
    return y


def dropout(x: Any, *, p: float, key: Any) -> Any:
    """The op `dropout` in float32, with a mask of x's shape."""
    (x,) = contiguous(x)
    y = backend.array_module(x).empty_like(x)
    scale = 1 / (1 - p) if p < 1 else 1.0
    if x.size:
        function("elementwise.cu", "dropout", x)(
            *over(tiles(x.size, 8)),
            (i64(x.size), *key_arguments(key), f32(p), f32(scale), x, y),
        )
    return y


def sgd(
    p: Any, g: Any, velocity: Any, *, lr: float, momentum: float = 0.0, dampening: float = 0.0,
    weight_decay: float = 0.0, nesterov: bool = False, first: bool = False,
) -> None:  # fmt: skip
    """A step of `minidl.optim.SGD` in place, over flat float32 arrays."""
    floats = map(f32, (lr, momentum, dampening, weight_decay))
    elementwise("sgd", p, p.size, *floats, i32(nesterov), i32(first), g, p, velocity)


def adam(
    p: Any, g: Any, m: Any, v: Any, *, step: int, lr: float, betas: tuple[float, float],
    eps: float, weight_decay: float = 0.0, decoupled: bool = False,
) -> None:  # fmt: skip
    """Step number `step` (from 1) of `minidl.optim.Adam` (or AdamW) in place, over flat arrays."""
    corrections = f32(1 - betas[0] ** step), f32(math.sqrt(1 - betas[1] ** step))
    shares = [number for beta in betas for number in (beta, 1 - beta)]
    floats = map(f32, (lr, *shares, eps, weight_decay))
    elementwise("adam", p, p.size, *floats, i32(decoupled), *corrections, g, p, m, v)


def warp_affine(x: Any, matrix: Any, size: Pair | None = None, fill: float = 0.0) -> Any:
    """Images (N, C, H, W), seen through maps (N, 2, 3) from pixels of the result to pixels of x."""
    x, matrix = contiguous(x, matrix)
    out_size = size or x.shape[2:]
    y = backend.array_module(x).empty((*x.shape[:2], *out_size), np.float32)
    if y.size:
        function("elementwise.cu", "warp_affine", x)(
            *over(x.shape[0] * math.prod(out_size)),
            (*map(i32, (*x.shape, *out_size)), f32(fill), x, matrix, y),
        )
    return y


# Sums and softmax -------------------------------------------------------------------------


def by_rows(name: str, x: Any, *more: Any) -> Any:
    """A kernel of reduce.cu over the rows of x (rows, columns)."""
    y = backend.array_module(x).empty_like(x)
    if x.size:
        arguments = (i32(x.shape[0]), i32(x.shape[1]), x, *more, y)
        function("reduce.cu", name, x)((tiles(x.shape[0], 8),), (256,), arguments)
    return y


def along(name: str, dim: int, *arrays: Any) -> Any:
    """The same along any dimension."""
    xp = backend.array_module(arrays[0])
    rows = contiguous(*(xp.moveaxis(x, dim, -1) for x in arrays))
    shape = rows[0].shape
    y = by_rows(name, *(x.reshape(-1, shape[-1]) for x in rows)).reshape(shape)
    return xp.ascontiguousarray(xp.moveaxis(y, -1, dim))


def softmax(x: Any, *, dim: int) -> Any:
    """The op `softmax` in float32."""
    return along("softmax", dim, x)


def log_softmax(x: Any, *, dim: int) -> Any:
    """The op `log_softmax` in float32."""
    return along("log_softmax", dim, x)


def softmax_gradient(g: Any, out: Any, *, dim: int) -> Any:
    return along("softmax_gradient", dim, g, out)


def log_softmax_gradient(g: Any, out: Any, *, dim: int) -> Any:
    return along("log_softmax_gradient", dim, g, out)


def sum_rows(x: Any) -> Any:
    """float32 (rows, columns) -> (rows,)."""
    (x,) = contiguous(x)
    y = backend.array_module(x).zeros(x.shape[0], np.float32)
    if x.size:
        function("reduce.cu", "sum_rows", x)(
            (tiles(x.shape[0], 8),), (256,), (i32(x.shape[0]), i32(x.shape[1]), x, y)
        )
    return y


# Recurrent layers -------------------------------------------------------------------------


def project(x: Any, w: Any, *biases: Any) -> Any:
    """x wᵀ + b for all steps: (T,N,D), (K,D) -> (T,N,K)."""
    y = matmul(x.reshape(-1, x.shape[2]), w.T)
    for b in biases:
        if b is not None:
            y += b
    return y.reshape(*x.shape[:2], w.shape[0])


def before(first: Any, states: Any) -> Any:
    """The state that each step starts from."""
    return backend.array_module(first).concatenate((first[None], states[:-1]))


def step_arguments(states: Any, lengths: Any, t: int) -> tuple[Any, ...]:
    n, h = states.shape
    return i32(n), i32(h), i32(t), null if lengths is None else lengths


def lstm(x: Any, h0: Any, c0: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any, lengths: Any) -> Any:
    """The op `lstm` in float32; lengths int64 or None."""
    a = project(x, w_ih, b_ih, b_hh)
    h, c = contiguous(h0, c0)
    states = backend.array_module(x).empty((2, *a.shape[:2], h.shape[1]), np.float32)
    step = function("rnn.cu", "lstm_forward", x)
    for t in range(len(a) if states.size else 0):
        gates = matmul(h, w_hh.T)
        arguments = (*step_arguments(h, lengths, t), a[t], gates, h, c, states[0, t], states[1, t])
        step(*over_all(h.size), arguments)
        h, c = states[0, t], states[1, t]
    return states


def over_all(length: int) -> tuple[tuple[int], tuple[int]]:
    return (tiles(length, 256),), (256,)


def lstm_gradient(
    g: Any, out: Any, x: Any, h0: Any, c0: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any,
    lengths: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """The gradient rule of `lstm`."""
    xp = backend.array_module(x)
    g, out, h0, c0 = contiguous(g, out, h0, c0)
    h_before, c_before = before(h0, out[0]), before(c0, out[1])
    a = project(x, w_ih, b_ih, b_hh) + project(h_before, w_hh)
    da, dh, dc = xp.empty_like(a), xp.zeros_like(h0), xp.zeros_like(c0)
    step = function("rnn.cu", "lstm_backward", x)
    for t in reversed(range(len(a) if a.size else 0)):
        step(
            *over_all(dh.size),
            (*step_arguments(dh, lengths, t), a[t], c_before[t], out[1, t], g[0, t], g[1, t])
            + (dh, dc, da[t]),
        )
        dh += matmul(da[t], w_hh)
    return recurrent_gradients(x, h_before, w_ih, da, da, [dh, dc])


def gru(x: Any, h0: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any, lengths: Any) -> Any:
    """The op `gru` in float32; lengths int64 or None."""
    a = project(x, w_ih, b_ih)
    (h,) = contiguous(h0)
    states = backend.array_module(x).empty((*a.shape[:2], h.shape[1]), np.float32)
    step = function("rnn.cu", "gru_forward", x)
    for t in range(len(a) if states.size else 0):
        b = project(h[None], w_hh, b_hh)
        step(*over_all(h.size), (*step_arguments(h, lengths, t), a[t], b, h, states[t]))
        h = states[t]
    return states


def gru_gradient(
    g: Any, out: Any, x: Any, h0: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any, lengths: Any
) -> tuple[Any, ...]:
    """The gradient rule of `gru`."""
    xp = backend.array_module(x)
    g, out, h0 = contiguous(g, out, h0)
    h_before = before(h0, out)
    a, b = project(x, w_ih, b_ih), project(h_before, w_hh, b_hh)
    da, db, dh = xp.empty_like(a), xp.empty_like(b), xp.zeros_like(h0)
    step = function("rnn.cu", "gru_backward", x)
    for t in reversed(range(len(a) if a.size else 0)):
        step(
            *over_all(dh.size),
            (*step_arguments(dh, lengths, t), a[t], b[t], h_before[t], g[t], dh, da[t], db[t]),
        )
        dh += matmul(db[t], w_hh)
    return recurrent_gradients(x, h_before, w_ih, da, db, [dh])


def recurrent_gradients(
    x: Any, h_before: Any, w_ih: Any, da: Any, db: Any, states: list[Any]
) -> tuple[Any, ...]:
    """What a rule returns, from the gradients of the inputs' and the states' share of the gates."""
    xs, hs, das, dbs = (z.reshape(-1, z.shape[2]) for z in (x, h_before, da, db))
    return (
        lambda: matmul(das, w_ih).reshape(x.shape),
        *states,
        lambda: matmul(das.T, xs),
        lambda: matmul(dbs.T, hs),
        lambda: das.sum(axis=0),
        lambda: dbs.sum(axis=0),
        None,
    )
