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
