"""How does dropout regularise? Error, gap and activations with it and without it.

    python benchmarks/experiments/dropout.py --root FOLDER

A fully connected network that overfits, on few images; with p = 0 (the control of every row) and
as Srivastava et al. (2014) use it: 0.5 of the hidden units, 0.2 of the pixels. The same images,
initial weights and number of steps for all variants of a seed. Then what else drops (weights,
channels), the activations (their section 7.2), and Monte-Carlo dropout. Writes
results/dropout.md, .json and .png.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from common import arguments, mean_std, network, some, table, train, write
from matplotlib.figure import Figure

import minidl
import minidl.nn.functional as F
from minidl import data, nn
from minidl.attack import deployed
from minidl.cli import kernels_in_words
from minidl.data import DataLoader, TensorDataset
from minidl.uncertainty import entropy, mc_dropout

Make = Callable[[], nn.Module]
SIZES = {"MNIST": (100, 1000, 5000), "Fashion-MNIST": (1000, 5000)}
STEPS = {100: 1500, 1000: 1500, 5000: 5000}  # enough to overfit: of 5,000 clothes 1,500 are not


def mlp(pixels: float, hidden: float, weights: float = 0.0) -> nn.Sequential:
    """784-512-512-10; the arguments are the probabilities with which each kind is dropped."""

    def linear(n: int, m: int) -> nn.Module:
        return nn.DropConnectLinear(n, m, p=weights) if weights else nn.Linear(n, m)

    return nn.Sequential(
        nn.Flatten(), nn.Dropout(pixels), nn.Linear(784, 512), nn.ReLU(),
        nn.Dropout(hidden), linear(512, 512), nn.ReLU(),
        nn.Dropout(hidden), linear(512, 10),
    )  # fmt: skip


def cnn(layer: nn.Module) -> nn.Sequential:
    """The small CNN of the other experiments, with a layer before its second and third convolution.

    (A `Dropout` has no state: one serves in both places.)
    """
    layers: dict[str, nn.Module] = {}
    for name, module in network(10).named_children():
        if isinstance(module, nn.Conv2d) and layers:
            layers[f"drop before {name}"] = layer
        layers[name] = module
    return nn.Sequential(layers)


MLPS: dict[str, Make] = {"nothing": lambda: mlp(0, 0), "dropout": lambda: mlp(0.2, 0.5)}
OTHERS: dict[str, Make] = {
    "0.2 of the pixels only": lambda: mlp(0.2, 0),
    "0.5 of the hidden units only": lambda: mlp(0, 0.5),
    "0.2 of the pixels, 0.5 of the weights (DropConnect)": lambda: mlp(0.2, 0, 0.5),
}
CNNS: dict[str, Make] = {
    "nothing": lambda: cnn(nn.Dropout(0)),
    "dropout, 0.2 of the numbers": lambda: cnn(nn.Dropout(0.2)),
    "spatial dropout, 0.2 of the channels": lambda: cnn(nn.Dropout2d(0.2)),
}


@minidl.no_grad()
def judge(model: nn.Module, dataset: Any) -> tuple[float, float]:
    """Error in per cent and mean loss in nats, in eval mode."""
    wrong, total = 0, 0.0
    with deployed(model):
        for x, y in DataLoader(dataset, 500):
            logits = model(x)
            wrong += int((logits.argmax(dim=1) != y).sum().item())
            total += float(F.cross_entropy(logits, y, reduction="sum").item())
    return 100 * wrong / len(dataset), total / len(dataset)


def learn(make: Make, few: Any, test_set: Any, steps: int, seed: int) -> tuple[Any, dict[str, Any]]:
    """A trained network; its errors and losses at the end, and the losses on the way."""
    minidl.manual_seed(seed)
    model = make()
    glance = some(test_set, len(test_set) // 100, 0, range(10))  # a tenth of it
    curve: list[tuple[int, float, float]] = []

    def watch(done: int) -> None:
        if done % max(steps // 15, 1) == 0:
            curve.append((done, judge(model, few)[1], judge(model, glance)[1]))

    train(model, few, steps, lr=1e-3, watch=watch)
    found: dict[str, Any] = {"curve": curve}
    for name, dataset in (("train", few), ("test", test_set)):
        found[f"{name} error"], found[f"{name} loss"] = judge(model, dataset)
    return model, found


def autoencoder(p: float, few: Any, steps: int) -> nn.Sequential:
    """784-256-784 with p of the hidden units dropped, as in Srivastava et al., section 7.2."""
    minidl.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Dropout(p), nn.Linear(256, 784))
    pixels = minidl.tensor(few.data.reshape(len(few), 784).astype(np.float32) / 255)
    optimizer = minidl.optim.Adam(model.parameters(), 1e-3)
    batches = DataLoader(TensorDataset(pixels), 50, shuffle=True)
    for _ in range(max(steps * 50 // len(few), 1)):
        for (x,) in batches:
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(model(x), x).backward()
            optimizer.step()
    return model


@minidl.no_grad()
def activations(model: nn.Module, x: minidl.Tensor) -> list[np.ndarray]:
    """What comes out of each ReLU in eval mode: (N, units)."""
    found: list[np.ndarray] = []
    hooks = [
        module.register_forward_hook(lambda m, inputs, out: found.append(out.numpy()))
        for module in model.modules()
        if isinstance(module, nn.ReLU)
    ]
    with deployed(model):
        model(x)
    for hook in hooks:
        hook.remove()
    return found


def auroc(score: np.ndarray, positive: np.ndarray) -> float:
    """How often a positive has the higher score of a pair, in per cent (ties count half)."""
    a, b = score[positive][:, None], score[~positive]
    return 100 * float(np.mean((a > b) + 0.5 * (a == b)))


def uncertainties(models: dict[str, Any], digits: Any, clothes: Any, samples: int) -> Any:
    """For each way to ask: error (%), and how well the answer's entropy finds what is wrong."""
    labels = digits.targets
    x = {"digits": next(iter(DataLoader(digits, len(digits))))[0],
         "clothes": next(iter(DataLoader(clothes, len(clothes))))[0]}  # fmt: skip

    def once(model: nn.Module, images: Any) -> np.ndarray:
        with minidl.no_grad(), deployed(model):
            return F.softmax(model(images), dim=1).numpy()

    answers = {
        "nothing, asked once": [once(models["nothing"], v) for v in x.values()],
        "dropout, asked once": [once(models["dropout"], v) for v in x.values()],
        f"dropout, {samples} networks": [
            mc_dropout(models["dropout"], v, samples).probabilities.numpy() for v in x.values()
        ],
    }
    rows = {}
    for name, (p, p_clothes) in answers.items():
        wrong = p.argmax(axis=1) != labels
        H = np.concatenate([entropy(p), entropy(p_clothes)])
        foreign = np.arange(len(H)) >= len(p)
        rows[name] = (100 * wrong.mean(), auroc(entropy(p), wrong), auroc(H, foreign))
    return rows


def main() -> None:
    args = arguments(__doc__)
    start = time.perf_counter()
    steps = dict.fromkeys(STEPS, 15) if args.quick else STEPS
    cnn_steps = 5 if args.quick else 600
    seeds = range(args.seeds)
    kinds = {"MNIST": data.MNIST, "Fashion-MNIST": data.FashionMNIST}
    sets = {name: [kind(args.root, train=t) for t in (True, False)] for name, kind in kinds.items()}
    tests = {name: some(pair[1], 30 if args.quick else 800, 0) for name, pair in sets.items()}
    runs: dict[str, Any] = {}
    kept: dict[Any, Any] = {}  # (data set, images, variant, seed) -> network
    for title, sizes in SIZES.items():
        runs[title] = {n: {name: [] for name in MLPS} for n in sizes}
        for n in sizes:
            for seed in seeds:
                few = some(sets[title][0], n // 10, seed)
                for name, make in MLPS.items():
                    model, numbers = learn(make, few, tests[title], steps[n], seed)
                    runs[title][n][name].append(numbers)
                    kept[title, n, name, seed] = model
            print(f"{title}, {n} images: {time.perf_counter() - start:.0f} s", flush=True)
    for title, makes, how_long in (("others", OTHERS, steps[1000]), ("CNN", CNNS, cnn_steps)):
        runs[title] = {name: [] for name in makes}
        for seed in seeds:
            few = some(sets["MNIST"][0], 100, seed)
            for name, make in makes.items():
                runs[title][name].append(learn(make, few, tests["MNIST"], how_long, seed)[1])
        print(f"{title}: {time.perf_counter() - start:.0f} s", flush=True)

    x = next(iter(DataLoader(tests["MNIST"], 1000, shuffle=True, seed=0)))[0]
    found: dict[str, list[np.ndarray]] = {}
    for name, p in (("nothing", 0.0), ("dropout", 0.5)):
        coder = autoencoder(p, some(sets["MNIST"][0], 500, 0), steps[1000])
        hidden = activations(kept["MNIST", 5000, name, 0], x)
        found[name] = [*activations(coder, x.flatten(1)), *hidden]
    sparse = {
        name: [(float(a.mean()), 100 * float((a > 0).mean())) for a in layers]
        for name, layers in found.items()
    }
    asked = [
        uncertainties(
            {name: kept["MNIST", 1000, name, seed] for name in MLPS},
            tests["MNIST"],
            some(tests["Fashion-MNIST"], 20, seed, range(10)),
            samples=3 if args.quick else 30,
        )
        for seed in seeds
    ]
    numbers = {"runs": runs, "activations": sparse, "uncertainty": asked}
    text = [
        "# How does dropout regularise?",
        f"784-512-512-10, Adam and one cycle over {steps[1000]:,} steps of 64 images "
        f"({steps[5000]:,} where there are 5,000), the same for every variant; "
        f"{len(seeds)} seeds (mean ± standard deviation; each draws other images and weights, the "
        f"same for all variants). Errors in per cent on {len(tests['MNIST']):,} test images. "
        "*nothing* is the control, p = 0; *dropout* zeroes 0.5 of the hidden units and 0.2 of the "
        "pixels. The gap is test loss - train loss, both in eval mode, in nats.",
        *(errors(title, runs[title]) for title in SIZES),
        "![loss curves and activations](dropout.png)",
        "## What else can be dropped (MNIST, 1,000 images)",
        kinds_table({"nothing": runs["MNIST"][1000]["nothing"], **runs["others"],
                     "both": runs["MNIST"][1000]["dropout"]}),
        f"And in a CNN ({cnn_steps} steps), before its second and third convolution:",
        kinds_table(runs["CNN"]),
        "## Activations (MNIST, 5,000 images, eval mode)",
        "Mean, and the share that is not 0. An *autoencoder* 784-256-784 is what Srivastava et "
        "al. show in section 7.2 (there the mean fell from 2.0 to 0.7).",
        table(
            ["", "autoencoder", "first hidden layer", "second"],
            [[name, *(f"{mean:.2f}; {share:.0f} %" for mean, share in layers)]
             for name, layers in sparse.items()],
        ),
        "## Several networks in one: Monte-Carlo dropout (MNIST, 1,000 images)",
        "How well the entropy of the answer tells wrong answers from right ones, and clothes from "
        "digits: area under the ROC curve in per cent, 50 is chance.",
        table(
            ["", "error", "finds its mistakes", "finds clothes"],
            [[name, *(mean_std(v) for v in zip(*(seed[name] for seed in asked)))]
             for name in asked[0]],
        ),
        verdict(numbers),
        f"{kernels_in_words()}; {(time.perf_counter() - start) / 60:.1f} minutes in all.",
    ]  # fmt: skip
    write(args.out, "dropout", "\n\n".join(text) + "\n", numbers, draw(runs["MNIST"], found))


def column(runs: list[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([run[key] for run in runs])


def gap(runs: list[dict[str, Any]]) -> np.ndarray:
    return column(runs, "test loss") - column(runs, "train loss")


def errors(title: str, sizes: dict[int, Any]) -> str:
    rows = []
    for n, found in sizes.items():
        gain = column(found["nothing"], "test error") - column(found["dropout"], "test error")
        rows.append([f"{n:,}", *(mean_std(column(found[k], "test error")) for k in found),
                     mean_std(gain), *(mean_std(column(found[k], "train error")) for k in found),
                     *(f"{gap(found[k]).mean():.3f}" for k in found)])  # fmt: skip
    header = ["images", "nothing", "dropout", "gain", "train error: nothing", "dropout",
              "gap: nothing", "dropout"]  # fmt: skip
    return f"## {title}\n\n{table(header, rows)}"


def kinds_table(found: dict[str, Any]) -> str:
    control = column(found["nothing"], "test error")
    return table(
        ["dropped", "test error", "gain"],
        [[name, mean_std(column(runs, "test error")),
          "" if name == "nothing" else mean_std(control - column(runs, "test error"))]
         for name, runs in found.items()],
    )  # fmt: skip


def draw(mnist: dict[int, Any], found: dict[str, list[np.ndarray]]) -> Figure:
    """Loss curves of 1,000 images side by side; the autoencoder's activations."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    above, below = figure.subplots(2, 2)
    for axes, (name, runs) in zip(above, mnist[1000].items()):
        for i, run in enumerate(runs):
            done, train_loss, test_loss = zip(*run["curve"])
            axes.plot(done, test_loss, color="tab:red", label=None if i else "test")
            axes.plot(done, train_loss, color="tab:blue", label=None if i else "train")
        axes.set(title=f"{name}, 1,000 images", xlabel="step", ylabel="loss (nats)", yscale="log")
        axes.sharey(above[0])
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    top = max(float(layers[0].max()) for layers in found.values())
    for axes, (name, layers) in zip(below, found.items()):
        axes.hist(layers[0].ravel(), bins=60, range=(0, top), log=True)
        axes.set(title=f"{name}: activations of the autoencoder, mean {layers[0].mean():.2f}")
        axes.set(xlabel="activation", ylabel="how many")
        axes.sharey(below[0])
    return figure


def verdict(numbers: dict[str, Any]) -> str:
    """The claims, each beside what was measured."""
    lines = []

    def claim(what: str, measured: str, holds: bool) -> None:
        lines.append(f"- {what}: {measured} ({'holds' if holds else 'DOES NOT HOLD'})")

    for title in SIZES:
        for n, found in numbers["runs"][title].items():
            gain = column(found["nothing"], "test error") - column(found["dropout"], "test error")
            measured = f"{gain.mean():+.2f} points, by seed {', '.join(f'{g:+.2f}' for g in gain)}"
            if n == 100:
                few = abs(gain.mean()) < 1.5
                claim(f"{title}, {n}: little is gained (under 1.5 points)", measured, few)
            elif title == "MNIST":
                claim(f"{title}, {n:,}: the test error falls in every seed", measured,
                      bool((gain > 0).all()))  # fmt: skip
            else:
                lines.append(f"- {title}, {n:,}: {measured}")
            before, after = gap(found["nothing"]), gap(found["dropout"])
            measured = f"{before.mean():.3f} → {after.mean():.3f}"
            if n == 100:
                lines.append(f"- {title}, {n}: the gap in loss: {measured}")
            else:
                shrinks = bool((after < before).all())
                claim(f"{title}, {n:,}: the gap in loss shrinks in every seed", measured, shrinks)
    nothing, dropout = numbers["activations"].values()
    names = ("autoencoder", "first hidden layer", "second hidden layer")
    for name, (_, before), (_, after) in zip(names, nothing, dropout):
        claim(f"{name}: fewer units active", f"{before:.0f} % → {after:.0f} %", after < before)
    return "## What was claimed\n\n" + "\n".join(lines)


if __name__ == "__main__":
    main()
