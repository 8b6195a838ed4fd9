"""The CUDA kernels of `csrc/cuda`, compiled where they run.

    load("matmul.cu").get_function("matmul_f32_small")(grid, block, args, shared_mem=26112)

`load` compiles for the GPU through CuPy, which needs a driver but no CUDA toolkit. `load_on_cpu`
compiles *the same source* with g++ and runs it on the CPU, a fiber for each CUDA thread
(`csrc/cuda/cuda_on_cpu.h`): slow, and honest about barriers, layouts and alignments. The tests of
the kernels run there, and a debugger stops there.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minidl import backend

Three = Sequence[int]


def source_folder() -> Path:
    """Where the kernels are: beside the package in a clone, inside it when installed."""
    package = Path(__file__).parents[1]
    for folder in (package / "csrc" / "cuda", package.parent / "csrc" / "cuda"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"the CUDA sources (csrc/cuda) are not beside {package}")


def inlined(file: str | Path) -> str:
    """A kernel file with its ``#include "..."`` written out, each once.

    CuPy's cache knows the text of a kernel and not what it includes, so there must be nothing to
    include. ``#line`` keeps what compilers and debuggers say in terms of the files. What only the
    CPU needs (`ptx_on_cpu.h`) stays an include: the compiler there looks for it.
    """
    seen: set[Path] = set()

    def read(path: Path) -> str:
        seen.add(path)
        lines = [f'#line 1 "{path}"']
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            name = re.match(r'#include "(.*\.cuh)"', line)
            if name and (found := path.parent / name[1]) not in seen:
                lines += [read(found), f'#line {number + 1} "{path}"']
            else:
                lines.append("" if name or line.startswith("#pragma once") else line)
        return "\n".join(lines)

    return read(source_folder() / file) + "\n"


def kernel_names(code: str) -> list[str]:
    """The kernels that a source defines, ``extern "C" __global__ void name(...)``."""
    bounds = r"(?:\s+__launch_bounds__\([\d, ]+\))?"
    return re.findall(rf'extern "C" __global__ void{bounds}\s+(\w+)\(', code)


# On the GPU -------------------------------------------------------------------------------


class CompileError(RuntimeError):
    """A kernel that does not compile, with the lines of its source."""


@functools.cache
def load(file: str, options: tuple[str, ...] = ()) -> Module:
    """Compile a file of kernels for the current GPU, once; for its architecture.

    Args:
        file: a name in csrc/cuda.
        options: for NVRTC, such as "-DNAME=1".

    Raises:
        CompileError: with each error's line of source.
    """
    cupy = backend.cupy()
    code = inlined(file)
    module = cupy.RawModule(code=code, options=("-std=c++17", *options))
    try:
        module.compile()
    except Exception as error:
        if "CompileException" not in type(error).__name__ and not isinstance(error, CompileError):
            raise
        raise CompileError(with_source_lines(str(error))) from None
    return Module(module)


class Module:
    """Compiled kernels, by name."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.get_function = functools.cache(self._get_function)

    def _get_function(self, name: str) -> Callable[..., None]:
        kernel = self.module.get_function(name)

        def launch(grid: Three, block: Three, args: Sequence[Any], shared_mem: int = 0) -> None:
            if shared_mem > 48 << 10 and kernel.max_dynamic_shared_size_bytes < shared_mem:
                kernel.max_dynamic_shared_size_bytes = shared_mem  # more than 48 KB: on request
            kernel(tuple(grid), tuple(block), tuple(args), shared_mem=shared_mem)

        return launch


def with_source_lines(message: str) -> str:
    """What NVRTC says, with the line of source under each place it names. (g++ shows it itself.)"""
    lines = []
    for line in message.splitlines():
        lines.append(line)
        place = re.match(r"(/[^():]+)\((\d+)\): (?:catastrophic )?error", line)
        if place and Path(place[1]).exists():
            source = Path(place[1]).read_text(encoding="utf-8").splitlines()
            lines.append(f"    {place[2]} | {source[int(place[2]) - 1]}")
    return "\n".join(lines)


# On the CPU -------------------------------------------------------------------------------

# What a build for the CPU is compiled with, beside -std and -I. "plain" is fast; in "watch" each
# access to memory is looked at; "address" and "thread" need the sanitizer's library preloaded
# (tools/sanitize_cuda.sh).
BUILDS = {
    "plain": ("-O2", "-g1"),
    "debug": ("-O0", "-g3"),
    "watch": ("-O1", "-g1", "-fsanitize=thread", "-fno-threadsafe-statics", "-DCUDA_ON_CPU_WATCH"),
    "address": ("-O1", "-g1", "-fsanitize=address,undefined", "-fsanitize-sections=shared_memory"),
    "thread": ("-O1", "-g1", "-fsanitize=thread"),
}


order_seed = 1  # of the order in which threads and blocks run; 0: as they are numbered


def load_on_cpu(file: str, options: tuple[str, ...] = (), build: str | None = None) -> Module:
    """Compile a file of kernels for the CPU, once. See `CpuModule`."""
    return _load_on_cpu(file, options, build or os.environ.get("MINIDL_CUDA_ON_CPU", "plain"))


@functools.cache
def _load_on_cpu(file: str, options: tuple[str, ...], build: str) -> Module:
    return Module(CpuModule(inlined(file), options, build))


class CpuModule:
    """``cupy.RawModule`` for NumPy arrays: kernels compiled with g++ and run on fibers.

    Args:
        code: the source, as `inlined` makes it.
        options: those of the form "-DNAME=1" are used.
        build: one of `BUILDS`; by default $MINIDL_CUDA_ON_CPU, or "plain".

    Raises:
        CompileError: with each error's line of source.
        RuntimeError: there is no g++.
    """

    def __init__(self, code: str, options: Sequence[str] = (), build: str | None = None) -> None:
        self.build = build or os.environ.get("MINIDL_CUDA_ON_CPU", "plain")
        self.names = kernel_names(code)
        self.path = compile_for_cpu(code, tuple(o for o in options if o[:2] == "-D"), self.build)
        self.library = ctypes.CDLL(str(self.path))

    def get_function(self, name: str) -> CpuKernel:
        """A kernel, by name."""
        if name not in self.names:
            raise ValueError(f"no kernel is called {name!r}; there are {', '.join(self.names)}")
        return CpuKernel(self, name)

    def watch(self, arrays: list[np.ndarray]) -> None:
        """Tell a "watch" build what memory the next launch may access, and count from 0."""
        rows = [(*np.lib.array_utils.byte_bounds(x), owner(x).ctypes.data) for x in arrays]
        columns = [np.array(column, np.uint64) for column in zip(*rows)]
        pointers = [ctypes.c_void_p(column.ctypes.data) for column in columns]
        self.library.cuda_on_cpu_watch_arrays(ctypes.c_int(len(rows)), *pointers)

    def report(self) -> Report:
        """What a "watch" build counted in the last launch."""
        function = self.library.cuda_on_cpu_report
        function.restype = ctypes.c_char_p
        return read_report(self.with_places(function().decode()))

    def with_places(self, text: str) -> str:
        """Put file:line where the library has an offset in itself, {1234}."""
        offsets = sorted({int(offset) for offset in re.findall(r"{(\d+)}", text)})
        if not offsets:
            return text
        command = ["addr2line", "-a", "-i", "-s", "-e", str(self.path), *map(hex, offsets)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        places = {}
        for part in said.split("0x")[1:]:
            address, *lines = part.split()
            # The innermost inlined function that is a kernel's and not the machinery's.
            kernels = [line for line in lines if re.search(r"\.cuh?:\d", line)] or lines
            places[int(address, 16)] = kernels[0]
        return re.sub(r"{(\d+)}", lambda match: places[int(match[1])], text)


class Count(NamedTuple):
    """How memory was accessed at one line: by so many warps together, in so many parts.

    A part is a pass through the 32 banks of shared memory, or a sector of 32 bytes of global
    memory; `least` is how many parts the same numbers would need at best.
    """

    requests: int
    parts: int
    least: int


class Report(NamedTuple):
    """What a "watch" build saw.

    Attributes:
        lines: by (kind, place), such as ("shared read", "gemm.cuh:190").
        phases: of block (0, 0, 0): what ended each, and its own `lines`.
    """

    lines: dict[tuple[str, str], Count]
    phases: list[tuple[str, dict[tuple[str, str], Count]]]

    def total(self, kind: str) -> Count:
        """Over all lines, of "shared read", "shared write", "global read" or "global write"."""
        counts = [count for (k, _), count in self.lines.items() if k == kind]
        return Count(*(sum(column) for column in zip(*counts))) if counts else Count(0, 0, 0)


def read_report(text: str) -> Report:
    lines: dict[tuple[str, str], Count] = {}
    phases: list[tuple[str, dict[tuple[str, str], Count]]] = []
    current = lines
    for row in text.splitlines():
        first, *rest = row.split("\t")
        if first == "phase":
            current = {}
            phases.append((" at ".join(part for part in rest if part != ":0"), current))
        elif first == "all":
            current = lines
        else:
            before = current.get((first, rest[0]), (0, 0, 0))
            current[first, rest[0]] = Count(*(a + int(b) for a, b in zip(before, rest[1:])))
    return Report(lines, phases)


class CpuKernel:
    """A kernel that runs on the CPU; called as ``cupy.RawKernel`` is."""

    def __init__(self, module: CpuModule, name: str) -> None:
        self.module, self.name = module, name
        self.max_dynamic_shared_size_bytes = 48 << 10
        self._launch = module.library[f"launch_{name}"]
        self._launch.restype = ctypes.c_char_p
        signature = module.library[f"signature_of_{name}"]
        signature.restype = ctypes.c_char_p
        self.types: list[str] = signature().decode().split()

    def __call__(self, grid: Three, block: Three, args: Sequence[Any], shared_mem: int = 0) -> None:
        """Run the kernel, and wait for it.

        Args:
            grid, block: how many blocks, and threads in each: up to three numbers.
            args: arrays, and NumPy scalars of exactly the kernel's types; ``np.uintp(0)`` in the
                place of an array is a null pointer.
            shared_mem: bytes of dynamic shared memory.

        Raises:
            TypeError: an argument too many or too few, or of another type. (CuPy would pass it
                on, and the kernel would read something else.)
            RuntimeError: the kernel did what a GPU does not forgive.
        """
        if len(args) != len(self.types):
            raise TypeError(f"{self.name} takes {len(self.types)} arguments, got {len(args)}")
        boxes = [self.box(i, arg) for i, arg in enumerate(args)]
        pointers = (ctypes.c_void_p * len(boxes))(*(box.ctypes.data for box in boxes))
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise RuntimeError(
                f"{self.name}: {shared_mem} bytes of shared memory, but "
                f"max_dynamic_shared_size_bytes is {self.max_dynamic_shared_size_bytes}"
            )
        self.module.library.cuda_on_cpu_seed(ctypes.c_uint(order_seed))
        if self.module.build == "watch":
            self.module.watch([arg for arg in args if isinstance(arg, np.ndarray)])
        error = self._launch(
            three_numbers(grid), three_numbers(block), ctypes.c_size_t(shared_mem), pointers
        )
        if error:
            raise RuntimeError(f"{self.name}: {self.module.with_places(error.decode())}")

    def box(self, i: int, arg: Any) -> np.ndarray:
        """An argument's value, in memory of its own that a pointer can point to."""
        wanted = self.types[i]
        if isinstance(arg, np.ndarray) and wanted == f"{arg.dtype}*":
            return np.array([arg.ctypes.data], np.uintp)
        if isinstance(arg, np.generic) and (
            wanted == str(arg.dtype) or (wanted.endswith("*") and arg.dtype == np.uintp and not arg)
        ):
            return np.array([arg])
        got = f"an array of {arg.dtype}" if isinstance(arg, np.ndarray) else type(arg).__name__
        raise TypeError(f"{self.name}: argument {i} is {wanted}, got {got}")


def owner(x: np.ndarray) -> np.ndarray:
    """The array whose memory x is a part of."""
    while isinstance(x.base, np.ndarray):
        x = x.base
    return x


def three_numbers(extent: Three) -> ctypes.Array[ctypes.c_uint]:
    return (ctypes.c_uint * 3)(*(*extent, 1, 1, 1)[:3])


def compile_for_cpu(code: str, options: tuple[str, ...], build: str) -> Path:
    """Make a shared library of a source, or find the one made before; where it is."""
    if build not in BUILDS:
        raise ValueError(f"a build for the CPU is one of {', '.join(BUILDS)}, got {build!r}")
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if not compiler:
        raise RuntimeError(
            "running a CUDA kernel on the CPU needs g++ (Debian, Ubuntu: apt install g++)"
        )
    folder = source_folder()
    headers = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.h")))
    command = [
        *compiler.split(), "-std=gnu++17", "-march=native", "-gdwarf-4", *BUILDS[build], *options,
        "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi", "-Wno-unused-function", "-I", str(folder),
        "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique",
    ]  # fmt: skip
    exports = "".join(f"EXPORT_KERNEL({name})\n" for name in kernel_names(code))
    code = f'{code}\n#line 1 "exports"\n{exports}'
    key = hashlib.sha256("\0".join([code, headers, *command, platform.node()]).encode()).hexdigest()
    library = cache_folder() / f"{key[:32]}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        source, made = Path(scratch, "kernels.cpp"), Path(scratch, "kernels.so")
        source.write_text(code, encoding="utf-8")
        # The "watch" build is instrumented, but watch.h takes the place of the sanitizer.
        link = [] if build == "watch" else [flag for flag in command if "-fsanitize=" in flag]
        steps = [
            [*command, "-c", str(source), "-o", f"{made}.o"],
            [*compiler.split(), "-shared", *link, f"{made}.o", "-o", str(made), "-lpthread"],
        ]
        for step in steps:
            done = subprocess.run(step, capture_output=True, text=True)
            if done.returncode:
                raise CompileError(done.stderr)
        made.rename(library)  # at once, for whoever else is making it
    return library


def cache_folder() -> Path:
    """$MINIDL_CACHE, or a folder of the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("MINIDL_CACHE") or Path(home, "minidl")) / "cuda_on_cpu"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
