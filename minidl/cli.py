"""The command line: ``minidl`` or ``python -m minidl``.

What a command needs is imported inside it, so that ``minidl --help`` answers at once.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
import typer.core

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    name="minidl",
    help="A small deep learning engine to read, to learn from, and to train with.",
    epilog="Start with: minidl demo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

bench = typer.Typer(help="Measure minidl on this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")


class ImageByDefault(typer.core.TyperGroup):
    """``minidl caption IMAGE`` is ``minidl caption show IMAGE``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if args[0] in self.commands else ["show", *args])


caption = typer.Typer(
    cls=ImageByDefault,
    help="Captions of images: `minidl caption train`, then `minidl caption IMAGE --model RUN`.",
    no_args_is_help=True,
    context_settings={"ignore_unknown_options": True},
)
app.add_typer(caption, name="caption")

FAILED, MISUSED = 1, 2  # exit codes; stopped by a signal: 128 + its number
debug = False


def main() -> None:
    """Run the command line; ``--debug`` is understood anywhere on it."""
    global debug
    debug = "--debug" in sys.argv[1:]
    app([argument for argument in sys.argv[1:] if argument != "--debug"])


def command(
    function: Callable[..., None],
    group: typer.Typer = app,
    name: str | None = None,
    **settings: Any,
) -> Callable[..., None]:
    """Make a command of a function: what goes wrong is said in a paragraph, not a traceback.

    (But a mistake in minidl itself, a TypeError say, keeps its traceback.)
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        from minidl.train import Interrupted, NonFiniteError

        try:
            function(*args, **kwargs)
        except typer.Exit:
            raise
        except Interrupted as stop:
            arguments = [a for a in sys.argv[1:] if a not in ("--resume", "--overwrite")]
            rank, ranks = which_rank()
            if rank == 0:
                mpirun = f"mpirun -n {ranks} " if ranks > 1 else ""
                if "MINIDL_LAUNCHER" in os.environ:
                    mpirun = f"minidl launch -n {ranks} --elastic "
                say_error(
                    f"{stop}. Go on with:\n\n  {mpirun}minidl {shlex.join(arguments)} --resume",
                    "stopped",
                )
            raise typer.Exit(128 + stop.signum) from None
        except KeyboardInterrupt:
            say_error("by Ctrl-C", "stopped")
            raise typer.Exit(130) from None
        except NonFiniteError as error:
            fail(error, FAILED)
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            fail(error, MISUSED)

    # Typer reads types from here; they are strings, made by `from __future__ import annotations`.
    run.__signature__ = inspect.signature(function, eval_str=True)  # type: ignore[attr-defined]
    return group.command(name, **settings)(run)


def fail(error: Exception, code: int) -> NoReturn:
    rank, ranks = which_rank()
    if rank > 0:
        time.sleep(1)  # if rank 0 says the same, once is enough
    if debug:
        traceback.print_exc()
    where = f"minidl, rank {rank} of {ranks}" if rank > 0 else "minidl"
    say_error(str(error) or type(error).__name__, where)
    if "minidl.distributed" in sys.modules:
        from minidl import distributed as dist

        dist.launch.told(error)
        if ranks > 1:
            dist.communicator().abort(code)  # the others would wait for this one
    raise typer.Exit(code) from None


def which_rank() -> tuple[int, int]:
    """This process among those that mpirun has started, and how many they are."""
    dist = sys.modules.get("minidl.distributed")
    if dist is None or not dist.is_initialized():
        return 0, 1
    return dist.rank(), dist.world_size()


def say_error(text: str, title: str) -> None:
    from rich.console import Console

    # As plain text: markup in it, a path such as [data], is not for rich to interpret.
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"{title}: {text}", style="yellow" if title == "stopped" else "red", markup=False
    )


def use_threads(threads: int | None) -> None:
    import minidl

    if threads is not None and threads < 1:
        raise ValueError(f"--threads is at least 1, got {threads}")
    if threads is not None:
        minidl.set_num_threads(threads)


# Options that several commands share ------------------------------------------------------

Seed = Annotated[int, typer.Option(min=0, help="Of all random numbers.")]
Threads = Annotated[
    int | None, typer.Option(help="Threads of the C++ kernels.", show_default="all cores")
]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")] = False,
) -> None:
    pass


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
    root: Annotated[
        Path | None,
        typer.Option(help="Folder with its files.", show_default="$MINIDL_DATA, or ./data"),
    ] = None,
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
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the run in OUT was stopped.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew though OUT holds a run.")
    ] = False,
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
    dist.init()
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
    root: Annotated[
        Path | None,
        typer.Option(help="Folder with the data's files.", show_default="$MINIDL_DATA, or ./data"),
    ] = None,
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
def quantize(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder, or a checkpoint in it.")],
    calibrate: Annotated[
        int, typer.Option(min=1, help="So many training images tell the ranges.")
    ] = 512,
    root: Annotated[
        Path | None,
        typer.Option(help="Folder with the data's files.", show_default="$MINIDL_DATA, or ./data"),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="int8; of weights only: int4, float16 or bfloat16.")
    ] = "int8",
    scheme: Annotated[
        str, typer.Option(help="static: ranges from images; dynamic: at each call; weight_only.")
    ] = "static",
    per_channel: Annotated[
        bool, typer.Option(help="A scale for each output channel of a weight, or one for all.")
    ] = True,
    observer: Annotated[
        str, typer.Option(help="How ranges are chosen: minmax, percentile, mse, entropy.")
    ] = "minmax",
    weight_bits: Annotated[int, typer.Option(min=2, max=8, help="Levels of the weights.")] = 8,
    skip: Annotated[
        list[str] | None, typer.Option(help="A layer that stays float; may be given several times.")
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Also draw accuracy against bits, 8 to 2.")
    ] = False,
    microscope: Annotated[
        Path | None,
        typer.Option(
            metavar="PAGE.html", help="Also write a page: where int8's error comes from, by layer."
        ),
    ] = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Also write model.onnx, for other programs.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results.", show_default="DTYPE/ in the run")
    ] = None,
    threads: Threads = None,
) -> None:
    """Make a trained network smaller and faster, and see what that costs.

    Prints accuracy, size, time an image, and how many predictions stay as they were; writes the
    network (model.safetensors), the table (quantize.json) and with --sweep a plot (sweep.png).
    """
    from minidl.quantization import report
    from minidl.quantization.quantize import SCHEMES

    use_threads(threads)
    screen = console()
    choose("dtype", dtype, ["int8", "int4", "float16", "bfloat16"])
    choose("scheme", scheme, list(SCHEMES))
    if onnx and (dtype, scheme) != ("int8", "static"):
        raise ValueError(f"--onnx is for --dtype int8 --scheme static, got {dtype}, {scheme}")
    network, test_set, config = open_checkpoint(checkpoint, root)
    train_set, _ = open_data(config["data"], root, False, False)
    how: dict[str, Any] = {"per_channel": per_channel, "observer": observer, "skip": skip or []}
    batches = report.calibration(train_set, calibrate)
    with screen.status("quantizing ..."):
        small = report.narrow(network, batches, dtype, scheme, weight_bits=weight_bits, **how)
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    out = out or folder / (dtype if scheme == "static" else f"{dtype}-{scheme}")
    out.mkdir(parents=True, exist_ok=True)
    with screen.status("comparing on the test images ..."):
        rows = report.compare(network, small, test_set, out / "model.safetensors")
    screen.print(report.table(rows, f"{config['model']} on {config['data']}", dtype))
    found = {"checkpoint": str(checkpoint), "dtype": dtype, "scheme": scheme,
             "weight_bits": weight_bits, **how, **rows}  # fmt: skip
    files = ["model.safetensors", "quantize.json"]
    if sweep:
        with screen.status("from 8 bits to 2 ..."):
            found["sweep"] = report.sweep(network, batches, test_set, observer, how["skip"])
        report.draw_sweep(found["sweep"], rows["float32"]["accuracy"], out / "sweep.png")
        for bits, accuracy in found["sweep"].items():
            screen.print(f"{bits} bits: per channel {100 * accuracy['per channel']:.2f} %, "
                         f"per tensor {100 * accuracy['per tensor']:.2f} %")  # fmt: skip
        files.append("sweep.png")
    if onnx:
        from minidl.onnx import export

        export(small, batches[0][:1], out / "model.onnx")
        files.append("model.onnx")
    report.write(found, out / "quantize.json")
    screen.print(f"written to {out}/ ({', '.join(files)})")
    if microscope is not None:
        from minidl.quantization.microscope import look, page

        with screen.status("looking at each layer ..."):
            images = report.calibration(test_set, 256, batch_size=256)[0]
            view = look(network, batches, images, per_channel=per_channel, observer=observer,
                        skip=how["skip"], weight_bits=weight_bits)  # fmt: skip
            page(view, microscope, f"{config['model']} on {config['data']}, in int8")
        worst = view.worst()
        screen.print(f"most noise on the scores: {worst.alone.decibels:.1f} dB, by {worst.name}; "
                     f"written to {microscope}")  # fmt: skip


@functools.partial(command, group=caption, name="train")
def caption_train(
    data: Annotated[
        str, typer.Option(help="scenes (drawn here, no files needed), flickr8k or coco.")
    ] = "scenes",
    root: Annotated[
        Path | None,
        typer.Option(help="Folder with its files.", show_default="$MINIDL_DATA, or ./data"),
    ] = None,
    encoder: Annotated[
        str, typer.Option(help="cnn, resnet8, resnet20, resnet18, resnet34.")
    ] = "cnn",
    weights: Annotated[
        Path | None, typer.Option(help="A checkpoint of the encoder's network as a classifier.")
    ] = None,
    freeze: Annotated[
        bool, typer.Option("--freeze", help="Keep the encoder as it is; it then looks only once.")
    ] = False,
    decoder: Annotated[str, typer.Option(help="attend, or tell (without attention).")] = "attend",
    cell: Annotated[str, typer.Option(help="lstm, gru or rnn.")] = "lstm",
    hidden: Annotated[int, typer.Option(min=1, help="Units of the recurrent network.")] = 256,
    dropout: Annotated[float, typer.Option(min=0, max=1, help="Before each word.")] = 0.3,
    word_dropout: Annotated[
        float, typer.Option(min=0, max=1, help="Words that go in as <unk>: look, do not guess.")
    ] = 0.0,
    tokens: Annotated[str, typer.Option(help="word, character or bpe.")] = "word",
    min_count: Annotated[int, typer.Option(min=1, help="Leave rarer words out.")] = 1,
    image_size: Annotated[int, typer.Option(min=16, help="Height and width.")] = 64,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Training images.", show_default="all")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training captions.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Captions a step.")] = 64,
    lr: Annotated[float, typer.Option(help="Learning rate, at its peak.")] = 0.003,
    weight_decay: Annotated[
        float, typer.Option(min=0, help="Of AdamW: against pairs learned by heart.")
    ] = 0.05,
    beam: Annotated[int, typer.Option(min=1, help="Of the gallery's captions.")] = 3,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the run.", show_default="runs/caption-DATA")
    ] = None,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    threads: Threads = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the run in OUT was stopped.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew though OUT holds a run.")
    ] = False,
) -> None:
    """Train a network that says what is in an image.

    OUT gets what a run of `minidl train` has, vocabulary.json, and gallery.html: held-out images
    with what the model says of them. "Accuracy" is that of the next word, given the true ones.
    """
    import minidl
    from minidl import optim, transfer
    from minidl.captioning import caption_loader, metrics
    from minidl.captioning import train as captions
    from minidl.train import train

    use_threads(threads)
    screen = console()
    for what, name, names in (
        ("data", data, list(captions.DATASETS)), ("encoder", encoder, list(captions.ENCODERS)),
        ("decoder", decoder, list(captions.DECODERS)),
    ):  # fmt: skip
        choose(what, name, names)
    if freeze and weights is None:
        raise ValueError("--freeze keeps the encoder as it is, and it is random: give --weights")
    splits: Any = captions.open_data(data, root, image_size, limit)
    vocabulary = captions.vocabulary_of(splits.train, tokens, min_count, 1000)
    config = {
        "data": data, "encoder": encoder, "encoder_weights": str(weights) if weights else None,
        "freeze": freeze, "decoder": decoder, "cell": cell, "hidden": hidden, "dropout": dropout,
        "word_dropout": word_dropout, "image_size": image_size, "batch_size": batch_size,
        "seed": seed, "epochs": epochs, "vocabulary": captions.describe(vocabulary),
    }  # fmt: skip
    minidl.manual_seed(seed)
    model = captions.build(config, vocabulary).to(device)
    train_set, val = splits.train, splits.val
    if freeze:
        transfer.freeze(model, "encoder")
        with screen.status("the frozen encoder looks at every image once ..."):
            train_set, val = (captions.Annotated(model, part) for part in (train_set, val))
    ahead: dict[str, Any] = {"prefetch_thread": True, "device": device}
    loader = caption_loader(train_set, vocabulary, batch_size, shuffle=True, bucket=freeze, **ahead)
    val_loader = caption_loader(val, vocabulary, 200, **ahead)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = optim.AdamW(learned, lr, weight_decay=weight_decay)
    scheduler = make_scheduler("onecycle", optimizer, epochs, len(loader))
    out = out or Path("runs") / f"caption-{data}"
    parameters = sum(p.numel() for p in model.parameters())
    screen.print(
        f"[bold]{encoder}[/] and [bold]{decoder}[/] ({parameters:,} parameters, "
        f"{len(vocabulary):,} tokens) on [bold]{data}[/] ({len(loader.dataset):,} captions of "
        f"{len(train_set):,} images), {kernels_in_words()}"
    )
    with Live(screen, epochs, len(loader)) as live:

        def on_step(progress: Any, lr: float) -> None:
            if progress.epoch == progress.step == 1:  # the run is under way, in this folder
                vocabulary.save(out / "vocabulary.json")
            live.step(progress, lr)

        train(
            model, loader, val_loader, optimizer, scheduler, epochs=epochs, out=out,
            max_grad_norm=1.0, resume=resume, overwrite=overwrite, config=config,
            on_step=on_step, on_epoch=live.epoch,
        )  # fmt: skip
    model, _ = captions.open_captioner(out)
    with screen.status("captioning held-out images ..."):
        report = metrics.evaluate(model, splits.test, beam)
    captions.gallery(splits.test, report, out / "gallery.html", f"{data}: held-out images")
    bleu = "" if report.bleu is None else f", BLEU-4 {report.bleu[3]:.3f}"
    screen.print(
        f"held-out images: {100 * report.exact:.1f} % word for word right{bleu}; with the images "
        f"of others {100 * report.shuffled_exact:.1f} %\nwritten to {out}/ (gallery.html, "
        "vocabulary.json, log.jsonl, curves.png, best.safetensors)"
    )


@functools.partial(command, group=caption, name="show")
def caption_show(
    image: Annotated[Path, typer.Argument(help="An image file.")],
    model: Annotated[
        Path, typer.Option(help="A run of `minidl caption train`, or a checkpoint in it.")
    ],
    beam: Annotated[int, typer.Option(min=1, help="How many sentences to pursue.")] = 5,
    max_length: Annotated[int, typer.Option(min=1, help="Of a caption, in tokens.")] = 30,
    length_penalty: Annotated[
        float, typer.Option(min=0, help="In favour of longer sentences: 0 to 1.")
    ] = 0.0,
    out: Annotated[
        Path | None,
        typer.Option(help="The picture with the attention.", show_default="IMAGE-attention.png"),
    ] = None,
    threads: Threads = None,
) -> None:
    """Say what is in an image, how likely the sentence is, and what else could be said.

    Of a model with attention also a picture: where it looked for each word.
    """
    import math

    from rich.table import Table

    from minidl.captioning import ShowAttend
    from minidl.captioning import train as captions
    from minidl.tensor import Tensor

    use_threads(threads)
    captioner, config = captions.open_captioner(model)
    pixels = captions.read_image(image, config["image_size"])
    (found,) = captioner.hypotheses(Tensor(pixels[None]), beam, max_length, length_penalty)
    table = Table("caption", "likelihood", "a token", box=None, header_style="bold")
    for i, hypothesis in enumerate(found):
        text = captioner.vocabulary.decode(hypothesis.tokens) or "(nothing)"
        n = len(hypothesis.tokens)
        p = math.exp(hypothesis.log_likelihood), math.exp(hypothesis.log_likelihood / n)
        table.add_row(f"[bold]{text}[/]" if i == 0 else text, f"{p[0]:.3g}", f"{p[1]:.3f}")
    screen = console()
    screen.print(table)
    if isinstance(captioner.decoder, ShowAttend):
        (maps,) = captioner.attention(Tensor(pixels[None]), [found[0].tokens])
        words = captions.tokens_in_words(captioner, found[0].tokens)
        out = out or Path(f"{image.stem}-attention.png")
        captions.draw_attention(pixels, words, maps, out)
        screen.print(f"where it looked: {out}")


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


@command
def kernels(
    step: Annotated[
        str | None,
        typer.Option(metavar="OP", help="Step through this op's CUDA kernel, on the CPU."),
    ] = None,
    kernel: Annotated[
        str | None, typer.Option(help="Which one of them.", show_default="cuda")
    ] = None,
) -> None:
    """List the operations that have kernels, and which implementation runs.

    With --step matmul, conv2d, softmax, ... run the op's CUDA kernel on a small problem, a fiber
    for each CUDA thread, and show what it asks of the memory from one barrier to the next. Needs
    g++, and no GPU.
    """
    from rich.table import Table

    import minidl
    from minidl.backend.native import why_missing

    if step is not None or kernel is not None:
        return step_through(step or "matmul", kernel)
    rows = minidl.kernels()
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in rows.header:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*row)
    screen = console()
    screen.print(table)
    if why_missing:
        screen.print(f"\nNo C++ kernels: {why_missing}", markup=False, style="yellow")
    screen.print('\nSwap one in a program: minidl.use("conv2d", "formula")', markup=False)


def step_through(op: str, kernel: str | None) -> None:
    from minidl.step import debugger, describe, launches

    screen = console()
    shown: set[str] = set()
    found = launches(op, kernel)
    for launch in found:
        if launch.name not in shown:  # a recurrent layer launches the same one at every step
            shown.add(launch.name)
            screen.print("\n".join(describe(launch)), markup=False, soft_wrap=True)
    if found:
        screen.print(
            f"\nStop in it:\n\n  {debugger(found[-1], op, kernel)}", markup=False, soft_wrap=True
        )


@command
def doctor() -> None:
    """Say what is installed, what is used, and what to do about what is missing."""
    from minidl.doctor import show

    show(console())


@functools.partial(
    command, context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True}
)
def launch(
    program: Annotated[
        list[str], typer.Argument(help="A Python script, or a command; and its arguments.")
    ],
    n: Annotated[int, typer.Option("-n", min=1, help="How many ranks.")] = 2,
    elastic: Annotated[
        bool, typer.Option("--elastic", help="Go on after a rank was lost, till all is done.")
    ] = False,
    on_failure: Annotated[
        str,
        typer.Option(
            help="restart: all, from the last checkpoint. shrink, respawn: the others go on, with "
            "fewer or with another in its place (Open MPI)."
        ),
    ] = "restart",
    max_restarts: Annotated[int, typer.Option(min=0, help="Give up after so many.")] = 10,
    backoff: Annotated[
        float, typer.Option(min=0, help="Seconds before the first restart; doubled each time.")
    ] = 1.0,
    stall: Annotated[
        float, typer.Option(help="Say which rank is silent, after so many seconds.")
    ] = 5.0,
    give_up: Annotated[float, typer.Option(help="Kill it after so many.")] = 60.0,
    mpirun: Annotated[
        str | None,
        typer.Option(help="Which mpirun.", show_default="$MINIDL_MPIRUN, or that of this Python"),
    ] = None,
    mpi: Annotated[
        str, typer.Option(help="More options for mpirun, such as '--hostfile hosts'.")
    ] = "",
) -> None:
    """Start a program on several ranks, watch them, and start them again.

    `minidl launch -n 4 --elastic script.py` needs a script that trains in `dist.elastic.run` (see
    its documentation), or `minidl train`. It says which rank died of what, and which is silent,
    and returns 0 only if the program has come to its end. Ctrl-C leaves a checkpoint, from which
    the same command goes on.
    """
    from minidl.distributed.launch import launch

    code = launch(
        program, n, elastic=elastic, on_failure=on_failure, max_restarts=max_restarts,
        backoff=backoff, stall=stall, give_up=give_up, mpirun=mpirun, mpi=mpi,
    )  # fmt: skip
    raise typer.Exit(code)


@command
def scale(
    model: Annotated[
        str, typer.Option(help="resnet50, resnet18, vgg16, ...: a network of images.")
    ] = "resnet50",
    gpus: Annotated[
        str, typer.Option(help="How many: 8:1024 doubles from 8 to 1,024; or 1,8,64.")
    ] = "8:1024",
    cluster: Annotated[
        str, typer.Option(help="p100, p100-pcie, titanx or h100; the options below change it.")
    ] = "p100",
    batch: Annotated[int, typer.Option(min=1, help="Images a step on each GPU.")] = 32,
    images_per_second: Annotated[
        float | None,
        typer.Option(help="That one GPU trains on.", show_default="from the network's operations"),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(min=4, help="Height and width.", show_default="as the network was made for"),
    ] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="In one machine.", show_default="the cluster's")
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(help="Gbit/s between machines.", show_default="the cluster's"),
    ] = None,
    latency: Annotated[
        float | None,
        typer.Option(help="Microseconds of a message between them.", show_default="the cluster's"),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Measure both here: mpirun -n 2 minidl scale --measure."),
    ] = False,
    algorithm: Annotated[
        str, typer.Option(help="All-reduce between machines: ring, halving_doubling, tree, ...")
    ] = "ring",
    bucket: Annotated[float, typer.Option(min=0, help="MB of gradients summed at once.")] = 25.0,
    jitter: Annotated[
        float, typer.Option(min=0, max=1, help="Standard deviation of a GPU's time, as a share.")
    ] = 0.03,
    out: Annotated[
        Path | None, typer.Option(help="The picture.", show_default="runs/scale-MODEL.png")
    ] = None,
) -> None:
    """Predict how training would scale to many GPUs, and what will bound it.

    On paper (α-β-γ models and a timeline of a step), no GPU needed. Each GPU keeps its batch. The
    columns on the right: the share of a step that would be saved if there were no latency, no
    limit of bandwidth, no GPU that is slower than the others.
    """
    from rich.table import Table

    from minidl.distributed import costs
    from minidl.distributed import init as join

    communicator = join()
    machines = costs.CLUSTERS[choose("cluster", cluster, list(costs.CLUSTERS))]
    link = machines.between
    if measure:
        link = costs.measure_link(communicator)
    if bandwidth is not None or latency is not None:
        if (bandwidth is not None and bandwidth <= 0) or (latency or 0) < 0:
            raise ValueError("--bandwidth is positive, and --latency is not negative")
        link = costs.Link(
            link.alpha if latency is None else latency * 1e-6,
            link.beta if bandwidth is None else costs.gigabits(bandwidth, 0.0).beta, link.gamma,
        )  # fmt: skip
    machines = machines._replace(
        between=link, gpus_per_node=gpus_per_node or machines.gpus_per_node
    )
    if communicator.rank > 0:
        return
    layers = costs.profile(*network_and_image(model, image_size))
    predictions = costs.predict(
        layers, machines, costs.doubling(gpus), batch, images_per_second, algorithm, bucket * 1e6,
        jitter=jitter,
    )  # fmt: skip
    screen = console()
    parameters = sum(layer.parameters for layer in layers)
    operations = sum(layer.operations for layer in layers)
    screen.print(
        f"[bold]{model}[/]: {parameters / 1e6:,.1f} M parameters, {operations / 1e9:,.1f} Gflop "
        f"forward of an image; [bold]{cluster}[/]: {machines.about}; between machines α "
        f"{1e6 * link.alpha:,.1f} µs, {8e-9 / link.beta if link.beta else math.inf:,.1f} Gbit/s"
    )
    table = Table(box=None, header_style="bold", padding=(0, 1), pad_edge=False)
    for title in ("GPUs", "batch", "step (ms)", "images/s", "efficiency", *predictions[0].lost):
        table.add_column(title, justify="right", no_wrap=True)
    for p in predictions:
        lost = [
            f"[bold]{100 * share:.1f} %[/]" if name == p.bound else f"{100 * share:.1f} %"
            for name, share in p.lost.items()
        ]
        table.add_row(
            f"{p.gpus:,}", f"{p.batch:,}", f"{1000 * p.seconds:,.1f}",
            f"{p.images_per_second:,.0f}", f"{100 * p.efficiency:.1f} %", *lost,
        )  # fmt: skip
    screen.print(table)
    screen.print(costs.advice(predictions[-1]))
    out = out or Path("runs") / f"scale-{model}.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    costs.plot_scaling(predictions, f"{model} on {cluster}", out)
    screen.print(f"written to {out}")


bench_command = functools.partial(command, group=bench)


@bench_command
def ladder(
    op: Annotated[str, typer.Option(help="matmul, conv2d or all.")] = "all",
    size: Annotated[
        int | None,
        typer.Option(
            min=32,
            help="Side of the matrices, or of the images (8×64 channels, 3×3 kernels).",
            show_default="matmul: 512; conv2d: 56",
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="For each implementation.")] = 0.5,
    out: Annotated[Path, typer.Option(help="Folder for the plot and the numbers.")] = Path(
        "runs/bench"
    ),
    threads: Threads = None,
) -> None:
    """Climb the ladder of implementations, from plain loops to the packed kernels.

    Every rung computes the same, and is checked against the formula. The table says how long each
    takes, its share of the peak that a loop of multiply-adds on registers reaches here, and how
    many operations it does for each byte; the plot puts them under the machine's roofline.
    """
    from minidl import bench

    use_threads(threads)
    ops = list(bench.SIZES) if op == "all" else [choose("op", op, [*bench.SIZES, "all"])]
    bench.ladder(console(), ops, {o: size or bench.SIZES[o] for o in ops}, seconds, out)


@bench_command
def step(
    model: Annotated[str, typer.Option(help="As for minidl train.")] = "cnn",
    batch_size: Annotated[int, typer.Option(min=1, help="Images a step.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Steps to take the median of.")] = 30,
    conv2d: Annotated[
        str | None,
        typer.Option(
            help="Which implementation of conv2d (minidl kernels lists them).",
            show_default="the fastest",
        ),
    ] = None,
    threads: Threads = None,
) -> None:
    """Time the parts of a training step: forward, backward, optimizer; and its memory."""
    from minidl import bench

    use_threads(threads)
    bench.step(console(), model, batch_size, steps, conv2d)


# What the commands are made of ------------------------------------------------------------


def console() -> Console:
    """The screen; of several ranks, rank 0's."""
    from rich.console import Console

    return Console(highlight=False, quiet=which_rank()[0] > 0)


def open_data(name: str, root: Path | None, download: bool, augment: bool) -> tuple[Any, Any]:
    """The training and the test images of a dataset."""
    from minidl import data
    from minidl.data.augment import Compose, RandomCrop, RandomHorizontalFlip

    kinds: dict[str, tuple[Any, list[Any]]] = {
        "digits": (data.Digits, [RandomCrop(8, padding=1)]),
        "mnist": (data.MNIST, [RandomCrop(28, padding=2)]),
        "fashion-mnist": (data.FashionMNIST, [RandomHorizontalFlip()]),
        "cifar10": (data.CIFAR10, [RandomHorizontalFlip(), RandomCrop(32, padding=4)]),
    }
    kind, transforms = kinds[choose("dataset", name, list(kinds))]
    transform = Compose(transforms) if augment else None
    if kind is data.Digits:
        return data.Digits(train=True, transform=transform), data.Digits(train=False)
    try:
        return (
            kind(root, train=True, transform=transform, download=download),
            kind(root, train=False, download=download),
        )
    except data.MissingDataError as error:
        raise ValueError(f"{error}\nHere: --download, or --root FOLDER that holds them") from None


def share_of_batches(dataset: Any, batch_size: int, shuffle: bool = False, **how: Any) -> Any:
    """A loader of batches; where there are several ranks, of this one's share of each."""
    from minidl import distributed as dist
    from minidl.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

    if dist.world_size() == 1:
        return DataLoader(dataset, batch_size, shuffle, **how)
    sampler = RandomSampler(dataset) if shuffle else SequentialSampler(dataset)
    whole = BatchSampler(sampler, batch_size)
    return DataLoader(dataset, batch_sampler=dist.DistributedBatchSampler(whole), **how)


def network_for(model: str, dataset: Any) -> Any:
    """A network with random weights, of the size that a dataset's images and classes ask for."""
    from minidl import models

    channels, height, _ = dataset[0][0].shape
    shape = {} if model.startswith("resnet") else {"image_size": height}
    return models.get(model, num_classes=len(dataset.classes), in_channels=channels, **shape)


def network_and_image(model: str, size: int | None) -> tuple[Any, Any]:
    """A network as it comes, and an empty image, by default of the size that it was made for."""
    import minidl
    from minidl import models

    network = models.get(model) if size is None else models.get(model, image_size=size)
    made = {k: p.default for k, p in inspect.signature(models.registry[model]).parameters.items()}
    usual = made.get("image_size", 224 if made["num_classes"] == 1000 else 32)
    return network, minidl.zeros(1, made["in_channels"], size or usual, size or usual)


def open_checkpoint(path: Path, root: Path | None) -> tuple[Any, Any, dict[str, Any]]:
    """What a run of `minidl train` learned: the network, its test images, its settings.

    Raises:
        ValueError: no such file, not a checkpoint of `minidl train`, or the data are not there.
    """
    import minidl

    if path.is_dir():
        path = path / "best.safetensors"
    if not path.exists():
        raise ValueError(f"{path} is not there: give a run's folder, or a checkpoint in it")
    state = minidl.load(path)
    config = state.get("config") if isinstance(state, dict) else None
    if not isinstance(config, dict) or not {"data", "model"} <= config.keys():
        raise ValueError(f"{path} is not a checkpoint of `minidl train`: its config is missing")
    _, test_set = open_data(config["data"], root, False, False)
    network = network_for(config["model"], test_set)
    network.load_state_dict(state["model"])
    return network.eval(), test_set, config


def make_optimizer(name: str, network: Any, lr: float, momentum: float, weight_decay: float) -> Any:
    from minidl import optim

    parameters = network.parameters()
    if name == "sgd":
        return optim.SGD(parameters, lr, momentum, weight_decay=weight_decay, nesterov=momentum > 0)
    if name == "rmsprop":
        return optim.RMSprop(parameters, lr, momentum=momentum, weight_decay=weight_decay)
    kinds = {"adam": optim.Adam, "adamw": optim.AdamW}
    return kinds[choose("optimizer", name, [*kinds, "sgd", "rmsprop"])](
        parameters, lr, weight_decay=weight_decay
    )


def make_scheduler(name: str, optimizer: Any, epochs: int, batches: int) -> Any:
    """A schedule over the whole run, stepped after every batch."""
    from minidl.optim import lr_scheduler

    steps = epochs * batches
    match choose("scheduler", name, ["onecycle", "cosine", "step", "none"]):
        case "onecycle":
            # One step more than is taken: after the last one, too, the schedule is stepped.
            lr = optimizer.param_groups[0]["lr"]
            return lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=0.2)
        case "cosine":
            return lr_scheduler.CosineAnnealingLR(optimizer, steps)
        case "step":
            return lr_scheduler.MultiStepLR(optimizer, [steps // 2, steps * 3 // 4])
    return None


def choose(what: str, name: str, names: list[str]) -> str:
    """The name, if it is one of the names."""
    import difflib

    if name not in names:
        close = difflib.get_close_matches(name, names, 1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"no {what} is called {name!r}{hint} Choose one of: {', '.join(names)}")
    return name


def kernels_in_words() -> str:
    """ "C++ kernels (avx512, 2 threads)", or "NumPy"."""
    from minidl.backend.native import native

    if native is None:
        return "NumPy kernels"
    threads = native.get_num_threads()
    return f"C++ kernels ({native.isa()}, {threads} thread{'s' * (threads > 1)})"


class Live:
    """A line for each epoch, and a progress bar under them while an epoch is under way."""

    def __init__(self, screen: Console, epochs: int, batches: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.screen, self.epochs, self.batches = screen, epochs, batches
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]:>3}"),
            BarColumn(bar_width=32, complete_style="cyan"),
            TextColumn("loss {task.fields[loss]:.4f}  lr {task.fields[lr]:.2e}"),
            TimeRemainingColumn(),
            console=screen,
            transient=True,
        )
        self.task = self.progress.add_task(
            "", total=epochs * batches, epoch=1, loss=float("nan"), lr=0.0
        )
        self.best = -1.0

    def __enter__(self) -> Live:
        self.progress.start()
        self.screen.print(
            "epoch   train loss   test loss   test accuracy   images/s   seconds", style="bold"
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def step(self, progress: Any, lr: float) -> None:
        self.progress.update(
            self.task,
            completed=(progress.epoch - 1) * self.batches + progress.step,
            epoch=progress.epoch,
            loss=progress.loss_sum / progress.samples,
            lr=lr,
        )

    def epoch(self, record: dict[str, Any]) -> None:
        better = record["test_accuracy"] > self.best
        self.best = max(self.best, record["test_accuracy"])
        accuracy = f"{100 * record['test_accuracy']:13.2f} %"
        self.screen.print(
            f"{record['epoch']:5d}   {record['train_loss']:10.4f}   {record['test_loss']:9.4f}   "
            + (f"[bold cyan]{accuracy}[/]" if better else accuracy)
            + f"   {record['images_per_second']:6,.0f}   {record['seconds']:7.1f}"
        )


if os.environ.get("PYTHONUNBUFFERED") is None and hasattr(sys.stdout, "reconfigure"):
    sys.stdout.reconfigure(line_buffering=True)  # a log file shows each epoch as it ends
