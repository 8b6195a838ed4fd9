# %% [markdown]
# # 11. What does FGSM imply for security
#
# A network reads handwritten digits, and most of them rightly. Change every pixel by a little, in
# the direction that it likes least, and it reads hardly one. The digits are still easy to read, for
# you. Here you make such images in one line, see why that line works, become an attacker who cannot
# even look into the network, and then defend it.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import minidl
import minidl.nn.functional as F
from minidl import attack, nn, optim
from minidl.data import DataLoader, Digits, Subset, augment

FIGURES = Path("runs/tutorials")
FIGURES.mkdir(parents=True, exist_ok=True)
minidl.manual_seed(0)

digits = Digits(train=True, transform=augment.RandomCrop(8, padding=1))
mine, theirs = (Subset(digits, range(start, len(digits), 2)) for start in (0, 1))
test = list(DataLoader(Digits(train=False), 360))
x, y = test[0]


def network(channels=32):
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(channels, 2 * channels, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * channels, 10),
    )


def trained(data, channels=32):
    model = network(channels)
    optimizer = optim.Adam(model.parameters(), 2e-3)
    for _ in range(30):
        for images, labels in DataLoader(data, 50, shuffle=True):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


def percent(model, how=attack.fgsm, epsilon=0.0):
    return 100 * attack.accuracy(model, test, how, epsilon)


model = trained(mine)
print(f"digits by other writers: {percent(model):.1f} % right")
assert percent(model) > 90

# %% [markdown]
# ## One step uphill
#
# Training asks: how must the *weights* change so that the loss falls? Turn both around: how must
# the *pixels* change so that the loss grows? The tape answers both questions. Of the answer only
# the signs are kept, -1 or +1 for each pixel, so that no pixel changes by more than ε:
#
#     x_adv = x + ε · sign(∇ₓ J(θ, x, y))        (Goodfellow et al. 2015, equation 1)

# %%
print(minidl.source(attack.fgsm))

epsilon = 0.15
x_adv = attack.fgsm(model, x, y, epsilon)
assert np.abs((x_adv - x).numpy()).max() <= epsilon + 1e-6
signs = np.sign(attack.input_gradient(model, x, y).numpy())
print("the signs that occur:", np.unique(signs))

fooled = np.flatnonzero(
    (model(x).argmax(dim=1) == y).numpy() & (model(x_adv).argmax(dim=1) != y).numpy()
)[:6]
figure, grid = plt.subplots(3, len(fooled), figsize=(8, 4.6), layout="constrained")
for column, i in zip(grid.T, fooled, strict=True):
    for axis, picture, low in zip(column, (x, signs, x_adv), (0, -1, 0), strict=True):
        pixels = picture[int(i), 0]
        pixels = pixels if isinstance(pixels, np.ndarray) else pixels.numpy()
        axis.imshow(pixels, cmap="gray_r", vmin=low, vmax=1)
        axis.set(xticks=[], yticks=[])
    for axis, images in ((column[0], x), (column[2], x_adv)):
        p = F.softmax(model(images[int(i)].reshape((1, 1, 8, 8))), dim=1).numpy()[0]
        axis.set_title(f"“{p.argmax()}”, {100 * p.max():.0f} %", fontsize=9)
grid[0, 0].set_ylabel("image")
grid[1, 0].set_ylabel("signs")
grid[2, 0].set_ylabel(f"image + {epsilon}·signs")
figure.savefig(FIGURES / "11_fgsm.png", dpi=120)

# %% [markdown]
# ## Why so little is enough
#
# If J were linear in the pixels, a step of ε along the signs would raise it by ε times the *sum* of
# all |∂J/∂xᵢ|: every pixel adds its share, and there are 64 of them (in a photograph, 150,000).
# Random signs have the same size, but their shares cancel. That is the control: without it nobody
# knows whether the direction matters, or just the noise.

# %%
gradient = attack.input_gradient(model, x, y).numpy() * len(x)  # of each image's own loss


def loss_of(images):
    return F.cross_entropy(model(images), y, reduction="none").numpy()


small = 0.01
predicted = small * np.abs(gradient).reshape(len(x), -1).sum(axis=1)
along = loss_of(attack.fgsm(model, x, y, small, clip=None)) - loss_of(x)
across = loss_of(attack.random_sign(x, small, clip=None, seed=0)) - loss_of(x)
print(f"the loss grows by {along.mean():.4f}; a linear one would by {predicted.mean():.4f};")
print(f"with random signs by {across.mean():+.4f}")
assert 0.7 < along.mean() / predicted.mean() < 1.5
assert abs(across.mean()) < 0.2 * along.mean()

# %% [markdown]
# ## How far it gets
#
# FGSM is one straight step. PGD takes many small ones and looks at the gradient again after each:
# the strongest of the simple attacks. Both can only do harm; the noise hardly does.

# %%
EPSILONS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
ATTACKS = {
    "noise (control)": lambda m, x, y, e: attack.random_sign(x, e, seed=0),
    "FGSM": attack.fgsm,
    "PGD": lambda m, x, y, e: attack.pgd(m, x, y, e, steps=20, seed=0),
}


def curves(model):
    return {
        name: [percent(model), *(percent(model, how, e) for e in EPSILONS)]
        for name, how in ATTACKS.items()
    }


def show(title, found):
    print(f"{title}:\n{'ε':>16}    0  " + "".join(f"{e:6g}" for e in EPSILONS))
    for name, shares in found.items():
        print(f"{name:>16}" + "".join(f"{share:6.1f}" for share in shares))


undefended = curves(model)
show("right, in per cent", undefended)
at = 1 + EPSILONS.index(0.15)
assert undefended["FGSM"][at] < 35 and undefended["noise (control)"][at] > 85
assert undefended["PGD"][at] <= undefended["FGSM"][at]

# %% [markdown]
# ## An attacker without your network
#
# "Nobody can look into my network" is no defence. Another network, of another size, trained by
# somebody else on *other* images, has learned much the same directions. An image made against that
# one, with your network never seen, is shown to yours:

# %%
substitute = trained(theirs, channels=16)


def elsewhere(_, x, y, e):
    return attack.fgsm(substitute, x, y, e)


transferred = percent(model, elsewhere, 0.15)
print(f"FGSM made against another network: {transferred:.1f} % right, of {percent(model):.1f} %")
assert transferred < percent(model) - 20

# %% [markdown]
# ## A defence: show it what is coming
#
#     J̃ = α J(θ, x, y) + (1 - α) J(θ, x + ε sign(∇ₓ J), y)        (section 6; α = 0.5)
#
# Each batch is attacked anew, as the network changes. Against PGD the network trains on PGD, with ε
# growing from 0: a strong attack on a network that knows nothing yet would teach it to say the same
# for every image.

# %%
print(minidl.source(attack.adversarial_loss))


def defended(how, **settings):
    model = network()
    loader, optimizer = DataLoader(mine, 50, shuffle=True), optim.Adam(model.parameters(), 3e-3)
    attack.adversarial_train(model, loader, optimizer, 0.15, epochs=60, attack=how, **settings)
    return model


by_fgsm = defended(attack.fgsm)
by_pgd = defended(lambda *a: attack.pgd(*a, steps=5), alpha=0.0, ramp_epochs=20)
found = {"trained plainly": undefended, "on FGSM": curves(by_fgsm), "on PGD": curves(by_pgd)}
for title, values in list(found.items())[1:]:
    show(f"trained {title}", values)
assert found["on FGSM"]["FGSM"][at] > undefended["FGSM"][at] + 20
assert found["on PGD"]["PGD"][at] > undefended["PGD"][at] + 20

figure, grid = plt.subplots(1, 3, figsize=(9, 3), sharey=True, layout="constrained")
for axes, (title, values) in zip(grid, found.items(), strict=True):
    for name, shares in values.items():
        axes.plot((0, *EPSILONS), shares, "--o" if "noise" in name else "-o", ms=3, label=name)
    axes.set(title=title, xlabel="ε")
grid[0].set_ylabel("right (%)")
grid[0].legend(frameon=False)
figure.savefig(FIGURES / "11_defences.png", dpi=120)

# %% [markdown]
# ## What it implies
#
# - **Accuracy is not security.** A test set asks about images that nobody chose. An attacker
#   chooses, and the same network goes from nearly all right to hardly any.
# - **Secrecy does not help much**: what fools one network fools its cousins.
# - **A defence holds against what it was trained for**, up to the ε it was trained for. Look right
#   of 0.15 in the plots: the curves fall again. Measure a defence with a stronger attack than the
#   one it knows (PGD for one trained on FGSM), or you only learn that it knows its teacher.
# - **It costs**: several gradients a step, and a little accuracy on honest images.
# - So where a wrong answer does harm (a car that reads signs, a filter that reads mail) the network
#   must not be the only lock: check inputs, limit how often anyone may ask, let a second, different
#   test agree.
#
# The same on 28×28 pixels, with three seeds: `python benchmarks/experiments/attack.py --root DIR`.
#
# ## Try this
#
# 1. Set `targeted=True` and labels of your choice: can every digit be read as a 3? At which ε?
# 2. Attack with `norm="2"`. Where does the change gather now?
# 3. Train the defended network with ε = 0.3. What becomes of its answers at ε = 0?
# 4. Draw `by_fgsm`'s signs as in the first picture, beside the plain network's. Which of them look
#    like digits?
# 5. `minidl attack RUN` does all this for a network trained by `minidl train`.
#
# `minidl/attack.py` is the whole family. Next: `12_from_one_word_to_a_sentence.py`.
