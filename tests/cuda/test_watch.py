"""What the "watch" build counts, against what can be counted by hand; and the other builds."""

import numpy as np
import pytest

from minidl.backend import cuda_kernels
from minidl.backend import cuda_launch as cuda

STRIDED = """
extern "C" __global__ void read_strided(int stride, const float* x, float* y) {
  __shared__ float tile[32 * 33];
  for (int i = threadIdx.x; i < 32 * 33; i += 32) tile[i] = 0;
  __syncwarp();
  y[threadIdx.x] = x[threadIdx.x * stride] + tile[threadIdx.x * stride];
}
"""


@pytest.fixture(scope="module")
def ladder():
    return cuda_kernels.load_on_cpu("ladder.cu", build="watch")


def watched(monkeypatch, module):
    monkeypatch.setattr(cuda, "function", lambda file, name, array: module.get_function(name))


def test_conflicts_and_sectors_of_strided_reads():
    code = cuda_kernels.inlined("ptx.cuh") + STRIDED
    module = cuda_kernels.CpuModule(code, build="watch")
    kernel = module.get_function("read_strided")
    for stride, passes, sectors in [(0, 1, 1), (1, 1, 4), (2, 2, 8), (32, 32, 32), (33, 1, 32)]:
        x, y = np.ones(32 * 33, np.float32), np.zeros(32, np.float32)
        kernel((1,), (32,), (np.int32(stride), x, y))
        report = module.report()
        assert report.total("shared read") == (1, passes, 1)
        assert report.total("global read")[:2] == (1, sectors)
        assert report.total("global write") == (1, 4, 4)
        assert report.total("shared write") == (33, 33, 33)


def test_each_rung_of_the_ladder_asks_less_of_the_memory(ladder, monkeypatch):
    watched(monkeypatch, ladder)
    a = np.random.default_rng(0).normal(size=(128, 64)).astype(np.float32)
    b = np.ascontiguousarray(a.T)
    reports = {}
    for rung in cuda.LADDER:
        x, y = (a.astype(np.float16), b.astype(np.float16)) if rung == "tensor" else (a, b)
        cuda.ladder(rung, x, y)
        reports[rung] = ladder.module.report()
    sectors = {rung: report.total("global read").parts for rung, report in reports.items()}
    # A warp's step of k: 32 rows of a and a number of b; or a number, and 32 in 4 sectors.
    steps = 128 * 128 // 32 * 64
    assert sectors["naive"] == steps * (32 + 1)
    assert sectors["coalesced"] == steps * (1 + 4)
    # Each of 4 x 4 blocks reads 32 rows of a and 32 columns of b once; then one block all.
    assert sectors["shared"] == 16 * (2 * 32 * 64 * 4) // 32
    assert sectors["register"] == sectors["vector"] == (2 * 128 * 64 * 4) // 32
    passes = {rung: report.total("shared read").parts for rung, report in reports.items()}
    assert passes["vector"] < passes["register"] < passes["shared"]
    for rung in ("shared", "vector", "tensor"):
        count = reports[rung].total("shared read")
        assert count.parts == count.least, f"{rung} has bank conflicts"


def test_the_products_have_no_bank_conflicts(monkeypatch):
    module = cuda_kernels.load_on_cpu("matmul.cu", build="watch")
    watched(monkeypatch, module)
    x = np.random.default_rng(0).normal(size=(128, 64)).astype(np.float32)
    h, q = x.astype(np.float16), (x * 30).astype(np.int8)
    for run in (
        lambda: cuda.matmul(x, x.T),
        lambda: cuda.matmul(x.T, x),
        lambda: cuda.linear_f16(h, h),
        lambda: cuda.matmul_f16(h, np.ascontiguousarray(h.T)),
        lambda: cuda.matmul_f16_tn(h, h),
        lambda: cuda.matmul_s8(q, q),
    ):
        run()
        for kind in ("shared read", "shared write"):
            count = module.module.report().total(kind)
            assert count.parts == count.least > 0


def test_phases_end_at_barriers(ladder, monkeypatch):
    watched(monkeypatch, ladder)
    a = np.ones((32, 64), np.float32)
    cuda.ladder("shared", a, a.T)
    phases = ladder.module.report().phases
    assert [end.partition(" at ")[0] for end, _ in phases] == ["__syncthreads"] * 4 + ["the end"]
    kinds = [sorted({kind for kind, _ in counts}) for _, counts in phases]
    load, multiply = ["global read", "shared write"], ["shared read"]
    assert kinds == [load, multiply, load, multiply, ["global write"]]


def test_fibers_without_assembly():
    module = cuda_kernels.load_on_cpu("reduce.cu", ("-DCUDA_ON_CPU_UCONTEXT",))
    x, y = np.ones((9, 70), np.float32), np.zeros(9, np.float32)
    module.get_function("sum_rows")((2,), (256,), (np.int32(9), np.int32(70), x, y))
    assert (y == 70).all()


def test_without_a_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(cuda_kernels.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="needs g\\+\\+"):
        cuda_kernels.CpuModule(cuda_kernels.inlined("reduce.cu"))
