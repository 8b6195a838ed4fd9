"""The ops: formulas with their gradients, one file a family.

Importing this package registers them all, and gives Tensor its operators and methods.
"""

from minidl.ops import (
    attention,
    conv,
    cuda,
    dropout,
    elementwise,
    embedding,
    half,
    linalg,
    loss,
    methods,
    narrow,
    norm,
    pool,
    quantized,
    reduce,
    rnn,
    shape,
    softmax,
    warp,
)

__all__ = [
    "attention", "conv", "cuda", "dropout", "elementwise", "embedding", "half", "linalg", "loss",
    "methods", "narrow", "norm", "pool", "quantized", "reduce", "rnn", "shape", "softmax", "warp",
]  # fmt: skip
