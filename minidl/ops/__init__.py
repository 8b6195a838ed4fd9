"""The ops: formulas with their gradients, one file a family.

Importing this package registers them all, and gives Tensor its operators and methods.
"""

from minidl.ops import elementwise, linalg, loss, methods, reduce, shape, softmax

__all__ = ["elementwise", "linalg", "loss", "methods", "reduce", "shape", "softmax"]
