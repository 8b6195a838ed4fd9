"""minidl quantize."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from minidl.cli.base import (
    Root,
    Threads,
    choose,
    command,
    console,
    open_checkpoint,
    open_data,
    use_threads,
)


@command
def quantize(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder, or a checkpoint in it.")],
    calibrate: Annotated[
        int, typer.Option(min=1, help="So many training images tell the ranges.")
    ] = 512,
    root: Root = None,
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
