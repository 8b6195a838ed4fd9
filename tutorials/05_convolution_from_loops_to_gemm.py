# %% [markdown]
# # 5. A convolution, from loops to a matrix product
#
# A convolution layer is seven nested loops. Written down like that it runs ten thousand times
# slower than the same machine can do it. Here you climb from there to the top, rung by rung:
# loops, one matrix product (*im2col*), a product that keeps its numbers in registers and caches, a
# convolution that never builds its matrix, and one that multiplies less (*Winograd*). Every rung is
# an implementation of the *same op* in the library; at the end you run and time them all.

# %%
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import minidl
import minidl.nn.functional as F
from minidl import bench
from minidl.op import registry
from minidl.ops.conv import im2col
from minidl.ops.linalg import matmul

FIGURES = Path("runs/tutorials")
FIGURES.mkdir(parents=True, exist_ok=True)
rng = np.random.default_rng(0)

# %% [markdown]
# ## Seven loops
#
# For every image $n$, output channel $o$ and pixel $(p, q)$, sum over the input channels $c$ and
# the taps $(i, j)$ of the kernel:
#
# $$ y_{nopq} = \sum_{c, i, j} x_{n, c, p + i, q + j} \; w_{ocij} $$

# %%
x = rng.standard_normal((2, 8, 12, 12), np.float32)
w = rng.standard_normal((16, 8, 3, 3), np.float32)


def seven_loops(x, w):
    (N, C, H, W), (O, _, kH, kW) = x.shape, w.shape
    y = np.zeros((N, O, H - kH + 1, W - kW + 1), np.float32)
    for n in range(N):
        for o in range(O):
            for p in range(y.shape[2]):
                for q in range(y.shape[3]):
                    for c in range(C):
                        for i in range(kH):
                            for j in range(kW):
                                y[n, o, p, q] += x[n, c, p + i, q + j] * w[o, c, i, j]
    return y


start = time.perf_counter()
y = seven_loops(x, w)
seconds = time.perf_counter() - start
flops = 2 * y.size * w[0].size  # a multiplication and an addition for each term
print(
    f"{flops / 1e6:.1f} million operations in {seconds:.2f} s: {flops / seconds / 1e9:.4f} GFLOP/s"
)
expected = F.conv2d(minidl.tensor(x), minidl.tensor(w)).numpy()
assert np.allclose(y, expected, atol=1e-4)

# %% [markdown]
# Python is not to blame alone. The op has this rung too, one output pixel at a time with NumPy for
# the three inner loops, and as seven loops in C++ (`csrc/cpu/ladder.h`):

# %%
rungs = bench.implementations("conv2d")
print("conv2d can run as:", ", ".join(rungs))
print(minidl.source(rungs["loops"]))

# %% [markdown]
# ## One matrix product
#
# Write the patch under each output pixel as a *column*. Then all outputs are one product,
#
# $$ \underbrace{Y}_{O \times N H' W'} = \underbrace{W}_{O \times C k_H k_W} \;
#    \underbrace{X_{\text{col}}}_{C k_H k_W \times N H' W'} $$
#
# and products are what libraries do best (Chellapilla et al. 2006). The price is the matrix: with a
# 3×3 kernel every pixel is copied nine times.

# %%
print(minidl.source(im2col))
how = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
columns, (height, width) = im2col(x, (3, 3), **how)
assert columns.nbytes == 9 * x.nbytes
product = w.reshape(16, -1) @ columns[0]
y = product.reshape(16, 2, height, width).swapaxes(0, 1)
assert np.allclose(y, F.conv2d(minidl.tensor(x), minidl.tensor(w), padding=1).numpy(), atol=1e-4)
print(f"the image has {x.nbytes:,} bytes, its columns {columns.nbytes:,}")

# %% [markdown]
# ## What makes a product fast
#
# A product of two $n \times n$ matrices is $2 n^3$ operations on $3 n^2$ numbers: plenty of work
# for each byte. Yet three plain loops in C++ reach a hundredth of the machine's peak. The rungs of
# `csrc/cpu/ladder.h` differ in one idea each:
#
# - **naive**: $i, j, k$. Down a column of $B$, each number is in another cache line, and each
#   addition waits for the one before.
# - **reordered**: $i, k, j$. The inner loop walks along rows; eight or sixteen numbers fit a
#   vector. But each multiplication still loads two vectors and stores one.
# - **tiled**: a small tile of $C$ stays in registers while its whole sum is added up. A number that
#   was loaded is now used as often as the tile is wide or high.
# - **native**: `csrc/cpu/gemm.h` also copies (*packs*) blocks of $A$ and $B$ into the order in
#   which the tile reads them, each block as large as the cache that it is read from again and
#   again (Goto & van de Geijn 2008).
#
# The sides here are 384. Copying costs, so on so small a product the plain tile may win. It loses
# where the matrices outgrow the caches, and where rows lie a power of two apart: then all of them
# fall into the same few places of the cache. (See its share at 256, in the last table.)

# %%
a, b = (rng.standard_normal((384, 384), np.float32) for _ in range(2))
exact = a.astype(np.float64) @ b
for name in bench.implementations("matmul"):
    if name == "loops":
        continue  # 57 million turns of a Python loop
    with minidl.use("matmul", name):
        seconds = np.median(bench.times_of(lambda: matmul(a, b), 0.2))
        result = matmul(a, b)
    assert np.abs(result - exact).max() < 1e-3
    print(f"{name:10} {2 * 384**3 / seconds / 1e9:8.2f} GFLOP/s")

# %% [markdown]
# ## Packing, in slow motion
#
# Cut $B$ into panels of a few columns, and store each panel row by row. The kernel now reads its
# memory from front to back, and nothing but what it needs:

# %%
COLUMNS = 4  # as wide as the tile; in C++ three vectors


def pack(block):
    """(k, n) -> (panels, k, COLUMNS): panel after panel, each row by row."""
    k, n = block.shape
    padded = np.zeros((k, -(-n // COLUMNS) * COLUMNS), block.dtype)
    padded[:, :n] = block
    return np.ascontiguousarray(padded.reshape(k, -1, COLUMNS).swapaxes(0, 1))


def packed_product(a, panels, n):
    c = np.empty((len(a), len(panels) * COLUMNS), a.dtype)
    for j, panel in enumerate(panels):
        for i in range(len(a)):
            tile = np.zeros(COLUMNS, a.dtype)  # in C++: registers
            for k, row in enumerate(panel):
                tile += a[i, k] * row
            c[i, j * COLUMNS : (j + 1) * COLUMNS] = tile
    return c[:, :n]


small_a, small_b = a[:5, :30], b[:30, :10]
panels = pack(small_b)
print(f"B {small_b.shape} packed as {panels.shape}")
assert np.allclose(packed_product(small_a, panels, 10), small_a @ small_b, atol=1e-4)

# %% [markdown]
# ## The matrix that is never built
#
# Here is the trick of `csrc/cpu/conv.h`: a panel is copied anyway, so why not straight from the
# image? Row $k$ of the big matrix is a channel and a tap, column $j$ an image and a pixel. Whoever
# can say where an element lies does not need the matrix.


# %%
def pack_from_image(x, kernel, k0, depth, j0, padding=1):
    """The panel of X_col with rows k0 ... and columns j0 ..., without X_col."""
    N, _, H, W = x.shape
    panel = np.zeros((depth, COLUMNS), x.dtype)
    for k in range(depth):
        c, tap = divmod(k0 + k, kernel * kernel)
        i, j = divmod(tap, kernel)
        for column in range(COLUMNS):
            n, pixel = divmod(j0 + column, H * W)
            p, q = divmod(pixel, W)
            row, col = p + i - padding, q + j - padding
            if n < N and 0 <= row < H and 0 <= col < W:  # else padding: zero
                panel[k, column] = x[n, c, row, col]
    return panel


for k0, j0 in [(0, 0), (20, 140), (40, 284)]:
    panel = pack_from_image(x, 3, k0, 30, j0)
    assert (panel == columns[0][k0 : k0 + 30, j0 : j0 + COLUMNS]).all()
print("the same panels, and no matrix of columns")

# %% [markdown]
# ## Fewer multiplications
#
# Two neighbouring outputs of a 3-tap filter are six multiplications. Four are enough (Winograd
# 1980; Lavin & Gray 2016): with $d$ four inputs and $g$ three weights,
#
# $$ y = A^T \big[ (G g) \odot (B^T d) \big] $$
#
# $G g$ is computed once for a layer, $B^T d$ is additions. For images the same is done along rows
# and along columns: a 2×2 tile takes 16 multiplications in place of 36.

# %%
BT = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], np.float32)
G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)
AT = np.array([[1, 1, 1, 0], [0, 1, -1, -1]], np.float32)

d, g = rng.standard_normal(4, np.float32), rng.standard_normal(3, np.float32)
assert np.allclose(AT @ ((G @ g) * (BT @ d)), [d[:3] @ g, d[1:] @ g], atol=1e-5)

tile, taps = rng.standard_normal((4, 4), np.float32), rng.standard_normal((3, 3), np.float32)
inside = (G @ taps @ G.T) * (BT @ tile @ BT.T)  # 16 multiplications
four = AT @ inside @ AT.T
direct = [[(tile[p : p + 3, q : q + 3] * taps).sum() for q in range(2)] for p in range(2)]
assert np.allclose(four, direct, atol=1e-5)

# %% [markdown]
# Summed over many channels, the elementwise products become 16 matrix products. With 4×4 outputs
# at once, 36 multiplications replace 144. The transforms add and subtract numbers of unlike size,
# so that the last digits suffer, the more the larger the tile:


# %%
def winograd(x, w):
    """F(2×2, 3×3) on an image of even sides, padding 1."""
    x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    tiles = np.lib.stride_tricks.sliding_window_view(x, (4, 4), axis=(2, 3))[:, :, ::2, ::2]
    transformed = BT @ tiles @ BT.T  # (N, C, H/2, W/2, 4, 4)
    sums = np.einsum("ncpqij,ocij->nopqij", transformed, G @ w @ G.T, optimize=True)
    y = AT @ sums @ AT.T
    n, o, p, q = y.shape[:4]
    return y.swapaxes(3, 4).reshape(n, o, 2 * p, 2 * q)


exact = registry["conv2d"].op.formula(x.astype(np.float64), w.astype(np.float64), None, **how)
errors = {
    "im2col": rungs["im2col"](x, w, None, **how),
    "Winograd, 2×2 tiles": winograd(x, w),
}
if "winograd" in rungs:  # the library's, in C++: 4×4 tiles
    errors["Winograd, 4×4 tiles"] = rungs["winograd"](x, w, None, **how)
for name, result in errors.items():
    error = np.abs(result - exact).max() / np.abs(exact).max()
    print(f"{name:20} relative error {error:.1e}")
    assert error < 1e-4

# %% [markdown]
# ## The whole ladder, under its roof
#
# No program can do more than the processor's *peak* (measured by a loop that does nothing but
# multiply and add registers), nor more than memory delivers: operations for each byte, times bytes
# per second. Together they are the machine's *roofline* (Williams et al. 2009). Now every
# implementation runs on one layer, 64 → 64 channels, on a smaller image if it is too slow.

# %%
roofs = bench.measure_roofs()
print(roofs or "the C++ kernels are missing: no roofs, and the Python rungs only")
ladder = []
for op, size in (("matmul", 256), ("conv2d", 28)):
    ladder += sorted(
        bench.climb(op, size, roofs.gflops if roofs else None, seconds=0.2),
        key=lambda rung: rung.gflops,
    )
for rung in ladder:
    share = "" if rung.share is None else f"{100 * rung.share:7.3f} % of the peak"
    print(f"{rung.op:7} {rung.name:10} {rung.problem:26} {rung.gflops:9.4f} GFLOP/s {share}")
assert {rung.name for rung in ladder} >= {"loops", "im2col"}
bench.draw(ladder, roofs).savefig(FIGURES / "05_roofline.png", dpi=120)

# %%
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
climbed = [rung for rung in ladder if rung.op == "conv2d"]
axes.barh([rung.name for rung in climbed], [rung.gflops for rung in climbed])
axes.set(xscale="log", xlabel="GFLOP/s", title="conv2d, rung by rung")
figure.savefig(FIGURES / "05_ladder.png", dpi=120)
print("written:", *sorted(p.name for p in FIGURES.glob("05_*")))

# %% [markdown]
# `climb` compares each rung with the formula before it times it: a fast wrong answer is no rung.
# Inside a training run you swap them in the same way, and the loss does not notice:

# %%
losses = []
for name in ("im2col", *(["native"] if "native" in rungs else [])):
    with minidl.use("conv2d", name):
        weight = minidl.tensor(w, requires_grad=True)
        loss = (F.conv2d(minidl.tensor(x), weight, padding=1) ** 2).mean()
        loss.backward()
        losses.append((loss.item(), weight.grad.norm().item()))
print(losses)
assert np.allclose(losses[0], losses[-1], rtol=1e-4)

# %% [markdown]
# ## Try this
#
# 1. `minidl bench ladder --op matmul --size 1024`: which rungs lose share as the matrices outgrow
#    the caches, and which do not?
# 2. `MINIDL_ISA=avx2 minidl bench ladder` and `MINIDL_ISA=baseline …`: the peak drops, and the
#    shares? (Wider vectors need more registers to hide the same latency.)
# 3. In `seven_loops`, exchange the loops over $o$ and $c$. Same result? Same time?
# 4. How many multiplications does F(4×4, 3×3) save, and F(6×6, 3×3)? Why does nobody use tiles of
#    20×20?
# 5. Draw the depthwise convolution (one channel a group) under the roof. Why is it a short kernel
#    of its own, and no matrix product?
#
# The formulas are in `minidl/ops/conv.py`, the measuring in `minidl/bench.py`, the C++ in
# `csrc/cpu/`. Next: `06_a_matrix_product_in_int8.py`.
