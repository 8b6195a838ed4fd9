"""What Tensor gets from the ops: its operators and methods, named as PyTorch's.

Type checkers see `Methods` as a base class of Tensor; at run time its functions are attached to
Tensor at the end of this file, and the operators *are* the ops: no call in between.
Dimensions may be given as NumPy says it, too (``axis=``, ``keepdims=``).
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minidl import backend
from minidl.autograd import mode
from minidl.backend import random
from minidl.ops import elementwise, linalg, reduce, shape, softmax
from minidl.tensor import Tensor, raw

Op = Callable[..., Tensor]
Dim = int | tuple[int, ...] | list[int] | None


class Extreme(NamedTuple):
    """What `max(dim)`, `min(dim)`, `sort` and `topk` return."""

    values: Tensor
    indices: Tensor


def axes(dim: Dim, axis: Dim = None) -> Any:
    """The dimensions to reduce, as ops take them: None, an int, or a tuple."""
    dim = axis if dim is None else dim
    if isinstance(dim, list | tuple):
        return tuple(dim) or None
    return dim


def sizes(size: tuple[Any, ...]) -> tuple[int, ...]:
    """``x.reshape(2, 3)`` and ``x.reshape((2, 3))`` mean the same."""
    return tuple(size[0]) if len(size) == 1 and isinstance(size[0], tuple | list) else size


def own(index: Any) -> Any:
    """An index as arrays that nobody else can change: the gradient needs them too."""
    if isinstance(index, tuple):
        return tuple([own(i) for i in index])
    if isinstance(index, list | Tensor | np.ndarray):
        return np.array(raw(index)) if isinstance(index, list) else raw(index).copy()
    return index


def update(x: Any, y: Any, op: Op, name: str) -> Tensor:
    """``x += y``: in place where the tape has no interest in x and y, else as ``x = x + y``."""
    if mode.enabled and (x._requires_grad or getattr(y, "_requires_grad", False)):
        if x._requires_grad and x.node is None:
            raise RuntimeError(
                f"x {name} y would change a leaf that requires a gradient, which the tape cannot "
                "see. Write x = x + y, or, to update a parameter, do it under "
                "`with minidl.no_grad():`"
            )
        return op(x, y)
    return x.write_(op.op.formula(x.array, raw(y)), name)  # type: ignore[attr-defined]


class Methods:
    # Operators ----------------------------------------------------------------------------

    __add__: Op = elementwise.add
    __sub__: Op = elementwise.sub
    __mul__: Op = elementwise.mul
    __truediv__: Op = elementwise.div
    __floordiv__: Op = elementwise.floor_divide
    __pow__: Op = elementwise.pow_
    __matmul__: Op = linalg.matmul
    __neg__: Op = elementwise.neg
    __abs__: Op = elementwise.abs_
    __eq__: Op = elementwise.eq  # type: ignore[assignment]
    __ne__: Op = elementwise.ne  # type: ignore[assignment]
    __lt__: Op = elementwise.lt
    __le__: Op = elementwise.le
    __gt__: Op = elementwise.gt
    __ge__: Op = elementwise.ge
    __invert__: Op = elementwise.bitwise_not
    __and__: Op = elementwise.bitwise_and
    __or__: Op = elementwise.bitwise_or
    __xor__: Op = elementwise.bitwise_xor
    __radd__: Op = elementwise.add
    __rmul__: Op = elementwise.mul
    __rand__: Op = elementwise.bitwise_and
    __ror__: Op = elementwise.bitwise_or
    __rxor__: Op = elementwise.bitwise_xor

    def __pos__(self) -> Tensor:
        return self  # type: ignore[return-value]

    def __rsub__(self, other: Any) -> Tensor:
        return elementwise.sub(other, self)

    def __rtruediv__(self, other: Any) -> Tensor:
        return elementwise.div(other, self)

    def __rfloordiv__(self, other: Any) -> Tensor:
        return elementwise.floor_divide(other, self)

    def __rpow__(self, other: Any) -> Tensor:
        return elementwise.pow_(other, self)

    def __rmatmul__(self, other: Any) -> Tensor:
        return linalg.matmul(other, self)

    def __mod__(self, other: Any) -> Tensor:
        return self - elementwise.floor_divide(self, other) * other

    def __getitem__(self, index: Any) -> Tensor:
        return shape.getitem(self, index=own(index))

    def __iadd__(self, other: Any) -> Tensor:  # type: ignore[misc]
        return update(self, other, elementwise.add, "+=")

    def __isub__(self, other: Any) -> Tensor:  # type: ignore[misc]
        return update(self, other, elementwise.sub, "-=")

    def __imul__(self, other: Any) -> Tensor:  # type: ignore[misc]
        return update(self, other, elementwise.mul, "*=")

    def __itruediv__(self, other: Any) -> Tensor:  # type: ignore[misc]
        return update(self, other, elementwise.div, "/=")

    # Elementwise --------------------------------------------------------------------------

    add: Op = elementwise.add
    sub: Op = elementwise.sub
    mul: Op = elementwise.mul
    multiply: Op = elementwise.mul
    div: Op = elementwise.div
    neg: Op = elementwise.neg
    pow: Op = elementwise.pow_
    floor_divide: Op = elementwise.floor_divide
    exp: Op = elementwise.exp
    log: Op = elementwise.log
    log1p: Op = elementwise.log1p
    sqrt: Op = elementwise.sqrt
    abs: Op = elementwise.abs_
    sign: Op = elementwise.sign
    sin: Op = elementwise.sin
    cos: Op = elementwise.cos
    tanh: Op = elementwise.tanh
    sigmoid: Op = elementwise.sigmoid
    relu: Op = elementwise.relu
    erf: Op = elementwise.erf
    maximum: Op = elementwise.maximum
    minimum: Op = elementwise.minimum
    floor: Op = elementwise.floor
    ceil: Op = elementwise.ceil
    isnan: Op = elementwise.isnan
    isinf: Op = elementwise.isinf
    isfinite: Op = elementwise.isfinite
    logical_not: Op = elementwise.logical_not
    logical_and: Op = elementwise.logical_and
    logical_or: Op = elementwise.logical_or
    logical_xor: Op = elementwise.logical_xor
    eq: Op = elementwise.eq
    ne: Op = elementwise.ne
    lt: Op = elementwise.lt
    le: Op = elementwise.le
    gt: Op = elementwise.gt
    ge: Op = elementwise.ge
    clone: Op = elementwise.clone

    def square(self) -> Tensor:
        return elementwise.mul(self, self)

    def rsqrt(self) -> Tensor:
        return elementwise.pow_(self, -0.5)

    def reciprocal(self) -> Tensor:
        return elementwise.div(1, self)

    def round(self, decimals: builtins.int = 0) -> Tensor:
        return elementwise.round_(self, decimals=decimals)

    def clamp(self, min: Any = None, max: Any = None) -> Tensor:
        """Held between two bounds (None: no bound): numbers, or tensors to broadcast."""
        if not (hasattr(min, "shape") or hasattr(max, "shape")):
            return elementwise.clamp(self, min=min, max=max)
        x: Any = self if min is None else elementwise.maximum(self, min)
        return x if max is None else elementwise.minimum(x, max)

    clip = clamp

    def where(self, condition: Any, other: Any) -> Tensor:
        """This where the condition holds, else the other."""
        return elementwise.where(condition, self, other)

    def masked_fill(self, mask: Any, value: Any) -> Tensor:
        """The value where the mask holds, else this."""
        return elementwise.where(mask, value, self)

    def equal(self, other: Tensor) -> builtins.bool:
        """Whether shape and all values are the same."""
        return self.shape == other.shape and builtins.bool(elementwise.eq(self, other).all())

    def allclose(
        self, other: Tensor, rtol: builtins.float = 1e-5, atol: builtins.float = 1e-8,
        equal_nan: builtins.bool = False,
    ) -> builtins.bool:  # fmt: skip
        """Whether |x - y| <= atol + rtol |y| everywhere."""
        xp = backend.array_module(self.array)
        return builtins.bool(xp.allclose(self.array, raw(other), rtol, atol, equal_nan))

    # Reductions ---------------------------------------------------------------------------

    def sum(
        self, dim: Dim = None, keepdim: builtins.bool = False, *, dtype: Any = None,
        axis: Dim = None, keepdims: builtins.bool = False,
    ) -> Tensor:  # fmt: skip
        x = self if dtype is None else self.astype(dtype)
        return reduce.sum_(x, dim=axes(dim, axis), keepdim=keepdim or keepdims)

    def mean(
        self, dim: Dim = None, keepdim: builtins.bool = False, *, dtype: Any = None,
        axis: Dim = None, keepdims: builtins.bool = False,
    ) -> Tensor:  # fmt: skip
        x = self if dtype is None else self.astype(dtype)
        return reduce.mean(x, dim=axes(dim, axis), keepdim=keepdim or keepdims)

    def prod(
        self, dim: builtins.int | None = None, keepdim: builtins.bool = False, *,
        axis: builtins.int | None = None, keepdims: builtins.bool = False,
    ) -> Tensor:  # fmt: skip
        return reduce.prod(self, dim=axes(dim, axis), keepdim=keepdim or keepdims)

    def var(
        self, dim: Dim = None, unbiased: builtins.bool = True, keepdim: builtins.bool = False, *,
        correction: builtins.int | None = None, axis: Dim = None, keepdims: builtins.bool = False,
    ) -> Tensor:  # fmt: skip
        """Divided by n - correction; PyTorch's default is 1 (unbiased), NumPy's is 0."""
        if isinstance(dim, builtins.bool):  # PyTorch's x.var(unbiased)
            unbiased, dim = dim, None
        correction = builtins.int(unbiased) if correction is None else correction
        return reduce.var(
            self, dim=axes(dim, axis), keepdim=keepdim or keepdims, correction=correction
        )

    def std(
        self, dim: Dim = None, unbiased: builtins.bool = True, keepdim: builtins.bool = False, *,
        correction: builtins.int | None = None, axis: Dim = None, keepdims: builtins.bool = False,
    ) -> Tensor:  # fmt: skip
        """The square root of `var`."""
        return reduce.safe_sqrt(
            self.var(dim, unbiased, keepdim, correction=correction, axis=axis, keepdims=keepdims)
        )

    def norm(self, p: Any = 2, dim: Dim = None, keepdim: builtins.bool = False) -> Tensor:
        """(Σ |x|ᵖ)^(1/p)."""
        return reduce.norm(self, p=p, dim=axes(dim), keepdim=keepdim)

    def amax(
        self, dim: Dim = None, keepdim: builtins.bool = False, *, axis: Dim = None,
        keepdims: builtins.bool = False,
    ) -> Tensor:  # fmt: skip
        """The largest; ties share the gradient evenly."""
        return reduce.amax(self, dim=axes(dim, axis), keepdim=keepdim or keepdims)

    def amin(
        self, dim: Dim = None, keepdim: builtins.bool = False, *, axis: Dim = None,
        keepdims: builtins.bool = False,
    ) -> Tensor:  # fmt: skip
        """The smallest; ties share the gradient evenly."""
        return reduce.amin(self, dim=axes(dim, axis), keepdim=keepdim or keepdims)

    def max(self, dim: Any = None, keepdim: builtins.bool = False) -> Any:
        """The largest; with a dim also where it is; with a tensor, the larger of each two."""
        if dim is None:
            return reduce.amax(self)
        if isinstance(dim, Tensor):
            return elementwise.maximum(self, dim)
        return Extreme(*along(self, reduce.argmax(self, dim=dim, keepdim=True), dim, keepdim))

    def min(self, dim: Any = None, keepdim: builtins.bool = False) -> Any:
        """The smallest; with a dim also where it is; with a tensor, the smaller of each two."""
        if dim is None:
            return reduce.amin(self)
        if isinstance(dim, Tensor):
            return elementwise.minimum(self, dim)
        return Extreme(*along(self, reduce.argmin(self, dim=dim, keepdim=True), dim, keepdim))

    def argmax(
        self, dim: builtins.int | None = None, keepdim: builtins.bool = False, *,
        axis: builtins.int | None = None, keepdims: builtins.bool = False,
    ) -> Tensor:  # fmt: skip
        return reduce.argmax(self, dim=axes(dim, axis), keepdim=keepdim or keepdims)

    def argmin(
        self, dim: builtins.int | None = None, keepdim: builtins.bool = False, *,
        axis: builtins.int | None = None, keepdims: builtins.bool = False,
    ) -> Tensor:  # fmt: skip
        return reduce.argmin(self, dim=axes(dim, axis), keepdim=keepdim or keepdims)

    def any(
        self, dim: Dim = None, keepdim: builtins.bool = False, *, axis: Dim = None,
        keepdims: builtins.bool = False,
    ) -> Tensor:  # fmt: skip
        return reduce.any_(self, dim=axes(dim, axis), keepdim=keepdim or keepdims)

    def all(
        self, dim: Dim = None, keepdim: builtins.bool = False, *, axis: Dim = None,
        keepdims: builtins.bool = False,
    ) -> Tensor:  # fmt: skip
        return reduce.all_(self, dim=axes(dim, axis), keepdim=keepdim or keepdims)

    def cumsum(self, dim: builtins.int = 0, *, axis: builtins.int | None = None) -> Tensor:
        return reduce.cumsum(self, dim=dim if axis is None else axis)

    def argsort(self, dim: builtins.int = -1, descending: builtins.bool = False) -> Tensor:
        return reduce.argsort(self, dim=dim, descending=descending)

    def sort(self, dim: builtins.int = -1, descending: builtins.bool = False) -> Extreme:
        return Extreme(*reduce.sort(self, dim=dim, descending=descending))

    def topk(
        self, k: builtins.int, dim: builtins.int = -1, largest: builtins.bool = True
    ) -> Extreme:
        """The k largest (or smallest), in order, and where they are."""
        return Extreme(*reduce.topk(self, k=k, dim=dim, largest=largest))

    def softmax(self, dim: builtins.int) -> Tensor:
        return softmax.softmax(self, dim=dim)

    def log_softmax(self, dim: builtins.int) -> Tensor:
        return softmax.log_softmax(self, dim=dim)

    def logsumexp(self, dim: Dim, keepdim: builtins.bool = False) -> Tensor:
        return softmax.logsumexp(self, dim=axes(dim), keepdim=keepdim)

    # Shape --------------------------------------------------------------------------------

    def reshape(self, *size: Any) -> Tensor:
        return shape.reshape(self, shape=sizes(size))

    view = reshape

    def view_as(self, other: Tensor) -> Tensor:
        return shape.reshape(self, shape=other.shape)

    reshape_as = view_as

    def flatten(self, start_dim: builtins.int = 0, end_dim: builtins.int = -1) -> Tensor:
        """Dimensions start_dim to end_dim as one."""
        n = builtins.max(self.ndim, 1)
        start, end = start_dim % n, end_dim % n
        if start > end:
            raise ValueError(f"flatten: start_dim {start_dim} comes after end_dim {end_dim}")
        length = math.prod(self.shape[start : end + 1])
        return shape.reshape(self, shape=(*self.shape[:start], length, *self.shape[end + 1 :]))

    def unflatten(self, dim: builtins.int, size: tuple[builtins.int, ...]) -> Tensor:
        """Dimension dim as several."""
        dim %= self.ndim
        return shape.reshape(self, shape=(*self.shape[:dim], *size, *self.shape[dim + 1 :]))

    def squeeze(self, dim: Dim = None) -> Tensor:
        """Without the dimensions of length 1 (of those named)."""
        n = builtins.max(self.ndim, 1)
        named = range(n) if dim is None else (dim,) if isinstance(dim, builtins.int) else dim
        dropped = {d % n for d in named}
        kept = tuple(m for d, m in enumerate(self.shape) if m != 1 or d not in dropped)
        return shape.reshape(self, shape=kept)

    def unsqueeze(self, dim: builtins.int) -> Tensor:
        """With a new dimension of length 1, at position dim of the result."""
        if not -self.ndim - 1 <= dim <= self.ndim:
            raise IndexError(f"unsqueeze: dim {dim} of a result of {self.ndim + 1} dimensions")
        dim %= self.ndim + 1
        return shape.reshape(self, shape=(*self.shape[:dim], 1, *self.shape[dim:]))

    def transpose(self, dim0: builtins.int, dim1: builtins.int) -> Tensor:
        """With two dimensions swapped."""
        return shape.transpose(self, dim0=dim0, dim1=dim1)

    swapaxes = transpose

    def t(self) -> Tensor:
        """A matrix, transposed; vectors and numbers stay as they are."""
        if self.ndim > 2:
            raise ValueError(f"t() takes at most 2 dimensions, got {self.ndim}: use x.mT")
        return self if self.ndim < 2 else shape.transpose(self, dim0=0, dim1=1)  # type: ignore[return-value]

    @property
    def T(self) -> Tensor:
        """With all dimensions in reverse order."""
        if self.ndim == 2:
            return shape.transpose(self, dim0=0, dim1=1)
        return shape.permute(self, dims=tuple(range(self.ndim))[::-1])

    @property
    def mT(self) -> Tensor:
        """Each matrix of a batch (..., m, n) transposed."""
        return shape.transpose(self, dim0=-1, dim1=-2)

    def permute(self, *dims: Any) -> Tensor:
        """Dimension i of the result is dimension dims[i]."""
        return shape.permute(self, dims=sizes(dims))

    def movedim(self, source: builtins.int, destination: builtins.int) -> Tensor:
        dims = [d for d in range(self.ndim) if d != source % self.ndim]
        dims.insert(destination % self.ndim, source % self.ndim)
        return shape.permute(self, dims=tuple(dims))

    def expand(self, *size: Any) -> Tensor:
        """Repeated, without a copy, along dimensions of length 1 and new ones; -1: as it is."""
        size = sizes(size)
        new = len(size) - self.ndim
        full = tuple(self.shape[d - new] if n == -1 and d >= new else n for d, n in enumerate(size))
        return shape.expand(self, shape=full)

    def expand_as(self, other: Tensor) -> Tensor:
        return shape.expand(self, shape=other.shape)

    def repeat(self, *repeats: Any) -> Tensor:
        """The whole tensor, repeated along each dimension (NumPy calls it tile)."""
        repeats = sizes(repeats)
        if len(repeats) < self.ndim:
            raise ValueError(f"repeat: {len(repeats)} numbers for {self.ndim} dimensions")
        old = (1,) * (len(repeats) - self.ndim) + self.shape
        x = shape.reshape(self, shape=tuple(v for n in old for v in (1, n)))
        x = shape.expand(x, shape=tuple(v for pair in zip(repeats, old) for v in pair))
        return shape.reshape(x, shape=tuple(r * n for r, n in zip(repeats, old)))

    def flip(self, *dims: Any) -> Tensor:
        return shape.flip(self, dims=sizes(dims))

    def roll(self, shifts: Any, dims: Any = None) -> Tensor:
        return shape.roll(self, shifts=shifts, dims=dims)

    def tril(self, diagonal: builtins.int = 0) -> Tensor:
        """The lower triangle of each matrix, zeros above."""
        return shape.tril(self, diagonal=diagonal)

    def triu(self, diagonal: builtins.int = 0) -> Tensor:
        """The upper triangle of each matrix, zeros below."""
        return shape.triu(self, diagonal=diagonal)

    def contiguous(self) -> Tensor:
        """Itself, or a copy if its elements are not in order in memory."""
        return self if self.is_contiguous() else elementwise.clone(self)  # type: ignore[return-value]

    # Some of the elements -----------------------------------------------------------------

    def narrow(self, dim: builtins.int, start: builtins.int, length: builtins.int) -> Tensor:
        """`length` positions of dimension dim, from start."""
        dim %= self.ndim
        if not 0 <= start <= start + length <= self.shape[dim]:
            raise IndexError(
                f"narrow: [{start}, {start + length}) of a dimension of {self.shape[dim]}"
            )
        return self[(slice(None),) * dim + (slice(start, start + length),)]

    def select(self, dim: builtins.int, index: builtins.int) -> Tensor:
        return self[(slice(None),) * (dim % self.ndim) + (index,)]

    def split(self, split_size: Any, dim: builtins.int = 0) -> tuple[Tensor, ...]:
        """Pieces of a given size (the last may be smaller), or of the sizes in a list."""
        n = self.shape[dim]
        if isinstance(split_size, builtins.int):
            starts = range(0, n, split_size)
            lengths = [builtins.min(split_size, n - s) for s in starts] or [0]
        else:
            lengths = list(split_size)
            if builtins.sum(lengths) != n:
                raise ValueError(f"split: sizes {lengths} do not add up to {n}")
        ends = np.cumsum(lengths).tolist()
        return tuple(self.narrow(dim, e - m, m) for e, m in zip(ends, lengths))

    def chunk(self, chunks: builtins.int, dim: builtins.int = 0) -> tuple[Tensor, ...]:
        """At most so many pieces of equal size (the last may be smaller)."""
        return self.split(builtins.max(-(-self.shape[dim] // chunks), 1), dim)

    def unbind(self, dim: builtins.int = 0) -> tuple[Tensor, ...]:
        """The slices along a dimension, without it."""
        return tuple(self.select(dim, i) for i in range(self.shape[dim]))

    def gather(self, dim: builtins.int, index: Any) -> Tensor:
        """out[i][j] = x[i][index[i][j]] for dim = 1, and so on."""
        return shape.gather(self, index, dim=dim)

    def take_along_dim(self, indices: Any, dim: builtins.int) -> Tensor:
        """As `gather`, with the other dimensions broadcast."""
        a, b = list(self.shape), list(indices.shape)
        n, m, a[dim], b[dim] = a[dim], b[dim], 1, 1
        a = list(np.broadcast_shapes(tuple(a), tuple(b)))
        b = list(a)
        a[dim], b[dim] = n, m
        index = np.broadcast_to(raw(indices), b)
        return shape.gather(self.expand(*a), index, dim=dim)

    def index_select(self, dim: builtins.int, index: Any) -> Tensor:
        """The positions in index along a dimension."""
        return self[(slice(None),) * (dim % self.ndim) + (index,)]

    def masked_select(self, mask: Any) -> Tensor:
        """The elements where the mask holds, as a vector."""
        return self[mask]

    def nonzero(self) -> Tensor:
        """The positions of what is not 0, one a row."""
        xp = backend.array_module(self.array)
        return Tensor(xp.stack(self.array.nonzero(), axis=1))

    # Products -----------------------------------------------------------------------------

    matmul: Op = linalg.matmul

    def mm(self, other: Tensor) -> Tensor:
        """Two matrices."""
        return linalg.matmul(need(self, 2, "mm"), need(other, 2, "mm"))

    def bmm(self, other: Tensor) -> Tensor:
        """Two batches of matrices."""
        return linalg.matmul(need(self, 3, "bmm"), need(other, 3, "bmm"))

    def mv(self, other: Tensor) -> Tensor:
        """A matrix and a vector."""
        return linalg.matmul(need(self, 2, "mv"), need(other, 1, "mv"))

    def dot(self, other: Tensor) -> Tensor:
        """Two vectors."""
        return linalg.matmul(need(self, 1, "dot"), need(other, 1, "dot"))

    def outer(self, other: Tensor) -> Tensor:
        """x_i y_j of two vectors."""
        return elementwise.mul(self.reshape(-1, 1), need(other, 1, "outer"))

    # To another dtype ---------------------------------------------------------------------

    def astype(self, dtype: Any) -> Tensor:
        """To another dtype, on the tape; itself, if it has that dtype."""
        dtype = np.dtype(dtype)
        if dtype == self.dtype:
            return self  # type: ignore[return-value]
        if dtype.kind not in "fV":  # only floating tensors have gradients
            return Tensor(self.array.astype(dtype))
        return elementwise.astype(self, dtype=dtype)

    def type(self, dtype: Any) -> Tensor:
        return self.astype(dtype)

    def type_as(self, other: Tensor) -> Tensor:
        return self.to(other)

    def float(self) -> Tensor:
        return self.astype(np.float32)

    def double(self) -> Tensor:
        return self.astype(np.float64)

    def half(self) -> Tensor:
        return self.astype(np.float16)

    def long(self) -> Tensor:
        return self.astype(np.int64)

    def int(self) -> Tensor:
        return self.astype(np.int32)

    def bool(self) -> Tensor:
        return self.astype(np.bool_)

    def to_device(self, device: str, non_blocking: Any = False) -> Tensor:
        return elementwise.to_device(self, device=device, non_blocking=non_blocking)

    # In place, for use under no_grad ------------------------------------------------------

    def add_(self, other: Any, *, alpha: builtins.float = 1) -> Tensor:
        other = raw(other) if alpha == 1 else alpha * raw(other)
        return self.write_(self.array + other, "add_")

    def sub_(self, other: Any, *, alpha: builtins.float = 1) -> Tensor:
        other = raw(other) if alpha == 1 else alpha * raw(other)
        return self.write_(self.array - other, "sub_")

    def mul_(self, other: Any) -> Tensor:
        return self.write_(self.array * raw(other), "mul_")

    def div_(self, other: Any) -> Tensor:
        return self.write_(self.array / raw(other), "div_")

    def zero_(self) -> Tensor:
        return self.write_(0, "zero_")

    def fill_(self, value: Any) -> Tensor:
        return self.write_(raw(value), "fill_")

    def copy_(self, other: Any) -> Tensor:
        """Take over another tensor's values, from whatever device and dtype."""
        values = backend.to_device(raw(other), self.device) if hasattr(other, "shape") else other
        return self.write_(values, "copy_")

    def clamp_(self, min: Any = None, max: Any = None) -> Tensor:
        return self.write_(self.array.clip(raw(min), raw(max)), "clamp_")

    def masked_fill_(self, mask: Any, value: Any) -> Tensor:
        return self.write_(np.where(raw(mask), raw(value), self.array), "masked_fill_")

    def normal_(self, mean: builtins.float = 0.0, std: builtins.float = 1.0) -> Tensor:
        """Normal random numbers, from minidl's generator."""
        numbers = random.generator().standard_normal(self.shape, np.float32)
        return self.write_(backend.to_device(numbers * std + mean, self.device), "normal_")

    def uniform_(self, low: builtins.float = 0.0, high: builtins.float = 1.0) -> Tensor:
        """Uniform random numbers in [low, high), from minidl's generator."""
        numbers = random.generator().random(self.shape, np.float32)
        return self.write_(backend.to_device(numbers * (high - low) + low, self.device), "uniform_")

    if TYPE_CHECKING:  # what Tensor itself has
        array: Any
        is_contiguous: Callable[[], builtins.bool]
        write_: Op
        to: Op

        @property
        def shape(self) -> tuple[builtins.int, ...]: ...

        @property
        def ndim(self) -> builtins.int: ...

        @property
        def dtype(self) -> np.dtype[Any]: ...

        @property
        def device(self) -> backend.device: ...


def along(x: Any, indices: Tensor, dim: int, keepdim: bool) -> tuple[Tensor, Tensor]:
    """The values at some positions (of length 1 along dim), and the positions."""
    values = shape.gather(x, indices, dim=dim)
    return (values, indices) if keepdim else (values.squeeze(dim), indices.squeeze(dim))


def need(x: Any, ndim: int, name: str) -> Tensor:
    if x.ndim != ndim:
        raise ValueError(f"{name} takes {ndim}-dimensional tensors, got shape {x.shape}")
    return x


def cat(tensors: Any, dim: int = 0) -> Tensor:
    """Tensors one after the other, along an existing dimension."""
    return shape.cat_(*tensors, dim=dim)


def stack(tensors: Any, dim: int = 0) -> Tensor:
    """Tensors of one shape side by side, along a new dimension."""
    return shape.stack_(*tensors, dim=dim)


for name, function in vars(Methods).items():
    if callable(function) or isinstance(function, property):
        setattr(Tensor, name, function)
