"""What fewer bits cost and buy: accuracy, agreement, size, time. `minidl quantize` prints it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import minidl
from minidl import nn
from minidl.attack import deployed
from minidl.data import DataLoader, Subset
from minidl.quantization.half import half
from minidl.quantization.quantize import quantize
from minidl.quantization.static import Quantized
from minidl.serialization import atomic_path

if TYPE_CHECKING:
    from rich.table import Table


def calibration(dataset: Any, count: int, batch_size: int = 64) -> list[Any]:
    """Batches of the first images."""
    some = Subset(dataset, range(min(count, len(dataset))))
    return [x for x, _ in DataLoader(some, batch_size)]


def narrow(
    model: nn.Module, batches: Sequence[Any], dtype: str, scheme: str, **how: Any
) -> nn.Module:
    """`quantize` for int8 and int4, `half` for 16 bits."""
    if dtype in ("float16", "bfloat16"):
        return half(model, dtype)
    return quantize(model, batches, dtype, scheme=scheme, **how)


def predictions(model: nn.Module, dataset: Any) -> np.ndarray:
    with minidl.no_grad(), deployed(model):
        found = [model(x).numpy().argmax(axis=1) for x, _ in DataLoader(dataset, 250)]
    return np.concatenate(found)


def milliseconds(model: nn.Module, images: Any, rounds: int = 15) -> float:
    """Of a batch: the median of several runs."""
    times = []
    with minidl.no_grad(), deployed(model):
        for _ in range(rounds + 2):
            start = time.perf_counter()
            model(images)
            times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times[2:]))


def compare(model: nn.Module, small: nn.Module, test_set: Any, path: Path) -> dict[str, Any]:
    """Both networks side by side; the small one is written to `path`.

    Returns:
        "float32" and "narrow": accuracy, MiB on disk, milliseconds for one image and for 32; and
        the share of predictions that stay as they were.
    """
    labels = np.array([test_set[i][1] for i in range(len(test_set))])
    images = np.stack([test_set[i % len(test_set)][0] for i in range(32)])
    sizes = []
    for network, file in ((model, path.with_suffix(".float")), (small, path)):
        if isinstance(network, Quantized):
            network.save(file)
        else:
            minidl.save(network.state_dict(), file)
        sizes.append(file.stat().st_size / 2**20)
    path.with_suffix(".float").unlink()
    rows: dict[str, Any] = {}
    said = []
    for name, network, size in zip(("float32", "narrow"), (model, small), sizes):
        said.append(predictions(network, test_set))
        rows[name] = {
            "accuracy": float((said[-1] == labels).mean()),
            "MiB": size,
            "ms, 1 image": milliseconds(network, minidl.tensor(images[:1])),
            "ms, 32 images": milliseconds(network, minidl.tensor(images)),
        }
    rows["agreement"] = float((said[0] == said[1]).mean())
    return rows


def table(rows: dict[str, Any], title: str, dtype: str) -> Table:
    from rich.table import Table

    found = Table(title, "accuracy", "MiB", "ms, 1 image", "ms, 32 images", "predictions kept",
                  box=None, header_style="bold")  # fmt: skip
    for name, row in (("float32", rows["float32"]), (dtype, rows["narrow"])):
        kept = "" if name == "float32" else f"{100 * rows['agreement']:.2f} %"
        found.add_row(name, f"{100 * row['accuracy']:.2f} %", f"{row['MiB']:.3f}",
                      f"{row['ms, 1 image']:.2f}", f"{row['ms, 32 images']:.2f}", kept)  # fmt: skip
    return found


def sweep(
    model: nn.Module, batches: Sequence[Any], test_set: Any, observer: str, skip: Sequence[str]
) -> dict[int, dict[str, float]]:
    """Accuracy with weights of 8 to 2 bits, a scale for each channel and one for all."""
    labels = np.array([test_set[i][1] for i in range(len(test_set))])
    found: dict[int, dict[str, float]] = {}
    for bits in range(8, 1, -1):
        for name, per_channel in (("per channel", True), ("per tensor", False)):
            small = quantize(model, batches, per_channel=per_channel, observer=observer, skip=skip,
                             weight_bits=bits)  # fmt: skip
            right = predictions(small, test_set) == labels
            found.setdefault(bits, {})[name] = float(right.mean())
    return found


def draw_sweep(found: dict[int, dict[str, float]], exact: float, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    for name in ("per channel", "per tensor"):
        axes.plot([*found], [100 * row[name] for row in found.values()], "o-", label=name)
    axes.axhline(100 * exact, color="grey", linestyle="--", label="float32")
    axes.invert_xaxis()
    axes.set(xlabel="bits of a weight (activations: 8)", ylabel="test accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def write(found: dict[str, Any], path: Path) -> None:
    with atomic_path(path) as part:
        part.write_text(json.dumps(found, indent=1) + "\n")
