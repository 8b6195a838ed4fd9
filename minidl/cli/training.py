"""minidl demo, train, attack, augment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from minidl.cli.base import (
    FAILED,
    Live,
    Overwrite,
    Resume,
    Root,
    Seed,
    Threads,
    choose,
    command,
    console,
    kernels_in_words,
    make_optimizer,
    make_scheduler,
    network_for,
    open_checkpoint,
    open_data,
    share_of_batches,
    use_threads,
)


@command
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the page and the run.")] = Path("runs/demo"),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training digits.")] = 20,
    seed: Seed = 0,
    threads: Threads = None,
) -> None:
    """Watch a network learn to read digits, and see what it learned.

    Trains a small convolutional network on the 1,437 handwritten digits that come with
    scikit-learn, tests it on 360 by other writers, and writes a page with its curves, filters,
    gradients and mistakes. Takes less than a minute. Exits with 1 below 97.5 %.
    """
    from minidl.demo import run

    use_threads(threads)
    if not run(console(), out, epochs, seed):
        raise typer.Exit(FAILED)


@command
def train(
    data: Annotated[
        str, typer.Option(help="The dataset: digits, mnist, fashion-mnist or cifar10.")
    ] = "digits",
    root: Root = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch the files if they are not there.")
    ] = False,
    model: Annotated[
        str, typer.Option(help="linear, mlp, lenet, cnn, resnet8, resnet20, resnet18 or resnet34.")
    ] = "cnn",
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Passes over the training images.", show_default="5; digits: 20"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the run.", show_default="runs/DATA-MODEL"),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Images a step, of all ranks.", show_default="64; digits: 32"),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Learning rate (its peak, with onecycle).",
            show_default="0.004; digits: 0.005; with sgd 0.05, with rmsprop 0.001",
        ),
    ] = None,
    optimizer: Annotated[str, typer.Option(help="adam, adamw, sgd or rmsprop.")] = "adam",
    momentum: Annotated[float, typer.Option(help="Of sgd and rmsprop.")] = 0.9,
    weight_decay: Annotated[float, typer.Option(help="Pull of the weights to zero.")] = 0.0,
    label_smoothing: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the target spread over all classes.")
    ] = 0.1,
    scheduler: Annotated[
        str,
        typer.Option(help="onecycle, cosine, step (÷10 after 1/2 and 3/4 of the epochs), none."),
    ] = "onecycle",
    augment: Annotated[
        bool | None,
        typer.Option(
            "--augment/--no-augment",
            help="Shift the training images at random; mirror clothes and photographs too.",
            show_default="from 10 epochs on",
        ),
    ] = None,
    max_grad_norm: Annotated[
        float | None, typer.Option(help="Clip the norm of the gradient.", show_default="no")
    ] = None,
    amp: Annotated[
        str | None,
        typer.Option(
            help="Mixed precision: float16 or bfloat16. To see what it does: a CPU gets slower.",
            show_default="no",
        ),
    ] = None,
    seed: Seed = 0,
    device: Annotated[
        str, typer.Option(help="cpu, cuda or cuda:N; with cuda, each rank takes a GPU of its own.")
    ] = "cpu",
    threads: Threads = None,
    checkpoint_seconds: Annotated[
        float, typer.Option(min=0, help="Write a checkpoint this often within an epoch.")
    ] = 30.0,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Train a classifier of images.

    OUT gets log.jsonl (a line an epoch), last.safetensors and best.safetensors (checkpoints), and
    curves.png. A run that was stopped, however rudely, goes on with --resume as if nothing had
    happened, to the same bits.

    `mpirun -n 2 minidl train ...` cuts every batch over two processes. They learn what one process
    learns, up to rounding (but draw other numbers for dropout). `minidl launch -n 2 --elastic
    minidl train ...` goes on when one of them dies.

    Recommended: the defaults for a quick result (Fashion-MNIST: about 92 % after 5 epochs), and
    --epochs 15 for a good one (above 93 %).
    """
    from rich.table import Table

    import minidl
    from minidl import distributed as dist
    from minidl import nn
    from minidl.backend import parse_device
    from minidl.train import train

    use_threads(threads)
    dist.init("cpu" if device == "cpu" else None)
    parse_device(device)
    if device == "cuda":
        minidl.cuda.set_device_by_rank()
    small = data == "digits"
    epochs = epochs or (20 if small else 5)
    batch_size = batch_size or (32 if small else 64)
    augment = epochs >= 10 if augment is None else augment
    train_set, test_set = open_data(data, root, download, augment)

    lrs = {"adam": 0.005 if small else 0.004, "sgd": 0.05, "rmsprop": 0.001}
    lrs["adamw"] = lrs["adam"]
    lr = lrs[choose("optimizer", optimizer, list(lrs))] if lr is None else lr
    config = {
        "data": data, "model": model, "batch_size": batch_size, "augment": augment, "seed": seed,
        "scheduler": scheduler if scheduler == "none" else f"{scheduler} over {epochs} epochs",
        "max_grad_norm": max_grad_norm, "label_smoothing": label_smoothing,
    }  # fmt: skip
    out = out or Path("runs") / f"{data}-{model}"

    def attempt(job: dist.elastic.Job) -> list[dict[str, Any]]:
        """Under `minidl launch --elastic` there may be several, on fewer ranks each."""
        ranks, screen = dist.communicator(), console()
        minidl.manual_seed(seed)
        network = network_for(model, test_set).to(device)
        if ranks.world_size > 1:
            network = dist.DataParallel(
                dist.SyncBatchNorm.convert_sync_batchnorm(network),
                check_finite=amp != "float16",  # there the scaler leaves such a step out
            )
        ahead: dict[str, Any] = {"prefetch_thread": True, "device": device}
        train_loader = share_of_batches(train_set, batch_size, shuffle=True, **ahead)
        test_loader = share_of_batches(test_set, 500, **ahead)
        optimizer_ = make_optimizer(optimizer, network, lr, momentum, weight_decay)
        scheduler_ = make_scheduler(scheduler, optimizer_, epochs, len(train_loader))

        parameters = sum(p.numel() for p in network.parameters())
        screen.print(
            f"[bold]{model}[/] ({parameters:,} parameters) on [bold]{data}[/] ({len(train_set):,} "
            f"+ {len(test_set):,} images), {kernels_in_words()}"
            + (f" on each of {ranks.world_size} ranks" if ranks.world_size > 1 else "")
        )
        with Live(screen, epochs, len(train_loader)) as live:
            return train(
                network, train_loader, test_loader, optimizer_, scheduler_,
                epochs=epochs, out=out, max_grad_norm=max_grad_norm, amp=amp,
                loss_function=nn.CrossEntropyLoss(label_smoothing=label_smoothing),
                resume=resume or job.attempt > 0, overwrite=overwrite and job.attempt == 0,
                config=config, checkpoint_seconds=checkpoint_seconds,
                on_step=live.step, on_epoch=live.epoch,
            )  # fmt: skip

    log = dist.elastic.run(attempt)
    best = max(log, key=lambda record: record["test_accuracy"])
    table = Table.grid(padding=(0, 2))
    table.add_row("test accuracy", f"[bold]{100 * log[-1]['test_accuracy']:.2f} %[/]")
    table.add_row("best", f"{100 * best['test_accuracy']:.2f} % (epoch {best['epoch']})")
    table.add_row("training time", f"{sum(record['seconds'] for record in log):.1f} s")
    table.add_row("written to", f"{out}/ (log.jsonl, curves.png, best.safetensors)")
    console().print(table)


@command
def attack(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder, or a checkpoint in it.")],
    root: Root = None,
    epsilon: Annotated[
        list[float] | None,
        typer.Option(
            help="How much a pixel of [0, 1] may change; may be given several times.",
            show_default="0.01 0.02 0.05 0.1 0.15 0.2 0.25 0.3",
        ),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="How many test images to attack.")] = 1000,
    steps: Annotated[int, typer.Option(min=1, help="Of BIM and PGD.")] = 10,
    show: Annotated[
        float | None, typer.Option(help="The epsilon of the sheet.", show_default="the middle one")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results.", show_default="attack/ in the run")
    ] = None,
    seed: Seed = 0,
    threads: Threads = None,
) -> None:
    """See how little it takes to fool a trained network.

    Attacks test images with random signs (the control), FGSM, BIM and PGD, for each epsilon, and
    writes into OUT the table (attack.json), accuracy against epsilon (curves.png), and a sheet of
    images before and after (sheet.png).
    """
    from rich.table import Table

    from minidl.robustness import ATTACKS, draw_curves, draw_sheet, measure, write

    use_threads(threads)
    screen = console()
    network, test_set, config = open_checkpoint(checkpoint, root)
    epsilons = sorted(set(epsilon or [0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]) - {0.0})
    if not epsilons or not all(0 < e <= 1 for e in epsilons):
        raise ValueError(f"epsilon is in (0, 1], the range of a pixel, got {epsilons or [0.0]}")
    show = epsilons[len(epsilons) // 2] if show is None else show
    if not 0 < show <= 1:
        raise ValueError(f"--show is an epsilon in (0, 1], got {show}")
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    out = out or folder / "attack"
    out.mkdir(parents=True, exist_ok=True)

    screen.print(
        f"[bold]{config['model']}[/] on {min(images, len(test_set)):,} test images of "
        f"[bold]{config['data']}[/]; pixels from 0 to 1, clipped; {steps} steps"
    )
    table = Table("epsilon", *ATTACKS, box=None, header_style="bold")
    with screen.status("attacking ...") as status:
        rows = []
        for row in measure(network, test_set, epsilons, images, steps, seed):
            rows.append(row)
            table.add_row(f"{row['epsilon']:g}", *(f"{100 * row[a]:.1f} %" for a in ATTACKS))
            status.update(f"attacking ... epsilon {row['epsilon']:g} done")
    screen.print(table)
    write(rows, {"checkpoint": str(checkpoint), "steps": steps, "seed": seed, **config}, out)
    draw_curves(rows, out / "curves.png")
    draw_sheet(network, test_set, show, out / "sheet.png")
    screen.print(f"written to {out}/ (attack.json, curves.png, sheet.png)")


@command
def augment(
    image: Annotated[
        list[Path], typer.Argument(help="An image file; a second one to mix it with.")
    ],
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("runs/augment.png"),
    columns: Annotated[int, typer.Option(min=1, help="Versions of each transform.")] = 8,
    size: Annotated[int, typer.Option(min=8, help="Shorter side, in pixels.")] = 96,
    seed: Seed = 0,
) -> None:
    """See what each random transform makes of an image, on a contact sheet.

    Ask of every row: is it still the same thing? Augment with the rows where it is.
    """
    import minidl
    from minidl.data.contact_sheet import draw_contact_sheet, read_images

    minidl.manual_seed(seed)
    images = read_images(image, size)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = draw_contact_sheet(images, out, columns)
    console().print(f"{rows} transforms, {columns} versions each: written to {out}")
