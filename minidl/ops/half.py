"""Products of 16-bit numbers as tensor cores compute them: summed in float32, rounded once.

NumPy adds float16 numbers up in float16, and is slow at it. Here the inputs are widened, which is
exact, the op runs in float32 by whichever kernel it has there, and its result is rounded. So does
the gradient rule.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import numpy as np

from minidl.op import OpFunction
from minidl.ops.conv import conv2d, conv2d_input, conv2d_relu, conv2d_weight
from minidl.ops.elementwise import astype
from minidl.ops.linalg import einsum_, linear, matmul
from minidl.ops.rnn import gru, lstm, rnn

# What `minidl.amp.autocast` runs in 16 bits, too.
PRODUCTS = (
    matmul, linear, einsum_, conv2d, conv2d_relu, conv2d_input, conv2d_weight, rnn, lstm, gru,
)  # fmt: skip
DTYPES = ("float16", "bfloat16")


def wide(x: Any) -> Any:
    """An array of 16-bit floats as float32; anything else as it is."""
    narrow = isinstance(x, np.ndarray) and x.dtype.name in DTYPES
    return x.astype(np.float32) if narrow else x


def rounded(x: Any, dtype: Any) -> Any:
    return None if x is None else astype(x, dtype=dtype)


def in_float32(product: OpFunction) -> None:
    """Give an op its kernel and its gradient kernel for 16-bit floats."""

    quiet = np.errstate(over="ignore", invalid="ignore")  # infinite is what too much is here

    @product.kernel("half", dtypes=DTYPES)
    @quiet
    def _(*inputs: Any, **settings: Any) -> Any:
        floats = [x.dtype for x in inputs if hasattr(x, "dtype") and x.dtype.kind in "fV"]
        dtype = np.result_type(*floats)
        return rounded(product(*map(wide, inputs), **settings), dtype)

    @product.gradient_kernel("half", dtypes=DTYPES)
    def _(g: Any, *saved: Any, **settings: Any) -> list[Any]:
        wide_g = wide(g)
        rule = product.op.array_rule(wide_g)

        @quiet
        def entry(gx: Any) -> Any:
            if type(gx) is FunctionType:
                return quiet(lambda: entry(gx()))
            return rounded(gx, g.dtype)

        return [entry(gx) for gx in rule(wide_g, *map(wide, saved), **settings)]


for product in PRODUCTS:
    in_float32(product)
