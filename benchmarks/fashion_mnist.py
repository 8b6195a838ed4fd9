"""Fashion-MNIST (or MNIST) with the default CNN, in minidl and in PyTorch.

    python benchmarks/fashion_mnist.py --root FOLDER [--data mnist] [--epochs 15 --augment]

The script is written once: both libraries are handed to the same functions. Both start from the
same weights and see the same batches in the same order, made by minidl's loader; only the masks
of dropout differ. Epochs alternate, so that whatever else the machine does slows both. Writes
results/DATA.md beside this file.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

import minidl
import minidl.optim
from minidl.backend.native import native
from minidl.cli import kernels_in_words, open_data
from minidl.data import DataLoader

LR, BATCH, SMOOTHING = 0.004, 64, 0.1  # the defaults of `minidl train`


def network(lib: ModuleType) -> Any:
    nn = lib.nn
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(3136, 128),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(128, 10),
    )


class Run:
    """One library's training run."""

    def __init__(self, lib: ModuleType, loaders: tuple[DataLoader, DataLoader], epochs: int):
        self.lib, (self.train_loader, self.test_loader) = lib, loaders
        self.model = network(lib)
        self.optimizer = lib.optim.Adam(self.model.parameters(), lr=LR)
        steps = epochs * len(self.train_loader) + 1
        self.scheduler = lib.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=LR, total_steps=steps, pct_start=0.2
        )
        self.seconds: list[float] = []
        self.accuracies: list[float] = []

    def batches(self, loader: DataLoader) -> Any:
        for images, labels in loader:
            yield [self.lib.from_numpy(np.array(x.numpy())) for x in (images, labels)]

    def epoch(self) -> None:
        cross_entropy = self.lib.nn.functional.cross_entropy
        self.model.train()
        start = time.perf_counter()
        for images, labels in self.batches(self.train_loader):
            self.optimizer.zero_grad()
            loss = cross_entropy(self.model(images), labels, label_smoothing=SMOOTHING)
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
        self.seconds.append(time.perf_counter() - start)

        self.model.eval()
        right = 0
        with self.lib.no_grad():
            for images, labels in self.batches(self.test_loader):
                right += (self.model(images).argmax(1) == labels).sum().item()
        self.accuracies.append(right / len(self.test_loader.dataset))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="fashion-mnist", choices=["mnist", "fashion-mnist"])
    parser.add_argument("--root", type=Path, help="default: $MINIDL_DATA")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--augment", action="store_true")
    parser.add_argument("--threads", type=int, default=native.get_num_threads() if native else 2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    if native:
        native.set_num_threads(args.threads)
    minidl.manual_seed(args.seed)
    torch.manual_seed(args.seed)

    train_set, test_set = open_data(args.data, args.root, False, args.augment)
    runs = [
        Run(
            lib,
            (DataLoader(train_set, BATCH, shuffle=True), DataLoader(test_set, 500)),
            args.epochs,
        )
        for lib in (minidl, torch)
    ]
    ours, theirs = runs
    weights = {k: torch.tensor(v.numpy()) for k, v in ours.model.state_dict().items()}
    theirs.model.load_state_dict(weights)

    print(f"{kernels_in_words()}, PyTorch {torch.__version__}, {args.threads} threads")
    rows = ["| epoch | minidl | PyTorch | minidl, s | PyTorch, s | PyTorch's time / ours |"]
    rows.append("|---|---|---|---|---|---|")
    print("\n".join(rows))
    for epoch in range(args.epochs):
        for run in runs if epoch % 2 == 0 else reversed(runs):
            run.epoch()
        rows.append(
            f"| {epoch + 1} | {100 * ours.accuracies[-1]:.2f} % | {100 * theirs.accuracies[-1]:.2f}"
            f" % | {ours.seconds[-1]:.1f} | {theirs.seconds[-1]:.1f} | "
            f"{theirs.seconds[-1] / ours.seconds[-1]:.2f} |"
        )
        print(rows[-1], flush=True)

    ratio = float(np.median([b / a for a, b in zip(ours.seconds, theirs.seconds)]))
    verdict = (
        f"After {args.epochs} epochs: minidl {100 * ours.accuracies[-1]:.2f} %, PyTorch "
        f"{100 * theirs.accuracies[-1]:.2f} %. PyTorch's time / minidl's, median over the epochs: "
        f"{ratio:.2f} (above 1, minidl is the faster)."
    )
    print(verdict)
    path = Path(__file__).parent / "results" / f"{args.data.replace('-', '_')}_{args.epochs}.md"
    path.parent.mkdir(exist_ok=True)
    settings = (
        f"batches of {BATCH}, Adam, one-cycle to {LR}, label smoothing {SMOOTHING}"
        + ", augmented" * args.augment
    )
    path.write_text(
        f"# {args.data}, {args.epochs} epochs\n\n"
        f"The default CNN, {settings}, seed {args.seed}; {kernels_in_words()} against PyTorch "
        f"{torch.__version__}, {args.threads} threads each.\n\n" + "\n".join(rows)
        + f"\n\n{verdict}\n"
    )  # fmt: skip


if __name__ == "__main__":
    main()
