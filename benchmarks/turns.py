"""How benchmarks measure: every library in a process of its own, in turns.

The libraries compute on the same number of threads. A case is measured in rounds, in each round
every contestant for a moment. Between its turns a process is stopped (SIGSTOP), for the threads of
OpenMP and OpenBLAS spin after their work and would slow whoever comes next. A time is the median
over the rounds of a turn's fastest call (other programs only ever slow one down); a ratio is the
median of the rounds' ratios, their time over ours: above 1, minidl is the faster.

A script names its sections and calls `main`, which writes results/NAME.md, .json and .png beside
this file. A section that is not measured keeps its last result.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata, util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
Call = Callable[[], Any]


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


# Measuring: one process a library ------------------------------------------------------------


def work(known: dict[str, Section]) -> None:
    """A worker's life: reads cases, one a line, and answers with seconds."""
    call: Call | None = None
    here = None
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
            [sys.executable, sys.argv[0], "--work"], env=env, text=True,
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
        [sys.executable, sys.argv[0], "--memory", request], env=env, text=True, check=True,
        capture_output=True,
    )  # fmt: skip
    return float(done.stdout)


def report_memory(known: dict[str, Section], request: str) -> None:
    section, number, contestant = json.loads(request)
    call = known[section].cases[number].contestants[contestant]()
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


def write(
    name: str, title: str, record: dict[str, Any], known: dict[str, Section], out: Path
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [
        f"# {title}",
        "",
        f"Written by `benchmarks/{name}.py`; how it measures: `benchmarks/turns.py`. "
        + record["machine"],
        "",
        "Ratios are their time over ours: above 1, minidl is the faster. "
        "“direct” is minidl without Winograd. Memory is a process's peak, library included.",
    ]
    for part, section in known.items():
        if part in record["sections"]:
            lines += ["", f"## {section.title}", ""]
            for rows in kinds(record["sections"][part]):
                lines += [*table(rows), ""]
            lines += [section.targets] if section.targets else []
    (out / f"{name}.md").write_text("\n".join(lines).rstrip() + "\n")
    draw(record, known).savefig(out / f"{name}.png", dpi=110)


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


NAMES = {"torch": "PyTorch", "numpy": "NumPy", "onnxruntime": "ONNX Runtime"}


def describe_machine(threads: int, packages: Sequence[str]) -> str:
    """The processor, and whose kernels of which version run on it."""
    from minidl.cli import kernels_in_words

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        model = names[0].partition(": ")[2] if names else model
    versions = ", ".join(
        f"{NAMES.get(package, package)} {metadata.version(package)}"
        for package in ("minidl", *packages)
    )
    return (
        f"{model}, {os.cpu_count()} cores, {threads} threads; {versions}, Python "
        f"{platform.python_version()}; minidl: {kernels_in_words()}."
    )


def main(
    name: str, title: str, known: dict[str, Section], packages: Sequence[str] = ("torch", "numpy")
) -> None:
    """The command line of benchmarks/NAME.py; `packages` are those that it compares with."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--quick", action="store_true", help="few rounds: a rough look")
    parser.add_argument("--only", nargs="+", choices=known, help="these sections", default=[*known])
    parser.add_argument("--out", type=Path, help="default: results/ (--quick: runs/bench)")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(known)
    if args.memory:
        return report_memory(known, args.memory)

    if missing := [package for package in packages if not util.find_spec(package)]:
        raise SystemExit(f"This compares with {missing[0]}: pip install 'minidl[bench]'")
    out = args.out or (Path("runs/bench") if args.quick else RESULTS)
    machine = subprocess.run(
        [sys.executable, "-c", f"from turns import *; print(describe_machine({args.threads}, "
         f"{list(packages)}))"],
        env=environment(args.threads, {}), cwd=Path(__file__).parent, text=True, check=True,
        capture_output=True,
    ).stdout.strip()  # fmt: skip
    print(machine, flush=True)
    record: dict[str, Any] = {"machine": machine, "sections": {}}
    if (out / f"{name}.json").exists():
        before = json.loads((out / f"{name}.json").read_text())
        if before["machine"] == machine:
            record = before
    rounds, seconds = (3, 0.05) if args.quick else (7, 0.15)
    for part in args.only:
        print(f"\n{known[part].title}", flush=True)
        record["sections"][part] = measure(part, known[part], args.threads, rounds, seconds)
        write(name, title, record, known, out)
    print(f"\nWritten: {out}/{name}.md, {name}.json, {name}.png")
