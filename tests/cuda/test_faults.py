"""Would the tests notice? Kernels with a mistake planted in them, each of which must be caught.

The mistakes are made by substitution in the sources themselves, so a fault that no longer fits is
an error here. All the mistaken kernels are compiled into one library, each in a namespace.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pytest

from minidl.backend import cuda_kernels
from minidl.backend import cuda_launch as cuda
from minidl.op import registry

GEMM = ("divisor.cuh", "gemm.cuh")
BARRIER = "__syncthreads();"


def data(*shape, dtype=np.float32):
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


def run_ladder(rung):
    dtype = np.float16 if rung == "tensor" else np.float32

    def run():
        a, b = data(70, 40, dtype=dtype), data(40, 70, dtype=dtype)
        return cuda.ladder(rung, a, b), a.astype(np.float64) @ b

    return run


def run_matmul():
    a, b = data(70, 50), data(50, 70)
    return cuda.matmul(a, b), a.astype(np.float64) @ b


def run_linear_f16():
    x, w = data(70, 99, dtype=np.float16), data(70, 99, dtype=np.float16)
    return cuda.linear_f16(x, w), x.astype(np.float64) @ w.T


def run_matmul_f16():
    a, b = data(70, 99, dtype=np.float16), data(99, 70, dtype=np.float16)
    return cuda.matmul_f16(a, b), a.astype(np.float64) @ b


def run_int8():
    x, w = (data(70, 99) * 50).astype(np.int8), (data(70, 99) * 50).astype(np.int8)
    return cuda.matmul_s8(x, w), x.astype(np.int64) @ w.T.astype(np.int64)


HOW = {"stride": (2, 1), "padding": (1, 1)}


def run_conv2d():
    x, w = data(2, 3, 7, 6), data(4, 3, 3, 3)
    return cuda.conv2d(x, w, **HOW), registry["conv2d"].op.formula(x, w, None, **HOW)


def run_conv2d_input():
    y, w = data(2, 4, 4, 6), data(4, 3, 3, 3)
    got = cuda.conv2d_input(y, w, input_size=(7, 6), **HOW)
    return got, registry["conv2d_input"].op.formula(y, w, input_size=(7, 6), **HOW)


def run_conv2d_weight():
    y, x = data(40, 4, 4, 6), data(40, 3, 7, 6)
    got = cuda.conv2d_weight(y, x, kernel_size=(3, 3), **HOW)
    return got, registry["conv2d_weight"].op.formula(y, x, kernel_size=(3, 3), **HOW)


def run_channels_last():
    x = data(2, 40, 5, 7)
    got = cuda.channels_last(x, 1, np.float16)
    return got[:, :, :, 0], x.astype(np.float16).transpose(0, 2, 3, 1)


def run_absmax():
    x = data(3, 700)
    return cuda.absmax(x), np.abs(x).max(axis=1)


def run_softmax():
    x = data(9, 70)
    return cuda.softmax(x, dim=1), registry["softmax"].op.formula(x.astype(np.float64), dim=1)


def run_standardize():
    x = data(5, 3, 200)
    wanted = registry["standardize"].op.formula(x.astype(np.float64), None, None, dim=(0, 2))
    return cuda.standardize(x, None, None, dim=(0, 2)), wanted


class Fault(NamedTuple):
    name: str
    files: tuple[str, ...]
    kernel: str
    old: str
    new: str
    run: Callable
    caught: str  # what the error says, if it is not (only) a wrong result


def fault(name, files, kernel, old, new, run, caught="wrong result"):
    return Fault(name, files, kernel, old, new, run, caught)


LADDER, MATMUL, CONV = ("ladder.cu",), (*GEMM, "matmul.cu"), (*GEMM, "conv.cu")
FAULTS = [
    # Barriers
    fault("tile read before it is whole", LADDER, "matmul_shared",
          f"{BARRIER}\n    for", "for", run_ladder("shared"),
          r"race in shared memory: (read|write) at ladder.cu:\d+, after a (read|write) at ladder"),
    fault("tile overwritten too early", LADDER, "matmul_shared",
          f"b_tile[k][x];\n    {BARRIER}", "b_tile[k][x];", run_ladder("shared"), "race in shared"),
    fault("asynchronous copies without a barrier", LADDER, "matmul_vector",
          BARRIER, "", run_ladder("vector"), "race in shared memory"),
    fault("the loop's barrier", MATMUL, "matmul_f32_small",
          BARRIER, "", run_matmul, "race in shared memory: .* gemm.cuh:"),
    fault("a slab loaded over the one in use", MATMUL, "matmul_f32_small",
          "load(s + stages - 1);", "load(s + stages);", run_matmul, "race in shared memory"),
    fault("a warp's barrier for a block's", ("quantize.cu",), "absmax",
          BARRIER, "__syncwarp();", run_absmax, "race in shared memory: .* quantize.cu:"),
    fault("memory of the last sum used again", ("divisor.cuh", "philox.cuh", "elementwise.cu"),
          "standardize", f"{BARRIER}  // of_warp may be used again", "", run_standardize,
          "race in shared memory: .* elementwise.cu:"),
    fault("a transposing tile without a barrier", ("quantize.cu",), "channels_last_f16",
          BARRIER, "", run_channels_last, "race in shared memory"),
    fault("a barrier that some do not reach", LADDER, "matmul_shared",
          f"{BARRIER}\n    for", f"if (m < M) {BARRIER}\n    for", run_ladder("shared"),
          r"threads diverge: __syncthreads at ladder.cu:\d+ while others wait at __syncthreads at "
          r"ladder.cu:\d+|deadlock"),
    fault("threads that leave before a barrier", LADDER, "matmul_shared",
          "float sum = 0;", "float sum = 0; if (m >= M) return;", run_ladder("shared"),
          r"deadlock: \d+ of 1024 threads of block .* wait at __syncthreads at ladder.cu:\d+, the "
          "others have returned"),
    # Waits
    fault("copies not waited for", LADDER, "matmul_vector", "copy_wait<0>", "copy_wait<1>",
          run_ladder("vector"), "race in shared memory"),
    fault("one slab too few waited for", MATMUL, "matmul_f32_small",
          "copy_wait<stages - 2>", "copy_wait<stages - 1>", run_matmul,
          "race in shared memory"),
    fault("copies not committed", MATMUL, "matmul_f32_small", "copy_commit();", "", run_matmul),
    # Fragments
    fault("k and rows of A exchanged", MATMUL, "matmul_f16_nt",
          "half_k = is_b ? fast : slow", "half_k = is_b ? fast : fast", run_linear_f16),
    fault("B in A's order", MATMUL, "matmul_f16_nt", "n + j * 16, k, true", "n + j * 16, k, false",
          run_linear_f16),
    fault("ldmatrix not transposed", MATMUL, "matmul_f16_nn",
          "load_matrices_transposed(f", "load_matrices(f", run_matmul_f16),
    fault("results in the wrong columns", MATMUL, "matmul_s8", "2 * t + r % 2", "t + r % 2 * 4",
          run_int8),
    fault("results in the wrong rows", MATMUL, "matmul_s8", "g + r / 2 * 8", "g + r % 2 * 8",
          run_int8),
    fault("a tile's half of n", MATMUL, "matmul_f32_small", "j / 4 * 32 + j % 4",
          "j / 4 * 4 + j % 4", run_matmul, "race in global memory: write at matmul.cu"),
    fault("a row of ldmatrix not aligned", LADDER, "matmul_tensor", "a_tile[64][32 + 8]",
          "a_tile[64][32 + 6]", run_ladder("tensor"), "ldmatrix at ladder.cu:.* multiple of 16"),
    # Bounds
    fault("results outside", LADDER, "matmul_naive", "if (m >= M || n >= N) return;",
          "if (m > M || n >= N) return;", run_ladder("naive"),
          r"(read|write) out of bounds at ladder.cu:\d+"),
    fault("one k too many", LADDER, "matmul_coalesced", "k < K", "k <= K", run_ladder("coalesced"),
          r"read out of bounds at ladder.cu:\d+"),
    fault("a tile's end past the matrix", MATMUL, "matmul_f32_small", "if (m < M && n < N) store",
          "if (m <= M && n < N) store", run_matmul, "out of bounds at matmul.cu|race in global"),
    fault("a vector past the end of its row", MATMUL, "matmul_f16_nt", "min(left, vector)",
          "vector", run_linear_f16),
    fault("below the image", CONV, "conv2d_f32_small", "h >= height || w >= width", "w >= width",
          run_conv2d, "out of bounds at gemm.cuh"),
    fault("left of the image", CONV, "conv2d_f32_small", "h < 0 || w < 0", "h < 0", run_conv2d,
          "out of bounds at gemm.cuh"),
    fault("strides not divided", CONV, "conv2d_input_f32_small", "p * stride_h != h || ", "",
          run_conv2d_input),
    fault("all parts of a cut sum in one place", CONV, "conv2d_weight_f32_small",
          "(long long)(split * groups + group)", "(long long)(group)", run_conv2d_weight,
          r"race in global memory: write at conv.cu:\d+, after a write at conv.cu:\d+"),
    # Warps
    fault("a shuffle that leaves out lanes", ("reduce.cu",), "softmax", "apart = 16", "apart = 8",
          run_softmax),
    fault("a shuffle of half a warp", ("reduce.cu",), "softmax",
          "__shfl_xor_sync(~0u, x, apart)", "__shfl_xor_sync(0xffff, x, apart)", run_softmax,
          "__shfl_xor_sync at reduce.cu:.*the mask leaves out the calling lane"),
]  # fmt: skip


def only_kernel(code, kernel, new_name):
    """The code without its other kernels, and this one renamed."""
    parts = code.split('extern "C" __global__')
    kept = [parts[0]]
    for part in parts[1:]:
        body, end, rest = part.partition("\n}\n")
        if f" {kernel}(" in body:
            kept.append(
                'extern "C" __global__'
                + body.replace(f" {kernel}(", f" {new_name}(", 1)
                + end
                + rest
            )
        else:
            kept.append("\n" * (body + end).count("\n") + rest)
    return "".join(kept)


def mistaken(number, fault):
    name, code = f"fault_{number}", ""
    folder = cuda_kernels.source_folder()
    for file in fault.files:
        text = (folder / file).read_text(encoding="utf-8")
        text = "".join(
            "\n" if line.startswith("#include") else line for line in text.splitlines(True)
        )
        code += f'#line 1 "{folder / file}"\n{text}\n'
    code = only_kernel(code, fault.kernel, name)
    assert code.count(fault.old) >= 1, f"{fault.name}: the source has no {fault.old!r} any more"
    code = code.replace(fault.old, fault.new)
    return f"namespace in_{name} {{\n{code}\n}}\nusing in_{name}::{name};\n"


def together(faults):
    code = cuda_kernels.inlined("ptx.cuh")
    code += "".join(mistaken(number, fault) for number, fault in enumerate(faults))
    return cuda_kernels.CpuModule(code, build="watch")


RIGHT = list({fault.kernel: fault._replace(old="", new="") for fault in FAULTS}.values())


@pytest.fixture(scope="module")
def modules():
    with ThreadPoolExecutor() as pool:  # two compilers at a time
        return list(pool.map(together, [FAULTS, RIGHT]))


def use(monkeypatch, module, kernel, instead):
    """Let cuda_launch take another kernel, from a module, in the place of one."""

    def function(file, name, array):
        if name == kernel:
            return cuda_kernels.Module(module).get_function(instead)
        return cuda_kernels.load_on_cpu(file).get_function(name)

    monkeypatch.setattr(cuda, "function", function)


def is_right(got, wanted):
    scale = np.abs(wanted).max()
    tolerance = 1e-2 if got.dtype == np.float16 else 1e-5
    return bool((np.abs(got.astype(np.float64) - wanted) <= tolerance * scale).all())


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_caught(fault, modules, monkeypatch):
    use(monkeypatch, modules[0], fault.kernel, f"fault_{FAULTS.index(fault)}")
    monkeypatch.setattr(cuda_kernels, "order_seed", 1)
    if fault.caught == "wrong result":
        assert not is_right(*fault.run())
    else:
        with pytest.raises(RuntimeError, match=fault.caught):
            fault.run()


@pytest.mark.parametrize("fault", RIGHT, ids=lambda fault: fault.kernel)
def test_without_a_fault_nothing_is_said(fault, modules, monkeypatch):
    use(monkeypatch, modules[1], fault.kernel, f"fault_{RIGHT.index(fault)}")
    for seed in (0, 1):
        monkeypatch.setattr(cuda_kernels, "order_seed", seed)
        assert is_right(*fault.run())
