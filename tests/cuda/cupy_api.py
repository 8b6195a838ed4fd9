"""Writes cupy_api.json: what CuPy has of NumPy's functions, and which arguments they take.

    pip install cupy-cuda13x && python tests/cuda/cupy_api.py

CuPy imports without a GPU, so its own signatures can be read anywhere. The double in
`cupy_double.py` offers what is listed there and nothing else.
"""

import inspect
import json
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


def main() -> None:
    import cupy
    import numpy as np

    found = {
        name: signature(getattr(cupy, name))
        for name in dir(cupy)
        if not name.startswith("_")
        and callable(getattr(cupy, name))
        and not isinstance(getattr(cupy, name), type)
        and callable(getattr(np, name, None))
    }
    lines = ",\n".join(f'  "{name}": {json.dumps(args)}' for name, args in found.items())
    text = f'{{\n"version": "{cupy.__version__}",\n"functions": {{\n{lines}\n}}\n}}\n'
    PATH.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
