# %% [markdown]
# # 8. Which augmentation fits which data
#
# You have 150 images, and would like to have more. Some changes make a new image that is still
# *the same thing*: a photograph of a dog, mirrored, is a photograph of a dog. Others do not: a 6
# turned upside down is a 9. **Augmentation** makes new images by changes of the first kind, anew
# in each epoch; with changes of the second kind it teaches nonsense. Which is which is a question
# about the data, not about the network, and here you answer it three times: by looking, by
# measuring, and on labels that are only partly true.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import minidl
import minidl.nn.functional as F
from minidl import nn, optim
from minidl.data import DataLoader, Digits, Subset, augment

FIGURES = Path("runs/tutorials")
FIGURES.mkdir(parents=True, exist_ok=True)
minidl.manual_seed(0)

# %% [markdown]
# ## Look first
#
# A row for each transform, the same two digits in each column pair. Ask of every picture: what is
# it? (For an image file of your own: `minidl augment IMAGE`.)

# %%
candidates = {
    "shift": augment.RandomCrop(8, padding=1),
    "rotation": augment.RandomRotation(15),
    "affine": augment.RandomAffine(10, translate=(0.1, 0.1), scale=(0.9, 1.1)),
    "noise": augment.GaussianNoise(sigma=0.15),
    "cutout": augment.Cutout(3),
    "mirror": augment.RandomHorizontalFlip(),
    "upside down": augment.Compose([augment.RandomHorizontalFlip(), augment.RandomVerticalFlip()]),
}
digits = Digits(train=True)
six, two = (digits[int(np.flatnonzero(digits.targets == d)[0])][0] for d in (6, 2))
images = np.stack([six, two] * 5)

figure, grid = plt.subplots(len(candidates), 10, figsize=(8, 6), layout="constrained")
for axes, (name, transform) in zip(grid, candidates.items(), strict=True):
    for axis, image in zip(axes, transform(images), strict=True):
        axis.imshow(image[0], cmap="gray_r", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
    axes[0].set_ylabel(name, rotation=0, ha="right", va="center")
figure.savefig(FIGURES / "08_sheet.png", dpi=120)

# %% [markdown]
# ## How it works
#
# A transform has two halves: `draw` decides what happens to one image, `apply` does it to many.

# %%
print(minidl.source(augment.RandomTransform.__call__))
print(minidl.source(augment.RandomRotation))

# %% [markdown]
# An image draws from a random stream of its own, named by (seed, epoch, index). So it comes out
# the same alone or in a batch, with no worker process or with eight, and a run that was stopped
# goes on as if it had not been.

# %%
transform = augment.Compose([candidates["shift"], candidates["rotation"]])


def first_batch(**how):
    loader = DataLoader(Digits(transform=transform), 6, shuffle=True, seed=7, **how)
    return next(iter(loader))[0].numpy(), next(iter(loader))[0].numpy()  # two epochs


here, there = first_batch(), first_batch(num_workers=2)
assert (here[0] == there[0]).all() and (here[1] == there[1]).all()
assert (here[0] != here[1]).any()  # but another version in each epoch

# %% [markdown]
# ## Then measure
#
# 150 digits to learn from, 15 of each; 360 by other writers to be tested on. Every variant sees
# the same digits, starts from the same weights and takes the same number of steps. The control is
# to do nothing.

# %%
train_all = Digits(train=True)
few = np.concatenate([np.flatnonzero(train_all.targets == d)[:15] for d in range(10)])
test_images, test_labels = next(iter(DataLoader(Digits(train=False), 360)))


def accuracy(model):
    model.eval()
    with minidl.no_grad():
        right = model(test_images).argmax(dim=1) == test_labels
    model.train()
    return 100 * float(right.numpy().mean())


def trained(transform=None, collate=None, steps=250, seed=0):
    minidl.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )
    optimizer = optim.Adam(model.parameters(), lr=3e-3)
    data = Subset(Digits(transform=transform), few.tolist())
    loader = DataLoader(data, 50, shuffle=True, collate_fn=collate)
    for _ in range(steps // len(loader)):
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return accuracy(model)


scores = {"nothing": [trained(seed=s) for s in range(2)]}
for name, transform in candidates.items():
    scores[name] = [trained(transform, seed=s) for s in range(2)]
for name, values in scores.items():
    print(f"{name:12}", " ".join(f"{v:5.1f}" for v in values), f" mean {np.mean(values):5.1f} %")

# %% [markdown]
# What looked like the same digit helps, or does no harm; what did not costs accuracy. The network
# has no opinion: it believes the labels.

# %%
means = {name: np.mean(values) for name, values in scores.items()}
assert max(means["shift"], means["affine"]) > means["nothing"]
assert means["upside down"] < means["nothing"] - 1

order = sorted(means, key=lambda name: means[name])
figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
colors = ["grey" if name == "nothing" else "tab:blue" for name in order]
axes.barh(order, [means[name] for name in order], color=colors)
axes.axvline(means["nothing"], color="grey", linestyle=":")
axes.set(xlabel="test accuracy (%)", xlim=(min(means.values()) - 5, 100))
figure.savefig(FIGURES / "08_accuracy.png", dpi=120)

# %% [markdown]
# | data | what does not matter | what does |
# |---|---|---|
# | digits, letters | a shift, a small turn | left and right, up and down |
# | photographs of things | left and right, a crop, the light | up and down, mostly |
# | cells, satellites | every direction | colour, where it is a stain |
# | X-rays | a shift, a small turn, contrast | left and right: the heart has a side |
#
# `benchmarks/experiments/augmentation.py` measures this on photographs and clothes, with curves
# over the number of images: with many images of the real thing there is less to gain.
#
# ## When the label changes too
#
# **Mixup** shows 70 % of one image and 30 % of another, and asks for 70 % of one answer and 30 % of
# the other. **CutMix** pastes a rectangle, and counts its area. Neither picture exists, but the
# label is true of it. Such a *soft* label is a row of probabilities, which `cross_entropy` takes.

# %%
mixup, cutmix = augment.MixUp(num_classes=10), augment.CutMix(num_classes=10)
batch = minidl.tensor(np.stack([six, two] * 3))
figure, grid = plt.subplots(2, 6, figsize=(8, 3.2), layout="constrained")
for axes, mix in zip(grid, (mixup, cutmix), strict=True):
    mixed, soft = mix(batch, minidl.tensor([6, 2] * 3))
    np.testing.assert_allclose(soft.numpy().sum(axis=1), 1, rtol=1e-6)
    for axis, image, label in zip(axes, mixed.numpy(), soft.numpy(), strict=True):
        axis.imshow(image[0], cmap="gray_r", vmin=0, vmax=1)
        axis.set_title(f"{label[6]:.0%} six, {label[2]:.0%} two", fontsize=8)
        axis.axis("off")
figure.savefig(FIGURES / "08_mixed.png", dpi=120)

print(minidl.source(augment.MixUp))
print(f"with mixup: {trained(collate=mixup.collate):.1f} %")

# %% [markdown]
# ## Try this
#
# 1. Rotate by up to 90° in place of 15°. Where on the way does it begin to cost?
# 2. Take 15 times as many images (all of `Digits`). What is left of the gain?
# 3. Mirror only the digits that stay digits (0, 1, 8). How would a transform know the label?
# 4. `augment.RandAugment()` draws among fourteen transforms. Which of them are wrong for digits?
# 5. Write a transform of your own: a subclass of `RandomTransform` with `draw` and `apply`, ten
#    lines. `tests/test_augment.py` tells you whether it treats a batch as it treats its images.
#
# `minidl/data/augment.py` holds all of it. Next: `09_when_does_transfer_learning_pay.py`.
