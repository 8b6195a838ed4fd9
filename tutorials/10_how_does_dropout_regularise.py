# %% [markdown]
# # 10. How does dropout regularise, and how is it implemented
#
# While a network trains, zero half of its hidden units, others at every step. When it answers, use
# them all. That is **dropout** (Srivastava et al. 2014), and a network that would learn its
# examples by heart errs less on new ones. Why? And what has to be right in the few lines that it
# takes? The second question first.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import minidl
import minidl.nn.functional as F
from minidl import nn, optim
from minidl.attack import deployed
from minidl.backend.random import Key, uniform
from minidl.data import DataLoader, Digits, Subset, augment
from minidl.ops.dropout import dropout
from minidl.uncertainty import mc_dropout

FIGURES = Path("runs/tutorials")
FIGURES.mkdir(parents=True, exist_ok=True)
minidl.manual_seed(0)

# %% [markdown]
# ## How it is implemented
#
# All of it but the gradient, which is the same op once more, with the same key:

# %%
print(minidl.source(dropout))

# %% [markdown]
# **Inverted scaling.** What stays is divided by 1 - p. So each number keeps its mean, the next
# layer sees sums of the usual size, and in eval mode there is nothing to do: the layer is the
# identity to the bit. (The paper multiplied the weights by 1 - p afterwards: easily forgotten, and
# work at every answer.)

# %%
layer = nn.Dropout(0.3)
ones = minidl.ones(100_000)
y = layer(ones).numpy()
print(f"values {np.unique(y)}, {np.mean(y == 0):.1%} zeros, mean {y.mean():.3f}")
assert set(np.unique(y)) == {0, np.float32(1 / 0.7)} and abs(y.mean() - 1) < 0.01
assert layer.eval()(ones) is ones  # not even a copy

# %% [markdown]
# **The gradient has the same mask**: a unit that said nothing learns nothing at this step. Nobody
# stores the mask, though. Random number i of stream (seed, call) is a function of these three
# integers (*Philox*, a counter-based generator), so the gradient rule computes it again.

# %%
x = minidl.ones(8, requires_grad=True)
y = F.dropout(x, 0.5)
y.sum().backward()
print("forward ", y.numpy(), "\ngradient", x.grad.numpy())
assert (x.grad.numpy() == y.numpy()).all()

# %% [markdown]
# And so it does not matter who computes which number: one thread or three, NumPy's formula, the C++
# kernel, a GPU. The same seed is the same mask.

# %%
ones, key, masks = np.ones(100_000, np.float32), Key(seed=7, call=3), []
threads = minidl.get_num_threads()
for n in (1, 2, 3):
    minidl.set_num_threads(n)
    masks.append(dropout(ones, p=0.5, key=key))
minidl.set_num_threads(threads)
with minidl.use("dropout", "formula"):
    masks.append(dropout(ones, p=0.5, key=key))
assert all((mask == masks[0]).all() for mask in masks)
assert ((masks[0] != 0) == (uniform(key, 100_000) >= 0.5)).all()

# %% [markdown]
# ## Does it regularise?
#
# A network far too large for 1,000 digits: 360,000 weights. The same digits, first weights and
# steps, without dropout (the control) and with it. Three times.

# %%
train_all = Digits(train=True)
index = np.concatenate([np.flatnonzero(train_all.targets == d)[:100] for d in range(10)])
few = Subset(train_all, index)
train_batch = next(iter(DataLoader(few, len(few))))
test_batch = next(iter(DataLoader(Digits(train=False), 360)))  # by other writers


def network(p):
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 512),
        nn.ReLU(),
        nn.Dropout(p),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Dropout(p),
        nn.Linear(512, 10),
    )


def judge(model, batch):
    """Loss, and error in per cent, in eval mode."""
    x, y = batch
    with minidl.no_grad(), deployed(model):
        logits = model(x)
    wrong = (logits.argmax(dim=1) != y).numpy()
    return float(F.cross_entropy(logits, y).item()), 100 * float(wrong.mean())


def trained(p, seed, epochs=50):
    minidl.manual_seed(seed)
    model, curve = network(p), []
    optimizer = optim.Adam(model.parameters(), 1e-3)
    for _ in range(epochs):
        for x, y in DataLoader(few, 50, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        curve.append([*judge(model, train_batch), *judge(model, test_batch)])
    return model, np.array(curve)


runs = {p: [trained(p, seed) for seed in range(3)] for p in (0.0, 0.5)}
ends = {p: np.array([curve[-1] for _, curve in found]) for p, found in runs.items()}
for p, found in ends.items():
    train_loss, train_error, loss, error = found.mean(axis=0)
    print(
        f"p = {p}: error {error:.1f} % (on what it has seen {train_error:.1f} %), "
        f"gap in loss {loss - train_loss:.2f}"
    )

figure, grid = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
for axes, (p, found) in zip(grid, runs.items(), strict=True):
    for _, curve in found:
        axes.plot(curve[:, 2], color="tab:red")
        axes.plot(curve[:, 0], color="tab:blue")
    axes.set(title=f"p = {p}", xlabel="epoch", ylim=(0, 0.8))
grid[0].set_ylabel("loss: test red, train blue")
figure.savefig(FIGURES / "10_curves.png", dpi=120)

# %% [markdown]
# Both know their digits by heart. Without dropout the loss on new digits then *rises*: the network
# is wrong, and more and more sure of it. With dropout it errs less, and the gap is smaller. (On
# 100 digits nothing is gained: see the experiment at the end.)

# %%
gap = {p: (found[:, 2] - found[:, 0]).mean() for p, found in ends.items()}
assert gap[0.5] < gap[0.0] - 0.05
assert ends[0.5][:, 3].mean() < ends[0.0][:, 3].mean()
rise = {p: np.mean([c[-1, 2] - c[:, 2].min() for _, c in found]) for p, found in runs.items()}
assert rise[0.5] < rise[0.0]

# %% [markdown]
# ## Why: no unit can rely on another
#
# A unit whose neighbours may be missing has to be of use by itself. Such units answer to something
# of their own, and are silent otherwise: the activations become *sparse*, although nobody asked
# for that (section 7.2 of the paper).

# %%
figure, grid = plt.subplots(1, 2, figsize=(8, 2.8), sharey=True, layout="constrained")
active = {}
for axes, (p, found) in zip(grid, runs.items(), strict=True):
    model = found[0][0]
    with minidl.no_grad():
        h = model[2](model[1](test_batch[0].flatten(1))).numpy()  # after the first ReLU
    active[p] = np.mean(h > 0)
    axes.hist(h.ravel(), bins=50, range=(0, 1.5), log=True)
    axes.set(title=f"p = {p}: {active[p]:.0%} are active, mean {h.mean():.2f}", xlabel="activation")
figure.savefig(FIGURES / "10_activations.png", dpi=120)
assert active[0.5] < active[0.0] - 0.1

# %% [markdown]
# ## Why: many networks in one
#
# Each mask is another network, 2ⁿ of them with n units, and they share their weights. Each is
# trained a little, and all of them together give the answer: an average is less often wrong than
# its members. Eval mode is one pass in place of that average. For a linear layer it is the average
# exactly; through ReLUs and a softmax, nearly.

# %%
linear, v = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 1)), test_batch[0][:1].flatten(1)
with minidl.no_grad():
    sampled = np.mean([linear(v).item() for _ in range(20_000)])
    with deployed(linear):
        print(f"average {sampled:.3f}, eval mode {linear(v).item():.3f}")
        assert abs(sampled - linear(v).item()) < 0.02

model = runs[0.5][0][0]
asked = mc_dropout(model, test_batch[0], samples=50)
labels = test_batch[1].numpy()
members = 100 * np.mean(asked.samples.numpy().argmax(axis=2) != labels)
together = 100 * np.mean(asked.probabilities.numpy().argmax(axis=1) != labels)
print(
    f"error: one network {members:.1f} %, the mean of 50 {together:.1f} %, "
    f"eval mode {judge(model, test_batch)[1]:.1f} %"
)
assert together < members and abs(together - judge(model, test_batch)[1]) < 1.5

# %% [markdown]
# ## What is dropped together
#
# Where neighbours say the same, dropping one of them hides nothing. So the family differs in what
# falls together, which is the shape of the mask: single numbers; in images whole **channels**
# (spatial dropout); in sequences a **feature at all its steps** (locked dropout); or single
# **weights** (DropConnect).

# %%
image, sequence = minidl.ones(1, 12, 6, 6), minidl.ones(20, 1, 24)  # (N, C, H, W), (T, N, features)
connect = nn.DropConnectLinear(24, 20, bias=False)
spatial = nn.Dropout2d()(image).numpy()
locked = nn.LockedDropout()(sequence).numpy()[:, 0]
weights = connect(minidl.eye(24)).numpy().T
assert (spatial == spatial[:, :, :1, :1]).all() and (locked == locked[:1]).all()
assert 0.3 < np.mean(weights == 0) < 0.7
channels = spatial.reshape(3, 4, 6, 6).swapaxes(1, 2).reshape(18, 24)  # 3×4 of them, side by side
pictures = {
    "Dropout\n(steps down, features across)": nn.Dropout()(sequence).numpy()[:, 0],
    "Dropout2d\n(12 channels)": channels,
    "LockedDropout\n(steps down)": locked,
    "DropConnectLinear\n(weights)": weights,
}
figure, grid = plt.subplots(1, 4, figsize=(9, 2.6), layout="constrained")
for axis, (name, mask) in zip(grid, pictures.items(), strict=True):
    axis.imshow(mask != 0, cmap="gray", interpolation="nearest", aspect="auto")
    axis.set_title(name, fontsize=8)
    axis.set(xticks=[], yticks=[])
figure.savefig(FIGURES / "10_masks.png", dpi=120)

# %% [markdown]
# Between recurrent layers it matters most. Fresh masks at every step are noise, and a state that
# adds up 50 steps averages noise away: all 50-step sums come out alike, and nothing was dropped.
# One mask for all steps (Gal & Ghahramani 2016) still drops half of what the layer above hears.
# Here the lower layer says 1 at every step, and the upper one adds up what it hears.

# %%
noise = {}
for locked in (False, True):
    rnn = nn.RNN(500, 500, 2, "relu", bias=False, dropout=0.5, locked_dropout=locked)
    for name, parameter in rnn.named_parameters():
        parameter.data = minidl.zeros(500, 500) if name == "weight_hh_l0" else minidl.eye(500)
    with minidl.no_grad():
        _, h = rnn(minidl.ones(50, 1, 500))
    noise[locked] = float((h[1].numpy() / 50).std())
print(f"spread of the mean over 50 steps: fresh {noise[False]:.2f}, locked {noise[True]:.2f}")
assert noise[False] < 0.2 and noise[True] > 0.9

# %% [markdown]
# ## What the network does not know
#
# If many networks hide in one, ask several: leave dropout on when it answers, and see whether they
# agree. This is **Monte-Carlo dropout**. Below a 3 is turned; each dot is what one of 100 networks
# says. Where they scatter, the answer is a guess.

# %%
print(minidl.source(mc_dropout))

three = test_batch[0].numpy()[np.flatnonzero(labels == 3)[0]]
angles = range(0, 181, 20)
turned = np.concatenate(
    [augment.warp_about_centre(three[None], augment.rotation(a)[None]) for a in angles]
)
found = mc_dropout(model, minidl.tensor(turned.astype(np.float32)), samples=100)
samples = found.samples.numpy()

figure, (above, below) = plt.subplots(
    2, 1, figsize=(8, 4.2), layout="constrained", gridspec_kw={"height_ratios": [3, 1]}
)
jitter = np.random.default_rng(0).uniform(-6, 6, 100)
for digit in sorted(set(found.probabilities.numpy().argmax(axis=1))):
    for i, a in enumerate(angles):
        label = f"says {digit}" if i == 0 else None
        above.scatter(a + jitter, samples[:, i, digit], 5, f"C{digit}", alpha=0.5, label=label)
above.set(ylabel="probability", xlim=(-10, 190), xticks=list(angles), xlabel="turned by (degrees)")
above.legend(frameon=False, fontsize=8)
below.imshow(np.hstack(turned[:, 0]), cmap="gray_r")
below.axis("off")
figure.savefig(FIGURES / "10_uncertainty.png", dpi=120)

for a, H, I in zip(angles, found.entropy.numpy(), found.mutual_information.numpy(), strict=True):
    print(f"{a:3}°: entropy {H:.2f} nats, of which disagreement {I:.2f}")
assert found.entropy.numpy()[0] < 0.1 < found.entropy.numpy().max()

# %% [markdown]
# It works on honest digits too: where the networks disagree, the answer is more often wrong. So an
# uncertain digit can be left to a person.

# %%
wrong = asked.probabilities.numpy().argmax(axis=1) != labels
doubt = asked.mutual_information.numpy()
surer, other = np.split(wrong[np.argsort(doubt)], 2)
print(f"error: {surer.mean():.1%} on the surer half, {other.mean():.1%} on the other")
assert surer.mean() < other.mean() / 2

# %% [markdown]
# But look at the turned 3 once more: at some angle it is taken for another digit, and hardly one
# of the networks doubts it. They learned from the same digits, and may be wrong together.
# Disagreement proves doubt; agreement proves nothing.

# %%
answers, entropy = found.probabilities.numpy().argmax(axis=1), found.entropy.numpy()
assert (entropy[answers != 3] < 0.2).any()

# %% [markdown]
# | | |
# |---|---|
# | how does it regularise | no unit can lean on another; the answer is an average of networks |
# | when does it pay | where a network overfits, not on the fewest images, nor in a short training |
# | what must be right | 1 / (1 - p), the identity in eval, the gradient's mask the same |
#
# `benchmarks/experiments/dropout.py` measures this with 100, 1,000 and 5,000 images, and what
# dropping pixels, weights and channels adds.
#
# ## Try this
#
# 1. Put `nn.Dropout(0.2)` before the first layer as well. The paper gains by that on 784 pixels:
#    why not on these 64?
# 2. Which p is best? Try 0.1 to 0.9. At which one does the network fail to learn its own digits?
# 3. Forget `model.eval()` when you test. What does that cost, and why so little?
# 4. Replace both dropouts by `nn.DropConnectLinear` layers. Are the activations sparse?
# 5. Show `mc_dropout` pure noise, and a blank image. Is it in doubt?
#
# `minidl/ops/dropout.py` holds the formula, `minidl/nn/dropout.py` the layers,
# `minidl/uncertainty.py` the questions asked several times.
# Next: `11_what_does_fgsm_imply_for_security.py`.
