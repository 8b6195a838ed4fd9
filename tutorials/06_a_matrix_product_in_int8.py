# %% [markdown]
# # 6. A matrix product in int8
#
# A trained network does not need 32 bits a number. With 8, weights take a quarter of the memory,
# and one instruction multiplies four times as many of them. Here you quantize one matrix product by
# hand: choose a scale, round, multiply integers, scale back. You see what the error is made of, and
# how it is kept small.
#
# The names are those of Jacob et al. 2018, "Quantization and Training of Neural Networks for
# Efficient Integer-Arithmetic-Only Inference".

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

FIGURES = Path("runs/tutorials")
FIGURES.mkdir(parents=True, exist_ok=True)
rng = np.random.default_rng(0)

# %% [markdown]
# ## The product
#
# A linear layer after a ReLU: 64 inputs of 256 features, none negative; a weight for each of 128
# outputs. Trained weights are small, and some outputs' are larger than others'.

# %%
x = np.maximum(rng.standard_normal((64, 256), np.float32), 0)
w = rng.standard_normal((256, 128), np.float32) * np.geomspace(0.01, 0.2, 128, dtype=np.float32)
y = x @ w

# %% [markdown]
# ## Scale and zero point
#
# An integer $q$ stands for the real number
#
# $$ r = S \, (q - Z) $$
#
# $S$, the *scale*, is the step between neighbours; $Z$, the *zero point*, is the integer that
# stands for 0 *exactly*, as padding and ReLU want it. For the inputs: 8 bits without a sign, 0 to
# 255, spread over the range that was observed.


# %%
def choose(low, high, bits=8):
    """The scale and zero point that spread [low, high] over unsigned integers of so many bits."""
    low, high = min(low, 0.0), max(high, 0.0)  # 0 must be among them
    scale = (high - low) / (2**bits - 1)
    return np.float32(scale), round(-low / scale)


def quantize(r, scale, zero_point, low=0, high=255):
    return np.clip(np.rint(r / scale) + zero_point, low, high).astype(np.int32)


def dequantize(q, scale, zero_point):
    return scale * (q - zero_point).astype(np.float32)


x_scale, x_zero = choose(x.min(), x.max())
xq = quantize(x, x_scale, x_zero)
print(f"scale {x_scale:.4f}, zero point {x_zero}; x[0, :6] = {x[0, :6].round(3)} is {xq[0, :6]}")

error = dequantize(xq, x_scale, x_zero) - x
assert np.abs(error).max() <= x_scale / 2 * 1.001  # rounding: at most half a step
seen = error[x > 0].std()  # as if it were noise, uniform over one step
assert abs(seen - x_scale / np.sqrt(12)) < 0.05 * x_scale

# %% [markdown]
# Here nothing is negative, so $Z = 0$. A layer after a tanh would have it in the middle:

# %%
t_scale, t_zero = choose(-1.0, 1.0)
assert dequantize(quantize(np.zeros(1), t_scale, t_zero), t_scale, t_zero) == 0
print(f"tanh: scale {t_scale:.4f}, zero point {t_zero}")

# %% [markdown]
# ## Weights: with a sign, and without a zero point
#
# Weights lie around 0, so $Z = 0$ and the integers are −127 to 127. (−128 is left out, so that the
# range is symmetric.) One scale for all of them, *per tensor*, suits the largest; the small ones
# get only a few of the steps. One for each output, *per channel*, costs 128 numbers:


# %%
def quantize_weight(w, per_channel, bits=8):
    most = 2 ** (bits - 1) - 1
    scale = np.abs(w).max(axis=0 if per_channel else None, keepdims=True).reshape(1, -1) / most
    return quantize(w, scale, 0, -most, most), scale.astype(np.float32)


for per_channel in (False, True):
    wq, w_scale = quantize_weight(w, per_channel)
    steps = [len(np.unique(wq[:, channel])) for channel in (0, 127)]
    error = np.linalg.norm(dequantize(wq, w_scale, 0) - w, axis=0) / np.linalg.norm(w, axis=0)
    print(
        f"per {'channel' if per_channel else 'tensor '}: {steps[0]:3} and {steps[1]:3} different "
        f"weights in the smallest and largest channel, errors {error[0]:.2%} and {error[-1]:.2%}"
    )
    if not per_channel:
        of_tensor = error[0]
assert error[0] < of_tensor / 5

# %% [markdown]
# ## Integers, multiplied
#
# Put $r = S(q - Z)$ into $y_{ij} = \sum_k x_{ik} w_{kj}$. The scales come out of the sum, and what
# is left of $Z$ is a sum over the weights alone, known before the first input arrives:
#
# $$ y_{ij} = S_x S_{w_j} \Big( \underbrace{\sum_k q^x_{ik} q^w_{kj}}_{\text{int8, int32}}
#    - Z_x \underbrace{\sum_k q^w_{kj}}_{\text{once}} \Big) $$
#
# A product of two bytes needs 16 bits, a sum of many needs more. In 32 bits, up to
# $2^{31} / (255 \cdot 127)$ terms fit for certain:

# %%
accumulator = xq @ wq  # int32
assert accumulator.dtype == np.int32
column_sums = wq.sum(axis=0)
y_int8 = x_scale * w_scale * (accumulator - x_zero * column_sums).astype(np.float32)

relative = np.linalg.norm(y_int8 - y) / np.linalg.norm(y)
print(f"terms that fit: {2**31 // (255 * 127):,}; relative error of the product: {relative:.2%}")
assert x.shape[1] < 2**31 // (255 * 127)
assert relative < 0.01

# %% [markdown]
# Nothing was lost *in* the product: integers add up exactly, in any order, on any number of
# threads. All of the error came from rounding $x$ and $w$:

# %%
rounded = dequantize(xq, x_scale, x_zero).astype(np.float64) @ dequantize(wq, w_scale, 0)
assert np.allclose(y_int8, rounded, rtol=1e-5, atol=1e-5)

# %% [markdown]
# ### An accumulator that is too narrow
#
# Processors before AVX-512 VNNI multiply bytes and add *pairs* of products in 16 bits, where 32,767
# is the most: two large pairs are cut off (`pmaddubsw`). No error message, only a wrong network.
# VNNI adds groups of four in 32 bits (`vpdpbusd`).

# %%
pair = np.array([255, 255]) @ np.array([127, 127])
print(f"255·127 + 255·127 = {pair:,}, in 16 bits at most {np.iinfo(np.int16).max:,}")
assert pair > np.iinfo(np.int16).max

# %% [markdown]
# ### Inputs with a sign
#
# `vpdpbusd` wants one operand without a sign. If both have one, add 128 to the inputs, and take it
# away again as if it were a zero point: it costs the same column sums.

# %%
signed = rng.integers(-127, 128, (8, 256))
shifted = signed + 128  # 1 ... 255
assert ((shifted @ wq - 128 * column_sums) == signed @ wq).all()

# %% [markdown]
# ## Back to bytes
#
# The next layer wants bytes again. So *requantize*: with the scale and zero point of $y$, observed
# beforehand on a few inputs,
#
# $$ q^y = Z_y + \mathrm{round}\Big( \frac{S_x S_w}{S_y} \,
#    \Big(\text{sum} - Z_x \, \text{column sum}\Big) \Big) $$
#
# A ReLU costs nothing: choose the range of $y$ from 0 on, and what is below is clipped.

# %%
y_scale, y_zero = choose(0.0, np.maximum(y, 0).max())
multiplier = x_scale * w_scale / y_scale
yq = quantize(multiplier * (accumulator - x_zero * column_sums), 1, y_zero)
relu = np.maximum(y, 0)
steps_off = np.abs(yq - quantize(relu, y_scale, y_zero))
print(
    f"ReLU in bytes: {np.mean(steps_off == 0):.1%} right, the others {steps_off.max()} step(s) off"
)
assert steps_off.max() <= 2

# %% [markdown]
# ## How many bits?
#
# Half a step of error at each rounding: each bit halves it, and 6 dB of noise go with it. Until two
# or three bits are left, and a network no longer forgives.

# %%
bits = np.arange(2, 11)
curves = {"per tensor": [], "per channel": []}
for b in bits:
    scale, zero = choose(x.min(), x.max(), b)
    xb = quantize(x, scale, zero, 0, 2**b - 1)
    for name, curve in curves.items():
        wb, scales = quantize_weight(w, name == "per channel", b)
        yb = scale * scales * ((xb - zero) @ wb)
        each = np.linalg.norm(yb - y, axis=0) / np.linalg.norm(y, axis=0)
        curve.append(each.mean())

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
for name, curve in curves.items():
    left.semilogy(bits, curve, "o-", label=name)
left.set(xlabel="bits", ylabel="relative error, mean over outputs", title="bits and error")
left.legend()
right.plot(y.ravel()[::7], y_int8.ravel()[::7], ".", markersize=2)
right.set(xlabel="float32", ylabel="int8", title="the product's entries")
figure.savefig(FIGURES / "06_int8.png", dpi=120)
at8 = {name: curve[list(bits).index(8)] for name, curve in curves.items()}
print({name: f"{error:.2%}" for name, error in at8.items()})
assert at8["per channel"] < at8["per tensor"]
assert curves["per channel"][0] > 20 * at8["per channel"]  # 2 bits are not 8

# %% [markdown]
# ## The op
#
# The library has what you did as one op, under the name that ONNX gives it: exact sums, zero points
# on both sides, scales for each channel, bias, ReLU and the way back to bytes. This is its formula;
# in C++ it runs on the same loop nest as every other product, with another innermost instruction.

# %%
import minidl
from minidl.ops.quantized import matmul_integer

print(minidl.source(matmul_integer))
xb, wb = xq.astype(np.uint8), wq.astype(np.int8)
of_x, of_w = np.uint8(x_zero), np.int8(0)
sums = matmul_integer(xb, wb, of_x, of_w, None, None, None)
assert sums.dtype == np.int32 and (sums == accumulator - x_zero * column_sums).all()

real = matmul_integer(xb, wb, of_x, of_w, (x_scale * w_scale)[0], None, None)
assert np.allclose(real, y_int8, rtol=1e-5, atol=1e-5)

out = matmul_integer(xb, wb, of_x, of_w, multiplier[0], None, np.uint8(y_zero), relu=True)
assert out.dtype == np.uint8 and np.abs(out.astype(int) - yq).max() <= 1  # ties may round apart
for name in ("formula", *[k.name for k in matmul_integer.op.kernels if not k.missing]):
    with minidl.use("matmul_integer", name):
        again = matmul_integer(xb, wb, of_x, of_w, None, None, None)
    assert (again == sums).all()
    print(f"{name}: the same integers")

# %% [markdown]
# ## Try this
#
# 1. Put one outlier into `x` (`x[0, 0] = 100`). What becomes of the error, and of which entries?
#    Would you rather clip it?
# 2. Quantize a layer with inputs from a tanh, so that $Z_x \ne 0$, and forget the column sums. How
#    wrong is it?
# 3. Quantize `x` per row. Does the scale still come out of the sum? And `w` per *row* (a scale for
#    each $k$)?
# 4. Keep the weights in 8 bits and `x` in float32. What is saved, and for which shapes does it pay?
#    (`linear_weight_only` in `minidl/ops/narrow.py`.)
#
# The ops are in `minidl/ops/quantized.py`, the C++ in `csrc/cpu/integer.h` and `csrc/cpu/narrow.h`.
# Next: `07_a_cuda_kernel_on_a_cpu.py`.
