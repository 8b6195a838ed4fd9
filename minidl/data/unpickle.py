"""Reading a pickle without running code.

A pickle is a program: it may import any function and call it. This one may name only what NumPy
arrays are made of; anything else is refused before it is called.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from minidl.data.errors import DataError

ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),  # protocol 5
    ("_codecs", "encode"),  # bytes, as Python 3 writes them in protocols below 3
}


class ArrayUnpickler(pickle.Unpickler):
    """An unpickler for arrays, numbers, strings, lists and dicts."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core.", "numpy._core.")  # as NumPy 1 called it
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")
        return super().find_class(module, name)


def read_pickle(path: Path) -> Any:
    """The arrays and plain objects in a pickle; Python 2's strings as bytes.

    Raises:
        DataError: it is empty, truncated, no pickle, or would run code.
    """
    content = path.read_bytes()
    if not content:
        raise DataError(f"{path}: the file is empty")
    try:
        return ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # damaged pickles raise nearly anything
        raise DataError(f"{path}: not a pickle of arrays, or damaged ({error})") from None
