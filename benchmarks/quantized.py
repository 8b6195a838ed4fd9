"""Whole networks in int8 against our own float32 and against ONNX Runtime's int8.

    python benchmarks/quantized.py          # needs onnx and onnxruntime; --quick: a rough look

Both run the same integers: `quantize` makes the network, `onnx.export` writes it in QDQ form, and
ONNX Runtime fuses that to its own integer kernels. Weights are random: they do not matter to the
time. How it measures: see turns.py. Writes results/quantized.md, .json and .png beside this file.
"""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from turns import Call, Case, Section, main

NETWORKS = {"the default CNN": ("cnn", 1, 28), "ResNet-8": ("resnet8", 3, 32),
            "ResNet-20": ("resnet20", 3, 32), "ResNet-18": ("resnet18", 3, 32)}  # fmt: skip


@functools.cache
def network(name: str) -> tuple[Any, Any]:
    """The float network, and images for it."""
    import minidl
    from minidl import models

    kind, channels, side = NETWORKS[name]
    minidl.manual_seed(0)
    how: dict[str, Any] = {"image_size": side} if kind == "cnn" else {}
    how |= {"stem": "cifar"} if kind == "resnet18" else {}
    images = np.random.default_rng(0).random((32, channels, side, side), np.float32)
    model = models.get(kind, num_classes=10, in_channels=channels, **how)
    return model.eval(), minidl.tensor(images)


def int8(name: str) -> Any:
    from minidl.quantization import quantize

    model, images = network(name)
    return quantize(model, [images])


def of_minidl(name: str, batch: int, make: Any, kernel: str | None = None) -> Call:
    import minidl

    minidl.use("conv2d", kernel)
    model, x = make(name), network(name)[1][:batch]

    def call() -> None:
        with minidl.no_grad():
            model(x)

    return call


def of_runtime(name: str, batch: int, make: Any) -> Call:
    import onnxruntime

    from minidl import onnx

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ["MINIDL_NUM_THREADS"])
    images = network(name)[1]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "m.onnx"
        onnx.export(make(name), images, file)
        session = onnxruntime.InferenceSession(file, options, ["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: images.numpy()[:batch]}
    return lambda: session.run(None, given)


def floats(name: str) -> Any:
    return network(name)[0]


def wide(dtype: str) -> Call:
    """A network that its weights weigh down: one image through 784-4096-4096-10."""
    import minidl
    from minidl import nn
    from minidl.quantization import half, quantize

    minidl.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(784, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(),
                               nn.Linear(4096, 10)).eval()  # fmt: skip
    if dtype in ("float16", "bfloat16"):
        model = half(model, dtype)
    elif dtype != "float32":
        model = quantize(model, dtype=dtype, scheme="weight_only")
    x = minidl.rand(1, 784)

    def call() -> None:
        with minidl.no_grad():
            model(x)

    return call


def sections() -> dict[str, Section]:
    networks = [
        Case(
            f"{name}, {batch} image{'s' * (batch > 1)}",
            {
                "minidl": lambda n=name, b=batch: of_minidl(n, b, int8),
                "float32": lambda n=name, b=batch: of_minidl(n, b, floats),
                "float32, direct": lambda n=name, b=batch: of_minidl(n, b, floats, "native"),
                "ONNX Runtime": lambda n=name, b=batch: of_runtime(n, b, int8),
                "ONNX Runtime, float32": lambda n=name, b=batch: of_runtime(n, b, floats),
            },
        )
        for name in NETWORKS
        for batch in (1, 32)
    ]
    weights = [
        Case(
            f"{dtype} weights",
            {"minidl": lambda d=dtype: wide(d), "float32": lambda: wide("float32")},
        )
        for dtype in ("float16", "bfloat16", "int8", "int4")
    ]
    return {
        "networks": Section(
            "Whole networks in int8: images in, logits out",
            "“minidl” and “ONNX Runtime” are int8, weights per channel; “float32” is minidl's own. "
            "Targets: at least 2.0 of float32 direct, never slower than float32, at least 1.0 of "
            "ONNX Runtime.",
            networks,
        ),
        "weights": Section(
            "Narrow weights, one image: 784-4096-4096-10",
            "Against minidl's own float32. Target: float16 at least 1.5.",
            weights,
        ),
    }


if __name__ == "__main__":
    main("quantized", "Quantized networks", sections(), ("numpy", "onnxruntime"))
