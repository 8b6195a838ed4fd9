# %% [markdown]
# # 7. A CUDA kernel on a CPU
#
# A GPU runs thousands of threads at once, and hides how from whoever writes for it: a missing
# barrier works nine times in ten, a slow access pattern looks like a fast one. Here CUDA kernels
# run on your CPU, one thread at a time, where nothing is hidden. You need g++ and no GPU.
#
# minidl compiles the very sources that a GPU would get (`csrc/cuda/`) with g++. Each CUDA thread
# becomes a *fiber*, a stack of its own that can be left and returned to; at a barrier one fiber
# stops and the next goes on.

# %%
import numpy as np

import minidl
from minidl import step
from minidl.backend import cuda_kernels, cuda_launch

# %% [markdown]
# ## A kernel is what one thread does
#
# This is the first rung of the ladder: the definition of a matrix product, one thread a result.

# %%
source = "\n".join(step.source("ladder.cu"))


def kernel(name):
    """A kernel of ladder.cu, with the comment above it."""
    at = source.index(f" {name}(")
    begin = source.rindex("\n\n", 0, at)
    return source[begin : source.index("\n}\n", at) + 2].strip()


print(kernel("matmul_naive"))

# %% [markdown]
# Threads come in *blocks*, blocks in a *grid*; `threadIdx` and `blockIdx` tell a thread which
# result is its own. The host chooses both. For 64 × 64 results in blocks of 32 × 32: a grid of
# 2 × 2. And it runs, on arrays of NumPy:

# %%
rng = np.random.default_rng(0)
a, b = rng.standard_normal((2, 64, 64), np.float32)
y = np.full((64, 64), np.nan, np.float32)

module = cuda_kernels.load_on_cpu("ladder.cu")
size = np.int32(64)
module.get_function("matmul_naive")((2, 2), (32, 32), (size, size, size, a, b, y))
print("largest error:", np.abs(y - a @ b).max())
assert np.allclose(y, a @ b, atol=1e-4)

# %% [markdown]
# ## What the memory sees
#
# The 32 threads of a *warp* execute one instruction together, and so their accesses to memory are
# one request. Memory comes in sectors of 32 bytes. If the threads want 32 numbers that lie side by
# side, that is four sectors; if every number lies in another row, it is 32, for the same numbers.
# The second rung exchanges two letters of the first:

# %%
print(kernel("matmul_coalesced"))

reports = {}
for rung in ("naive", "coalesced", "shared"):
    (launch,) = step.launches("matmul", f"cuda_{rung}", (a, b))  # watched
    reports[rung] = launch.report
    sectors = launch.report.total("global read")
    print(f"{rung:10} {sectors.parts:6,} sectors read, {sectors.least:6,} at best")
read = {rung: report.total("global read").parts for rung, report in reports.items()}
assert read["naive"] > 5 * read["coalesced"] > 5 * 5 * read["shared"]

# %% [markdown]
# Every access was counted, by its line of source. (A build with the compiler's hooks for
# ThreadSanitizer calls a function before each one; the function is ours.)
#
# ## Sharing, and waiting for one another
#
# The third rung reads far less: a block fetches a tile of each matrix once, into memory on the
# chip that all its threads see.

# %%
print(kernel("matmul_shared"))

# %% [markdown]
# Between the two `__syncthreads()` a thread reads what *others* have brought. This is a block's
# life, from barrier to barrier:

# %%
(launch,) = step.launches("matmul", "cuda_shared", (a, b))
print("\n".join(step.describe(launch, most=3)))
barriers = [end for end, _ in launch.report.phases if "__syncthreads" in end]
assert len(barriers) >= 2

# %% [markdown]
# ## Without the barrier
#
# Take the first one out. On a GPU the result would be wrong now and then. Here threads run in an
# order that a seed shuffles, and shared memory holds NaN before a block begins: whoever reads too
# early reads NaN.

# %%
code = cuda_kernels.inlined("ladder.cu")
mistake = "__syncthreads();\n    for (int k = 0; k < 32; ++k) sum += a_tile[row][k]"
assert mistake in code
broken = cuda_kernels.CpuModule(code.replace(mistake, mistake.removeprefix("__syncthreads();")))
y = np.zeros((64, 64), np.float32)
broken.get_function("matmul_shared")((2, 2), (32, 32), (size, size, size, a, b, y))
print(f"{np.isnan(y).mean():.0%} of the results are NaN")
assert np.isnan(y).any()

# %% [markdown]
# And a barrier that only some threads come to, which hangs a GPU, is an error with its line:

# %%
one_sided = "if (m < M && n < N) y[m * N + n] = sum;\n}\n\n// 4."
assert one_sided in code
broken = cuda_kernels.CpuModule(
    code.replace(one_sided, "if (threadIdx.x == 0) __syncthreads();\n}\n\n// 4.")
)
said = ""
try:
    broken.get_function("matmul_shared")((2, 2), (32, 32), (size, size, size, a, b, y))
except RuntimeError as error:
    said = str(error)
print(said)
assert "ladder.cu:" in said

# %% [markdown]
# ## All the way up
#
# The rungs go on: results in registers, asynchronous copies, tensor cores. All of them compute the
# same product, and on a GPU `minidl.use("matmul", "cuda_vector")` picks one inside a program.

# %%
for rung in cuda_launch.LADDER:
    x, w = (a.astype(np.float16), b.astype(np.float16)) if rung == "tensor" else (a, b)
    error = np.abs(cuda_launch.ladder(rung, x, w).astype(np.float32) - x @ w).max()
    print(f"{rung:10} largest error {error:.1e}")
    assert error < 0.1
print(minidl.source(cuda_launch.ladder))

# %% [markdown]
# ## Try this
#
# 1. `minidl kernels --step matmul --kernel cuda_register`: why are there fewer passes through the
#    banks of shared memory than in `cuda_shared`, though both compute as many products?
# 2. The same command prints one for `gdb`. Stop in the kernel, and look at `threadIdx`, `sum` and
#    a tile. Whose turn is it next?
# 3. Take out the *second* barrier of `matmul_shared`. For how many seeds
#    (`cuda_kernels.order_seed = 1, 2, ...`) is the result right all the same?
# 4. In `matmul_naive`, what would a block of 8 × 128 threads change, and what one of 128 × 8?
#    Count, then try.
#
# The fibers are in `csrc/cuda/fiber.h`, the machine in `csrc/cuda/cuda_on_cpu.h`, the counting in
# `csrc/cuda/watch.h`; `minidl/step.py` is what this page is made of.
# Next: `08_which_augmentation_fits_which_data.py`.
