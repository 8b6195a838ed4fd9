"""Where arrays live: NumPy on the CPU, CuPy on CUDA devices, and the native module beside them.

A device is named as PyTorch names it: "cpu", "cuda", "cuda:1".
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """Split a device's name: "cuda:1" -> ("cuda", 1). "cuda" alone is the current GPU.

    Raises:
        ValueError: not "cpu", "cuda" or "cuda:N".
    """
    kind, _, index = str(device).partition(":")
    if kind == "cpu" and index in ("", "0"):
        return kind, 0
    if kind == "cuda" and (index or "0").isdigit():
        return kind, int(index) if index else current_gpu()
    raise ValueError(f"device {device!r}: expected 'cpu', 'cuda' or 'cuda:N'")


def current_gpu() -> int:
    """The number of the GPU that new arrays go to: 0, or what `device` and `set_device` chose."""
    try:
        import cupy

        return cupy.cuda.Device().id
    except Exception:  # no CuPy, no driver: whoever wants a GPU is told so when they ask for it
        return 0


class device(str):
    """A device's name, with its parts: PyTorch's ``torch.device("cuda:1")``.

    ``with minidl.device("cuda:1"):`` makes it the current GPU, the one that "cuda" means and that
    computes: ops on its tensors belong in there. ("cpu" changes nothing.)

    Attributes:
        type: "cpu" or "cuda".
        index: which one, or None if the name does not say.

    Raises:
        ValueError: not "cpu", "cuda" or "cuda:N".
        RuntimeError: of the ``with`` block: no CuPy, or no such GPU.
    """

    type: str
    index: int | None  # type: ignore[assignment]  # PyTorch's name; hides str.index

    def __new__(cls, name: str, index: int | None = None) -> device:
        self = super().__new__(cls, name if index is None else f"{name}:{index}")
        self.type, number = parse_device(self)
        self.index = number if ":" in self else None
        self._entered = []
        return self

    _entered: list[Any]

    def __enter__(self) -> device:
        if self.type == "cuda":
            context = gpu(parse_device(self)[1])
            context.__enter__()
            self._entered.append(context)
        return self

    def __exit__(self, *error: object) -> None:
        if self.type == "cuda":
            self._entered.pop().__exit__(*error)


def device_type(array: Any) -> str:
    """ "cpu" or "cuda"."""
    return "cpu" if isinstance(array, np.ndarray | np.generic) else "cuda"


def device_name(array: Any) -> str:
    """The name of the device that holds an array: "cpu", "cuda:0", ..."""
    return "cpu" if device_type(array) == "cpu" else f"cuda:{array.device.id}"


def gpu(index: int) -> Any:
    """CuPy's name for a GPU, if it is there.

    Raises:
        RuntimeError: no CuPy, or no such GPU.
    """
    cp = cupy()
    try:
        count = cp.cuda.runtime.getDeviceCount()
    except cp.cuda.runtime.CUDARuntimeError as error:
        raise RuntimeError(
            f"device 'cuda': CuPy finds no GPU that it can use ({error}). `minidl doctor` says more"
        ) from None
    if index >= count:
        raise RuntimeError(
            f"device 'cuda:{index}': this machine has {count} GPU(s), numbered from 0"
        )
    return cp.cuda.Device(index)


def to_device(array: Any, device: str, non_blocking: bool = False) -> Any:
    """The array on a device; itself if it is there already.

    Args:
        non_blocking: from pinned memory (`pinned`) to a GPU: do not wait until it is there. Later
            work on the same stream waits for it; the pinned array must not change meanwhile.

    Raises:
        ValueError: unknown device name.
        RuntimeError: no CuPy, or no such GPU.
    """
    kind, index = parse_device(device)
    here = device_type(array)
    if kind == "cpu":
        return array if here == "cpu" else array.get()
    with gpu(index):
        if here == "cpu":
            return cupy().asarray(array, blocking=not non_blocking)
        return array if array.device.id == index else cupy().array(array)


def empty(shape: Sequence[int], dtype: Any, device: str) -> Any:
    """An array on a device, whatever is in it.

    Raises:
        ValueError: unknown device name.
        RuntimeError: no CuPy, or no such GPU.
    """
    kind, index = parse_device(device)
    if kind == "cpu":
        return np.empty(tuple(shape), dtype)
    with gpu(index):
        return cupy().empty(tuple(shape), dtype)


def pinned(array: np.ndarray) -> np.ndarray:
    """A copy in memory that the system keeps in its place, from which a GPU reads by itself.

    Raises:
        RuntimeError: no CuPy, or no GPU.
    """
    gpu(0)
    import cupyx

    copy = cupyx.empty_pinned(array.shape, array.dtype)
    copy[...] = array
    return copy
