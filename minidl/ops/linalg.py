"""Matrix products."""

from __future__ import annotations

import string
from typing import Any

import numpy as np

from minidl.backend.native import native, why_missing
from minidl.op import op, sample
from minidl.ops.shape import expand, permute

SMALL = 2**18  # multiplications; up to here BLAS uses one thread, and is quick to start


@op
def matmul(x, y):
    """NumPy's x @ y: vectors, matrices (..., m, k) @ (..., k, n), with batches broadcast."""
    if x.ndim == 2 and y.ndim == 2:
        return x.dot(y)  # the same as @, which takes twice as long to start
    return batched(x, y)


def batched(x: Any, y: Any) -> Any:
    if x.ndim > 2 and y.ndim > 1 and x.shape[-1] == y.shape[-2] == 1:
        return x * y  # outer products: ten times as fast as NumPy's loop over the batch
    return x @ y


@matmul.gradient
def _(g, x, y):
    if x.ndim == 2 and y.ndim == 2:
        return lambda: matmul(g, y.T), lambda: matmul(x.T, g)
    if x.ndim == 1 or y.ndim == 1:  # as matrices of one row or column
        row = x.reshape((1, -1)) if x.ndim == 1 else x
        column = y.reshape((-1, 1)) if y.ndim == 1 else y
        g = g.reshape(np.broadcast_shapes(row.shape[:-2], column.shape[:-2])
                      + (row.shape[-2], column.shape[-1]))  # fmt: skip
        to_x, to_y = matmul.op.rule(g, row, column)

        def vector(d, v):
            """d, in the shape of a vector; a matrix's, as it is."""
            return d.reshape((*d.shape[:-2], -1)) if v.ndim == 1 else d

        return lambda: vector(to_x(), x), lambda: vector(to_y(), y)
    if y.ndim == 2:  # one tall product instead of a batch of small ones and their sum
        tall = x.reshape((-1, x.shape[-1]))
        return lambda: matmul(g, y.T), lambda: matmul(tall.T, g.reshape((-1, g.shape[-1])))
    return lambda: matmul(g, y.swapaxes(-1, -2)), lambda: matmul(x.swapaxes(-1, -2), g)


@matmul.kernel("native", dtypes=("float32", "float64"), missing=why_missing)
def _(x, y):
    """The same packed product that convolution runs on: its bits do not depend on the threads."""
    if x.ndim == 2 and y.ndim == 2:
        if x.size * y.shape[1] <= SMALL or x.dtype != y.dtype:
            return x.dot(y)
        return native.matmul(x, y)
    if x.ndim > 2 and y.ndim == 2:
        return matmul(x.reshape(-1, x.shape[-1]), y).reshape(*x.shape[:-1], y.shape[1])
    return batched(x, y)


@op
def linear(x, w, b):
    """x wᵀ + b: (..., in), (out, in), (out,) or None -> (..., out)."""
    y = matmul(x, w.T)
    if b is not None:
        y += b
    return y


@linear.gradient
def _(g, x, w, b_shape):
    def to_w():
        return matmul(g.reshape((-1, w.shape[0])).T, x.reshape((-1, w.shape[1])))

    return lambda: matmul(g, w), to_w, g


@linear.kernel("native", dtypes=("float32", "float64"), missing=why_missing)
def _(x, w, b):
    """The bias is added while the product is still in the cache."""
    if x.size * w.shape[0] <= SMALL or x.dtype != w.dtype or (b is not None and x.dtype != b.dtype):
        return linear.op.formula(x, w, b)
    return native.matmul(x.reshape(-1, w.shape[1]), w.T, b).reshape(*x.shape[:-1], w.shape[0])


@op
def einsum_(*xs, equation):
    """Einstein's sum; `equation` is explicit ("ij,jk->ik"), no letter twice in one input."""
    return np.einsum(equation, *xs, optimize=len(xs) > 1)


@einsum_.gradient
def _(g, *xs, equation):
    """Swap an input's letters with the output's. Letters found only there were summed: repeat."""
    letters, _, result = equation.partition("->")
    letters = letters.split(",")

    def to(i):
        others = [x for j, x in enumerate(xs) if j != i]
        names = [result, *(names for j, names in enumerate(letters) if j != i)]
        reached = "".join(c for c in letters[i] if c in "".join(names))
        d = einsum_(g, *others, equation=f"{','.join(names)}->{reached}")
        lengths = dict(zip(reached, d.shape, strict=True))
        d = d.reshape(tuple(lengths.get(c, 1) for c in letters[i]))
        shape = tuple(lengths.get(c, n) for c, n in zip(letters[i], xs[i].shape, strict=True))
        return d if d.shape == shape else expand(d, shape=shape)

    return [lambda i=i: to(i) for i in range(len(xs))]


def einsum(equation: str, *operands: Any) -> Any:
    """``einsum("bij,bjk->bik", x, y)``, with all of NumPy's notation.

    Raises:
        ValueError: the equation does not fit the inputs.
    """
    xs = list(operands)
    if len(xs) == 1 and isinstance(xs[0], list | tuple):
        xs = list(xs[0])
    left, arrow, result = equation.replace(" ", "").partition("->")
    letters = left.split(",")
    if len(letters) != len(xs):
        raise ValueError(f"einsum: {equation!r} names {len(letters)} inputs, got {len(xs)}")
    if not arrow:  # NumPy's rule: letters that occur once, in alphabetical order
        result = "..." * ("..." in left)
        result += "".join(c for c in sorted(set(left) - set(",.")) if left.count(c) == 1)

    # Spell "..." out in letters that are not used, counted from the right.
    unused = [c for c in string.ascii_letters if c not in equation]
    longest = 0
    for i, (names, x) in enumerate(zip(letters, xs, strict=True)):
        n = x.ndim - len(names.replace("...", "")) if "..." in names else 0
        longest = max(longest, n)
        letters[i] = names.replace("...", "".join(unused[:n][::-1]))
        if len(letters[i]) != x.ndim:
            raise ValueError(f"einsum: {names!r} in {equation!r} does not fit shape {x.shape}")
    result = result.replace("...", "".join(unused[:longest][::-1]))

    for i, names in enumerate(letters):  # a letter twice in one input: its diagonal
        while len(set(names)) < len(names):
            c = next(c for c in names if names.count(c) > 1)
            a, b = names.index(c), names.rindex(c)
            n = xs[i].shape[a]
            if xs[i].shape[b] != n:
                raise ValueError(f"einsum: {c!r} in {equation!r} has two lengths: {xs[i].shape}")
            # a and b side by side, and in front, so that indexing puts the diagonal in front
            x = permute(xs[i], dims=(a, b, *(d for d in range(xs[i].ndim) if d not in (a, b))))
            positions = np.arange(n)
            xs[i] = x[positions, positions]
            names = c + "".join(names[d] for d in range(len(names)) if d not in (a, b))
        letters[i] = names
    return einsum_(*xs, equation=f"{','.join(letters)}->{result}")


# Other implementations of matmul -----------------------------------------------------------

# The rungs of a ladder; `minidl bench ladder` tells what each is worth.


def of_matrices(product):
    """np.matmul for all shapes, from a product of two matrices of the same dtype."""

    def matmul(x, y):
        dtype = np.result_type(x, y)
        row = x.reshape(1, -1) if x.ndim == 1 else x
        column = y.reshape(-1, 1) if y.ndim == 1 else y
        if row.shape[-1] != column.shape[-2]:
            raise ValueError(f"x {x.shape} has rows of another length than y {y.shape} columns")
        batch = np.broadcast_shapes(row.shape[:-2], column.shape[:-2])
        row = np.broadcast_to(row, batch + row.shape[-2:]).astype(dtype, copy=False)
        column = np.broadcast_to(column, batch + column.shape[-2:]).astype(dtype, copy=False)
        z = np.empty((*batch, row.shape[-2], column.shape[-1]), dtype)
        for i in np.ndindex(batch):
            z[i] = product(row[i], column[i])
        return z.reshape(batch + x.shape[-2:-1] + (y.shape[-1:] if y.ndim > 1 else ()))

    return matmul


@matmul.kernel("loops", default=False)
@of_matrices
def _(x, y):
    z = np.zeros((x.shape[0], y.shape[1]), x.dtype)
    for i in range(x.shape[0]):
        for j in range(y.shape[1]):
            for k in range(x.shape[1]):
                z[i, j] += x[i, k] * y[k, j]
    return z


for rung in ("naive", "reordered", "tiled"):  # csrc/cpu/ladder.h
    matmul.kernel(rung, dtypes=("float32", "float64"), missing=why_missing, default=False)(
        of_matrices(getattr(native, f"matmul_{rung}", np.matmul))
    )


# Samples ----------------------------------------------------------------------------------


@matmul.samples
def _(rng):
    shapes = [
        ((3, 4), (4, 2)), ((2, 3, 4), (2, 4, 5)), ((2, 3, 4), (4, 5)), ((3, 4), (2, 4, 5)),
        ((2, 1, 3, 4), (3, 4, 2)), ((4,), (4,)), ((3, 4), (4,)), ((4,), (4, 3)),
        ((2, 3, 4), (4,)), ((4,), (2, 4, 3)), ((0, 4), (4, 3)), ((3, 0), (0, 2)),
        ((8, 4200), (4200, 8)),  # more than SMALL
    ]  # fmt: skip
    for a, b in shapes:
        yield sample(rng.normal(size=a), rng.normal(size=b))


@linear.samples
def _(rng):
    yield sample(rng.normal(size=(3, 4)), rng.normal(size=(5, 4)), rng.normal(size=5))
    yield sample(rng.normal(size=(2, 3, 4)), rng.normal(size=(5, 4)), rng.normal(size=5))
    yield sample(rng.normal(size=4), rng.normal(size=(5, 4)), rng.normal(size=5))
    yield sample(rng.normal(size=(3, 4)), rng.normal(size=(5, 4)), None)
    yield sample(rng.normal(size=(0, 4)), rng.normal(size=(5, 4)), rng.normal(size=5))
    yield sample(rng.normal(size=(8, 4200)), rng.normal(size=(8, 4200)), rng.normal(size=8))


@einsum_.samples
def _(rng):
    sizes = {"i": 2, "j": 3, "k": 4, "b": 2}
    equations = ("ij,jk->ik", "bij,bjk->bik", "ij->ji", "ij->i", "ij->", "i,j->ij", "ij,ij->",
                 "ij,j,k->ik", "bij,kj->bki", "ij,k->i")  # fmt: skip
    for equation in equations:
        inputs = equation.partition("->")[0].split(",")
        yield sample(*(rng.normal(size=[sizes[c] for c in x]) for x in inputs), equation=equation)
