from typing import TypeAlias, TypeVar

from numpy import float32, float64, int32
from numpy.typing import DTypeLike, NDArray

T = TypeVar("T", float32, float64)
Pair: TypeAlias = tuple[int, int]

version: str
sanitizer: str

def conv2d(
    x: NDArray[T],
    w: NDArray[T],
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> NDArray[T]: ...
def conv2d_naive(
    x: NDArray[T],
    w: NDArray[T],
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> NDArray[T]: ...
def conv2d_input(
    g: NDArray[T],
    w: NDArray[T],
    input_size: Pair,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> NDArray[T]: ...
def conv2d_weight(
    g: NDArray[T],
    x: NDArray[T],
    kernel_size: Pair,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> NDArray[T]: ...
def matmul(a: NDArray[T], b: NDArray[T], bias: NDArray[T] | None = None) -> NDArray[T]: ...
def matmul_naive(a: NDArray[T], b: NDArray[T]) -> NDArray[T]: ...
def matmul_reordered(a: NDArray[T], b: NDArray[T]) -> NDArray[T]: ...
def matmul_tiled(a: NDArray[T], b: NDArray[T]) -> NDArray[T]: ...
def max_pool2d(
    x: NDArray[T],
    kernel: Pair,
    stride: Pair,
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
) -> tuple[NDArray[T], NDArray[int32]]: ...
def max_pool2d_input(g: NDArray[T], index: NDArray[int32], input_size: Pair) -> NDArray[T]: ...
def peak_flops(dtype: DTypeLike) -> float: ...
def memory_bandwidth(bytes: int = ...) -> float: ...
def isa() -> str: ...
def supported_isas() -> list[str]: ...
def get_num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
def keep_memory() -> bool: ...
