"""Writes cupy_api.json: what CuPy has of NumPy's functions, which arguments they take; NCCL.

    pip install cupy-cuda13x nvidia-nccl-cu13 && python tests/cuda/cupy_api.py

CuPy imports without a GPU, so its own signatures can be read anywhere. The double in
`cupy_double.py` offers what is listed there and nothing else.
"""

import inspect
import json
from collections.abc import Callable
from pathlib import Path

PATH = Path(__file__).with_suffix(".json")


def signature(function: object) -> list[str] | None:
    """Names of the arguments, "*args" for any number; None for a ufunc."""
    if type(function).__name__ == "ufunc":
        return None
    try:
        parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    except ValueError:  # compiled, and silent about it
        return ["*args", "**kwargs"]
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return [stars.get(p.kind, "") + p.name for p in parameters]


def arguments(method: Callable[..., object]) -> list[str]:
    """Of a compiled method, whose docstring begins so: "C.bcast(self, intptr_t buff, ...)"."""
    head = (method.__doc__ or "()").split("\n")[0]
    inside = head.partition("(")[2].partition(")")[0].split(", ")
    return [words.split("=")[0].split()[-1] for words in inside if words not in ("", "self")]


def main() -> None:
    import cupy
    import numpy as np
    from cupy.cuda import nccl

    found = {
        name: signature(getattr(cupy, name))
        for name in dir(cupy)
        if not name.startswith("_")
        and callable(getattr(cupy, name))
        and not isinstance(getattr(cupy, name), type)
        and callable(getattr(np, name, None))
    }
    lines = ",\n".join(f'  "{name}": {json.dumps(args)}' for name, args in found.items())
    own = {
        "constants": {k: getattr(nccl, k) for k in dir(nccl) if k.startswith("NCCL_")},
        "methods": {
            name: arguments(getattr(nccl.NcclCommunicator, name))
            for name in dir(nccl.NcclCommunicator)
            if not name.startswith("_") and callable(getattr(nccl.NcclCommunicator, name))
        },
    }
    text = f'{{\n"version": "{cupy.__version__}",\n"functions": {{\n{lines}\n}},\n'
    text += f'"nccl": {json.dumps(own)}\n}}\n'
    PATH.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
