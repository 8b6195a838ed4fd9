"""`minidl demo`: a network learns to read handwritten digits, and shows what it learned."""

from __future__ import annotations

import inspect
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import minidl
from minidl import data, nn, optim, report
from minidl.data.augment import RandomCrop
from minidl.nn import functional as F
from minidl.train import train

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

GOAL = 0.975  # of the 360 held-out digits
SMOOTHING = 0.1  # the targets are 0.91 and 0.01 instead of 1 and 0: worth a whole per cent here


def network() -> nn.Sequential:
    """(N, 1, 8, 8) -> (N, 10): small, since the images are."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 64),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(64, 10),
    )


def neuron() -> tuple[minidl.Tensor, ...]:
    x = minidl.tensor([1.0, 2.0, -1.0])
    w = minidl.tensor([0.5, -0.2, 0.1], requires_grad=True)
    b = minidl.tensor(0.3, requires_grad=True)
    y = ((w * x).sum() + b).tanh()
    loss = (y - 1.0) ** 2
    return x, w, b, loss


def run(screen: Console, out: Path, epochs: int = 20, seed: int = 0) -> bool:
    """Train, and write OUT/index.html; whether the goal was reached."""
    from rich.live import Live

    minidl.manual_seed(seed)
    # Shifted by a pixel now and then, 1,437 digits are worth more.
    digits = data.Digits(train=True, transform=RandomCrop(8, padding=1))
    new_digits = data.Digits(train=False)
    model = network()
    loader = data.DataLoader(digits, batch_size=32, shuffle=True)
    optimizer = optim.Adam(model.parameters(), lr=0.005)
    scheduler = optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.005, total_steps=epochs * len(loader) + 1, pct_start=0.2
    )

    screen.print(
        f"\n[bold]A network learns to read.[/] {len(digits):,} digits to learn from, "
        f"{len(new_digits)} by other writers to be tested on.\n"
    )
    log: list[dict[str, Any]] = []
    with Live(progress_table(log, epochs), console=screen, auto_refresh=False) as live:

        def show(record: dict[str, Any]) -> None:
            log.append(record)
            live.update(progress_table(log, epochs), refresh=True)

        train(
            model, loader, data.DataLoader(new_digits, batch_size=360), optimizer, scheduler,
            epochs=epochs, out=out, overwrite=True, on_epoch=show,
            loss_function=nn.CrossEntropyLoss(label_smoothing=SMOOTHING),
        )  # fmt: skip

    page = out / "index.html"
    content = findings(model.eval(), digits, new_digits, log)
    content["facts"] |= {"seed": seed, "version": minidl.__version__}
    report.render(page, **content)
    return conclude(screen, page, log)


def progress_table(log: list[dict[str, Any]], epochs: int) -> Table:
    """The epochs so far, with a bar between 80 and 100 % for the accuracy."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 3, 0, 0))
    for title in ("epoch", "train loss", "test loss", "new digits read", "", "images/s"):
        table.add_column(title, justify="left" if title == "" else "right")
    for record in log:
        accuracy = record["test_accuracy"]
        table.add_row(
            f"{record['epoch']} of {epochs}",
            f"{record['train_loss']:.3f}",
            f"{record['test_loss']:.3f}",
            f"{100 * accuracy:.1f} %",
            Text("━" * round(max(0.0, accuracy - 0.8) / 0.2 * 30),
                 style="green" if accuracy >= GOAL else "cyan"),
            f"{record['images_per_second']:,.0f}",
        )  # fmt: skip
    return table


def conclude(screen: Console, page: Path, log: list[dict[str, Any]]) -> bool:
    accuracy = log[-1]["test_accuracy"]
    seconds = sum(record["seconds"] for record in log)
    screen.print(
        f"\n[bold]{100 * accuracy:.1f} %[/] of the new digits read correctly, after "
        f"{seconds:.1f} s of training.\n\nSee what it learned:  "
        f"[bold cyan]{page.resolve().as_uri()}[/]\n\nThen try",
        soft_wrap=True,
    )
    for line, what in NEXT:
        screen.print(f"  [bold]{line}[/]\n    [dim]{what}[/]", soft_wrap=True)
    if accuracy < GOAL:
        screen.print(
            f"\nThat is below the {100 * GOAL:.1f} % expected of 20 epochs.", style="bold red"
        )
    return accuracy >= GOAL


NEXT = [
    (
        "minidl train --data fashion-mnist --download --out runs/fashion",
        "Clothes instead of digits: 60,000 images. Kill it at any moment; --resume goes on, to "
        "the same bits.",
    ),
    (
        "python tutorials/01_*.py",
        "From one derivative to a network, in small steps; each runs.",
    ),
    ("minidl kernels", "Which operations run in C++ here, and how to swap them."),
    ("minidl doctor", "What is installed, and what to do about what is missing."),
]


# What the page shows ----------------------------------------------------------------------


def findings(
    model: nn.Module, digits: data.Digits, new_digits: data.Digits, log: list[dict[str, Any]]
) -> dict[str, Any]:
    """The content of the page, for `minidl.report.render`."""
    from minidl.cli import kernels_in_words

    images = minidl.tensor(new_digits.data)
    labels = new_digits.targets
    with minidl.no_grad():
        probabilities = F.softmax(model(images), dim=1).numpy()
    predicted = probabilities.argmax(axis=1)
    confusion = np.zeros((10, 10), dtype=int)
    np.add.at(confusion, (labels, predicted), 1)
    wrong = np.flatnonzero(predicted != labels)
    wrong = wrong[np.argsort(-probabilities[wrong, predicted[wrong]])]

    # For each digit, the right answer that it is surest of.
    sure = np.where(predicted == labels, probabilities.max(axis=1), 0)
    examples = [int(np.where(labels == d, sure, -1).argmax()) for d in range(10)]
    seconds = sum(record["seconds"] for record in log)
    return {
        "facts": {
            "train": len(digits),
            "test": len(new_digits),
            "accuracy": log[-1]["test_accuracy"],
            "wrong": len(wrong),
            "seconds": seconds,
            "epochs": len(log),
            "parameters": sum(p.numel() for p in model.parameters()),
            "images_per_second": float(np.median([r["images_per_second"] for r in log])),
            "kernels": kernels_in_words(),
            "confused": report.confused_most(confusion),
        },
        "charts": {
            "loss": report.chart(
                {name: [r[f"{name}_loss"] for r in log] for name in ("train", "test")}, log=True
            ),
            "accuracy": report.chart(
                {"test": [r["test_accuracy"] for r in log]}, percent=True, goal=GOAL
            ),
        },
        "example": report.pixels(images.numpy()[examples[3], 0], limit=1.0),
        "filters": filters(model, images[examples[3] : examples[3] + 1]),
        "saliency": saliency(model, images, labels, examples),
        "mistakes": [
            report.mistake(images.numpy()[i, 0], probabilities[i], int(labels[i])) for i in wrong
        ],
        "confusion": report.confusion_cells(confusion),
        **neuron_explained(),
        "next": [list(pair) for pair in NEXT],
    }


def filters(model: Any, image: minidl.Tensor) -> list[dict[str, str]]:
    """The first layer's filters, and what each answers to an image (1, 1, H, W)."""
    with minidl.no_grad():
        answers = model[0](image).numpy()[0]
    limit = float(np.abs(answers).max())
    return [
        {
            "weight": report.pixels(weight[0], signed=True),
            "answer": report.pixels(answer, signed=True, limit=limit),
        }
        for weight, answer in zip(model[0].weight.numpy(), answers)
    ]


def saliency(
    model: nn.Module, images: minidl.Tensor, labels: np.ndarray, examples: list[int]
) -> list[dict[str, Any]]:
    """The derivative of the true digit's score by each pixel (Simonyan et al. 2014, section 3).

    One backward pass for all images, since no image's score depends on another image.
    """
    images = images.detach().requires_grad_()
    scores = model(images)
    (gradient,) = minidl.grad(scores[np.arange(len(labels)), labels].sum(), images)
    assert gradient is not None
    pixels, gradients = images.numpy()[:, 0], gradient.numpy()[:, 0]
    return [
        {
            "image": report.pixels(pixels[i], limit=1.0),
            "gradient": report.pixels(gradients[i], signed=True),
            "mean": report.pixels(gradients[labels == digit].mean(axis=0), signed=True),
            "predicted": int(scores.numpy()[i].argmax()),
        }
        for digit, i in enumerate(examples)
    ]


def neuron_explained() -> dict[str, str]:
    """The source of `neuron`, its drawn tape, and the gradients that the walk finds."""
    x, w, b, loss = neuron()
    picture = minidl.draw(loss, {"x": x, "w": w, "b": b, "loss": loss})
    before = loss.item()
    started = time.perf_counter()
    loss.backward()
    micro = 1e6 * (time.perf_counter() - started)
    assert w.grad is not None and b.grad is not None
    body = textwrap.dedent("".join(inspect.getsourcelines(neuron)[0][1:-1]))
    found = (
        f"loss.backward()   # {micro:.0f} µs\n\n"
        f"loss    {before:.4f}\n"
        f"w.grad  [{', '.join(f'{v:.4f}' for v in w.grad.tolist())}]\n"
        f"b.grad  {b.grad.item():.4f}"
    )
    return {"expression": f"{body}\n{found}", "graph": str(picture)}
