"""minidl's CUDA kernels on a GPU against cuBLAS, cuDNN and cuBLASLt.

    make gpu                        # builds, tests on the GPU, and runs this; no network is needed
    python benchmarks/gpu.py

Every kernel is timed by device events, in turn with its rival, the median of several runs; on fresh
random data, its memory poisoned with NaN, and its result compared with the rival's before a time is
believed. Ratios are the rival's time over ours: above 1, minidl is faster. cuBLAS is called through
CuPy, the others through PyTorch; without it their columns stay empty. Writes
benchmarks/results/gpu-NAME.md and .json, NAME the GPU's.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from operator import matmul
from pathlib import Path
from typing import Any

import numpy as np

import minidl
from minidl import backend, models, nn, optim
from minidl.backend import cuda_launch
from minidl.data import DataLoader, Digits
from minidl.nn import functional as F

try:
    import torch
except ImportError:
    torch = None  # type: ignore[assignment]

RESULTS = Path(__file__).parent / "results"
TARGETS = {  # what the project wants to reach: the rival's time / ours
    "matmul float16": 0.5, "matmul int8": 0.5, "matmul float32": 0.75, "conv2d float16": 0.5,
    "ResNet-18 step": 0.7,
}  # fmt: skip


@dataclass
class Row:
    """One comparison.

    Attributes:
        name, size: what was computed.
        ours, rival: milliseconds, medians; rival is None where there is none here.
        rate: ours, in 10¹² operations a second; None where that says nothing.
        against: the rival's name.
        error: the largest difference between the results, relative to the largest number.
    """

    name: str
    size: str
    ours: float
    rival: float | None
    rate: float | None
    against: str
    error: float | None

    @property
    def ratio(self) -> float | None:
        return self.rival / self.ours if self.rival else None


Call = Callable[[], Any]


class Bench:
    """Times calls in turn, after checking that they agree."""

    def __init__(self, runs: int) -> None:
        self.cp, self.runs = backend.cupy(), runs

    def poison(self, *arrays: Any) -> None:
        """Leave NaN in the memory that results of these sizes will get next."""
        for a in arrays:
            self.cp.full(a.nbytes // 4 + 1, np.nan, np.float32)

    def milliseconds(self, call: Call) -> float:
        events = self.cp.cuda.Event(), self.cp.cuda.Event()
        events[0].record()
        call()
        events[1].record()
        events[1].synchronize()
        return self.cp.cuda.get_elapsed_time(*events)

    def compare(
        self, name: str, size: str, ours: Call, rival: Call | None, against: str,
        operations: float | None = None, tolerance: float = 1e-3,
    ) -> Row:  # fmt: skip
        """Raises: AssertionError: the results differ by more than the tolerance."""
        result = ours()  # compiles, and says how large a result is
        self.poison(result)
        del result
        result, error = to_host(ours()), None
        assert np.isfinite(result).all(), f"{name} {size}: left memory unwritten"
        if rival is not None:
            expected = to_host(rival())
            error = float(np.abs(result - expected).max() / np.abs(expected).max())
            assert error <= tolerance, f"{name} {size}: differs from {against} by {error:.2g}"
        times: dict[str, list[float]] = {"ours": [], "rival": []}
        for _ in range(self.runs):
            times["ours"].append(self.milliseconds(ours))
            if rival is not None:
                times["rival"].append(self.milliseconds(rival))
        mine = float(np.median(times["ours"]))
        theirs = float(np.median(times["rival"])) if rival is not None else None
        rate = operations / mine / 1e9 if operations else None
        return Row(name, size, mine, theirs, rate, against, error)


def to_host(x: Any) -> np.ndarray:
    return np.asarray(x.get() if hasattr(x, "get") else x.detach().cpu().numpy(), np.float32)


def for_torch(*arrays: Any) -> list[Any]:
    """The same memory, as PyTorch sees it; on PyTorch's and CuPy's common stream."""
    return [torch.as_tensor(a, device="cuda") for a in arrays]


def normal(cp: Any, *shape: int, dtype: Any = np.float32) -> Any:
    return cp.asarray(np.random.default_rng().standard_normal(shape, np.float32)).astype(dtype)


# What is compared -------------------------------------------------------------------------


def products(bench: Bench, sizes: list[int], ladder: int) -> Iterator[Row]:
    cp = bench.cp
    for n in sizes:
        size, operations = f"{n}³", 2.0 * n**3
        a, b = normal(cp, n, n), normal(cp, n, n)
        yield bench.compare(
            "matmul float32", size, partial(cuda_launch.matmul, a, b), partial(matmul, a, b),
            "cuBLAS", operations,
        )  # fmt: skip
        h, k = a.astype(np.float16), b.astype(np.float16)
        yield bench.compare(
            "matmul float16", size, partial(cuda_launch.matmul_f16, h, k), partial(matmul, h, k),
            "cuBLAS", operations, tolerance=1e-2,
        )  # fmt: skip
        x, w = ((c * 30).astype(np.int8) for c in (a, b))
        rival = None
        if torch is not None:
            tx, tw = for_torch(x, w)
            rival = partial(torch._int_mm, tx, tw.T)
        yield bench.compare(
            "matmul int8", size, partial(cuda_launch.matmul_s8, x, w), rival, "cuBLASLt", operations
        )
    a, b = normal(cp, ladder, ladder), normal(cp, ladder, ladder)
    for rung in cuda_launch.LADDER:
        x, y = (c.astype(np.float16 if rung == "tensor" else np.float32) for c in (a, b))
        yield bench.compare(
            f"ladder: {rung}", f"{ladder}³", partial(cuda_launch.ladder, rung, x, y),
            partial(matmul, x, y), "cuBLAS", 2.0 * ladder**3, tolerance=1e-2,
        )  # fmt: skip


def convolutions(bench: Bench, batch: int, layers: list[tuple[int, int, int]]) -> Iterator[Row]:
    for c, o, side in layers:
        x, w = normal(bench.cp, batch, c, side, side), normal(bench.cp, o, c, 3, 3)
        how = {"padding": (1, 1)}
        operations = 2.0 * batch * o * side**2 * c * 9
        size = f"{batch}×{c}×{side}² → {o}"
        rivals: dict[str, Call | None] = {"float32": None, "float16": None, "NHWC": None}
        if torch is not None:
            t, u = for_torch(x, w)
            h, k = t.half(), u.half()
            last = h.to(memory_format=torch.channels_last)
            k_last = k.to(memory_format=torch.channels_last)
            rivals = {
                "float32": partial(torch.nn.functional.conv2d, t, u, padding=1),
                "float16": partial(torch.nn.functional.conv2d, h, k, padding=1),
                "NHWC": partial(torch.nn.functional.conv2d, last, k_last, padding=1),
            }
        for name, call, rival, against in (
            ("conv2d float32", cuda_launch.conv2d, "float32", "cuDNN"),
            ("conv2d float16", cuda_launch.conv2d_f16, "float16", "cuDNN, NCHW"),
            ("conv2d float16", cuda_launch.conv2d_f16, "NHWC", "cuDNN, NHWC"),
        ):
            yield bench.compare(
                name, size, partial(call, x, w, **how), rivals[rival], against, operations, 1e-2
            )


def rows_and_elements(bench: Bench, rows: int, columns: int) -> Iterator[Row]:
    x = normal(bench.cp, rows, columns)
    size = f"{rows}×{columns}"
    rivals: dict[str, Call | None] = {"softmax": None, "layer norm": None}
    if torch is not None:
        (t,) = for_torch(x)
        rivals = {
            "softmax": lambda: t.softmax(1),
            "layer norm": lambda: torch.nn.functional.layer_norm(t, (columns,)),
        }
    yield bench.compare(
        "softmax", size, lambda: cuda_launch.softmax(x, dim=1), rivals["softmax"], "PyTorch"
    )
    yield bench.compare(
        "layer norm", size, lambda: cuda_launch.standardize(x, None, None, dim=(1,)),
        rivals["layer norm"], "PyTorch",
    )  # fmt: skip
    key = minidl.backend.random.Key(0, 0)
    yield bench.compare("dropout", size, lambda: cuda_launch.dropout(x, p=0.5, key=key), None, "")


def training_step(bench: Bench, batch: int) -> Row:
    """A step of ResNet-18 on 32×32, SGD with momentum."""
    rng = np.random.default_rng()
    images, labels = rng.random((batch, 3, 32, 32), np.float32), rng.integers(0, 10, batch)
    model = models.resnet18(10, stem="cifar").to("cuda")
    optimizer = optim.SGD(model.parameters(), 0.01, momentum=0.9)
    x, y = (minidl.tensor(a).to("cuda") for a in (images, labels))

    def ours() -> Any:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.array

    rival = torch_step(images, labels) if torch is not None else None
    return bench.compare(
        "ResNet-18 step", f"batch {batch}", ours, rival, "PyTorch eager", tolerance=np.inf
    )


def torch_step(images: np.ndarray, labels: np.ndarray) -> Call:
    """The same step in PyTorch, of a network built as ours is."""
    from torch import nn as tnn

    class Block(tnn.Module):
        def __init__(self, c: int, o: int, stride: int) -> None:
            super().__init__()
            self.body = tnn.Sequential(
                tnn.Conv2d(c, o, 3, stride, 1, bias=False), tnn.BatchNorm2d(o), tnn.ReLU(),
                tnn.Conv2d(o, o, 3, 1, 1, bias=False), tnn.BatchNorm2d(o),
            )  # fmt: skip
            same = stride == 1 and c == o
            self.short = tnn.Identity() if same else tnn.Sequential(
                tnn.Conv2d(c, o, 1, stride, bias=False), tnn.BatchNorm2d(o)
            )  # fmt: skip

        def forward(self, x: Any) -> Any:
            return (self.body(x) + self.short(x)).relu()

    layers: list[Any] = [tnn.Conv2d(3, 64, 3, 1, 1, bias=False), tnn.BatchNorm2d(64), tnn.ReLU()]
    c = 64
    for o, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Block(c, o, stride), Block(o, o, 1)]
        c = o
    layers += [tnn.AdaptiveAvgPool2d(1), tnn.Flatten(), tnn.Linear(512, 10)]
    model = tnn.Sequential(*layers).cuda()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    x, y = torch.tensor(images).cuda(), torch.tensor(labels).cuda()

    def step() -> Any:
        loss = tnn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return step


def train_digits(epochs: int) -> tuple[float, float]:
    """Train the default CNN on digits, on the GPU: accuracy on the held-out ones, and seconds."""
    minidl.manual_seed(0)
    model = models.cnn(image_size=8).to("cuda")
    optimizer = optim.Adam(model.parameters(), 2e-3)
    start = time.perf_counter()
    for _ in range(epochs):
        for x, y in DataLoader(Digits(train=True), 64, shuffle=True, device="cuda"):
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    seconds = time.perf_counter() - start
    model.eval()
    (x, y), *_ = DataLoader(Digits(train=False), 360, device="cuda")
    return float((model(x).argmax(dim=1) == y).float().mean().item()), seconds


# The report -------------------------------------------------------------------------------


def write(rows: list[Row], facts: dict[str, Any], folder: Path) -> Path:
    name = re.sub(r"\W+", "-", facts["gpu"]).strip("-").lower()
    table = [
        "| what | size | minidl, ms | 10¹² op/s | rival | its ms | rival / minidl | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        target = TARGETS.get(row.name)
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        ratio += f" (target {target})" if target and ratio else ""
        table.append(
            f"| {row.name} | {row.size} | {row.ours:.3f} | "
            f"{'' if row.rate is None else f'{row.rate:.1f}'} | {row.against} | "
            f"{'' if row.rival is None else f'{row.rival:.3f}'} | {ratio} | "
            f"{'' if row.error is None else f'{row.error:.1e}'} |"
        )
    lines = [f"# CUDA kernels on {facts['gpu']}", "", "`make gpu`; medians; device events.", ""]
    lines += [f"- {key}: {value}" for key, value in facts.items()] + ["", *table, ""]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"gpu-{name}.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    found = {"facts": facts, "rows": [{**asdict(row), "ratio": row.ratio} for row in rows]}
    path.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return path


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--smallest", action="store_true", help="sizes for trying the script out")
    options = parser.parse_args(arguments)
    backend.gpu(0)
    bench = Bench(1 if options.smallest else options.runs)
    if torch is not None and torch.cuda.is_available():
        # Both libraries on one stream, so that events of the one time the other as well.
        bench.cp.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream).use()
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        ratio = "" if row.ratio is None else f"{row.ratio:.2f} of {row.against}"
        print(f"{row.name:18}{row.size:22}{row.ours:9.3f} ms  {ratio}", flush=True)

    small = options.smallest
    for row in products(bench, [33] if small else [2048, 4096, 8192], 40 if small else 4096):
        add(row)
    layers = [(3, 5, 6)] if small else [(64, 64, 56), (128, 128, 28), (256, 256, 14)]
    for row in convolutions(bench, 2 if small else 64, layers):
        add(row)
    for row in rows_and_elements(bench, *((5, 7) if small else (8192, 4096))):
        add(row)
    if not small:
        add(training_step(bench, 256))
    accuracy, seconds = train_digits(0 if small else 15)
    print(f"the default CNN on digits: {100 * accuracy:.1f} % after {seconds:.1f} s")
    facts = {
        "gpu": minidl.cuda.get_device_name(), "cupy": bench.cp.__version__,
        "torch": torch.__version__ if torch is not None else "not installed",
        "digits, default CNN": f"{100 * accuracy:.1f} % after {seconds:.1f} s",
    }  # fmt: skip
    path = write(rows, facts, options.out)
    print(f"written: {path}, {path.with_suffix('.json').name}")
    return path


if __name__ == "__main__":
    main()
