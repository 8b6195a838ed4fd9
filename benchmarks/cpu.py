"""minidl's kernels on the CPU against PyTorch (oneDNN) and NumPy (OpenBLAS): kernels, then steps.

    make bench                               # all of it: about ten minutes
    python benchmarks/cpu.py --quick         # a rough look: about two
    python benchmarks/cpu.py --only conv2d steps

How it measures: see turns.py. Writes results/cpu.md, cpu.json and cpu.png beside this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
from turns import Call, Case, Section, library, main


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


if __name__ == "__main__":
    main("cpu", "minidl on the CPU", sections())
