"""Under a sanitizer (tools/sanitize_cuda.sh) a mistake in a kernel is named by its line."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = os.environ.get("MINIDL_CUDA_ON_CPU", "plain")

RUN = """
import numpy as np
from minidl.backend import cuda_kernels
from tests.cuda.test_faults import only_kernel

code = cuda_kernels.inlined("ladder.cu")
code = only_kernel(code, "matmul_shared", "mistaken")
assert {old!r} in code
module = cuda_kernels.CpuModule(code.replace({old!r}, {new!r}))
a, y = np.ones((50, 50), np.float32), np.zeros((50, 50), np.float32)
fifty = np.int32(50)
module.get_function("mistaken")((2, 2), (32, 32), (fifty, fifty, fifty, a, a, y))
print("nothing noticed")
"""


def run(old, new):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(old=old, new=new)],
        capture_output=True, text=True, env=environment, cwd=ROOT,
    )  # fmt: skip
    return done.stdout + done.stderr


def line_of(text):
    lines = (ROOT / "csrc/cuda/ladder.cu").read_text(encoding="utf-8").splitlines()
    return 1 + next(number for number, line in enumerate(lines) if text in line)


@pytest.mark.skipif(BUILD not in ("address", "thread"), reason="tools/sanitize_cuda.sh runs this")
def test_a_right_kernel_passes():
    assert run("float sum = 0;", "float sum = 0;").strip() == "nothing noticed"


@pytest.mark.skipif(BUILD != "thread", reason="tools/sanitize_cuda.sh thread runs this")
def test_a_race_is_named_by_both_lines():
    said = run("__syncthreads();\n    for", "for")
    write, read = line_of("b_tile[row][x] ="), line_of("b_tile[k][x];")
    assert "WARNING: ThreadSanitizer: data race" in said
    places = {int(line) for line in re.findall(r"ladder\.cu:(\d+)", said)}
    # The barrier's line is gone, and with it the line after it has moved up.
    assert places & {write, write - 1} and places & {read - 1, read}, said


@pytest.mark.skipif(BUILD != "address", reason="tools/sanitize_cuda.sh address runs this")
@pytest.mark.parametrize(
    "old, new, what, at",
    [
        ("if (m < M && n < N) y", "if (n < N) y", "heap-buffer-overflow", "if (m < M && n < N) y"),
        ("b_tile[k][x];", "b_tile[k + 1][x];", "global-buffer-overflow", "b_tile[k][x];"),
    ],
)
def test_an_index_past_the_end_is_named_by_its_line(old, new, what, at):
    said = run(old, new)
    assert what in said and f"ladder.cu:{line_of(at)}" in said, said
