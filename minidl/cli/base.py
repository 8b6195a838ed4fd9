"""What every command of the command line has: the app, errors in a paragraph, shared options, and
what the commands are made of."""

from __future__ import annotations

import functools
import inspect
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
Root = Annotated[
    Path | None,
    typer.Option(help="Folder with the data's files.", show_default="$MINIDL_DATA, or ./data"),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where the run in OUT was stopped.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start anew though OUT holds a run.")]
Threads = Annotated[
    int | None, typer.Option(help="Threads of the C++ kernels.", show_default="all cores")
]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")] = False,
) -> None:
    pass


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
