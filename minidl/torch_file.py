"""Reading what `torch.save` wrote, without PyTorch and without running code from the file.

Such a file is a pickle, and a pickle is a program: it says which functions to call with what. The
reader below knows the few that tensors are made of, and refuses all others by name. There are two
layouts of the same thing:

    since PyTorch 1.6   a zip archive: data.pkl, and the numbers of storage k in data/k
    before              pickles one after the other, then all storages' numbers

A tensor in the pickle is a view: (storage, offset, size, stride).
"""

from __future__ import annotations

import collections
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from minidl import backend
from minidl.data.unpickle import ArrayUnpickler
from minidl.tensor import Tensor

MAGIC = 0x1950A86A20F9469CFC6C  # begins a file of the older layout
DTYPES = {
    "Float": "<f4", "Double": "<f8", "Half": "<f2", "Long": "<i8", "Int": "<i4", "Short": "<i2",
    "Char": "i1", "Byte": "u1", "Bool": "?",
}  # fmt: skip


def read_torch(path: Path, device: str | None = None) -> Any:
    """The nested dicts, lists and values in the file, its tensors as Tensors on `device`.

    Raises:
        ValueError: it is damaged, asks for code to be run, or has a dtype that NumPy lacks.
    """
    try:
        read = read_archive if zipfile.is_zipfile(path) else read_older
        with open(path, "rb") as file:
            content = read(file, path.stat().st_size)
    except Exception as error:  # damaged pickles raise nearly anything
        raise ValueError(f"{path}: not a file of tensors by torch.save ({error})") from None
    return as_tensors(content, device or "cpu")


def read_archive(file: BinaryIO, size: int) -> Any:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        program = next((name for name in names if name.endswith("data.pkl")), None)
        if program is None:
            raise ValueError("the archive has no data.pkl: TorchScript, or no file of tensors")
        folder = program.removesuffix("data.pkl")
        if folder + "byteorder" in names and archive.read(folder + "byteorder") != b"little":
            raise ValueError("its numbers are big-endian")

        def storage(key: str, dtype: np.dtype, count: int) -> np.ndarray:
            numbers = np.frombuffer(archive.read(f"{folder}data/{key}"), dtype)
            if len(numbers) < count:
                raise ValueError(f"storage {key} has {len(numbers)} numbers, expected {count}")
            return numbers

        with archive.open(program) as pickled:
            return TorchUnpickler(pickled, storage).load()


def read_older(file: BinaryIO, size: int) -> Any:
    storages: dict[str, np.ndarray] = {}  # their numbers come last: until then they are empty
    left = size

    def storage(key: str, dtype: np.dtype, count: int) -> np.ndarray:
        nonlocal left
        if key not in storages:
            left -= count * dtype.itemsize
            if count < 0 or left < 0:
                raise ValueError(f"truncated: {size:,} bytes do not hold its tensors")
            storages[key] = np.empty(count, dtype)
        return storages[key]

    def load() -> Any:
        return TorchUnpickler(file, storage).load()

    if load() != MAGIC:
        raise ValueError("a pickle, but not by torch.save")
    _version, _machine, content = load(), load(), load()
    for key in load():
        count = int.from_bytes(file.read(8), "little")
        if count != len(storages[key]) or file.readinto(storages[key].data) != storages[key].nbytes:  # type: ignore[attr-defined]
            raise ValueError("truncated")
    return content


class TorchUnpickler(ArrayUnpickler):
    """Knows tensors, parameters and ordered dicts, beside NumPy's arrays; no other name."""

    def __init__(self, file: Any, storage: Callable[[str, np.dtype, int], np.ndarray]) -> None:
        super().__init__(file, encoding="utf-8")
        self.storage = storage

    def persistent_load(self, pid: Any) -> np.ndarray:
        """A storage: ("storage", its type, key, device, numbers[, view of another])."""
        kind, dtype, key, _device, count, *view = pid
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise pickle.UnpicklingError(f"it asks for {kind!r}, which is unknown")
        if view and view[0] is not None:
            raise pickle.UnpicklingError("it has a view of a storage, as PyTorch 0.1 wrote them")
        return self.storage(str(key), dtype, int(count))

    def find_class(self, module: str, name: str) -> Any:
        kind = name.removesuffix("Storage")
        if module in ("torch", "torch.storage") and kind != name:
            if kind not in DTYPES:
                raise pickle.UnpicklingError(f"it has a tensor of {kind}, which NumPy lacks")
            return np.dtype(DTYPES[kind])
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: view(storage, offset, size, stride)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_: data
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        return super().find_class(module, name)


def view(storage: np.ndarray, offset: int, size: Any, stride: Any) -> np.ndarray:
    """A tensor's numbers; refuses one that would reach beyond its storage."""
    if len(size) != len(stride) or min([offset, *size, *stride], default=0) < 0:
        raise ValueError(f"a tensor of size {tuple(size)}, stride {tuple(stride)} is impossible")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if 0 not in size and last >= len(storage):
        raise ValueError(
            f"a tensor of size {tuple(size)} reaches beyond its {len(storage)} numbers"
        )
    steps = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)


def as_tensors(value: Any, device: str) -> Any:
    """Arrays as Tensors of their own memory, ordered dicts as dicts."""
    if isinstance(value, np.ndarray):
        return Tensor(backend.to_device(np.array(value), device))
    if isinstance(value, dict):
        return {key: as_tensors(v, device) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(as_tensors(v, device) for v in value)
    return value
