"""`minidl kernels --step OP`: every op with a CUDA kernel can be stepped through."""

import re

import pytest

from minidl import step
from minidl.backend import cuda_kernels
from minidl.op import registry
from tests.test_cli import call

STEPS = [
    (name, kernel.name)
    for name, function in sorted(registry.items())
    for kernel in function.op.kernels
    if kernel.device == "cuda" and not (name == "erf" or kernel.name == "sorted")  # CuPy's own
]


@pytest.mark.parametrize("op, kernel", STEPS)
def test_every_kernel(op, kernel, monkeypatch):
    """In the build that counts nothing: the tests have compiled it anyway."""
    monkeypatch.setenv("MINIDL_CUDA_ON_CPU", "plain")
    found = step.launches(op, kernel)
    assert found
    for launch in found[:2]:
        code = step.source(launch.file)
        assert f" {launch.name}(" in code[launch.line - 1]
        assert launch.report is None
        assert next(iter(step.describe(launch))).startswith(launch.name)


@pytest.mark.parametrize("kernel", ["cuda_naive", "cuda_shared", "cuda_tensor"])
def test_what_is_counted(kernel):
    for launch in step.launches("matmul", kernel):
        assert launch.report.total("global write").requests > 0
        text = "\n".join(step.describe(launch))
        assert "phase 1" in text and "sectors" in text
        for file, line in re.findall(r"^ +([\w.]+\.cuh?):(\d+): .", text, flags=re.M):
            assert int(line) <= len(step.source(file))


def test_the_command():
    code, output = call("kernels", "--step", "matmul", "--kernel", "cuda_shared")
    assert code == 0
    assert "matmul_shared (ladder.cu:" in output and "__syncthreads at ladder.cu:" in output
    assert "MINIDL_CUDA_ON_CPU=debug gdb" in output and "break ladder.cu:" in output


def test_refused():
    for arguments, words in [
        (["--step", "conv"], "no op 'conv' has a CUDA kernel; these have: conv2d"),
        (["--step", "matmul", "--kernel", "tiled"], "no CUDA kernel 'tiled'; it has: cuda_naive"),
    ]:
        code, output = call("kernels", *arguments)
        assert code == 2 and words in output
    assert cuda_kernels.order_seed == 1
