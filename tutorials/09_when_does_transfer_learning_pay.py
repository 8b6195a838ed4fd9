# %% [markdown]
# # 9. When does transfer learning pay
#
# Learning to see takes many images; learning what a thing is called takes few. **Transfer
# learning** takes a network that has learned to see on one task, replaces its last layer, and
# teaches it another task with a handful of images. It pays when the images are few and the tasks
# have something in common. Both halves of that sentence are measured here, beside the control that
# is easily forgotten: features that nobody learned.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import minidl
import minidl.nn.functional as F
from minidl import nn, optim, transfer
from minidl.attack import deployed
from minidl.data import DataLoader, Digits, ImageDataset

FIGURES = Path("runs/tutorials")
FIGURES.mkdir(parents=True, exist_ok=True)
minidl.manual_seed(0)

# %% [markdown]
# ## Two tasks
#
# Digits, but somewhere on a canvas: a network has to learn that the place does not matter. Of the
# digits 0 to 4 there are many images. Of the digits 5 to 9 we pretend to have one, five or forty
# each.


# %%
def part(classes, per_class=None, train=True, seed=0, copies=1):
    """Some images of some classes, numbered anew from 0, each somewhere on 16×16 pixels."""
    data, rng = Digits(train=train), np.random.default_rng(seed)
    index = [rng.permutation(np.flatnonzero(data.targets == c))[:per_class] for c in classes]
    labels = np.tile(np.repeat(np.arange(len(classes)), [len(i) for i in index]), copies)
    canvases = np.zeros((len(labels), 1, 16, 16), np.float32)
    for canvas, digit in zip(canvases, data.data[np.tile(np.concatenate(index), copies)]):
        y, x = rng.integers(0, 9, 2)
        canvas[:, y : y + 8, x : x + 8] = digit
    return ImageDataset(canvases, labels)


OLD, NEW = range(5), range(5, 10)
test_set = part(NEW, train=False)


def network():
    return nn.Sequential({
        "conv1": nn.Conv2d(1, 16, 3, padding=1),
        "bn1": nn.BatchNorm2d(16),
        "relu1": nn.ReLU(),
        "pool1": nn.MaxPool2d(2),
        "conv2": nn.Conv2d(16, 32, 3, padding=1),
        "bn2": nn.BatchNorm2d(32),
        "relu2": nn.ReLU(),
        "pool2": nn.MaxPool2d(2),
        "conv3": nn.Conv2d(32, 64, 3, padding=1),
        "bn3": nn.BatchNorm2d(64),
        "relu3": nn.ReLU(),
        "pool3": nn.MaxPool2d(2),
        "flatten": nn.Flatten(),
        "fc": nn.Linear(64 * 2 * 2, 5),
    })  # fmt: skip


def train(model, data, epochs, parameters=None, lr=3e-3):
    optimizer = optim.Adam(parameters or [p for p in model.parameters() if p.requires_grad], lr)
    model.train()
    for _ in range(epochs):
        for x, y in DataLoader(data, 25, shuffle=True):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def accuracy(model, data):
    x, y = next(iter(DataLoader(data, len(data))))
    with minidl.no_grad(), deployed(model):
        return 100 * float((model(x).argmax(dim=1) == y).numpy().mean())


pretrained = network()
train(pretrained, part(OLD, copies=3), 5)
weights = {name: tensor.numpy().copy() for name, tensor in pretrained.state_dict().items()}
print(f"digits 0 to 4 by other writers: {accuracy(pretrained, part(OLD, train=False)):.1f} %")
assert accuracy(pretrained, part(OLD, train=False)) > 85

# %% [markdown]
# A published network comes from a file instead: `transfer.load_weights(model, "resnet18.pth")`
# reads what PyTorch wrote, without running code from it, into a model with the same names.
#
# ## Replace the head, freeze the rest
#
# The last layer knows about the old classes. A new one takes its place, with random weights.
# Everything before it is *frozen*: it gets no gradient, and its batch norm no longer follows the
# batches. (That is the trap: setting `requires_grad` alone leaves the running statistics moving,
# since they are no parameters.)

# %%
head = transfer.replace_head(pretrained, num_classes=5)
frozen = transfer.freeze(pretrained, depth=-1)  # all but the last layer
print("frozen:", ", ".join(frozen))

before = {name: tensor.numpy().copy() for name, tensor in pretrained.state_dict().items()}
train(pretrained, part(NEW, 5), 3)  # it calls model.train()
changed = [n for n, t in pretrained.state_dict().items() if (t.numpy() != before[n]).any()]
print("changed:", ", ".join(changed))
assert changed == ["fc.weight", "fc.bias"]

print(minidl.source(transfer.freeze))

# %% [markdown]
# ## What freezing saves
#
# The gradient walks back from the loss to the first parameter that learns, and stops. Below it
# nothing was recorded, so no intermediate result is kept either.

# %%
x, y = next(iter(DataLoader(part(NEW, 5), 25)))


def recorded(model):
    """Which layers leave something on the tape."""
    names = []
    hooks = [
        m.register_forward_hook(lambda m, a, out, n=n: names.append(n) if out.grad_fn else None)
        for n, m in model.named_children()
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return names


print("frozen:          ", recorded(pretrained))
assert recorded(pretrained) == ["fc"]
transfer.unfreeze(pretrained)
print("everything learns:", recorded(pretrained))
assert len(recorded(pretrained)) == 14
transfer.freeze(pretrained, depth=-1)

# %% [markdown]
# And the frozen layers say the same of the same image in every epoch. So ask them once: the images
# become *features*, and an epoch costs the head alone. (Not with augmented images, which are others
# every time: it refuses those.)

# %%
features, head = transfer.cache_features(pretrained, part(NEW, 5))
print(f"images {x.shape[1:]} became features {features.tensors[0].shape[1:]}")
before = accuracy(pretrained, test_set)
train(head, features, 40)  # trains the layers of the model itself
print(f"digits 5 to 9: {before:.1f} % before, {accuracy(pretrained, test_set):.1f} % after")

# %% [markdown]
# ## Does it pay?
#
# Four ways, the same images for each: from **scratch**; **frozen**, as above; **fine-tuned**, where
# everything learns and earlier layers more slowly; and **frozen-random**, the control: if a new
# head on *random* layers did as well, nothing was transferred.


# %%
def learn(way, data, seed):
    minidl.manual_seed(seed)
    model = network()
    if way in ("frozen", "fine-tuned"):
        model.load_state_dict(weights)
        transfer.replace_head(model, 5)
    epochs = max(12, 150 // max(len(data) // 25, 1) // 2)
    if way.startswith("frozen"):
        transfer.freeze(model, depth=-1)
        features, head = transfer.cache_features(model, data)
        train(head, features, 2 * epochs, lr=1e-2)
    elif way == "fine-tuned":
        train(model, data, epochs, transfer.discriminative_lr(model, 3e-3))
    else:
        train(model, data, epochs)
    return accuracy(model, test_set)


SIZES, WAYS = (1, 5, 40), ("scratch", "frozen", "fine-tuned", "frozen-random")
scores = {way: [] for way in WAYS}
for n in SIZES:
    for way in WAYS:
        scores[way].append(np.mean([learn(way, part(NEW, n, seed=s), s) for s in range(2)]))
print("images a class:", *SIZES)
for way, values in scores.items():
    print(f"{way:14}", " ".join(f"{value:5.1f}" for value in values))

figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
for way, values in scores.items():
    axes.plot(SIZES, values, "o--" if way == "frozen-random" else "o-", label=way)
axes.set(xscale="log", xlabel="images a class", ylabel="test accuracy (%)")
axes.set_xticks(SIZES, [str(n) for n in SIZES])
axes.legend(frameon=False)
figure.savefig(FIGURES / "09_transfer.png", dpi=120)

# %% [markdown]
# With few images the learned features win by far, against scratch and against the control: the
# layers brought along that the place does not matter. With forty a class the network can learn
# that itself, and what is frozen becomes a limit.

# %%
few = SIZES.index(5)
assert scores["frozen"][few] > scores["frozen-random"][few] + 5
assert scores["frozen"][few] > scores["scratch"][few] + 2
assert scores["scratch"][-1] > scores["frozen"][-1]

# %% [markdown]
# | | same kind of images | other images |
# |---|---|---|
# | few labels | freeze, learn the head | freeze the first layers only; measure against scratch |
# | many labels | fine-tune | scratch does as well; fine-tuning is faster to start |
#
# It does not always pay. `benchmarks/experiments/transfer.py` goes from photographs to ants and
# bees and to medical images, and from clothes to X-rays of lungs, where little is gained.
#
# ## Try this
#
# 1. Pretrain for one epoch only. Which of the four curves move?
# 2. Freeze by hand: `for p in model.parameters(): p.requires_grad_(False)`, and train. Which
#    buffers change? What does `cache_features` say of it?
# 3. Freeze `depth=2` in place of all: the first layers are the most general.
# 4. `transfer.gradual_unfreeze(model, epoch)` at the start of each epoch: better than fine-tuning
#    everything at once?
# 5. Pretrain on digits whose labels were shuffled. Are those features better than random ones?
#
# `minidl/transfer.py` holds what was used here, `minidl/torch_file.py` reads the checkpoints.
# Next: `10_how_does_dropout_regularise.py`.
