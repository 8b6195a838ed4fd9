# %% [markdown]
# # 1. A derivative by hand
#
# All of deep learning rests on one question: *if I turn this knob a little, how does the result
# change?* The answer is a derivative. Here you compute one by hand for the smallest network there
# is, check it twice, and take a step downhill with it. Nothing is hidden: at the end you will see
# that minidl does what you did, with the very same formulas.

# %%
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import minidl

FIGURES = Path("runs/tutorials")
FIGURES.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## The smallest network
#
# One input `x`, one weight `w`, one bias `b`, and a target `t` that we would like to hear from it:
#
# $$ s = w x + b \qquad y = \tanh(s) \qquad L = (y - t)^2 $$
#
# `L` is the loss: small when the answer `y` is near the target.

# %%
x, t = 0.5, 0.8
w, b = 0.6, -0.1


def loss_of(w, b):
    s = w * x + b
    y = math.tanh(s)
    return (y - t) ** 2


print(f"loss: {loss_of(w, b):.4f}")

# %% [markdown]
# ## Turn the knob and look
#
# The derivative is the slope: how much `L` changes per change of `w`. We can simply try it, on
# both sides of `w` (*central differences*).


# %%
def slope(f, at, eps=1e-5):
    return (f(at + eps) - f(at - eps)) / (2 * eps)


tried_w = slope(lambda w: loss_of(w, b), w)
tried_b = slope(lambda b: loss_of(w, b), b)
print(f"dL/dw by trying: {tried_w:.8f}")
print(f"dL/db by trying: {tried_b:.8f}")

# %% [markdown]
# How small should the step be? Too large, and the curve bends away from the straight line; too
# small, and the two losses agree in so many digits that their difference is mostly rounding
# noise. In double precision the best step is near $10^{-5}$: that is why gradient checks use
# float64. Trying also costs two evaluations *per knob*; a network has millions of knobs. We need
# something better, and keep this as the judge.

# %%
steps = 10.0 ** np.arange(-13, 0)
exact = 2 * (math.tanh(w * x + b) - t) * (1 - math.tanh(w * x + b) ** 2) * x
errors = [abs(slope(lambda w: loss_of(w, b), w, eps) - exact) for eps in steps]

figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
axes.loglog(steps, errors, "o-")
axes.set(xlabel="step", ylabel="error of the slope", title="not too large, not too small")
figure.savefig(FIGURES / "01_step_size.png", dpi=120)

best = steps[np.argmin(errors)]
assert 1e-7 < best < 1e-3, best

# %% [markdown]
# ## The chain rule
#
# `w` moves `s`, `s` moves `y`, `y` moves `L`. Small changes multiply along the way:
#
# $$ \frac{dL}{dw} = \frac{dL}{dy} \cdot \frac{dy}{ds} \cdot \frac{ds}{dw} $$
#
# Each factor is the derivative of *one* simple step, and needs only what that step saw:
#
# | step | derivative |
# |---|---|
# | $L = (y - t)^2$ | $2 (y - t)$ |
# | $y = \tanh(s)$ | $1 - y^2$ |
# | $s = w x + b$ | $x$ to `w`, $1$ to `b` |
#
# First forward, keeping what we will need; then backward, from the loss to the knobs. Going
# backward, one number serves everything before it: `to_s` is computed once and used for both `w`
# and `b`. This is why one backward pass is enough for a million knobs.

# %%
s = w * x + b  # forward
y = math.tanh(s)
L = (y - t) ** 2

to_y = 2 * (y - t)  # backward: dL/dy,
to_s = to_y * (1 - y * y)  # dL/ds,
to_w = to_s * x  # dL/dw,
to_b = to_s * 1  # dL/db

print(f"dL/dw by hand:   {to_w:.8f}")
print(f"dL/db by hand:   {to_b:.8f}")
assert abs(to_w - tried_w) < 1e-9
assert abs(to_b - tried_b) < 1e-9

# %% [markdown]
# Two ways that share nothing agree to nine digits: we can believe it.
#
# ## The same with minidl
#
# Tensors that say `requires_grad` are knobs. Compute with them as usual, and call `backward()`.

# %%
w_, b_ = (minidl.tensor(np.float64(v), requires_grad=True) for v in (w, b))
s_ = w_ * x + b_
y_ = s_.tanh()
L_ = (y_ - t) ** 2
L_.backward()

print(f"dL/dw by minidl: {w_.grad.item():.8f}")
assert abs(w_.grad.item() - to_w) < 1e-12
assert abs(b_.grad.item() - to_b) < 1e-12

# %% [markdown]
# It holds no other secret than your table of derivatives. This is the live source of the two
# rules you used. `g` is what has arrived from behind (our `to_y`, `to_s`), and each rule multiplies
# it by its own factor:

# %%
from minidl.ops import elementwise

print(minidl.source(elementwise.tanh.op.rule), "\n")
print(minidl.source(elementwise.mul.op.rule))
assert "g * out * out" in minidl.source(elementwise.tanh.op.rule)

# %% [markdown]
# And this is the whole walk, step by step, with your own lines beside it. (`explain("walk.html")`
# writes it as a page with a slider and a drawing. A tape is used up by one `backward()`, so we
# compute the loss again.)

# %%
s_ = w_ * x + b_
y_ = s_.tanh()
L_ = (y_ - t) ** 2
L_.explain()
L_.explain(FIGURES / "01_walk.html")

# %% [markdown]
# ## Downhill
#
# The slope says where *up* is. Go the other way, a little, and again: that is all of training.

# %%
losses = []
for _ in range(40):
    y = math.tanh(w * x + b)
    losses.append((y - t) ** 2)
    to_s = 2 * (y - t) * (1 - y * y)
    w, b = w - 0.5 * to_s * x, b - 0.5 * to_s * 1

figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.semilogy(losses)
axes.set(xlabel="step", ylabel="loss", title="40 steps downhill, by hand")
figure.savefig(FIGURES / "01_downhill.png", dpi=120)

print(f"loss: {losses[0]:.4f} -> {losses[-1]:.1e}; the network says {math.tanh(w * x + b):.3f}")
assert losses[-1] < 1e-3 * losses[0]

# %% [markdown]
# ## Try this
#
# 1. Replace `tanh` by the sigmoid $\sigma(s) = 1 / (1 + e^{-s})$ everywhere. Its derivative is
#    $y (1 - y)$; derive it, then let `slope` judge.
# 2. Make the learning rate 0.5 ten times larger, and then a hundred times. What breaks, and why?
# 3. Start at `w = 20`. The loss hardly moves: look at `to_s`. (This is a *saturated* unit.)
# 4. Use `x` twice: $L = (y - x\,t)^2$. Which derivatives change? Check them with `slope`.
#
# The rules are in `minidl/ops/elementwise.py`, each under its formula. Who calls them, in which
# order, is the subject of the next tutorial: `02_the_tape.py`.
