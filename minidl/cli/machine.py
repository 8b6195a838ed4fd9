"""minidl kernels, doctor, bench."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from minidl.cli.base import Threads, app, choose, command, console, use_threads

bench = typer.Typer(help="Measure minidl on this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")


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
