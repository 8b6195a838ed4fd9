"""A strict double of CuPy, for machines without a GPU.

`install()` puts it in the place of the modules ``cupy`` and ``cupyx``. Its arrays are NumPy arrays
in a wrapper that lets nothing through which CuPy would not: no array of the host where one of the
device is wanted, no implicit copy back (``np.asarray(x)``), no function and no argument that CuPy
lacks (`cupy_api.json`, read off CuPy itself), no scalars out of reductions, no array of another
device than the current one. What it refuses, CuPy refuses in nearly the same words. Kernels
(`RawModule`) are compiled with g++ and run on fibers.

(A subclass of ndarray would not do: ``np.asarray`` would take it apart without asking.)
"""

from __future__ import annotations

import itertools
import json
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from minidl.backend import cuda_kernels

API = json.loads(Path(__file__).with_name("cupy_api.json").read_text(encoding="utf-8"))
FUNCTIONS: dict[str, list[str] | None] = API["functions"]
DEVICES = 2
HOST_RESULTS = {"shape", "ndim", "size", "result_type", "broadcast_shapes", "can_cast"}
CONVERTERS = {"array", "asarray", "ascontiguousarray", "asfortranarray", "asanyarray"}


class Refused(TypeError):
    """What CuPy would not do either (or would do wrongly, in silence)."""


class Here(threading.local):
    """What each thread has of its own: its device and its streams."""

    def __init__(self) -> None:
        self.device = 0
        self.streams: list[Stream] = []

    @property
    def stream(self) -> Stream:
        return self.streams[-1] if self.streams else NULL


here = Here()

# Which stream has written to a piece of memory last, and when. What another stream, or the host,
# does with it must come after an event that was recorded later and waited for.

writes: dict[int, tuple[Stream, int, int]] = {}  # address: stream, time, bytes
clock = itertools.count(1)


def owner(memory: np.ndarray) -> np.ndarray:
    while isinstance(memory.base, np.ndarray):
        memory = memory.base
    return memory


def address(memory: np.ndarray) -> int:
    return int(memory.__array_interface__["data"][0])


def wrote(memory: np.ndarray, stream: Stream | None = None) -> None:
    whole = owner(memory)
    writes[address(whole)] = (stream or here.stream, next(clock), whole.nbytes)


def check_written(memory: np.ndarray, stream: Stream | None = None) -> None:
    """Refuse to read what may still be written."""
    stream = stream or here.stream
    by, moment, _ = writes.get(address(owner(memory)), (stream, 0, 0))
    if by is not stream and max(stream.knows.get(by, 0), HOST.get(by, 0)) < moment:
        raise Refused(
            f"{by} may still be writing this memory, and {stream} has not waited for it: "
            "wait_event(an event recorded after that)"
        )


# Arrays -----------------------------------------------------------------------------------


def wrap(x: Any) -> Any:
    """What NumPy computed, as what CuPy would have returned: its scalars are arrays there."""
    if isinstance(x, np.ndarray | np.generic):
        memory = np.asarray(x)
        wrote(memory)
        return ndarray(memory, here.device)
    if isinstance(x, tuple | list):
        return type(x)(map(wrap, x))
    return x


def unwrap(x: Any) -> Any:
    """The memory of a device array, for a computation on the current device."""
    if isinstance(x, ndarray):
        if x._device != here.device:
            raise ValueError(
                "Array device must be same as the current device: array device = "
                f"{x._device} while current = {here.device}"
            )
        check_written(x._memory)
        return x._memory
    if isinstance(x, np.ndarray):
        raise Refused("Unsupported type <class 'numpy.ndarray'>")
    if isinstance(x, tuple | list):
        return type(x)(map(unwrap, x))
    return x


def check_arguments(name: str, allowed: list[str] | None, args: Any, kwargs: Any) -> None:
    if allowed is None:  # a ufunc
        allowed = ["*args", "out", "casting", "dtype"]
    wrong = [k for k in kwargs if k not in allowed] if "**kwargs" not in allowed else []
    if wrong or (len(args) > len(allowed) and not any(a.startswith("*") for a in allowed)):
        raise Refused(
            f"cupy.{name}({', '.join(allowed)}) takes no {wrong or f'{len(args)} arguments'}"
        )


def call(name: str, function: Callable[..., Any], allowed: Any, args: Any, kwargs: Any) -> Any:
    """A function of CuPy's on device arrays."""
    check_arguments(name, allowed, args, kwargs)
    out = kwargs.get("out")
    if name in HOST_RESULTS:
        return function(*map(bare, args), **kwargs)
    result = function(*map(unwrap, args), **{k: unwrap(v) for k, v in kwargs.items()})
    if out is None:
        return wrap(result)
    wrote(out._memory)
    return out


def bare(x: Any) -> Any:
    return x._memory if isinstance(x, ndarray) else x


METHODS = {
    "all": "axis out keepdims", "any": "axis out keepdims", "max": "axis out keepdims",
    "min": "axis out keepdims", "argmax": "axis out dtype keepdims",
    "argmin": "axis out dtype keepdims", "sum": "axis dtype out keepdims",
    "prod": "axis dtype out keepdims", "mean": "axis dtype out keepdims",
    "var": "axis dtype out ddof keepdims", "std": "axis dtype out ddof keepdims",
    "cumsum": "axis dtype out", "cumprod": "axis dtype out", "argsort": "axis",
    "astype": "dtype order casting subok copy", "copy": "order", "ravel": "order",
    "flatten": "order", "squeeze": "axis", "swapaxes": "axis1 axis2", "transpose": "*axes",
    "take": "indices axis out", "repeat": "repeats axis", "clip": "min max out",
    "round": "decimals out", "dot": "b out", "nonzero": "", "diagonal": "offset axis1 axis2",
    "searchsorted": "v side sorter", "trace": "offset axis1 axis2 dtype out", "conj": "",
    "view": "dtype", "reshape": "*shape order",
}  # fmt: skip


OWNERS: weakref.WeakValueDictionary[int, ndarray] = weakref.WeakValueDictionary()  # of memory


class ndarray:
    """``cupy.ndarray``."""

    __array_priority__ = 100
    __hash__ = None  # type: ignore[assignment]
    __slots__ = ("__weakref__", "_device", "_memory", "base")

    def __init__(self, memory: np.ndarray, device: int) -> None:
        self._memory, self._device = memory, device
        self.base: ndarray | None = None  # always the same one: minidl tells memory by it
        if isinstance(memory.base, np.ndarray):
            known = OWNERS.get(id(memory.base))
            self.base = ndarray(memory.base, device) if known is None else known
        else:
            OWNERS.setdefault(id(memory), self)

    # NumPy's ways in ------------------------------------------------------------------------

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise Refused(
            "Implicit conversion to a NumPy array is not allowed. Please use `.get()` to "
            "construct a NumPy array explicitly."
        )

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if method != "__call__" or ufunc.__name__ not in FUNCTIONS:
            return NotImplemented
        if "out" in kwargs:
            (kwargs["out"],) = kwargs["out"]
            if not isinstance(kwargs["out"], ndarray):
                raise Refused(f"out is {type(kwargs['out'])}, not a cupy.ndarray")
        return call(ufunc.__name__, ufunc, FUNCTIONS[ufunc.__name__], inputs, kwargs)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        module = sys.modules["cupy"]
        for part in func.__module__.split(".")[1:]:
            module = getattr(module, part, None)  # type: ignore[assignment]
        ours = getattr(module, func.__name__, None)
        return NotImplemented if ours is None else ours(*args, **kwargs)

    # What it is -----------------------------------------------------------------------------

    @property
    def device(self) -> Device:
        return Device(self._device)

    @property
    def data(self) -> Any:
        return types.SimpleNamespace(ptr=self._memory.ctypes.data, device_id=self._device)

    @property
    def T(self) -> ndarray:
        return self._like(self._memory.T)

    @property
    def __cuda_array_interface__(self) -> Any:
        return self._memory.__array_interface__

    dtype = property(lambda self: self._memory.dtype)
    shape = property(lambda self: self._memory.shape)
    strides = property(lambda self: self._memory.strides)
    ndim = property(lambda self: self._memory.ndim)
    size = property(lambda self: self._memory.size)
    nbytes = property(lambda self: self._memory.nbytes)
    itemsize = property(lambda self: self._memory.itemsize)

    @property
    def flags(self) -> Any:
        flags = self._memory.flags
        return types.SimpleNamespace(
            c_contiguous=flags.c_contiguous, f_contiguous=flags.f_contiguous, owndata=flags.owndata
        )

    def _like(self, memory: np.ndarray) -> ndarray:
        return ndarray(memory, self._device)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of unsized object")
        return self.shape[0]

    def __iter__(self) -> Iterator[ndarray]:
        if not self.shape:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return repr(self.get())

    # Back to the host, which waits for the device -------------------------------------------

    def get(
        self, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True
    ) -> Any:
        stream = stream or here.stream
        check_written(self._memory, stream)
        if blocking:
            stream.synchronize()
        if out is None:
            return self._memory.copy()
        if not isinstance(out, np.ndarray):
            raise TypeError("Only numpy.ndarray can be obtained from cupy.ndarray")
        if out.dtype != self.dtype or out.shape != self.shape:
            raise ValueError(f"{out.dtype}{out.shape} array from {self.dtype}{self.shape} array")
        out[...] = self._memory
        return out

    def set(self, arr: np.ndarray, stream: Any = None) -> None:
        if not isinstance(arr, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if arr.dtype != self.dtype or arr.shape != self.shape:
            raise ValueError(f"{arr.dtype}{arr.shape} array to {self.dtype}{self.shape} array")
        self._memory[...] = arr
        wrote(self._memory, stream)

    def item(self, *args: Any) -> Any:
        return self.get().item(*args)

    def tolist(self) -> Any:
        return self.get().tolist()

    def __bool__(self) -> bool:
        return bool(self.get())

    def __int__(self) -> int:
        return int(self.get())

    def __float__(self) -> float:
        return float(self.get())

    # Elements -------------------------------------------------------------------------------

    def _index(self, index: Any) -> Any:
        """An index for NumPy. (CuPy copies indices from the host; it does so in silence.)"""
        parts = index if isinstance(index, tuple) else (index,)
        masks = [p for p in parts if isinstance(p, ndarray) and p.dtype.kind == "b" and p.ndim]
        if len(masks) > 1:
            raise Refused("CuPy takes no more than one boolean array in an index")
        if any(isinstance(p, np.ndarray) and p.ndim for p in parts):
            raise Refused("an index from the host's memory: a copy to the device that nobody sees")
        return tuple(map(unwrap, parts)) if isinstance(index, tuple) else unwrap(index)

    def __getitem__(self, index: Any) -> ndarray:
        return self._like(np.asarray(self._memory[self._index(index)]))

    def __setitem__(self, index: Any, value: Any) -> None:
        self._memory[self._index(index)] = unwrap(value)
        wrote(self._memory)

    def fill(self, value: Any) -> None:
        self._memory.fill(unwrap(value))
        wrote(self._memory)

    # Arithmetic -----------------------------------------------------------------------------

    def __pow__(self, other: Any, modulo: None = None) -> Any:
        return self._operate("__pow__", other)

    def _operate(self, name: str, *others: Any) -> Any:
        if any(isinstance(other, np.ndarray) for other in others):
            raise Refused("Unsupported type <class 'numpy.ndarray'>")
        if any(type(other).__name__ == "Tensor" for other in others):
            return NotImplemented
        result = getattr(unwrap(self), name)(*map(unwrap, others))
        if name.startswith("__i") and name not in ("__invert__",):
            wrote(self._memory)
            return self
        return result if result is NotImplemented else wrap(result)


def operator(name: str) -> Callable[..., Any]:
    return lambda self, *others: self._operate(name, *others)


TWO = "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"
ONE = "neg", "pos", "abs", "invert", "lt", "le", "gt", "ge", "eq", "ne"
for sign in (*ONE, *(kind + sign for sign in TWO for kind in ("", "r", "i"))):
    if sign not in ("pow", "imatmul"):  # pow is above; CuPy has no @= either
        setattr(ndarray, f"__{sign}__", operator(f"__{sign}__"))


def method(name: str, allowed: list[str]) -> Callable[..., Any]:
    def run(self: ndarray, *args: Any, **kwargs: Any) -> Any:
        bound = getattr(unwrap(self), name)
        return call(f"ndarray.{name}", bound, allowed, args, kwargs)

    return run


for name, allowed in METHODS.items():
    setattr(ndarray, name, method(name, allowed.split()))


# Devices, streams, memory -----------------------------------------------------------------


class CUDARuntimeError(RuntimeError):
    pass


class Device:
    """``cupy.cuda.Device``."""

    def __init__(self, device: int | None = None) -> None:
        self.id = here.device if device is None else int(device)
        self._before: list[int] = []

    def __int__(self) -> int:
        return self.id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self) -> int:
        return self.id

    def use(self) -> None:
        if not 0 <= self.id < devices_here:
            raise CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
        here.device = self.id

    def __enter__(self) -> Device:
        self._before.append(here.device)
        self.use()
        return self

    def __exit__(self, *_: object) -> None:
        here.device = self._before.pop()

    def synchronize(self) -> None:
        for stream in list(streams.values()):
            stream.synchronize()


class Pending:
    """Work that a stream has not done yet: NCCL's, which waits for other processes."""

    def step(self) -> bool:
        """Go on, if possible; whether it is done."""
        raise NotImplementedError


class Stream:
    """``cupy.cuda.Stream``: work is done at once, in whichever order it is asked for.

    (But for `Pending` work, which a thread goes on with. Who has waited for what is recorded.)
    """

    def __init__(self, null: bool = False, non_blocking: bool = False, ptds: bool = False) -> None:
        self.ptr = 0 if null else next(clock)
        self.device_id = here.device if streams else 0
        self.knows: dict[Stream, int] = {}  # up to when it has waited for each of the others
        self.pending: list[Pending] = []
        self.lock = threading.RLock()
        streams[self.ptr] = self

    def __repr__(self) -> str:
        return f"stream {self.ptr}"

    def __enter__(self) -> Stream:
        here.streams.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        here.streams.pop()

    def progress(self) -> None:
        with self.lock:
            while self.pending and self.pending[0].step():
                self.pending.pop(0)

    def synchronize(self) -> None:
        self.record().synchronize()

    def wait_event(self, event: Event) -> None:
        if not event.recorded:
            raise CUDARuntimeError("the event was never recorded")
        event.wait()
        for stream, moment in event.knows.items():
            self.knows[stream] = max(self.knows.get(stream, 0), moment)

    def record(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event


class Event:
    """``cupy.cuda.Event``."""

    def __init__(self, block: bool = False, disable_timing: bool = False) -> None:
        self.recorded, self.time = False, 0.0
        self.knows: dict[Stream, int] = {}
        self.stream, self.pending = NULL, list[Pending]()

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream = stream or here.stream
        self.recorded, self.time = True, time.perf_counter()
        self.knows = {**stream.knows, stream: next(clock)}
        with stream.lock:
            self.pending = list(stream.pending)

    def wait(self) -> None:
        limit = time.monotonic() + 30
        while not self.done:
            if time.monotonic() > limit:
                raise Refused(f"this would hang: {self.pending[0]} never comes to its end")
            time.sleep(1e-3)

    def synchronize(self) -> None:
        self.wait()
        for stream, moment in self.knows.items():
            HOST[stream] = max(HOST.get(stream, 0), moment)

    @property
    def done(self) -> bool:
        self.stream.progress()
        with self.stream.lock:
            return self.recorded and not any(p in self.stream.pending for p in self.pending)


streams: dict[int, Stream] = {}
HOST: dict[Stream, int] = {}  # up to when the host has waited for each stream
NULL = Stream(null=True)
devices_here = DEVICES


class MemoryPool:
    """``cupy.get_default_memory_pool()``."""

    def used_bytes(self) -> int:
        return 0

    def total_bytes(self) -> int:
        return 0

    def free_all_blocks(self) -> None:
        pass

    def set_limit(self, size: int | None = None, fraction: float | None = None) -> None:
        pass


class RawModule:
    """``cupy.RawModule``: kernels compiled for the CPU."""

    def __init__(self, *, code: str, options: tuple[str, ...] = (), backend: str = "nvrtc") -> None:
        self.code, self.options = code, options

    def compile(self, log_stream: Any = None) -> None:
        self.module = cuda_kernels.CpuModule(self.code, self.options)

    def get_function(self, name: str) -> RawKernel:
        return RawKernel(self.module.get_function(name))


class RawKernel:
    """``cupy.RawKernel``, stricter: CuPy passes arguments of wrong types on to the kernel."""

    def __init__(self, kernel: cuda_kernels.CpuKernel) -> None:
        object.__setattr__(self, "kernel", kernel)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.kernel, name, value)

    def __call__(self, grid: Any, block: Any, args: Any, *, shared_mem: int = 0) -> None:
        self.kernel(grid, block, tuple(map(unwrap, args)), shared_mem)
        for x in args:  # which of them it has written to, nobody says
            if isinstance(x, ndarray):
                wrote(x._memory)


# The modules ------------------------------------------------------------------------------


def named(name: str) -> Callable[..., Any]:
    """A function of CuPy's that NumPy has as well."""
    function, allowed = getattr(np, name), FUNCTIONS[name]

    def run(*args: Any, **kwargs: Any) -> Any:
        if name in CONVERTERS:  # the explicit ways from the host to the device
            check_arguments(name, allowed, args, kwargs)
            kwargs.pop("blocking", None)  # whether to wait for the copy: here it is done at once
            source, *rest = args
            on_device = isinstance(source, ndarray)
            memory = function(source._memory if on_device else source, *rest, **kwargs)
            if not on_device and memory is source:
                memory = memory.copy()
            same = on_device and source._device == here.device and memory is source._memory
            return source if same else wrap(memory)
        return call(name, function, allowed, args, kwargs)

    run.__name__ = name
    if isinstance(function, np.ufunc):
        for method in ("at", "reduce", "accumulate", "reduceat", "outer"):
            ufunc_method = getattr(function, method)
            setattr(run, method, lambda *a, m=ufunc_method, **k: wrap(m(*map(unwrap, a), **k)))
    return run


def modules(devices: int) -> dict[str, types.ModuleType]:
    cupy = types.ModuleType("cupy")
    for name in FUNCTIONS:
        setattr(cupy, name, named(name))
    for name in (
        "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16",
        "uint32", "uint64", "bool_", "inf", "nan", "newaxis", "dtype", "generic", "integer",
    ):  # fmt: skip
        setattr(cupy, name, getattr(np, name))

    def count() -> int:
        if not devices:
            raise CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
        return devices

    runtime = types.SimpleNamespace(
        CUDARuntimeError=CUDARuntimeError,
        getDeviceCount=count,
        getDeviceProperties=lambda i: {"name": b"a double", "major": 8, "minor": 0},
        deviceGetPCIBusId=lambda i: f"0000:{i:02X}:00.0",
        runtimeGetVersion=lambda: 13000,
        driverGetVersion=lambda: 13000,
    )
    cuda = types.ModuleType("cupy.cuda")
    for name, value in {
        "Device": Device, "Stream": Stream, "Event": Event, "runtime": runtime,
        "get_elapsed_time": lambda a, b: (b.time - a.time) * 1e3,
        "get_current_stream": lambda: here.stream,
        "alloc_pinned_memory": lambda size: memoryview(bytearray(size)),
    }.items():  # fmt: skip
        setattr(cuda, name, value)
    pool = MemoryPool()
    linalg = types.ModuleType("cupy.linalg")
    for name in ("norm", "qr", "svd", "solve", "inv"):
        function = getattr(np.linalg, name)
        setattr(linalg, name, lambda *a, f=function, **k: wrap(f(*map(unwrap, a), **k)))
    for name, value in {
        "__version__": API["version"] + " (double)", "ndarray": ndarray, "cuda": cuda,
        "linalg": linalg, "RawModule": RawModule,
        "asnumpy": lambda a, **_: a.get() if isinstance(a, ndarray) else np.asarray(a),
        "get_default_memory_pool": lambda: pool,
    }.items():  # fmt: skip
        setattr(cupy, name, value)

    cupyx, scipy = types.ModuleType("cupyx"), types.ModuleType("cupyx.scipy")
    special = types.ModuleType("cupyx.scipy.special")
    from scipy.special import erf

    special.erf = lambda x: wrap(erf(unwrap(x)))  # type: ignore[attr-defined]
    scipy.special, cupyx.scipy = special, scipy  # type: ignore[attr-defined]
    cupyx.empty_pinned = np.empty  # type: ignore[attr-defined]
    nccl = types.ModuleType("cupy.cuda.nccl")  # no attribute of cupy.cuda before it is imported
    nccl.available = False  # type: ignore[attr-defined]  # see nccl_double.py
    return {
        "cupy": cupy, "cupy.cuda": cuda, "cupy.cuda.nccl": nccl,
        "cupy.linalg": linalg, "cupyx": cupyx,
        "cupyx.scipy": scipy, "cupyx.scipy.special": special,
    }  # fmt: skip


@contextmanager
def installed(devices: int = DEVICES) -> Iterator[types.ModuleType]:
    """``import cupy`` finds the double in here; with 0 devices, a CuPy that sees no GPU."""
    global devices_here
    made, devices_here = modules(devices), devices
    before = {name: sys.modules.get(name) for name in made}
    sys.modules.update(made)
    cuda_kernels.load.cache_clear()
    try:
        yield made["cupy"]
    finally:
        cuda_kernels.load.cache_clear()
        devices_here = DEVICES
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
