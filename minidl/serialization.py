"""save and load: nested dicts and lists of tensors as one safetensors file.

The tensors are stored under dotted names (``{"model": {"conv1.weight": w}}`` becomes
"model.conv1.weight"), so that any safetensors reader opens the file. The nesting, and everything
that is not a tensor, is JSON in the file's metadata (on request compressed: zlib, as base64);
reading it runs no code.

In that JSON plain values stand for themselves, and an object with one key that starts with "$"
stands for something else:

=================================  ==============================================================
{"$tensor": name}, {"$array": …}   a Tensor, a NumPy array, stored under that name
{"$scalar": [dtype, value]}        a NumPy scalar
{"$float": "nan"}                  nan, inf, -inf, which JSON lacks
{"$tuple": […]}                    a tuple
{"$dict": [[key, value], …]}       a dict with keys that are not all strings, or start with "$"
=================================  ==============================================================
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
import secrets
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16)
import numpy as np
import safetensors
import safetensors.numpy

from minidl import backend
from minidl.tensor import Tensor

METADATA = "minidl"
VERSION = 1
DTYPES = "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 bfloat16 float32 float64"
MAX_DEPTH = 100

Where = tuple[Any, ...]  # the keys and indices that lead to a value


def save(obj: Any, path: str | os.PathLike[str], *, compress: bool = False) -> None:
    """Write nested dicts, lists and tuples of tensors and plain values to a file.

    The values may be Tensors, NumPy arrays and scalars, numbers, strings, bools and None. A tensor
    that occurs twice (the same memory: tied weights) is stored once, and is one tensor again when
    loaded. Gradients and `requires_grad` are not stored, nor the device.

    With ``compress`` the JSON is compressed (never the tensors): for small networks of many layers,
    where what describes them weighs.

    The file appears under its name only when it is complete: a run that is killed while saving
    leaves the file that was there.

    Raises:
        TypeError: something else is in `obj`; the message says where.
        ValueError: `obj` contains itself.
    """
    packer = _Packer()
    content: dict[str, Any] = {"version": VERSION, "object": packer.pack(obj, ())}
    if compress:
        text = compact(content.pop("object")).encode()
        content["zlib"] = base64.b64encode(zlib.compress(text, 9)).decode()
    metadata = {METADATA: compact(content)}
    with atomic_path(path) as part:
        safetensors.numpy.save_file(packer.arrays, part, metadata)


def load(path: str | os.PathLike[str], device: str | None = None) -> Any:
    """Read what `save` wrote, in the same nesting (a subclass of dict comes back as a dict, a
    named tuple as a tuple).

    Any other safetensors file comes as a flat dict of its names and tensors, and what `torch.save`
    wrote (.pth, .pt) as it was nested. Tensors are put on `device` (default: "cpu").

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, or neither kind of file; it would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if read_start(path, 4) in (b"PK\3\4", b"\x80\2\x8a\n"):  # torch.save's two layouts
        from minidl.torch_file import read_torch

        return read_torch(path, device)
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            arrays = {name: _owned(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        size = path.stat().st_size
        raise ValueError(
            f"{path}: not a safetensors file, or truncated ({size:,} bytes; {error})"
        ) from None
    except (TypeError, AttributeError, KeyError) as error:  # float8
        raise ValueError(f"{path}: has a dtype that NumPy lacks ({error})") from None
    tensors = {
        name: Tensor(backend.to_device(array, device or "cpu")) for name, array in arrays.items()
    }
    if METADATA not in metadata:
        return tensors
    try:
        content = json.loads(metadata[METADATA])
        if content["version"] > VERSION:
            raise ValueError(f"written by a newer minidl (format {content['version']})")
        if "zlib" in content:
            content["object"] = json.loads(zlib.decompress(base64.b64decode(content["zlib"])))
        return _unpack(content["object"], tensors, arrays)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, zlib.error) as error:
        what = f"no tensor {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: damaged metadata ({what})") from None


def compact(tree: Any) -> str:
    return json.dumps(tree, allow_nan=False, separators=(",", ":"))


def read_start(path: Path, count: int) -> bytes:
    """The first bytes of a file."""
    with open(path, "rb") as file:
        return file.read(count)


def _owned(array: np.ndarray) -> np.ndarray:
    """Writable: optimizers write into what was loaded."""
    return array if array.flags.writeable else array.copy()


class _Packer:
    """Turns an object into JSON, and puts its arrays aside."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self.names: dict[Any, str] = {}  # by the memory that an array occupies
        self.alive: list[Any] = []  # as long as its address is a key
        self.open: set[int] = set()  # the containers around the current one

    def pack(self, obj: Any, where: Where) -> Any:
        if isinstance(obj, Tensor):
            return {"$tensor": self.store(obj.array, where)}
        if isinstance(obj, np.ndarray):
            return {"$array": self.store(obj, where)}
        if isinstance(obj, np.generic):
            if obj.dtype.name not in DTYPES.split():
                raise TypeError(f"{place(where)}: a NumPy scalar of {obj.dtype} cannot be saved")
            return {"$scalar": [obj.dtype.name, self.pack(obj.item(), where)]}
        if obj is None or isinstance(obj, bool):
            return obj
        if isinstance(obj, int):
            return int(obj)
        if isinstance(obj, str):
            return str(obj)
        if isinstance(obj, float):
            return float(obj) if math.isfinite(obj) else {"$float": str(float(obj))}
        if isinstance(obj, dict | list | tuple):
            return self.pack_container(obj, where)
        raise TypeError(f"{place(where)}: a {type(obj).__name__} cannot be saved")

    def pack_container(self, obj: Any, where: Where) -> Any:
        if id(obj) in self.open:
            raise ValueError(f"{place(where)}: contains itself")
        if len(self.open) >= MAX_DEPTH:
            raise ValueError(f"{place(where)}: nested more than {MAX_DEPTH} deep")
        self.open.add(id(obj))
        try:
            if isinstance(obj, dict):
                values = [(key, self.pack(value, (*where, key))) for key, value in obj.items()]
                if all(type(key) is str and not key.startswith("$") for key in obj):
                    return dict(values)
                return {"$dict": [[self.pack_key(key, where), value] for key, value in values]}
            items = [self.pack(item, (*where, i)) for i, item in enumerate(obj)]
            return {"$tuple": items} if isinstance(obj, tuple) else items
        finally:
            self.open.remove(id(obj))

    def pack_key(self, key: Any, where: Where) -> Any:
        if isinstance(key, str | int | float | np.generic) or key is None:
            return self.pack(key, where)
        if isinstance(key, tuple):
            return {"$tuple": [self.pack_key(k, where) for k in key]}
        raise TypeError(f"{place(where)}: a {type(key).__name__} cannot be saved as a key")

    def store(self, array: Any, where: Where) -> str:
        """Put an array aside under its dotted name (with ~2 added if that is taken)."""
        if array.dtype.name not in DTYPES.split():
            raise TypeError(f"{place(where)}: an array of {array.dtype} cannot be saved")
        memory = (address(array), array.shape, array.strides, array.dtype.str)
        if array.size and memory in self.names:
            return self.names[memory]
        dotted = ".".join(map(str, where)) or "tensor"
        name, n = dotted, 1
        while name in self.arrays or name == "__metadata__":
            name, n = f"{dotted}~{n + 1}", n + 1
        self.names[memory] = name
        self.alive.append(array)
        host = backend.to_device(array, "cpu")
        # C order (safetensors reads the bare memory), little-endian; 0-d stays 0-d.
        self.arrays[name] = np.asarray(host, dtype=host.dtype.newbyteorder("<"), order="C")
        return name


def place(where: Where) -> str:
    """Where a value is, for an error: ("optimizer", 3) -> "state['optimizer'][3]"."""
    return "state" + "".join(f"[{key!r}]" for key in where)


def address(array: Any) -> int:
    """Where an array's memory begins."""
    pointer: int = array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr
    return pointer


def _unpack(tree: Any, tensors: dict[str, Tensor], arrays: dict[str, np.ndarray]) -> Any:
    """The object that `_Packer.pack` made the tree of."""

    def unpack(tree: Any) -> Any:
        if isinstance(tree, list):
            return [unpack(item) for item in tree]
        if not isinstance(tree, dict):
            return tree
        kind: str = next(iter(tree), "")
        value: Any = tree.get(kind)
        if not kind.startswith("$"):
            return {key: unpack(item) for key, item in tree.items()}
        if kind == "$tensor":
            return tensors[value]
        if kind == "$array":
            return arrays[value]
        if kind == "$scalar":
            dtype, number = value
            if dtype not in DTYPES.split():
                raise ValueError(f"unknown dtype {dtype!r}")
            return np.dtype(dtype).type(unpack(number))
        if kind == "$float":
            return float(value)
        if kind == "$tuple":
            return tuple(unpack(item) for item in value)
        if kind == "$dict":
            return {unpack(key): unpack(item) for key, item in value}
        raise ValueError(f"unknown kind {kind!r}")

    return unpack(tree)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file whole or not at all::

        with atomic_path("log.json") as part:
            part.write_text(...)

    `part` is a temporary file in the same folder (a rename works only within a file system). At
    the end it is flushed to the disk and takes the name; on an exception it is removed.
    """
    path = Path(os.path.realpath(path))  # through a link, as an ordinary write would go
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # the rename itself; not all systems can
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
