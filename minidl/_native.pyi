from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, TypeVar, overload

from numpy import float32, float64, int8, int32, int64, uint8
from numpy.typing import DTypeLike, NDArray

T = TypeVar("T", float32, float64)
Pair: TypeAlias = tuple[int, int]

version: str
sanitizer: str

def conv2d(
    x: NDArray[T],
    w: NDArray[T],
    b: NDArray[T] | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    relu: bool = False,
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
def conv2d_winograd(
    x: NDArray[float32],
    w: NDArray[float32],
    b: NDArray[float32] | None = None,
    padding: Pair = (0, 0),
    relu: bool = False,
) -> NDArray[float32]: ...
def conv2d_input_winograd(
    g: NDArray[float32], w: NDArray[float32], input_size: Pair, padding: Pair = (0, 0)
) -> NDArray[float32]: ...
def conv2d_weight_winograd(
    g: NDArray[float32], x: NDArray[float32], padding: Pair = (0, 0)
) -> NDArray[float32]: ...
def matmul(a: NDArray[T], b: NDArray[T], bias: NDArray[T] | None = None) -> NDArray[T]: ...
def matmul_naive(a: NDArray[T], b: NDArray[T]) -> NDArray[T]: ...
def matmul_reordered(a: NDArray[T], b: NDArray[T]) -> NDArray[T]: ...
def matmul_tiled(a: NDArray[T], b: NDArray[T]) -> NDArray[T]: ...
@overload
def max_pool2d(
    x: NDArray[T],
    kernel: Pair,
    stride: Pair,
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    return_index: Literal[True] = True,
) -> tuple[NDArray[T], NDArray[int32]]: ...
@overload
def max_pool2d(
    x: NDArray[T],
    kernel: Pair,
    stride: Pair,
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    *,
    return_index: Literal[False],
) -> NDArray[T]: ...
def max_pool2d_gradient(
    g: NDArray[T],
    x: NDArray[T],
    kernel: Pair,
    stride: Pair,
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
) -> NDArray[T]: ...
def avg_pool2d(
    x: NDArray[T], rows: Sequence[int], columns: Sequence[int], divisors: NDArray[float64]
) -> NDArray[T]: ...
def avg_pool2d_input(
    y: NDArray[T],
    input_size: Pair,
    rows: Sequence[int],
    columns: Sequence[int],
    divisors: NDArray[float64],
) -> NDArray[T]: ...
def warp_affine(
    x: NDArray[T], m: NDArray[float64], size: Pair, mode: str, padding: str, fill: float
) -> NDArray[T]: ...
def warp_affine_input(
    y: NDArray[T], m: NDArray[float64], input_size: Pair, mode: str, padding: str
) -> NDArray[T]: ...
def statistics(x: NDArray[T], dim: Sequence[int]) -> tuple[NDArray[T], NDArray[T]] | None: ...
def standardize(
    x: NDArray[T],
    weight: NDArray[T] | None,
    bias: NDArray[T] | None,
    dim: Sequence[int],
    eps: float,
    mean: NDArray[T],
    variance: NDArray[T],
) -> NDArray[T] | None: ...
def standardize_gradient(
    g: NDArray[T],
    x: NDArray[T],
    weight: NDArray[T] | None,
    dim: Sequence[int],
    eps: float,
    mean: NDArray[T],
    variance: NDArray[T],
) -> tuple[NDArray[T], NDArray[T] | None, NDArray[T] | None] | None: ...
def scale_shift(x: NDArray[T], scale: NDArray[T], shift: NDArray[T]) -> NDArray[T]: ...
def softmax(x: NDArray[T], dim: int) -> NDArray[T]: ...
def softmax_gradient(g: NDArray[T], y: NDArray[T], dim: int) -> NDArray[T]: ...
def log_softmax(x: NDArray[T], dim: int) -> NDArray[T]: ...
def log_softmax_gradient(g: NDArray[T], y: NDArray[T], dim: int) -> NDArray[T]: ...
def cross_entropy(
    x: NDArray[T], label: NDArray[int64], weight: NDArray[T] | None, label_smoothing: float
) -> NDArray[T]: ...
def cross_entropy_gradient(
    g: NDArray[T],
    x: NDArray[T],
    label: NDArray[int64],
    weight: NDArray[T] | None,
    label_smoothing: float,
) -> NDArray[T]: ...
def dropout(
    x: NDArray[T],
    seed_low: int,
    seed_high: int,
    call: int,
    threshold: int,
    scale: float,
    repeat: int,
) -> NDArray[T]: ...
def in_order(x: NDArray[T]) -> NDArray[T] | None: ...
def relu(x: NDArray[T]) -> NDArray[T]: ...
def relu_gradient(g: NDArray[T], y: NDArray[T]) -> NDArray[T]: ...
def recurrent(
    cell: str,
    a: NDArray[T],
    w_hh: NDArray[T],
    b_ih: NDArray[T] | None,
    b_hh: NDArray[T] | None,
    first: NDArray[T],
    lengths: NDArray[int64] | None,
    keep: bool,
) -> tuple[NDArray[T], NDArray[T]]: ...
def recurrent_gradient(
    cell: str,
    g: NDArray[T],
    kept: NDArray[T],
    w_hh: NDArray[T],
    lengths: NDArray[int64] | None,
) -> tuple[NDArray[T], NDArray[T], NDArray[T]]: ...
def additive_scores(u: NDArray[T], v: NDArray[T], w: NDArray[T]) -> NDArray[T]: ...
def additive_scores_gradient(
    g: NDArray[T], u: NDArray[T], v: NDArray[T], w: NDArray[T]
) -> tuple[NDArray[T], NDArray[T], NDArray[T]]: ...
def sgd(
    p: Sequence[NDArray[T]],
    g: Sequence[NDArray[T]],
    momentum_buffer: Sequence[NDArray[T]],
    first: Sequence[bool],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None: ...
def adam(
    p: Sequence[NDArray[T]],
    g: Sequence[NDArray[T]],
    exp_avg: Sequence[NDArray[T]],
    exp_avg_sq: Sequence[NDArray[T]],
    max_exp_avg_sq: Sequence[NDArray[T]],
    step_size: Sequence[float],
    correction: Sequence[float],
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    shrink: float,
    maximize: bool,
) -> None: ...
def rmsprop(
    p: Sequence[NDArray[T]],
    g: Sequence[NDArray[T]],
    square_avg: Sequence[NDArray[T]],
    grad_avg: Sequence[NDArray[T]],
    momentum_buffer: Sequence[NDArray[T]],
    lr: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    maximize: bool,
) -> None: ...
def max_pool2d_input(g: NDArray[T], index: NDArray[int32], input_size: Pair) -> NDArray[T]: ...
def peak_flops(dtype: DTypeLike) -> float: ...
def memory_bandwidth(bytes: int = ...) -> float: ...

class PackedWeight:
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def groups(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def maker(self) -> str: ...

def pack_linear(w: NDArray[Any]) -> PackedWeight: ...
def linear_int4(
    x: NDArray[float32],
    w: NDArray[uint8],
    scale: NDArray[float32],
    group_size: int,
    bias: NDArray[float32] | None = ...,
) -> NDArray[float32]: ...
def linear(
    x: NDArray[float32],
    w: PackedWeight | NDArray[Any],
    scale: NDArray[float32] | None = None,
    bias: NDArray[float32] | None = None,
) -> NDArray[float32]: ...
def pack_matmul_integer(
    w: NDArray[int8] | NDArray[uint8], zero_point: int | NDArray[int32] = 0
) -> PackedWeight: ...
def matmul_integer(
    a: NDArray[int8] | NDArray[uint8],
    w: PackedWeight,
    a_zero_point: int | NDArray[int32] = 0,
    bias: NDArray[int32] | None = None,
    scale: NDArray[float32] | None = None,
    offset: NDArray[float32] | None = None,
    dtype: str | None = None,
    zero_point: int = 0,
    relu: bool = False,
) -> NDArray[Any]: ...
def pack_conv_integer(
    w: NDArray[int8] | NDArray[uint8], zero_point: int | NDArray[int32] = 0, groups: int = 1
) -> PackedWeight: ...
def conv_integer(
    x: NDArray[int8] | NDArray[uint8],
    w: PackedWeight,
    x_zero_point: int = 0,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    bias: NDArray[int32] | None = None,
    scale: NDArray[float32] | None = None,
    offset: NDArray[float32] | None = None,
    dtype: str | None = None,
    zero_point: int = 0,
    relu: bool = False,
) -> NDArray[Any]: ...
def isa() -> str: ...
def supported_isas() -> list[str]: ...
def get_num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
def keep_memory() -> bool: ...
