"""Independent answers for every op.

An op ``f`` of the registry has two oracles, keyed by its name:

* ``@loops("f")``: the definition in plain Python loops over elements (no vectorised NumPy that
  the formula could share a mistake with). Takes and returns float64 arrays. Runs in `make test`.
* ``@pytorch("f")``: the same in PyTorch, on torch tensors. Runs in `.ci/run`: forward, first and
  second order gradients are compared. torch is imported by the caller, inside the function.

Both take the op's inputs and keyword arguments. A registered op without both fails the suite.
"""

from collections.abc import Callable
from typing import Any

Oracle = Callable[..., Any]

LOOPS: dict[str, Oracle] = {}
PYTORCH: dict[str, Oracle] = {}


def loops(*names: str) -> Callable[[Oracle], Oracle]:
    """Register a plain-loop oracle for one op or several of the same signature."""
    return lambda f: [LOOPS.__setitem__(name, f) for name in names] and f


def pytorch(*names: str) -> Callable[[Oracle], Oracle]:
    """Register a PyTorch oracle."""
    return lambda f: [PYTORCH.__setitem__(name, f) for name in names] and f
