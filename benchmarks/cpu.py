"""minidl's kernels on the CPU against PyTorch (oneDNN) and NumPy (OpenBLAS): kernels, then steps.

    make bench                               # all of it: about ten minutes
    python benchmarks/cpu.py --quick         # a rough look: about two
    python benchmarks/cpu.py --only conv2d steps

Every library computes in a process of its own, on the same number of threads, and they take turns:
a case is measured in rounds, in each round every contestant for a moment. Between its turns a
process is stopped (SIGSTOP), for the threads of OpenMP and OpenBLAS spin after their work and would
slow whoever comes next. A time is the median over the rounds of a turn's fastest call (other
programs only ever slow one down); a ratio is the median of the rounds' ratios, their time over
ours: above 1, minidl is the faster.

Writes results/cpu.md, cpu.json and cpu.png beside this file. A section that is not measured keeps
its last result.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata, util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
Call = Callable[[], Any]

# The cases ---------------------------------------------------------------------------------


@dataclass
class Case:
    """One row: what each contestant calls. The first is minidl as it comes.

    Attributes:
        name: of the row.
        contestants: by name; each makes its arrays and returns the call that is timed. The name up
            to a comma is the process that it runs in: "minidl", "PyTorch" or "NumPy".
        memory: measure a process's peak memory as well.
    """

    name: str
    contestants: dict[str, Callable[[], Call]]
    memory: bool = False


@dataclass
class Section:
    """A table of results.

    Attributes:
        title, targets: words above and below it.
        cases: its rows.
        environment: of all processes.
    """

    title: str
    targets: str
    cases: list[Case]
    environment: dict[str, str] = field(default_factory=dict)


def library(name: str) -> ModuleType:
    """minidl or torch: the same code serves both."""
    import importlib

    return importlib.import_module({"minidl": "minidl", "PyTorch": "torch"}[name])


def with_kernel(kernel: str, build: Callable[[str], Call]) -> Callable[[], Call]:
    """minidl with this implementation of the convolutions, where they have it."""

    def built() -> Call:
        import minidl
        from minidl.op import registry

        for op in ("conv2d", "conv2d_input", "conv2d_weight"):
            names = [kernel.name for kernel in registry[op].op.kernels]
            minidl.use(op, kernel if kernel in names else None)
        return build("minidl")

    return built


def of_both(build: Callable[[str], Call], rungs: bool = False) -> dict[str, Callable[[], Call]]:
    """minidl (with Winograd, and with `rungs` also without) and PyTorch."""
    mine = {"minidl": with_kernel("winograd", build)}
    if rungs:
        mine["minidl, direct"] = with_kernel("native", build)
    return {**mine, "PyTorch": lambda: build("PyTorch")}


# in → out, kernel, stride, groups, side of the image; padding keeps its size (at stride 1)
LAYERS = [
    (1, 32, 3, 1, 1, 28),
    (32, 64, 3, 1, 1, 28),
    (64, 64, 3, 1, 1, 56),
    (128, 128, 3, 1, 1, 28),
    (256, 256, 3, 1, 1, 14),
    (512, 512, 3, 1, 1, 7),
    (64, 256, 1, 1, 1, 56),
    (64, 128, 3, 2, 1, 56),
    (3, 64, 7, 2, 1, 64),
    (128, 128, 3, 1, 128, 28),
]
BATCH = 32


def convolution(layer: tuple[int, ...], backward: bool, lib_name: str) -> Call:
    c, o, kernel, stride, groups, side = layer
    lib = library(lib_name)
    F = lib.nn.functional
    rng = np.random.default_rng(0)
    x, w = (
        lib.from_numpy(rng.standard_normal(shape, np.float32)).requires_grad_(backward)
        for shape in ((BATCH, c, side, side), (o, c // groups, kernel, kernel))
    )
    if not backward:
        return lambda: F.conv2d(x, w, None, stride, kernel // 2, 1, groups)
    y = F.conv2d(x, w, None, stride, kernel // 2, 1, groups)
    g = lib.from_numpy(rng.standard_normal(tuple(y.shape), np.float32))

    def call() -> None:
        y = F.conv2d(x, w, None, stride, kernel // 2, 1, groups)
        lib.autograd.grad(y, (x, w), g)

    return call


def layer_cases(rungs: bool) -> Iterator[Case]:
    for backward in (False, True):
        for layer in LAYERS:
            c, o, kernel, stride, groups, side = layer
            kind = "depthwise " if groups > 1 else ""
            name = f"{kind}{kernel}×{kernel}{f'/{stride}' * (stride > 1)} {c}→{o} {side}²"
            yield Case(
                f"{name}, {'forward + backward' if backward else 'forward'}",
                of_both(lambda lib, a=layer, b=backward: convolution(a, b, lib), rungs),
            )


def cnn(lib: ModuleType) -> Any:
    """The default CNN for 28×28."""
    nn = lib.nn
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(3136, 128),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(128, 10),
    )


def resnet18(lib: ModuleType) -> Any:
    """He et al. 2016, with the stem for 32×32: 3×3, stride 1, no pooling."""
    nn = lib.nn

    class Block(nn.Module):  # type: ignore[name-defined, misc]
        def __init__(self, c: int, o: int, stride: int) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(c, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU(),
                nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o),
            )  # fmt: skip
            self.shortcut = nn.Sequential()
            if stride > 1 or c != o:
                self.shortcut = nn.Sequential(
                    nn.Conv2d(c, o, 1, stride, bias=False), nn.BatchNorm2d(o)
                )

        def forward(self, x: Any) -> Any:
            return lib.nn.functional.relu(self.body(x) + self.shortcut(x))

    layers = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    for c, o, stride in [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]:
        layers += [Block(c, o, stride), Block(o, o, 1)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)]
    return nn.Sequential(*layers)


def training_step(
    network: Callable[[ModuleType], Any], batch: int, shape: tuple[int, ...], lib_name: str
) -> Call:
    lib = library(lib_name)
    lib.manual_seed(0)
    model = network(lib)
    optimizer = lib.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, y = lib.randn(batch, *shape), lib.arange(batch) % 10

    def step() -> None:
        optimizer.zero_grad()
        lib.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def lstm(lib_name: str) -> Call:
    lib = library(lib_name)
    model = lib.nn.LSTM(128, 256)
    x, g = lib.randn(16, 32, 128), lib.randn(16, 32, 256)

    def step() -> None:
        model(x)[0].backward(g)
        for p in model.parameters():
            p.grad = None

    return step


def step_cases() -> list[Case]:
    return [
        Case(
            "default CNN, 28×28, batch 64, step",
            of_both(lambda lib: training_step(cnn, 64, (1, 28, 28), lib), rungs=True),
            memory=True,
        ),
        Case("LSTM 128→256, T = 16, batch 32, forward + backward", of_both(lstm), memory=True),
        Case(
            "ResNet-18, 32×32, batch 32, step",
            of_both(lambda lib: training_step(resnet18, 32, (3, 32, 32), lib), rungs=True),
            memory=True,
        ),
    ]


def matrices(*shapes: tuple[int, int]) -> list[Any]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


def numpy_matmul(m: int, k: int, n: int) -> Call:
    x, y = matrices((m, k), (k, n))
    return lambda: x @ y


def minidl_matmul(m: int, k: int, n: int) -> Call:
    from minidl.ops.linalg import matmul

    x, y = matrices((m, k), (k, n))
    return lambda: matmul(x, y)


def torch_matmul(m: int, k: int, n: int) -> Call:
    import torch

    x, y = map(torch.from_numpy, matrices((m, k), (k, n)))
    return lambda: x @ y


def matmul_cases() -> Iterator[Case]:
    for m, k, n in [(512,) * 3, (1024,) * 3, (2048,) * 3, (64, 3136, 128), (32, 256, 1024)]:
        yield Case(
            f"{m}×{k} · {k}×{n}",
            {
                "minidl": lambda s=(m, k, n): minidl_matmul(*s),
                "NumPy": lambda s=(m, k, n): numpy_matmul(*s),
                "PyTorch": lambda s=(m, k, n): torch_matmul(*s),
            },
        )


def minidl_int8(n: int) -> Call:
    from minidl.backend.native import native

    rng = np.random.default_rng(0)
    a, b = (rng.integers(-127, 128, (n, n)).astype(np.int8) for _ in range(2))
    packed = native.pack_matmul_integer(b)
    return lambda: native.matmul_integer(a, packed)


def torch_int8(n: int) -> Call:
    import torch

    a, b = (torch.randint(-127, 128, (n, n), dtype=torch.int8) for _ in range(2))
    return lambda: torch._int_mm(a, b)


def int8_cases() -> Iterator[Case]:
    for n in (512, 1024, 2048):
        yield Case(
            f"{n}×{n} · {n}×{n}",
            {
                "minidl": lambda n=n: minidl_int8(n),
                "NumPy, float32": lambda n=n: numpy_matmul(n, n, n),
                "PyTorch": lambda n=n: torch_int8(n),
            },
        )


def minidl_int8_conv(layer: tuple[int, ...]) -> Call:
    from minidl.backend.native import native

    c, o, kernel, stride, groups, side = layer
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (BATCH, c, side, side)).astype(np.uint8)
    w = rng.integers(-127, 128, (o, c // groups, kernel, kernel)).astype(np.int8)
    packed = native.pack_conv_integer(w, 0, groups)
    scale = np.full(o, 1e-3, np.float32)
    how = {"stride": (stride, stride), "padding": (kernel // 2, kernel // 2), "scale": scale}
    return lambda: native.conv_integer(x, packed, 0, **how, dtype="uint8")


def int8_conv_cases() -> Iterator[Case]:
    """Bytes in, bytes out, against our own float32 without Winograd (in a process of its own)."""
    for layer in LAYERS:
        c, o, kernel, stride, groups, side = layer
        kind = "depthwise " if groups > 1 else ""
        direct = with_kernel("native", lambda lib, a=layer: convolution(a, False, lib))
        yield Case(
            f"{kind}{kernel}×{kernel}{f'/{stride}' * (stride > 1)} {c}→{o} {side}²",
            {"minidl": lambda a=layer: minidl_int8_conv(a), "float32, direct": direct},
        )


def minidl_narrow(rows: int, n: int, dtype: str) -> Call:
    import ml_dtypes  # noqa: F401  # makes bfloat16 known to NumPy

    from minidl.backend.native import native

    x, w = matrices((rows, n), (n, n))
    if dtype == "float32":
        return minidl_matmul(rows, n, n)
    scale = np.full(n, 1 / 127, np.float32) if dtype == "int8" else None
    packed = native.pack_linear((w * (30 if dtype == "int8" else 1)).astype(dtype))
    return lambda: native.linear(x, packed, scale)


def narrow_cases() -> Iterator[Case]:
    for rows, n in ((1, 4096), (8, 4096)):
        for dtype in ("float16", "bfloat16", "int8"):
            yield Case(
                f"{rows}×{n} · {n}×{n}, {dtype} weights",
                {
                    "minidl": lambda r=rows, n=n, d=dtype: minidl_narrow(r, n, d),
                    "NumPy, float32": lambda r=rows, n=n: numpy_matmul(r, n, n),
                },
            )


def square_half_cases() -> Iterator[Case]:
    for n in (1024, 2048):
        yield Case(
            f"{n}×{n} · {n}×{n}, float16 weights",
            {
                "minidl": lambda n=n: minidl_narrow(n, n, "float16"),
                "float32": lambda n=n: minidl_narrow(n, n, "float32"),
            },
        )


AVX2 = {
    "MINIDL_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
}


def sections() -> dict[str, Section]:
    return {
        "conv2d": Section(
            f"Convolution, float32, batch {BATCH}",
            "Targets: geometric mean at least 1.5, no layer under 0.8; direct (without Winograd): "
            "mean at least 1.0.",
            list(layer_cases(rungs=True)),
        ),
        "matmul": Section("Matrix product, float32", "", list(matmul_cases())),
        "int8": Section(
            "Matrix product, int8",
            "Targets: at least 3.5 times NumPy's float32 and 0.95 times torch._int_mm.",
            list(int8_cases()),
        ),
        "int8-conv": Section(
            f"Convolution, int8, batch {BATCH}, against our own float32 without Winograd",
            "Target: at least 2.5.",
            list(int8_conv_cases()),
        ),
        "narrow": Section(
            "Few rows, narrow weights",
            "Targets against NumPy's float32: 16 bits 1.3 (one row) and 3 (eight); int8 2 and 4. "
            "Square float16 against our own float32: 0.9.",
            [*narrow_cases(), *square_half_cases()],
        ),
        "steps": Section(
            "Training steps",
            "Targets: CNN at least 1.8, LSTM at least 1.2, ResNet-18 at least 1.2; peak memory not "
            "above PyTorch's.",
            step_cases(),
        ),
        "avx2": Section(
            "The same on AVX2",
            "minidl with MINIDL_ISA=avx2 against PyTorch with ATEN_CPU_CAPABILITY=avx2 and "
            "ONEDNN_MAX_CPU_ISA=AVX2; no target.",
            [*layer_cases(rungs=True), *step_cases()],
            AVX2,
        ),
    }


# Measuring: one process a library ------------------------------------------------------------


def work() -> None:
    """A worker's life: reads cases, one a line, and answers with seconds."""
    call: Call | None = None
    here = None
    known = sections()
    for line in sys.stdin:
        section, number, contestant, seconds = json.loads(line)
        if here != (section, number, contestant):
            call = None  # let go of the last one's memory first
            call = known[section].cases[number].contestants[contestant]()
            here = (section, number, contestant)
        assert call is not None
        call()
        times: list[float] = []
        while sum(times) < seconds or len(times) < 3:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        print(json.dumps(min(times)), flush=True)


def environment(threads: int, extra: dict[str, str]) -> dict[str, str]:
    # A core type or cache size that was set for another OpenBLAS slows NumPy's own down.
    inherited = {
        k: v for k, v in os.environ.items() if k not in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
    }
    names = ("MINIDL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return inherited | dict.fromkeys(names, str(threads)) | extra


class Worker:
    """A process that measures when it is told to, and is stopped in between."""

    def __init__(self, env: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work"], env=env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.process.send_signal(signal.SIGSTOP)

    def measure(self, *request: Any) -> float:
        assert self.process.stdin and self.process.stdout
        self.process.send_signal(signal.SIGCONT)
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that measured {request} ended: see above")
        self.process.send_signal(signal.SIGSTOP)
        return float(json.loads(answer))

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def measure(name: str, section: Section, threads: int, rounds: int, seconds: float) -> list[Any]:
    """The rows of a section."""
    env = environment(threads, section.environment)
    workers: dict[str, Worker] = {}
    rows = []
    try:
        for number, case in enumerate(section.cases):
            times: dict[str, list[float]] = {contestant: [] for contestant in case.contestants}
            for round_ in range(rounds):
                order = list(times) if round_ % 2 else list(times)[::-1]
                for contestant in order:
                    process = contestant.partition(",")[0]
                    if process not in workers:
                        workers[process] = Worker(env)
                    times[contestant].append(
                        workers[process].measure(name, number, contestant, seconds)
                    )
            row = {"name": case.name, "times": times}
            if case.memory:
                row["memory"] = {
                    contestant: peak_memory(name, number, contestant, env)
                    for contestant in case.contestants
                }
            rows.append(row)
            print(line_of(row), flush=True)
    finally:
        for worker in workers.values():
            worker.end()
    return rows


def peak_memory(section: str, number: int, contestant: str, env: dict[str, str]) -> float:
    """MiB that a process needs at most for a few calls, Python and the library included."""
    request = json.dumps([section, number, contestant])
    done = subprocess.run(
        [sys.executable, __file__, "--memory", request], env=env, text=True, check=True,
        capture_output=True,
    )  # fmt: skip
    return float(done.stdout)


def report_memory(request: str) -> None:
    section, number, contestant = json.loads(request)
    call = sections()[section].cases[number].contestants[contestant]()
    for _ in range(5):
        call()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


# Reporting -----------------------------------------------------------------------------------


def ratio(row: Any, ours: str, theirs: str) -> float:
    return float(np.median(np.divide(row["times"][theirs], row["times"][ours])))


def rivals(row: Any) -> tuple[list[str], list[str]]:
    """Ours and theirs among a row's contestants."""
    ours = [name for name in row["times"] if name.startswith("minidl")]
    return ours, [name for name in row["times"] if name not in ours]


def line_of(row: Any) -> str:
    ours, theirs = rivals(row)
    words = [f"{name} {1e3 * np.median(t):.3g} ms" for name, t in row["times"].items()]
    ratios = [f"{theirs_} / {o}: {ratio(row, o, theirs_):.2f}" for o in ours for theirs_ in theirs]
    return f"{row['name']}: {'; '.join(words)}; {'; '.join(ratios)}"


def table(rows: list[Any]) -> list[str]:
    """Rows of one kind as Markdown, and the geometric means of their ratios."""
    ours, theirs = rivals(rows[0])
    pairs = [(o, t) for o in ours for t in theirs]
    kind = kind_of(rows[0])
    head = [kind, *(f"{name}, ms" for name in rows[0]["times"])]
    head += [f"{t} / {o}" for o, t in pairs]
    if "memory" in rows[0]:
        head += [f"{name}, MiB" for name in rows[0]["memory"]]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for row in rows:
        cells = [
            row["name"].removesuffix(f", {kind}"),
            *(f"{1e3 * np.median(t):.3g}" for t in row["times"].values()),
        ]
        cells += [f"{ratio(row, o, t):.2f}" for o, t in pairs]
        cells += [f"{m:.0f}" for m in row.get("memory", {}).values()]
        lines.append("| " + " | ".join(cells) + " |")
    means = [
        f"**{math.exp(np.mean([math.log(ratio(row, o, t)) for row in rows])):.2f}**"
        for o, t in pairs
    ]
    if len(rows) > 2:
        blank = [""] * len(rows[0]["times"])
        after = [""] * len(rows[0].get("memory", {}))
        lines.append("| " + " | ".join(["geometric mean", *blank, *means, *after]) + " |")
    return lines


def kind_of(row: Any) -> str:
    """What a row measures of a layer: forward, or forward + backward."""
    name, _, last = row["name"].rpartition(", ")
    return last if name.endswith("²") else ""


def kinds(rows: list[Any]) -> list[list[Any]]:
    """Rows apart by their kind and by their columns: a table each."""
    found: dict[Any, list[Any]] = {}
    for row in rows:
        found.setdefault((kind_of(row), *row["times"], "memory" in row), []).append(row)
    return list(found.values())


def write(record: dict[str, Any], known: dict[str, Section], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "cpu.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [
        "# minidl on the CPU",
        "",
        "Written by `benchmarks/cpu.py`, which says how it measures. " + record["machine"],
        "",
        "Ratios are their time over ours: above 1, minidl is the faster. "
        "“direct” is minidl without Winograd. Memory is a process's peak, library included.",
    ]
    for name, section in known.items():
        if name in record["sections"]:
            lines += ["", f"## {section.title}", ""]
            for rows in kinds(record["sections"][name]):
                lines += [*table(rows), ""]
            lines += [section.targets] if section.targets else []
    (out / "cpu.md").write_text("\n".join(lines).rstrip() + "\n")
    draw(record, known).savefig(out / "cpu.png", dpi=110)


def draw(record: dict[str, Any], known: dict[str, Section]) -> Any:
    """Every ratio as a point on a line of its own; a matplotlib figure."""
    from matplotlib.figure import Figure

    rows = [(name, row) for name in known for row in record["sections"].get(name, ())]
    figure = Figure(figsize=(9, 1.2 + 0.22 * len(rows)), layout="constrained")
    axes = figure.subplots()
    colors = {"PyTorch": "C1", "NumPy": "C0"}
    for i, (_, row) in enumerate(rows):
        ours, theirs = rivals(row)
        for o in ours:
            for t in theirs:
                axes.plot(
                    ratio(row, o, t), i, "o" if o == "minidl" else "|", markersize=7,
                    color=colors.get(t.partition(",")[0], "C2"), label=f"{t} / {o}",
                )  # fmt: skip
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", ylim=(len(rows), -1), xlabel="their time / ours (right: we are faster)")
    ticks = [0.5, 0.8, 1, 1.5, 2, 3, 4, 6, 8]
    axes.set_xticks(ticks, map(str, ticks), minor=False)
    axes.set_xticks([], minor=True)
    avx2 = " (AVX2)"
    axes.set_yticks(
        range(len(rows)), [row["name"] + avx2 * (name == "avx2") for name, row in rows], fontsize=7
    )
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles))
    axes.legend(unique.values(), unique.keys(), loc="lower right", fontsize=8)
    return figure


def describe_machine(threads: int) -> str:
    """The processor, and whose kernels of which version run on it."""
    from minidl.cli import kernels_in_words

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        model = names[0].partition(": ")[2] if names else model
    versions = ", ".join(
        f"{name} {metadata.version(package)}"
        for name, package in (("minidl", "minidl"), ("PyTorch", "torch"), ("NumPy", "numpy"))
    )
    return (
        f"{model}, {os.cpu_count()} cores, {threads} threads; {versions}, Python "
        f"{platform.python_version()}; minidl: {kernels_in_words()}."
    )


def main() -> None:
    known = sections()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--quick", action="store_true", help="few rounds: a rough look")
    parser.add_argument("--only", nargs="+", choices=known, help="these sections", default=[*known])
    parser.add_argument("--out", type=Path, help="default: results/ (--quick: runs/bench)")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work()
    if args.memory:
        return report_memory(args.memory)

    if not util.find_spec("torch"):
        raise SystemExit("This compares with PyTorch: pip install 'minidl[bench]', or make bench")
    out = args.out or (Path("runs/bench") if args.quick else RESULTS)
    machine = subprocess.run(
        [sys.executable, "-c", f"from cpu import *; print(describe_machine({args.threads}))"],
        env=environment(args.threads, {}), cwd=Path(__file__).parent, text=True, check=True,
        capture_output=True,
    ).stdout.strip()  # fmt: skip
    print(machine, flush=True)
    record: dict[str, Any] = {"machine": machine, "sections": {}}
    if (out / "cpu.json").exists():
        before = json.loads((out / "cpu.json").read_text())
        if before["machine"] == machine:
            record = before
    rounds, seconds = (3, 0.05) if args.quick else (7, 0.15)
    for name in args.only:
        print(f"\n{known[name].title}", flush=True)
        record["sections"][name] = measure(name, known[name], args.threads, rounds, seconds)
        write(record, known, out)
    print(f"\nWritten: {out}/cpu.md, cpu.json, cpu.png")


if __name__ == "__main__":
    main()
