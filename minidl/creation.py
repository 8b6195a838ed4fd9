"""Tensors from nothing: zeros, ranges, random numbers. Signatures and defaults are PyTorch's.

Random ones take their numbers from `minidl.backend.random`: the same seed gives the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minidl import backend
from minidl.backend import random
from minidl.tensor import Tensor, float32, int64, raw, tensor


def new(array: Any, dtype: Any, device: Any, requires_grad: bool) -> Tensor:
    """A Tensor of an array that is nobody else's."""
    array = array if dtype is None else array.astype(dtype, copy=False)
    return Tensor(backend.to_device(array, str(device or "cpu")), requires_grad)


def shape_of(size: tuple[Any, ...]) -> tuple[int, ...]:
    """``zeros(2, 3)`` and ``zeros((2, 3))`` mean the same."""
    if len(size) == 1 and isinstance(size[0], tuple | list):
        size = tuple(size[0])
    return tuple(int(n) for n in size)


def zeros(
    *size: Any, dtype: Any = float32, device: Any = None, requires_grad: bool = False
) -> Tensor:
    return new(np.zeros(shape_of(size), dtype or float32), None, device, requires_grad)


def ones(
    *size: Any, dtype: Any = float32, device: Any = None, requires_grad: bool = False
) -> Tensor:
    return new(np.ones(shape_of(size), dtype or float32), None, device, requires_grad)


def empty(
    *size: Any, dtype: Any = float32, device: Any = None, requires_grad: bool = False
) -> Tensor:
    """Values left to chance: whatever was in that memory."""
    return new(np.empty(shape_of(size), dtype or float32), None, device, requires_grad)


def full(
    size: Any, fill_value: Any, *, dtype: Any = None, device: Any = None,
    requires_grad: bool = False,
) -> Tensor:  # fmt: skip
    """All of one value; its kind (bool, int, float) gives the dtype."""
    if dtype is None:
        dtype = bool if isinstance(fill_value, bool) else type(fill_value)
        dtype = {int: int64, float: float32}.get(dtype, dtype)
    size = (size,) if isinstance(size, int) else shape_of(size)
    return new(np.full(size, raw(fill_value), dtype), None, device, requires_grad)


def eye(
    n: int, m: int | None = None, *, dtype: Any = float32, device: Any = None,
    requires_grad: bool = False,
) -> Tensor:  # fmt: skip
    return new(np.eye(n, m, dtype=dtype or float32), None, device, requires_grad)


def arange(
    start: Any, end: Any = None, step: Any = 1, *, dtype: Any = None, device: Any = None,
    requires_grad: bool = False,
) -> Tensor:  # fmt: skip
    """start, start + step, ... below end: int64 if all three are ints, float32 otherwise."""
    if end is None:
        start, end = 0, start
    if dtype is None:
        whole = all(isinstance(v, int | np.integer) for v in (start, end, step))
        dtype = int64 if whole else float32
    return new(np.arange(start, end, step), dtype, device, requires_grad)


def linspace(
    start: float, end: float, steps: int, *, dtype: Any = float32, device: Any = None,
    requires_grad: bool = False,
) -> Tensor:  # fmt: skip
    """`steps` numbers at equal distances, both ends included."""
    return new(np.linspace(start, end, steps), dtype or float32, device, requires_grad)


def rand(
    *size: Any, dtype: Any = float32, device: Any = None, requires_grad: bool = False
) -> Tensor:
    """Uniform in [0, 1)."""
    shape = shape_of(size)
    dtype = np.dtype(dtype or float32)
    numbers = random.generator().random(shape, np.float64 if dtype == np.float64 else np.float32)
    return new(numbers, dtype, device, requires_grad)


def randn(
    *size: Any, dtype: Any = float32, device: Any = None, requires_grad: bool = False
) -> Tensor:
    """Normal, of mean 0 and variance 1."""
    shape = shape_of(size)
    dtype = np.dtype(dtype or float32)
    kind = np.float64 if dtype == np.float64 else np.float32
    return new(random.generator().standard_normal(shape, kind), dtype, device, requires_grad)


def randint(
    low: int, high: Any = None, size: Any = None, *, dtype: Any = int64, device: Any = None,
    requires_grad: bool = False,
) -> Tensor:  # fmt: skip
    """Integers in [low, high); ``randint(high, size)`` starts at 0."""
    if size is None and isinstance(high, tuple | list):
        low, high, size = 0, low, high
    elif high is None:
        low, high = 0, low
    if size is None:
        raise TypeError("randint needs a size: randint(low, high, size) or randint(high, size)")
    numbers = random.generator().integers(low, high, shape_of((size,)))
    return new(numbers, dtype or int64, device, requires_grad)


def randperm(n: int, *, dtype: Any = int64, device: Any = None) -> Tensor:
    """0 … n - 1 in random order."""
    return new(random.generator().permutation(n), dtype or int64, device, False)


def like(x: Tensor, dtype: Any, device: Any) -> dict[str, Any]:
    return {"dtype": dtype or x.dtype, "device": device or x.device}


def zeros_like(
    x: Tensor, *, dtype: Any = None, device: Any = None, requires_grad: bool = False
) -> Tensor:
    return zeros(x.shape, **like(x, dtype, device), requires_grad=requires_grad)


def ones_like(
    x: Tensor, *, dtype: Any = None, device: Any = None, requires_grad: bool = False
) -> Tensor:
    return ones(x.shape, **like(x, dtype, device), requires_grad=requires_grad)


def empty_like(
    x: Tensor, *, dtype: Any = None, device: Any = None, requires_grad: bool = False
) -> Tensor:
    return empty(x.shape, **like(x, dtype, device), requires_grad=requires_grad)


def full_like(
    x: Tensor, fill_value: Any, *, dtype: Any = None, device: Any = None,
    requires_grad: bool = False,
) -> Tensor:  # fmt: skip
    return full(x.shape, fill_value, **like(x, dtype, device), requires_grad=requires_grad)


def rand_like(
    x: Tensor, *, dtype: Any = None, device: Any = None, requires_grad: bool = False
) -> Tensor:
    return rand(x.shape, **like(x, dtype, device), requires_grad=requires_grad)


def randn_like(
    x: Tensor, *, dtype: Any = None, device: Any = None, requires_grad: bool = False
) -> Tensor:
    return randn(x.shape, **like(x, dtype, device), requires_grad=requires_grad)


def as_tensor(data: Any, dtype: Any = None, device: Any = None) -> Tensor:
    """A Tensor of the data, sharing its memory if it is an array or Tensor that fits."""
    if not isinstance(data, Tensor):
        data = Tensor(data) if hasattr(data, "dtype") else tensor(data, dtype)
    return data.to(device=device, dtype=dtype)


def is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


# The random state -------------------------------------------------------------------------


def initial_seed() -> int:
    """What minidl's random numbers were seeded with."""
    return random.default_generator.seed


def get_rng_state() -> Tensor:
    """The random state: two integers, (seed, streams handed out)."""
    state = random.default_generator.state_dict()
    return tensor(np.array([state["seed"], state["calls"]], np.uint64).view(np.int64))


def set_rng_state(state: Tensor) -> None:
    """Go on where `get_rng_state` was called."""
    seed, calls = np.ascontiguousarray(state.numpy()).view(np.uint64).tolist()
    random.default_generator.load_state_dict({"seed": seed, "calls": calls})
