# %% [markdown]
# # 13. A network in eight bits
#
# Tutorial 06 rounded one product. Here a whole network goes from 32 bits to 8, first one layer by
# hand, then all of it, from bytes to bytes. You see what it buys, what "8 bits are enough" hides,
# where it ends, and how training brings some of it back.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import minidl
import minidl.nn.functional as F
from minidl import nn, optim
from minidl.data import DataLoader, Digits
from minidl.quantization import convert, prepare_qat, quantize
from minidl.quantization.fake_quantize import fake_quantize

FIGURES = Path("runs/tutorials")
FIGURES.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## A network to begin with
#
# Handwritten digits, three convolutions with batch norm. Nothing here knows of integers.


# %%
def block(c, o):
    return nn.Conv2d(c, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU()


def train(model, epochs, lr):
    optimizer = optim.Adam(model.parameters(), lr)
    model.train()
    for _ in range(epochs):
        for x, y in DataLoader(Digits(), 64, shuffle=True, seed=0):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


def predictions(model):
    with minidl.no_grad():
        return model(images).numpy().argmax(axis=1)


def accuracy(model):
    return (predictions(model) == labels.numpy()).mean()


images, labels = next(iter(DataLoader(Digits(train=False), 360)))
minidl.manual_seed(0)
model = train(
    nn.Sequential(
        *block(1, 16), *block(16, 32), nn.MaxPool2d(2), *block(32, 32), nn.Flatten(),
        nn.Linear(32 * 16, 10),
    ),
    12,
    2e-3,
)  # fmt: skip
exact = accuracy(model)
print(f"float32: {exact:.1%} of 360 digits by other writers")
assert exact > 0.95

# %% [markdown]
# ## One layer by hand
#
# The last one. What goes into it is what the layers before make of some training images; its range
# is all that we need to know (*calibration*). Weights get a scale for each output:
#
# $$ q = \mathrm{round}(r / S) + Z, \qquad
#    y_j = S_x S_{w_j} \Big( \sum_k (q^x_k - Z_x) \, q^w_{jk} + q^b_j \Big) $$
#
# The bias is an integer too, of 32 bits and the scale of the sum.

# %%
body, last = model[:-1], model[-1]
some = next(iter(DataLoader(Digits(), 256)))[0]  # to calibrate with: not the test images
with minidl.no_grad():
    seen, x = body(some).numpy(), body(images).numpy()
w, b = last.weight.numpy(), last.bias.numpy()

S_x, Z_x = seen.max() / 255, 0  # after a ReLU nothing is negative
S_w = np.abs(w).max(axis=1) / 127
q_x = np.clip(np.rint(x / S_x) + Z_x, 0, 255).astype(np.int32)
q_w = np.rint(w / S_w[:, None]).astype(np.int32)
q_b = np.rint(b / (S_x * S_w)).astype(np.int32)
by_hand = S_x * S_w * ((q_x - Z_x) @ q_w.T + q_b)

y = x @ w.T + b
noise = by_hand - y
decibel = 10 * np.log10((y**2).mean() / (noise**2).mean())
kept = (by_hand.argmax(axis=1) == y.argmax(axis=1)).mean()
print(f"logits: {decibel:.0f} dB above the rounding; {kept:.1%} of the predictions stay")
assert decibel > 30 and kept > 0.99

# %% [markdown]
# ## Batch norm goes first
#
# In eval mode batch norm is a scale and a shift for each channel, and a convolution has those to
# give away (Jacob et al. 2018, equation 14):
#
# $$ w'_j = \frac{\gamma_j}{\sqrt{\sigma_j^2 + \epsilon}} \, w_j, \qquad
#    b'_j = \beta_j - \frac{\gamma_j \mu_j}{\sqrt{\sigma_j^2 + \epsilon}} $$
#
# So it costs nothing at all. But now some channels' weights are several times as large as others',
# and a scale for *all* of them, chosen by the largest, leaves the smallest few steps:

# %%
conv, norm = model[0], model[1]
factor = norm.weight.numpy() / np.sqrt(norm.running_var.numpy() + norm.eps)
folded = conv.weight.numpy() * factor[:, None, None, None]
ranges = np.abs(folded).max(axis=(1, 2, 3))
print(f"largest weights of the channels: {ranges.min():.2f} to {ranges.max():.2f}")
with minidl.no_grad():
    shift = norm.bias.numpy() - factor * norm.running_mean.numpy()
    difference = F.conv2d(images, minidl.tensor(folded), minidl.tensor(shift), padding=1)
    difference = np.abs((difference - norm(conv(images))).numpy()).max()
assert difference < 1e-4
assert ranges.max() > 1.5 * ranges.min()

# %% [markdown]
# ## The whole network
#
# `quantize` does this for every layer: it records what ops the network is made of, folds, runs the
# calibration batches to see which range each value has, and puts ops on integers in place of those
# on floats. Between the layers there are bytes only: pooling takes the largest *byte*, a ReLU is a
# range that begins at 0.

# %%
small = quantize(model, [some])
for step in small.graph.steps:
    print(f"{step.op:20} {step.dtype:8} {step.layer}")
kept = (predictions(small) == predictions(model)).mean()
print(f"int8: {accuracy(small):.1%}, and {kept:.1%} of the predictions are float32's")
assert kept > 0.98
assert {step.dtype for step in small.graph.steps[:-1]} <= {"uint8", "int8", "float32"}

# %% [markdown]
# What it buys first is size:

# %%
minidl.save(model.state_dict(), FIGURES / "13_float32.safetensors")
small.save(FIGURES / "13_int8.safetensors")
size32, size8 = (
    (FIGURES / f"13_{name}.safetensors").stat().st_size for name in ("float32", "int8")
)
print(f"{size32:,} bytes, {size8:,} bytes: {size8 / size32:.2f}")
assert size8 < 0.5 * size32  # the headers of so small a file weigh as much as its numbers

# %% [markdown]
# and speed second, if there is enough to compute: rounding the input costs as much for a small
# network as for a large one. `minidl quantize runs/fashion` prints both for a network of yours.
#
# ## What eight bits hide
#
# A network that loses nothing at 8 bits proves little: so does a careless one. Take bits away from
# the weights, and the difference between one scale for all and one for each channel shows:

# %%
bits = range(8, 1, -1)
curves = {
    name: [accuracy(quantize(model, [some], per_channel=per_channel, weight_bits=b)) for b in bits]
    for name, per_channel in (("per channel", True), ("per tensor", False))
}
figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
for name, curve in curves.items():
    print(name, *(f"{b}: {a:.1%} " for b, a in zip(bits, curve)))
    axes.plot(bits, curve, "o-", label=name)
axes.axhline(exact, color="grey", linestyle="--", label="float32")
axes.invert_xaxis()
axes.set(xlabel="bits of a weight", ylabel="accuracy", title="rounded after training")
axes.legend()
figure.savefig(FIGURES / "13_bits.png", dpi=120)
at2 = {name: curve[-1] for name, curve in curves.items()}
assert abs(curves["per channel"][0] - exact) < 0.015  # 8 bits
assert at2["per tensor"] < exact - 0.1  # 2 bits: the end

# %% [markdown]
# ![accuracy against bits](../runs/tutorials/13_bits.png)
#
# ## One bad image
#
# The ranges are what the calibration saw. With one broken image among 256, five hundred times too
# bright, nearly all of the 256 steps lie where no number will ever be. Observers that look at the
# *distribution* leave out what is rare: a share of the numbers is clipped (`percentile`), or the
# rounded numbers are to be distributed as the numbers are (`entropy`). The mean square error
# (`mse`) counts what it clips by the square, and so an outlier most of all:

# %%
broken = some.numpy().copy()
broken[0] *= 500
found = {}
for observer in ("minmax", "percentile", "mse", "entropy"):
    found[observer] = accuracy(quantize(model, [minidl.tensor(broken)], observer=observer))
    print(f"{observer:11} {found[observer]:.1%}")
assert found["entropy"] > found["minmax"] + 0.3

# %% [markdown]
# ## Training for two bits
#
# Rounding has a derivative of 0 almost everywhere: no gradient comes through. The *straight-through
# estimator* pretends that it is 1, wherever nothing was clipped. So the network feels its rounding
# on the way forward, and its float weights learn to live with it:

# %%
print(minidl.source(fake_quantize))
rounded = quantize(model, [some], weight_bits=2)
aware = train(prepare_qat(model, bits=2, learned=True), 6, 1e-3)
low = convert(aware.eval())
print(f"weights of 2 bits: {accuracy(rounded):.1%} rounded after training")
print(f"                   {accuracy(low):.1%} trained for it")
assert accuracy(low) > accuracy(rounded) + 0.05

# %% [markdown]
# ## Try this
#
# 1. Leave out the first layer (`quantize(model, [some], skip=["0"])`) or the last ("11") at 3 bits.
#    Which of them matters most?
# 2. Calibrate with noise instead of images, with one image, with all of them. From where on does it
#    not matter?
# 3. `half(model)` keeps 16 bits. What is its size, and how many predictions does it keep?
# 4. Train without learned steps. How do the two compare at 3 bits, and at 2?
# 5. Attack it: does `fgsm` on the float network fool the one in 8 bits (`minidl/attack.py`)?
#
# The five steps of `quantize` are in `minidl/quantization/static.py`, the observers in
# `minidl/quantization/observers.py`, training in `minidl/quantization/qat.py`.
# Next: `14_one_gradient_from_many_ranks.py`.
