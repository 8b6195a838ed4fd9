"""Where arrays live: NumPy on the CPU, CuPy on CUDA devices, and the native module beside them.

A device is named as PyTorch names it: "cpu", "cuda", "cuda:1".
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np


def array_module(array: Any) -> ModuleType:
    """The module that made an array: `numpy` or `cupy`.

    Formulas call it ``xp``. Only creation (``xp.zeros``) needs it: ufuncs and functions such as
    ``np.where`` find their way to CuPy by themselves.
    """
    if isinstance(array, np.ndarray | np.generic | int | float):
        return np
    return cupy()


def cupy() -> ModuleType:
    """CuPy, or an error that says what to install."""
    try:
        import cupy
    except ImportError as error:
        raise RuntimeError(
            "device 'cuda' needs CuPy: pip install 'minidl[cuda]' (an NVIDIA driver is enough, "
            f"no CUDA toolkit). Importing cupy said: {error}"
        ) from None
    return cupy


def parse_device(device: str) -> tuple[str, int]:
    """Split a device's name: "cuda:1" -> ("cuda", 1).

    Raises:
        ValueError: not "cpu", "cuda" or "cuda:N".
    """
    kind, _, index = str(device).partition(":")
    if (kind == "cpu" and index in ("", "0")) or (kind == "cuda" and (index or "0").isdigit()):
        return kind, int(index or 0)
    raise ValueError(f"device {device!r}: expected 'cpu', 'cuda' or 'cuda:N'")


class device(str):
    """A device's name, with its parts: PyTorch's ``torch.device("cuda:1")``.

    Attributes:
        type: "cpu" or "cuda".
        index: which one, or None if the name does not say.

    Raises:
        ValueError: not "cpu", "cuda" or "cuda:N".
    """

    type: str
    index: int | None  # type: ignore[assignment]  # PyTorch's name; hides str.index

    def __new__(cls, name: str, index: int | None = None) -> device:
        self = super().__new__(cls, name if index is None else f"{name}:{index}")
        self.type, number = parse_device(self)
        self.index = number if ":" in self else None
        return self


def device_type(array: Any) -> str:
    """ "cpu" or "cuda"."""
    return "cpu" if isinstance(array, np.ndarray | np.generic) else "cuda"


def device_name(array: Any) -> str:
    """The name of the device that holds an array: "cpu", "cuda:0", ..."""
    return "cpu" if device_type(array) == "cpu" else f"cuda:{array.device.id}"


def to_device(array: Any, device: str) -> Any:
    """The array on a device; itself if it is there already.

    Raises:
        ValueError: unknown device name.
        RuntimeError: no CuPy, or no such GPU.
    """
    kind, index = parse_device(device)
    if kind == "cpu":
        return array if device_type(array) == "cpu" else array.get()
    cp = cupy()
    try:
        count = cp.cuda.runtime.getDeviceCount()
    except cp.cuda.runtime.CUDARuntimeError as error:
        raise RuntimeError(f"device {device!r}: CuPy found no usable GPU ({error})") from None
    if index >= count:
        raise RuntimeError(f"device {device!r}: this machine has {count} GPU(s), numbered from 0")
    with cp.cuda.Device(index):
        return cp.asarray(array)
