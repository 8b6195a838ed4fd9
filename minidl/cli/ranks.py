"""minidl launch, scale: many ranks, in earnest and on paper."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Annotated

import typer

from minidl.cli.base import choose, command, console, network_and_image


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
    address: Annotated[
        str | None,
        typer.Option(help="By which those hosts find this one.", show_default="its full name"),
    ] = None,
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
        backoff=backoff, stall=stall, give_up=give_up, mpirun=mpirun, mpi=mpi, address=address,
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
