"""All of minidl on CuPy arrays, on a double of CuPy that is as strict as CuPy is.

On a machine with a GPU, MINIDL_GPU=1 runs the same tests on CuPy itself (`make gpu`).
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

import minidl
from minidl import autograd, backend, models, nn, optim, use
from minidl.amp import GradScaler, MasterWeights, autocast
from minidl.data import DataLoader, Digits
from minidl.nn import functional as F
from minidl.onnx import operators
from minidl.quantization import quantize
from minidl.tensor import Tensor
from tests import registry as reg
from tests import test_ops
from tests.cuda import cupy_double as double
from tests.nn_cases import CASES as LAYERS
from tests.registry import Case, every_case, every_differentiable_case

# On the double and on the CPU float64 sums go in the same order, but for the CPU's kernels.
SAME = 1e-12
HALF = 2e-3  # float16 products with float32 sums, of numbers around 1


ON_GPU = os.environ.get("MINIDL_GPU", "0") not in ("", "0")


@pytest.fixture(autouse=True)
def cupy() -> Iterator[Any]:
    if ON_GPU:
        yield backend.cupy()
    else:
        with double.installed() as module:
            yield module


def needs(gpus: int) -> None:
    if minidl.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")


def there(x: Any) -> Any:
    """An array on the GPU; anything else as it is."""
    return backend.to_device(x, "cuda") if isinstance(x, np.ndarray) else x


def back(x: Any) -> Any:
    return x if isinstance(x, np.ndarray | np.generic) or not hasattr(x, "get") else x.get()


def on_gpu(case: Case) -> Case:
    kwargs = {k: there(v) for k, v in case.kwargs.items()}
    return case.map(there)._replace(kwargs=kwargs)


# The double refuses what CuPy refuses --------------------------------------------------------


@pytest.mark.parametrize(
    "mix",
    [
        lambda h, d: h + d, lambda h, d: d + h, lambda h, d: np.add(d, h), lambda h, d: d @ h,
        lambda h, d: np.asarray(d), lambda h, d: np.array([d]), lambda h, d: np.where(d > 0, h, d),
        lambda h, d: np.concatenate([h, d]), lambda h, d: np.add(h, h, out=d),
        lambda h, d: d.__setitem__(slice(1, 2), h[1:2]), lambda h, d: d.dot(h),
        lambda h, d: np.sum(d, where=True), lambda h, d: d.sum(initial=0.0),
        lambda h, d: np.add.at(d, 0, d[0]), lambda h, d: np.frompyfunc(float, 1, 1)(d),
        lambda h, d: np.insert(d, 0, 1), lambda h, d: d.argsort(kind="stable"),
        lambda h, d: np.float32(1).item() + np.linalg.eigvals(d),
    ],
)  # fmt: skip
def test_refused(mix: Any) -> None:
    host = np.ones((2, 2), np.float32)
    with pytest.raises(TypeError):
        mix(host, there(host))


def test_what_comes_out_is_on_the_device() -> None:
    d = there(np.arange(6, dtype=np.float32).reshape(2, 3))
    for x in (d.sum(), d[0, 1], d.T, np.exp(d), 2 * d, d > 1, d.argmax(), np.float32(2) * d):
        assert type(x) is type(d)
    assert d.sum().get() == 15 and isinstance(d.get(), np.ndarray)
    assert isinstance(d.sum().item(), float)


# Every op ---------------------------------------------------------------------------------------


@every_case
def test_op(case: Case) -> None:
    """A formula runs on CuPy as it is, and gives what it gives on NumPy. (erf: SciPy's.)"""
    call = on_gpu(case)
    actual = back(case.function(*call.inputs, **{**case.op.defaults, **call.kwargs}))
    expected = case.op.formula(*case.inputs, **case.settings)
    if case.op.name == "to_device":
        assert isinstance(actual, np.ndarray)
    reg.assert_close(np.asarray(actual), expected, SAME)


@every_differentiable_case
def test_gradients(case: Case) -> None:
    """To the second order, by rules that run on CuPy arrays and on Tensors of them."""
    found = []
    for call, change in ((case, lambda x: x), (on_gpu(case), there)):
        xs = [
            Tensor(x, requires_grad=i in case.floats) if hasattr(x, "dtype") else x
            for i, x in enumerate(call.inputs)
        ]
        y = call.function(*xs, **call.kwargs)
        shape = np.empty(y.shape)
        g = Tensor(change(reg.cotangent(Tensor(shape))), requires_grad=True)
        inputs = [xs[i] for i in case.floats]
        first = autograd.grad(y, inputs, g, create_graph=True, allow_unused=True)
        wanted = [gx for gx in first if gx is not None and gx.requires_grad]
        weights = [Tensor(change(reg.cotangent(Tensor(np.empty(gx.shape))))) for gx in wanted]
        second = autograd.grad(wanted, [g, *inputs], weights, allow_unused=True) if wanted else ()
        found.append([None if a is None else back(a.array) for a in (*first, *second)])
    reg.assert_all_close(found[1], found[0], 1e-9)


WITH_KERNELS = {
    name: case
    for name, case in reg.CASES.items()
    if any(kernel.device == "cuda" for kernel in case.op.kernels)
}


@reg.parametrize("case", WITH_KERNELS)
def test_kernels(case: Case) -> None:
    """Every CUDA kernel gives what the formula gives in float64."""
    for kernel in case.op.kernels:
        if kernel.device != "cuda":
            continue
        for dtype in kernel.dtypes or ("float32", "float64"):
            call = case.cast(dtype)
            expected = case.op.formula(*call.cast("float64").inputs, **case.settings)
            actual = kernel.function(*call.map(there).inputs, **case.settings)
            assert actual.dtype == dtype or actual.dtype.kind != "f"
            bound = HALF if dtype == "float16" else test_ops.OF_KERNELS[dtype]
            reg.assert_close(actual.get(), expected, bound)


@reg.parametrize("case", {k: c for k, c in WITH_KERNELS.items() if c.op.gradient_kernels})
def test_gradient_kernels(case: Case) -> None:
    for kernel in case.op.gradient_kernels:
        if kernel.device != "cuda":
            continue
        for dtype in kernel.dtypes or ("float32", "float64"):
            call = case.cast(dtype)
            y = case.function(*reg.leaves(call), **case.kwargs)
            entries = kernel.function(
                there(reg.cotangent(y)), *map(there, y.node.saved), **y.node.kwargs
            )
            found = [entries[i]() if callable(entries[i]) else entries[i] for i in case.floats]
            actual = [
                None if a is None else autograd.unbroadcast(a, call.inputs[i].shape).get()
                for i, a in zip(case.floats, found, strict=True)
            ]
            expected = reg.gradients(case.op.rule, call.cast("float64"))
            reg.assert_all_close(actual, expected, test_ops.OF_KERNELS[dtype])


def test_a_wrong_kernel_is_caught() -> None:
    from dataclasses import replace

    for name in {case.op.name for case in WITH_KERNELS.values()}:
        this = reg.OPS[name].op
        for kernel in this.kernels:
            if kernel.device != "cuda":
                continue
            factor = 1.1 if kernel.dtypes == ("float16",) else 1.001
            wrong = lambda *a, k=kernel, f=factor, **s: k.function(*a, **s) * f  # noqa: E731
            dtypes = [d for d in kernel.dtypes or ("float32",) if d != "float16" or factor > 1.01]
            with reg.replaced(this, kernels=[replace(kernel, function=wrong, dtypes=dtypes)]):
                caught = 0
                for case in WITH_KERNELS.values():
                    if case.op is this:
                        try:
                            test_kernels(case)
                        except AssertionError:
                            caught += 1
            assert caught, f"{name}: kernel {kernel.name!r} times {factor}"


def test_use_and_the_table() -> None:
    x = minidl.randn(4, 5, device="cuda")
    y = minidl.randn(5, 3, device="cuda")
    with use("matmul", "formula"):
        expected = (x @ y).cpu().numpy()
    for name in ("cuda", "cuda_naive", "cuda_shared", "cuda_register", "cuda_vector"):
        with use("matmul", name):
            np.testing.assert_allclose((x @ y).cpu().numpy(), expected, rtol=1e-5, atol=1e-6)
    rows = {(row[0], row[2]): row for row in minidl.kernels() if row[1] == "cuda"}
    assert rows["conv2d", "float32"][4] == "cuda"
    assert rows["conv2d", "float64"][4] == "formula"
    assert "gradient too" in rows["softmax", "float32"][5]


# Layers, optimizers, training -------------------------------------------------------------------


def tensors(case: Any, device: str) -> Any:
    rng = np.random.default_rng(0)

    def make(draw: Any) -> Any:
        if isinstance(draw, tuple):
            return tuple(map(make, draw))
        array = np.asarray(draw(rng))
        array = array.astype(np.float32) if array.dtype.kind == "f" else array
        return Tensor(backend.to_device(array, device), requires_grad=array.dtype.kind == "f")

    return [make(draw) for draw in case.inputs]


def flat(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    return [x for output in outputs for x in flat(output)]


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
def test_layer(case: Any) -> None:
    """In training, forwards and backwards, the same as on the CPU, random numbers included."""
    found = []
    for device in ("cpu", "cuda"):
        minidl.manual_seed(0)
        layer = case.make(nn).to(device)
        inputs = tensors(case, device)
        outputs = flat(layer(*inputs))
        assert all(out.device.type == device for out in outputs)
        total = minidl.zeros((), device=device)
        for out in outputs:
            total = total + (out * Tensor(backend.to_device(reg.cotangent(out), device))).sum()
        if total.requires_grad:
            total.backward()
        state = [*outputs, *layer.state_dict().values(), *(p.grad for p in layer.parameters())]
        found.append([None if t is None else t.cpu().numpy() for t in state])
    reg.assert_all_close(found[1], found[0], 3e-5)


@pytest.mark.parametrize("how", [{"scheme": "dynamic"}, {"scheme": "weight_only"},
                                 {"scheme": "weight_only", "dtype": "int4"}])  # fmt: skip
@pytest.mark.parametrize("name", ["Linear-0", "Embedding-0", "LSTM-2", "GRU-1", "RNNCell-0"])
def test_narrow_layers(name: str, how: dict[str, str]) -> None:
    """Quantized on the CPU or on the GPU: the same layer, and the same results."""
    (case,) = (case for case in LAYERS if case.name == name)
    minidl.manual_seed(0)
    layer = case.make(nn)
    found = [flat(quantize(layer, None, **how)(*tensors(case, "cpu")))]
    for small in (quantize(layer, None, **how).to("cuda"), quantize(layer.to("cuda"), None, **how)):
        found.append(flat(small(*tensors(case, "cuda"))))
        assert all(out.device.type == "cuda" for out in found[-1])
    for other in found[1:]:
        reg.assert_all_close([x.cpu().numpy() for x in other], [x.numpy() for x in found[0]], 3e-5)


OPTIMIZERS = {
    "sgd": lambda p: optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: optim.Adam(p, 0.01, weight_decay=0.01),
    "adamw": lambda p: optim.AdamW(p, 0.01),
    "rmsprop": lambda p: optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: optim.Adagrad(p, 0.01),
    "adadelta": lambda p: optim.Adadelta(p),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_optimizer(make: Any) -> None:
    found = []
    for device in ("cpu", "cuda"):
        minidl.manual_seed(0)
        layer = nn.Linear(5, 3).to(device)
        optimizer = make(layer.parameters())
        x = minidl.randn(7, 5).to(device)
        for _ in range(3):
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
            optimizer.step()
        other = make(layer.parameters())
        other.load_state_dict(optimizer.state_dict())
        found.append([p.detach().cpu().numpy() for p in layer.parameters()])
    reg.assert_all_close(found[1], found[0], 1e-5)


def test_one_kernel_does_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from minidl.backend import cuda_launch

    for name, make in (("sgd", optim.SGD), ("adam", optim.Adam), ("adam", optim.AdamW)):
        found = []
        for fused in (True, False):
            launch = Mock(wraps=getattr(cuda_launch, name))
            p = Tensor(there(np.linspace(-1, 1, 6, dtype=np.float32)), requires_grad=True)
            optimizer = make([p], lr=0.1, weight_decay=0.1)
            optimizer.fused = fused
            with monkeypatch.context() as patch:
                patch.setattr(cuda_launch, name, launch)
                for _ in range(3):
                    p.grad = Tensor(there(np.linspace(1, 3, 6, dtype=np.float32)))
                    optimizer.step()
            assert launch.call_count == (3 if fused else 0)
            found.append([p.detach().cpu().numpy()])
        reg.assert_all_close(found[0], found[1], 1e-6)


def test_a_small_network_learns_as_on_the_cpu(tmp_path: Any) -> None:
    """The default CNN on digits: loader, model, loss, optimizer, checkpoint."""
    losses = {}
    for device in ("cpu", "cuda"):
        minidl.manual_seed(0)
        model = models.cnn(image_size=8).to(device)
        optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        loader = DataLoader(Digits(train=True), 16, shuffle=True, device=device)
        losses[device] = []
        for images, labels in [batch for batch, _ in zip(loader, range(6))]:
            assert images.device.type == device and labels.device.type == device
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[device].append(loss.item())
    np.testing.assert_allclose(losses["cuda"], losses["cpu"], rtol=1e-3)
    minidl.save(model.state_dict(), tmp_path / "model.safetensors")
    loaded = minidl.load(tmp_path / "model.safetensors", device="cuda")
    for name, tensor in model.state_dict().items():
        assert loaded[name].is_cuda
        np.testing.assert_array_equal(loaded[name].cpu().numpy(), tensor.cpu().numpy())


@pytest.mark.parametrize("halved", [False, True])
def test_mixed_precision_learns_as_on_the_cpu(halved: bool) -> None:
    """float16 under autocast, with a scaled loss; and with float16 weights and their masters."""
    losses: dict[str, list[float]] = {}
    for device in ("cpu", "cuda"):
        minidl.manual_seed(0)
        layers = [
            nn.Conv2d(1, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(288, 10),
        ]
        model = nn.Sequential(*layers).to(device)
        if halved:
            model.half()
        optimizer: optim.Optimizer = optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        optimizer = MasterWeights(optimizer) if halved else optimizer
        scaler = GradScaler(init_scale=2.0**10)
        losses[device] = []
        for images, labels in [
            b for b, _ in zip(DataLoader(Digits(), 16, device=device), range(5))
        ]:
            optimizer.zero_grad()
            with autocast(device, "float16"):
                scores = model(images)
                loss = F.cross_entropy(scores, labels)
            assert scores.dtype == np.float16 and scores.device.type == device
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses[device].append(loss.item())
        assert {p.dtype.name for p in model.parameters()} == {"float16" if halved else "float32"}
    np.testing.assert_allclose(losses["cuda"], losses["cpu"], rtol=0.01)


def test_training_runs(tmp_path: Any) -> None:
    """`minidl train --device cuda`: killed nowhere, resumed once."""
    from tests.test_cli import call

    small = ["train", "--device", "cuda", "--model", "mlp", "--batch-size", 256, "--out", tmp_path]
    assert call(*small, "--epochs", 2)[0] == 0
    assert call(*small, "--epochs", 2, "--resume")[0] == 0


# Devices ----------------------------------------------------------------------------------------


def test_the_current_gpu() -> None:
    needs(2)
    assert minidl.zeros(2, device="cuda").device == "cuda:0"
    with minidl.device("cuda:1"):
        x = minidl.ones(2, device="cuda")
        assert x.device == "cuda:1" and minidl.cuda.current_device() == 1
        assert (x + x).device == "cuda:1"
        with minidl.device("cpu"), minidl.device("cuda:0"):
            assert minidl.cuda.current_device() == 0
        assert minidl.cuda.current_device() == 1
    assert minidl.cuda.current_device() == 0
    np.testing.assert_array_equal(x.to("cuda:0").cpu().numpy(), [1, 1])
    minidl.cuda.set_device(1)
    try:
        assert minidl.zeros(2, device="cuda").device == "cuda:1"
    finally:
        minidl.cuda.set_device(0)


def test_each_rank_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = minidl.cuda.device_count()
    try:
        assert minidl.cuda.set_device_by_rank() == 0
        for name in ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"):
            with monkeypatch.context() as patch:
                patch.setenv(name, "5")
                assert minidl.cuda.set_device_by_rank() == 5 % gpus
                assert minidl.zeros(1, device="cuda").device == f"cuda:{5 % gpus}"
    finally:
        minidl.cuda.set_device(0)


def test_computing_on_another_gpu_is_refused() -> None:
    needs(2)
    x = minidl.ones(2, device="cuda:1")
    with pytest.raises((RuntimeError, ValueError), match="current"):
        x + x


def test_gradients_flow_between_devices() -> None:
    x = minidl.ones(3, requires_grad=True)
    (x.to("cuda") * 2).to("cpu").sum().backward()
    assert x.grad.device == "cpu"
    np.testing.assert_array_equal(x.grad.numpy(), [2, 2, 2])


@pytest.mark.parametrize("seed", [0, 2**70])
def test_random_numbers_are_the_same_on_every_device(seed: int) -> None:
    found = []
    for device in ("cpu", "cuda"):
        minidl.manual_seed(seed)
        x = minidl.ones(3, 4, 5, 5, device=device)
        draws = [
            minidl.rand(5, device=device), minidl.randn(5, device=device), F.dropout(x, 0.3),
            F.dropout2d(x, 0.3), F.locked_dropout(x[0], 0.3), F.dropout(x, 1.0),
            minidl.empty(4, device=device).normal_(),
        ]  # fmt: skip
        found.append([t.cpu().numpy() for t in draws])
    reg.assert_same_bits(found[1], found[0])


@pytest.mark.parametrize("pinned", [False, True])
def test_batches_in_advance_and_a_loader_that_is_resumed(pinned: bool) -> None:
    where = {"pin_memory": True} if pinned else {"device": "cuda"}
    loader = DataLoader(Digits(train=False), 50, shuffle=True, seed=3, **where)
    expected = [x.numpy() for x, _ in DataLoader(Digits(train=False), 50, shuffle=True, seed=3)]
    batches = iter(loader)
    first = [next(batches)[0] for _ in range(3)]
    state = loader.state_dict()
    assert state["batch"] == 3  # not four, though one more is on its way
    resumed = DataLoader(Digits(train=False), 50, shuffle=True, seed=3, **where)
    resumed.load_state_dict(state)
    rest = [x for x, _ in resumed]
    for x, y in zip([*first, *rest], expected, strict=True):
        assert x.is_cuda != pinned
        np.testing.assert_array_equal(x.to("cuda", non_blocking=True).cpu().numpy(), y)


# What is missing is said ------------------------------------------------------------------------


def test_no_gpu() -> None:
    with double.installed(devices=0):
        assert not minidl.cuda.is_available()
        for ask in (
            lambda: minidl.ones(2).to("cuda"),
            lambda: nn.Linear(2, 2).to("cuda"),
            lambda: DataLoader(Digits(), device="cuda"),
            lambda: minidl.cuda.set_device(0),
            lambda: minidl.device("cuda").__enter__(),
            minidl.cuda.current_device,
        ):
            with pytest.raises(RuntimeError, match="finds no GPU"):
                ask()


def test_no_such_gpu() -> None:
    with pytest.raises(RuntimeError, match=r"'cuda:99': this machine has \d+ GPU"):
        minidl.ones(2).to("cuda:99")


def test_the_operators_of_onnx() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.integers(0, 256, (2, 4, 6, 5), "u1"), rng.integers(-128, 128, (6, 4, 3, 3), "i1")
    zeros, scales = (x[0, 0, 0, 0], w[:, 0, 0, 0]), (np.float32(0.1), rng.random(6, "f"))
    bias, y_zero = rng.integers(-999, 999, 6, "i4"), np.uint8(7)
    calls: list[Any] = [
        (operators.conv_integer, (x, w, *zeros), {"pads": (0, 1, 2, 0)}),
        (operators.qlinear_conv, (x, scales[0], zeros[0], w, scales[1], zeros[1], 50.0, y_zero,
                                  bias), {"strides": (2, 1)}),
        (operators.matmul_integer, (x, w[:5, :, 0, 0], zeros[0], zeros[1][:4]), {}),
        (operators.qlinear_matmul, (x[0], 0.1, x[0, :, :, :1], x[1].swapaxes(1, 2), scales[1],
                                    None, 90.0, y_zero), {}),
        (operators.dynamic_quantize_linear, (rng.normal(size=(3, 4)).astype("f"),), {}),
        (operators.dequantize_linear, (x, scales[1][:4], x[0, :, 0, 0]), {}),
        (operators.quantize_linear, (rng.normal(size=(3, 6)).astype("f"), scales[1]), {}),
    ]  # fmt: skip
    for f, args, how in calls:
        on_cpu, on_gpu = f(*args, **how), f(*map(there, args), **how)
        pairs = zip(on_cpu, on_gpu) if isinstance(on_cpu, tuple) else [(on_cpu, on_gpu)]
        for y, found in pairs:
            assert backend.device_name(found).startswith("cuda") and found.dtype == y.dtype
            np.testing.assert_array_equal(back(found), y)


def test_no_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert not minidl.cuda.is_available()
    with pytest.raises(RuntimeError, match=r"needs CuPy: pip install 'minidl\[cuda\]'"):
        minidl.ones(2).to("cuda")


def test_pinning_refuses_what_is_on_the_gpu() -> None:
    with pytest.raises(RuntimeError, match="only a tensor on the CPU"):
        minidl.ones(2, device="cuda").pin_memory()


def test_minidl_imports_without_looking_for_a_gpu() -> None:
    code = "import minidl, sys; assert 'cupy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_benchmark_on_a_gpu(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """`make gpu`, at the smallest sizes: what it computes is right, and it writes its report."""
    if ON_GPU:
        pytest.skip("make gpu runs it whole")
    path = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
    spec = importlib.util.spec_from_file_location("gpu_benchmark", path)
    script = importlib.util.module_from_spec(spec)
    sys.modules["gpu_benchmark"] = script
    spec.loader.exec_module(script)
    script.torch = None  # it may be there, but without a GPU
    report = script.main(["--smallest", "--out", str(tmp_path)])
    text = report.read_text()
    assert report.name == "gpu-a-double.md" and "matmul float32" in text and "cuBLAS" in text
    rows = json.loads(report.with_suffix(".json").read_text())["rows"]
    assert {row["name"] for row in rows} >= {"matmul int8", "conv2d float16", "ladder: tensor"}
    assert all(row["error"] < 1e-2 for row in rows if row["error"] is not None)
