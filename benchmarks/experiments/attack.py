"""Attacks and defences: how far ε · sign(∇ₓ J) gets, beside noise of the same size.

    python benchmarks/experiments/attack.py --root FOLDER

MNIST and Fashion-MNIST; ε is in units of a pixel in [0, 1]. "noise" (random signs of the same size)
is the control of every attack, and the undefended network that of every defence. "Clipped" cuts
adversarial images back to [0, 1], as a camera would. Writes results/attack.md, .json and .png.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from common import accuracy, arguments, mean_std, some, table, train, write
from matplotlib.figure import Figure

import minidl
from minidl import attack, data, models, nn, optim
from minidl.cli import kernels_in_words
from minidl.data import DataLoader
from minidl.optim.lr_scheduler import OneCycleLR

EPSILONS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
ATTACKS = ("noise", "FGSM", "BIM", "PGD")
MODELS = {
    "softmax regression": lambda: models.linear(),
    "two layers": lambda: models.mlp(hidden=(240,)),
    "CNN": lambda: models.cnn(),
}
TRAIN, TEST = 1000, 100  # images a class
Errors = dict[str, dict[str, list[float]]]  # attack -> epsilon -> error of each seed, in per cent


def error(model: nn.Module, batches: Any, name: str, epsilon: float, clip: Any, seed: int) -> float:
    """In per cent, under one attack made against the model itself."""
    how: dict[str, attack.Attack] = {
        "noise": lambda m, x, y, e: attack.random_sign(x, e, clip, seed),
        "FGSM": lambda m, x, y, e: attack.fgsm(m, x, y, e, clip),
        "BIM": lambda m, x, y, e: attack.bim(m, x, y, e, steps=10, clip=clip),
        "PGD": lambda m, x, y, e: attack.pgd(m, x, y, e, steps=20, clip=clip, seed=seed),
        "PGD-40": lambda m, x, y, e: attack.pgd(m, x, y, e, steps=40, clip=clip, seed=seed),
    }
    return 100 * (1 - attack.accuracy(model, batches, how[name], epsilon))


def defend(train_set: Any, epsilon: float, epochs: int, seed: int, steps: int = 0) -> nn.Module:
    """A CNN trained on adversarial images: of FGSM with α = 0.5 (Goodfellow et al. 2015, section
    6), or of PGD in so many steps, those alone, with ε growing from 0 over half of the training."""
    minidl.manual_seed(seed)
    model = models.cnn()
    loader = DataLoader(train_set, 64, shuffle=True, drop_last=True)
    optimizer = optim.Adam(model.parameters(), 2e-3)
    scheduler = OneCycleLR(optimizer, 2e-3, total_steps=epochs * len(loader) + 1)
    how: dict[str, Any] = {"epochs": epochs, "scheduler": scheduler}
    if steps:
        how |= {"alpha": 0.0, "ramp_epochs": epochs / 2}
        how["attack"] = lambda *a: attack.pgd(*a, steps=steps)
    attack.adversarial_train(model, loader, optimizer, epsilon, **how)
    return model.eval()


def main() -> None:
    args = arguments(__doc__)
    start = time.perf_counter()
    epsilons = (0.25,) if args.quick else EPSILONS
    per_class, epochs = (20, 1) if args.quick else (TRAIN, 12)
    kinds = {"MNIST": data.MNIST, "Fashion-MNIST": data.FashionMNIST}
    numbers: dict[str, Any] = {}
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    grid = figure.subplots(2, len(MODELS), sharey=True)
    text = [
        "# Attacks and defences",
        f"{10 * per_class:,} training and {10 * TEST:,} test images, {args.seeds} seeds (mean ± "
        "standard deviation; each draws other images and other weights). Error in per cent. "
        "FGSM in one step, BIM in 10, PGD in 20 from a random start; noise is the control.",
    ]
    for (title, kind), row in zip(kinds.items(), grid):
        found: dict[str, Any] = {"attacks": {}, "unclipped": {}, "transfer": {}, "defences": {}}
        numbers[title] = found
        train_all, test_all = kind(args.root, train=True), kind(args.root, train=False)
        for seed in range(args.seeds):
            train_set = some(train_all, per_class, seed)
            test_set = some(test_all, TEST // 10 if args.quick else TEST, seed)
            batches = list(DataLoader(test_set, 250))
            trained = {}
            for name, make in MODELS.items():
                minidl.manual_seed(seed)
                trained[name] = make()
                train(trained[name], train_set, epochs * 150)
                note(found["attacks"], name, "clean", 0, 100 - accuracy(trained[name], test_set))
                for which in ATTACKS:
                    for epsilon in epsilons:
                        e = error(trained[name], batches, which, epsilon, (0, 1), seed)
                        note(found["attacks"], name, which, epsilon, e)
                    e = error(trained[name], batches, which, 0.25, None, seed)
                    note(found["unclipped"], name, which, 0.25, e)
            for of in MODELS:
                for on in MODELS:
                    made = [
                        (attack.fgsm(trained[of], x, y, 0.25), y) for x, y in batches
                    ]  # against one, shown to another
                    e = 100 * (1 - attack.accuracy(trained[on], made))
                    found["transfer"].setdefault(of, {}).setdefault(on, []).append(e)
            defended = {
                "none": trained["CNN"],
                "FGSM, α = 0.5": defend(train_set, 0.25, epochs, seed),
                "PGD-5, ε ramp": defend(train_set, 0.25, epochs, seed, steps=5),
            }
            for name, model in defended.items():
                note(found["defences"], name, "clean", 0, 100 - accuracy(model, test_set))
                for which in ("noise", "FGSM", "PGD-40"):
                    e = error(model, batches, which, 0.25, (0, 1), seed)
                    note(found["defences"], name, which, 0.25, e)
                e = error(model, batches, "FGSM", 0.25, None, seed)
                note(found["defences"], name, "FGSM, unclipped", 0.25, e)
            print(f"{title}, seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
        text += [f"## {title}", *tables(found, epsilons)]
        for axes, (name, errors) in zip(row, found["attacks"].items()):
            draw(axes, f"{title}: {name}", errors, epsilons)
    text += ["![error against epsilon](attack.png)", verdict(numbers)]
    text += [f"{kernels_in_words()}; {(time.perf_counter() - start) / 60:.1f} minutes in all."]
    write(args.out, "attack", "\n\n".join(text) + "\n", numbers, figure)


def note(found: dict[str, Errors], name: str, which: str, epsilon: float, e: float) -> None:
    found.setdefault(name, {}).setdefault(which, {}).setdefault(str(epsilon), []).append(e)


def tables(found: dict[str, Any], epsilons: tuple[float, ...]) -> list[str]:
    rows, free = [], found["unclipped"]
    for name, errors in found["attacks"].items():
        clean = mean_std(errors["clean"]["0"])
        for which in ATTACKS:
            cells = [mean_std(errors[which][str(epsilon)]) for epsilon in epsilons]
            rows.append([name, which, clean, *cells, mean_std(free[name][which]["0.25"])])
    head = ["network", "attack", "ε = 0", *map(str, epsilons), "0.25, unclipped"]
    columns = [("clean", "0"), *((w, "0.25") for w in ("noise", "FGSM", "FGSM, unclipped"))]
    columns.append(("PGD-40", "0.25"))
    defences = [
        [name, *(mean_std(errors[which][epsilon]) for which, epsilon in columns)]
        for name, errors in found["defences"].items()
    ]
    transfer = [
        [f"made against: {of}", *(mean_std(e) for e in on.values())]
        for of, on in found["transfer"].items()
    ]
    return [
        table(head, rows),
        "A CNN's defences, at ε = 0.25 (the images clipped but in one column):",
        table(["trained on adversarial images of", *(which for which, _ in columns)], defences),
        "FGSM's images, ε = 0.25, made against one network and shown to another:",
        table(["", *(f"shown to: {on}" for on in found["transfer"])], transfer),
    ]


def draw(axes: Any, title: str, errors: dict[str, Any], epsilons: tuple[float, ...]) -> None:
    for which in ATTACKS:
        means = [np.mean(errors[which][str(e)]) for e in epsilons]
        means, style = [np.mean(errors["clean"]["0"]), *means], "--" if which == "noise" else "-"
        axes.plot((0, *epsilons), means, style + "o", ms=3, label=which)
    axes.set(title=title, xlabel="ε", ylabel="error (%)", ylim=(-2, 102))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)


def verdict(numbers: dict[str, Any]) -> str:
    """The claims, each beside what was measured."""

    def at(title: str, part: str, name: str, which: str, epsilon: str = "0.25") -> float:
        return float(np.mean(numbers[title][part][name][which][epsilon]))

    lines = []

    def claim(words: str, value: Any, holds: Any, more: str = "") -> None:
        lines.append(f"- {words}: {value:.1f} ({'holds' if holds else 'DOES NOT HOLD'}){more}")

    for name, bound in (("softmax regression", 99), ("two layers", 95)):
        fgsm, noise = (at("MNIST", "attacks", name, which) for which in ("FGSM", "noise"))
        clean = at("MNIST", "attacks", name, "clean", "0")
        words = f"FGSM, ε = 0.25, MNIST, clipped: {name} errs on at least {bound} %"
        claim(words, fgsm, fgsm >= bound)
        share = 100 * (noise - clean) / (fgsm - clean)
        words = "noise of the same size costs at most half of that; its share in per cent"
        claim(f"{name}: {words}", share, share <= 50)
    stronger, weaker = [], []  # PGD's error less FGSM's, for each data set, network, ε
    for title in numbers:
        for name in MODELS:
            errors = numbers[title]["attacks"][name]
            for epsilon in errors["FGSM"]:
                more = np.mean(errors["PGD"][epsilon]) - np.mean(errors["FGSM"][epsilon])
                stronger.append(more)
                if more < 0:
                    weaker.append(f"{title}, {name}, ε = {epsilon}: {more:.2f}")
    cases = f"; weaker in {len(weaker)} of {len(stronger)} cases {weaker or ''}".rstrip()
    claim("PGD is never weaker than FGSM: mean difference", np.mean(stronger), not weaker, cases)
    for title, bound, cost in (("MNIST", 20, 1), ("Fashion-MNIST", 50, 8)):
        of = {name: at(title, "defences", name, "FGSM") for name in numbers[title]["defences"]}
        strong = {name: at(title, "defences", name, "PGD-40") for name in of}
        clean_of = {name: at(title, "defences", name, "clean", "0") for name in of}
        by_fgsm, by_pgd, none = "FGSM, α = 0.5", "PGD-5, ε ramp", "none"
        words = f"{title}: training on FGSM brings the error under FGSM below {bound} %"
        claim(words, of[by_fgsm], of[by_fgsm] < bound, f"; undefended: {of[none]:.1f}")
        price = clean_of[by_fgsm] - clean_of[none]
        claim(f"{title}: at a clean cost below {cost} points", price, price < cost)
        lines.append(
            f"- {title}: that network has learned FGSM, not to be robust: PGD-40 makes it err on "
            f"{strong[by_fgsm]:.1f} %."
        )
        words = f"{title}: training on PGD keeps the error under PGD-40 below 50 %"
        price = clean_of[by_pgd] - clean_of[none]
        claim(words, strong[by_pgd], strong[by_pgd] < 50, f", at a clean cost of {price:.1f}")
        shown = numbers[title]["transfer"]["CNN"]["softmax regression"]
        noise = at(title, "attacks", "softmax regression", "noise")
        words = f"{title}: FGSM's images of a CNN fool softmax regression more than noise does"
        claim(words, np.mean(shown), np.mean(shown) > noise, f"; noise: {noise:.1f}")
    return "## What was claimed\n\n" + "\n".join(lines)


if __name__ == "__main__":
    main()
