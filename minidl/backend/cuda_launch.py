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
    return size * 80 if along_k else 32 * (size * 2 + 16)


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
    x: Any, w: Any, *, stride: Pair = (1, 1), padding: Pair = (0, 0), dilation: Pair = (1, 1),
    groups: int = 1, bias: Any | None = None,
) -> Any:  # fmt: skip
    """The op `conv2d` in float32, and if given + bias (O,)."""
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
         x, w, null if bias is None else bias, y),
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
