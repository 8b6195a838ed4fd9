"""Trained networks in 16 and 8 bits: what is lost, what stays as it was, how small they are.

The default CNN on MNIST and Fashion-MNIST and ResNet-8 on CIFAR-10, trained here on all images and
then narrowed, without any training after (Nagel et al. 2021, section 3). ONNX Runtime quantizes the
same networks with the same images, as a yardstick for how many predictions may change:

    python benchmarks/experiments/quantized_networks.py --root DIR  # 15 minutes; needs onnxruntime

writes benchmarks/results/quantized_networks.md, .json and .png.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from common import arguments, table, train, write
from matplotlib.figure import Figure
from onnxruntime.quantization import CalibrationDataReader, QuantType, quant_pre_process
from onnxruntime.quantization import quantize_static as ort_quantize

import minidl
from minidl import data, models, nn, onnx
from minidl.cli import kernels_in_words
from minidl.data import DataLoader, Subset
from minidl.data.augment import RandomCrop, RandomHorizontalFlip
from minidl.data.transforms import Compose
from minidl.quantization import half, quantize, report
from minidl.quantization.static import Quantized

CALIBRATION = 512  # images of the training set


class Task(NamedTuple):
    dataset: Any
    network: str
    epochs: int
    seeds: int = 3  # at most
    transform: Any = None


AUGMENT = Compose([RandomHorizontalFlip(), RandomCrop(32, padding=4)])
TASKS = {
    "MNIST, CNN": Task(data.MNIST, "cnn", 2),
    "Fashion-MNIST, CNN": Task(data.FashionMNIST, "cnn", 3),
    "CIFAR-10, ResNet-8": Task(data.CIFAR10, "resnet8", 8, 1, AUGMENT),
}
WAYS: dict[str, Callable[[nn.Module, list[Any]], nn.Module]] = {
    "float16": lambda model, _: half(model, "float16"),
    "bfloat16": lambda model, _: half(model, "bfloat16"),
    "int8": lambda model, batches: quantize(model, batches),
    "int8, per tensor": lambda model, batches: quantize(model, batches, per_channel=False),
    "int8, dynamic": lambda model, batches: quantize(model, batches, scheme="dynamic"),
    "int8, weights only": lambda model, batches: quantize(model, batches, scheme="weight_only"),
    "int4, weights only": lambda m, batches: quantize(m, batches, "int4", scheme="weight_only"),
}
RUNTIME = "ONNX Runtime's int8"


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """What ONNX Runtime calibrates with: the same batches."""

    def __init__(self, name: str, batches: list[Any]) -> None:
        self.batches = iter([{name: batch.numpy()} for batch in batches])

    def get_next(self) -> Any:
        return next(self.batches, None)


def of_runtime(model: nn.Module, batches: list[Any], dataset: Any, folder: Path) -> np.ndarray:
    """The predictions of the network that ONNX Runtime quantized."""
    float_file, int_file = folder / "float.onnx", folder / "int8.onnx"
    onnx.export(model, batches[0], float_file)
    quant_pre_process(float_file, float_file)  # folds batch norms
    first = onnxruntime.InferenceSession(float_file, providers=["CPUExecutionProvider"])
    name = first.get_inputs()[0].name
    ort_quantize(float_file, int_file, Reader(name, batches), per_channel=True,
                 activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)  # fmt: skip
    session = onnxruntime.InferenceSession(int_file, providers=["CPUExecutionProvider"])
    said = [
        session.run(None, {name: x.numpy()})[0].argmax(axis=1) for x, _ in DataLoader(dataset, 250)
    ]
    return np.concatenate(said)


def size(model: nn.Module, folder: Path) -> int:
    """Of its file, in bytes."""
    file = folder / "m.safetensors"
    if isinstance(model, Quantized):
        model.save(file)
    else:
        minidl.save(model.state_dict(), file)
    return file.stat().st_size


def learn(task: Task, root: Any, seed: int, quick: bool) -> tuple[nn.Module, Any]:
    """A trained network, and the images that it was trained on, as they are."""
    minidl.manual_seed(seed)
    plain = task.dataset(root)
    channels, _, side = plain[0][0].shape
    how = {"image_size": side} if task.network == "cnn" else {}
    model = models.get(task.network, num_classes=10, in_channels=channels, **how)
    augmented = task.dataset(root, transform=task.transform) if task.transform else plain
    steps = 10 if quick else task.epochs * len(plain) // 64
    train(model, augmented, steps, 5e-3 if task.network != "cnn" else 2e-3)
    return model.eval(), plain


def run(task: Task, args: Any, seed: int, folder: Path) -> dict[str, Any]:
    start = time.perf_counter()
    model, train_set = learn(task, args.root, seed, args.quick)
    test_set = task.dataset(args.root, train=False)
    test_set = Subset(test_set, range(250)) if args.quick else test_set
    batches = report.calibration(train_set, CALIBRATION)
    labels = np.array([test_set[i][1] for i in range(len(test_set))])
    exact, whole = report.predictions(model, test_set), size(model, folder)

    def row(said: np.ndarray, size: float | None) -> dict[str, Any]:
        right = 100 * float((said == labels).mean())
        return {"accuracy": right, "kept": 100 * float((said == exact).mean()), "size": size}

    found = {"float32": row(exact, 1.0)}
    for name, make in WAYS.items():
        small = make(model, batches)
        found[name] = row(report.predictions(small, test_set), size(small, folder) / whole)
    found[RUNTIME] = row(of_runtime(model, batches, test_set, folder), None)
    print(f"seed {seed}: {(time.perf_counter() - start) / 60:.1f} minutes", found, flush=True)
    return found


def main() -> None:
    args = arguments(__doc__ or "")
    start = time.perf_counter()
    runs: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for title, task in TASKS.items():
            seeds = range(min(args.seeds, task.seeds))
            runs[title] = [run(task, args, seed, Path(folder)) for seed in seeds]
    record(runs, args, (time.perf_counter() - start) / 60)


def record(runs: dict[str, list[dict[str, Any]]], args: Any, minutes: float) -> None:
    epochs = ", ".join(f"{title} {task.epochs}" for title, task in TASKS.items())
    text = [
        "# Trained networks in 16 and 8 bits",
        f"Epochs of training: {epochs} (photographs flipped and cropped); the mean of "
        f"{max(map(len, runs.values()))} seeds, of photographs one. Ranges from {CALIBRATION} "
        "training images. Accuracy on all test images, in per cent. *Kept*: predictions that are "
        "those of float32, right or wrong. *Size*: of the file, float32's is 1; “weights only” is "
        "of linear layers. ONNX Runtime quantized the same networks itself (static, per channel).",
        *(f"## {title}\n\n{rows(found)}" for title, found in runs.items()),
        "![what is lost](quantized_networks.png)",
        verdict(runs),
        f"{kernels_in_words()}; {minutes:.0f} minutes in all.",
    ]
    write(args.out, "quantized_networks", "\n\n".join(text) + "\n", runs, draw(runs))


def mean(found: list[dict[str, Any]], way: str, what: str) -> float:
    return float(np.mean([run[way][what] for run in found]))


def lost(found: list[dict[str, Any]], way: str) -> float:
    return mean(found, "float32", "accuracy") - mean(found, way, "accuracy")


def rows(found: list[dict[str, Any]]) -> str:
    lines = [
        [way, f"{mean(found, way, 'accuracy'):.2f}", f"{mean(found, way, 'kept'):.2f}",
         "" if found[0][way]["size"] is None else f"{mean(found, way, 'size'):.3f}"]
        for way in found[0]
    ]  # fmt: skip
    return table(["", "accuracy", "kept", "size"], lines)


def draw(runs: dict[str, list[dict[str, Any]]]) -> Figure:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    names = [*WAYS, RUNTIME]
    for i, (title, found) in enumerate(runs.items()):
        changed = [100 - mean(found, name, "kept") for name in names]
        axes.barh(np.arange(len(names)) + 0.25 * (i - 1), changed, 0.25, label=title)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("predictions that changed (%)")
    axes.legend(frameon=False)
    return figure


def verdict(runs: dict[str, list[dict[str, Any]]]) -> str:
    """The claims, each beside what was measured."""
    lines = []

    def claim(what: str, measured: str, holds: bool) -> None:
        lines.append(f"- {what}: {measured} ({'holds' if holds else 'DOES NOT HOLD'})")

    for title, found in runs.items():
        points = lost(found, "int8")
        claim(f"{title}: int8 loses at most 0.3 points", f"{points:.2f}", points <= 0.3)
        kept, theirs = (mean(found, way, "kept") for way in ("int8", RUNTIME))
        claim(f"{title}: int8 keeps 99.5 % of predictions, or ONNX Runtime's share less 0.2",
              f"{kept:.2f} and {theirs:.2f}", kept >= min(99.5, theirs - 0.2))  # fmt: skip
        points = lost(found, "float16")
        claim(f"{title}: float16 loses at most 0.1 points", f"{points:.2f}", points <= 0.1)
        for way, most in (("int8", 0.27), ("float16", 0.51)):
            share = mean(found, way, "size")
            claim(f"{title}: {way} at most {most} of the size", f"{share:.3f}", share <= most)
    return "## What was claimed\n\n" + "\n".join(lines)


if __name__ == "__main__":
    main()
