"""Step through a CUDA kernel on the CPU: what `minidl kernels --step OP` shows.

The kernel runs on a small problem (a sample of its op), a fiber for each CUDA thread, and every
access to memory is counted as a GPU would serve it: global memory in sectors of 32 bytes, shared
memory in passes through its 32 banks. A block's life is cut into *phases*, from one barrier to the
next: within a phase its threads run side by side, and no order among them may be relied on.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from minidl.backend import cuda_kernels, cuda_launch
from minidl.op import registry


class Launch(NamedTuple):
    """A kernel that ran.

    Attributes:
        file, line: where the kernel begins.
        name: the kernel's.
        grid, block: how many blocks, and threads in each.
        shared: bytes of dynamic shared memory.
        report: what it asked of the memory; None from a build that does not count.
    """

    file: str
    line: int
    name: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    report: cuda_kernels.Report | None


def launches(
    op: str, kernel: str | None = None, inputs: tuple[Any, ...] | None = None
) -> list[Launch]:
    """Run an op's CUDA kernel on the CPU; what it launched.

    Args:
        op: "matmul", "conv2d", ...
        kernel: which of its CUDA kernels, such as "cuda_shared"; None: "cuda".
        inputs: the op's, arrays on the CPU; None: of the first of its samples that is computed.

    Raises:
        ValueError: no such op, or no such kernel of it.
        RuntimeError: there is no g++.
    """
    ours = {  # not those that call CuPy
        name: {k.name: k for k in f.op.kernels if k.device == "cuda" and k.name.startswith("cuda")}
        for name, f in sorted(registry.items())
    }
    if not ours.get(op):
        names = ", ".join(name for name, own in ours.items() if own)
        raise ValueError(f"no op {op!r} has a CUDA kernel; these have: {names}")
    this, own = registry[op].op, ours[op]
    if (kernel or "cuda") not in own:
        raise ValueError(f"{op} has no CUDA kernel {kernel!r}; it has: {', '.join(own)}")
    chosen = own[kernel or "cuda"]
    build = os.environ.get("MINIDL_CUDA_ON_CPU") or "watch"
    found: list[Launch] = []

    def recorded(file: str, name: str, array: Any) -> Any:
        module = cuda_kernels.load_on_cpu(file, build=build)
        run = module.get_function(name)

        def launch(grid: Any, block: Any, args: Any, shared_mem: int = 0) -> None:
            run(grid, block, args, shared_mem=shared_mem)
            report = module.module.report() if build == "watch" else None
            where = source(file).index(next(x for x in source(file) if f" {name}(" in x)) + 1
            found.append(Launch(file, where, name, tuple(grid), tuple(block), shared_mem, report))

        return launch

    assert this.draw_samples is not None
    dtype = (chosen.dtypes or ("float32",))[0]
    before, cuda_launch.function = cuda_launch.function, recorded
    try:
        drawn = this.draw_samples(np.random.default_rng(0))
        for xs, settings in drawn if inputs is None else [(inputs, {})]:
            arrays = [x.astype(dtype) if getattr(x, "dtype", None) == np.float64 else x for x in xs]
            chosen.function(*arrays, **{**this.defaults, **settings})
            if found:
                return found
    finally:
        cuda_launch.function = before
    return found


def source(file: str) -> list[str]:
    return (cuda_kernels.source_folder() / file).read_text(encoding="utf-8").splitlines()


def describe(launch: Launch, most: int = 6) -> Iterator[str]:
    """A launch in lines: its size, and the first phases of its first block, access by access."""
    shared = f", {launch.shared:,} bytes of shared memory" if launch.shared else ""
    yield (
        f"{launch.name}  ({launch.file}:{launch.line})  grid {times(launch.grid)}, "
        f"block {times(launch.block)}{shared}"
    )
    if launch.report is None:
        return
    for number, (end, lines) in enumerate(launch.report.phases[:most], 1):
        yield f"  phase {number}, to {end or 'the end'}"
        for (kind, place), count in sorted(lines.items(), key=lambda item: item[0][1]):
            parts = "passes" if kind.startswith("shared") else "sectors"
            best = f", at best {count.least:,}" if count.least < count.parts else ""
            yield f"    {kind:13}{count.requests:6,} warps {count.parts:6,} {parts}{best}"
            file, _, line = place.partition(":")
            if line.isdecimal() and (cuda_kernels.source_folder() / file).exists():
                yield f"      {place}: {source(file)[int(line) - 1].strip()}"
    if len(launch.report.phases) > most:
        yield f"  ... {len(launch.report.phases)} phases in all"
    for kind in ("global read", "global write", "shared read", "shared write"):
        total = launch.report.total(kind)
        if total.requests:
            parts = "passes" if kind.startswith("shared") else "sectors"
            share = f"{100 * total.least / total.parts:.0f} % of what was moved was needed"
            yield f"  all blocks: {kind}: {total.parts:,} {parts}, {share}"


def times(extent: tuple[int, ...]) -> str:
    return " × ".join(map(str, extent))


def debugger(launch: Launch, op: str, kernel: str | None) -> str:
    """The command that stops in a kernel, with every CUDA thread's variables to look at."""
    again = [sys.executable, "-m", "minidl", "kernels", "--step", op]
    again += ["--kernel", kernel] if kernel else []
    where = ["-ex", "set breakpoint pending on", "-ex", f"break {launch.file}:{launch.line + 2}"]
    command = ["gdb", *where, "-ex", "run", "--args", *again]
    return f"MINIDL_CUDA_ON_CPU=debug {shlex.join(command)}"
