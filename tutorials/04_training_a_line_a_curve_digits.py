# %% [markdown]
# # 4. Training: a line, a curve, digits
#
# Training is one loop: guess, measure, ask for the gradient, take a step. You write it once in
# full for a line. Then the same loop bends a curve, and at last it reads handwriting, with `nn`,
# `optim` and `data` taking over what has become routine. Nothing else is new.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import minidl
import minidl.nn.functional as F
from minidl import nn, optim
from minidl.data import DataLoader, Digits

FIGURES = Path("runs/tutorials")
FIGURES.mkdir(parents=True, exist_ok=True)
minidl.manual_seed(0)

# %% [markdown]
# ## A line
#
# Forty noisy points of the line $y = 1.5\,x - 0.5$. Two parameters, and the plain loop: no module,
# no optimizer. The update is done under `no_grad()`, since it is not part of what we
# differentiate, and `.grad` is cleared, since `backward()` *adds* to it.

# %%
x = minidl.rand(40, 1) * 4 - 2
y = 1.5 * x - 0.5 + 0.2 * minidl.randn(40, 1)

w = minidl.zeros(1, 1, requires_grad=True)
b = minidl.zeros(1, requires_grad=True)
path = []
for _ in range(60):
    loss = ((x @ w + b - y) ** 2).mean()  # guess, and measure
    loss.backward()  # ask for the gradient
    path.append((w.item(), b.item(), loss.item()))
    with minidl.no_grad():  # take a step
        w -= 0.1 * w.grad
        b -= 0.1 * b.grad
    w.grad = b.grad = None

print(f"found y = {w.item():.2f} x {b.item():+.2f}, loss {loss.item():.4f}")

# %% [markdown]
# For a line the best answer is known in closed form (least squares). The loop finds the same.

# %%
best, *_ = np.linalg.lstsq(np.hstack([x.numpy(), np.ones((40, 1))]), y.numpy(), rcond=None)
assert abs(w.item() - best[0, 0]) < 1e-2 and abs(b.item() - best[1, 0]) < 1e-2

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
left.plot(x.numpy(), y.numpy(), ".")
ends = np.array([-2.0, 2.0])
for step in (0, 3, 10, 59):
    left.plot(ends, path[step][0] * ends + path[step][1], label=f"step {step}", alpha=0.8)
left.legend()
left.set_title("a line, by hand-written SGD")
slopes, offsets = np.meshgrid(np.linspace(-0.5, 2.5, 60), np.linspace(-1.5, 1.0, 60))
residual = slopes[..., None] * x.numpy()[:, 0] + offsets[..., None] - y.numpy()[:, 0]
right.contour(slopes, offsets, np.log((residual**2).mean(axis=-1)), levels=14)
right.plot([p[0] for p in path], [p[1] for p in path], ".-", color="tab:orange")
right.set(xlabel="w", ylabel="b", title="the way downhill")
figure.savefig(FIGURES / "04_line.png", dpi=120)

# %% [markdown]
# ## A curve
#
# A line cannot bend. Two layers with a `tanh` between can: a *multilayer perceptron*. `nn.Module`
# is only a box that finds its parameters, and an optimizer is only the update rule, written once
# for all of them. Plain SGD would do; Adam gives each parameter a step size of its own.

# %%
x = minidl.linspace(-1, 1, 64).reshape(-1, 1)
clean = (3 * np.pi * x).sin() * (1 - x * x)
y = clean + 0.05 * minidl.randn(64, 1)

model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
optimizer = optim.Adam(model.parameters(), lr=1e-2)
snapshots = {}
for step in range(1001):
    prediction = model(x)
    loss = F.mse_loss(prediction, y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step in (0, 100, 1000):
        snapshots[step] = prediction.numpy()

print(f"loss after 1,000 steps: {loss.item():.4f} (the noise alone: {0.05**2})")
assert loss.item() < 0.01
assert F.mse_loss(model(x), clean).item() < 0.01  # it found the curve, not the noise

figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
axes.plot(x.numpy(), y.numpy(), ".", color="grey")
for step, prediction in snapshots.items():
    axes.plot(x.numpy(), prediction, label=f"step {step}")
axes.legend()
axes.set_title("a curve, by an MLP")
figure.savefig(FIGURES / "04_curve.png", dpi=120)

# %% [markdown]
# How is a layer made, and a step taken? Live from the library:

# %%
print(minidl.source(nn.Linear.forward))
print(minidl.source(optim.Adam))

# %% [markdown]
# ## Digits
#
# The same loop reads handwriting. New are only the parts: images come in *batches* from a
# `DataLoader` in random order; the model is a small convolutional network; the loss is the *cross
# entropy* of ten classes; and what counts is measured on 360 digits by writers the network never
# saw.

# %%
train = DataLoader(Digits(train=True), batch_size=32, shuffle=True)
images, labels = next(iter(DataLoader(Digits(train=False), batch_size=360)))
print(f"test images {images.shape}, labels {labels.shape}")

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1),
    nn.ReLU(),
    nn.Conv2d(16, 32, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Flatten(),
    nn.Dropout(0.25),
    nn.Linear(32 * 4 * 4, 10),
)
print(f"{sum(p.numel() for p in model.parameters()):,} parameters")


# %%
def accuracy():
    model.eval()  # dropout off
    with minidl.no_grad():
        correct = (model(images).argmax(dim=1) == labels).numpy().mean()
    model.train()
    return float(correct)


optimizer = optim.Adam(model.parameters(), lr=2e-3)
losses, scores = [], [accuracy()]
for epoch in range(8):
    for batch, target in train:
        loss = F.cross_entropy(model(batch), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    scores.append(accuracy())
    print(f"epoch {epoch + 1}: loss {np.mean(losses[-45:]):.3f}, test accuracy {scores[-1]:.1%}")

assert scores[0] < 0.3  # it knew nothing,
assert scores[-1] > 0.9  # and learned

# %% [markdown]
# On the writers that it has seen it is nearly perfect, on others it makes a mistake in fourteen:
# it *overfits* their hands. (`make demo` shows it slightly moved and turned digits as well, and
# gets far fewer wrong; augmentation has a tutorial of its own.)
#
# Where is it wrong? Often where you would hesitate, too.

# %%
model.eval()
with minidl.no_grad():
    probabilities = F.softmax(model(images), dim=1).numpy()
model.train()
guesses = probabilities.argmax(axis=1)
wrong = np.flatnonzero(guesses != labels.numpy())

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
left.plot(losses, linewidth=0.7)
left.set(xlabel="batch", ylabel="loss", title="training loss")
right.plot(scores, "o-")
right.set(xlabel="epoch", ylabel="test accuracy", title="digits by other writers")
figure.savefig(FIGURES / "04_digits.png", dpi=120)

figure, axes = plt.subplots(1, 8, figsize=(9, 1.8), layout="constrained")
for ax, i in zip(axes, wrong, strict=False):
    ax.imshow(images.numpy()[i, 0], cmap="gray_r")
    ax.set_title(f"{guesses[i]}, not {labels.numpy()[i]}", fontsize=9)
for ax in axes:
    ax.axis("off")
figure.savefig(FIGURES / "04_mistakes.png", dpi=120)
print(f"{len(wrong)} of {len(guesses)} wrong")

# %% [markdown]
# And what did one step of it do? The walk back from the loss through the whole network, as a page
# with a slider: step by step, where the gradient goes and what it looks like there.

# %%
batch, target = next(iter(train))
loss = F.cross_entropy(model(batch), target)
loss.explain(FIGURES / "04_walk.html")
print("written:", *sorted(p.name for p in FIGURES.glob("04_*")))

# %% [markdown]
# ## Try this
#
# 1. In the line's loop, forget `w.grad = b.grad = None`. Why does the loss swing?
# 2. Train the curve with `optim.SGD(lr=...)`. Find a rate that works; then add `momentum=0.9`.
# 3. Take away both `nn.Tanh()` from the curve's network. Why is it a line now, however deep?
# 4. Train the digits with the labels shuffled (`target[minidl.randperm(len(target))]`). What do
#    the two curves do? What does the network learn?
# 5. How few training digits are enough for 90 %? (`minidl.data.Subset`)
#
# `minidl/nn/module.py`, `minidl/optim/` and `minidl/data/loader.py` hold what was used here;
# `minidl/train.py` is this loop with everything that a long run needs. What the convolutions in it
# cost, and how they are made fast: `05_convolution_from_loops_to_gemm.py`.
