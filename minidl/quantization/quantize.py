"""`quantize`: a trained network in 8 bits (or 4), by one of three schemes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from minidl import nn
from minidl.quantization.bias_correction import correct_biases
from minidl.quantization.dynamic import dynamic
from minidl.quantization.equalize import equalize as equalized
from minidl.quantization.observers import OBSERVERS
from minidl.quantization.static import Lowering, Quantized, calibrate, depthwise, fold, learned
from minidl.quantization.weight_only import weight_only
from minidl.trace import trace

SCHEMES = ("static", "dynamic", "weight_only")


def quantize(
    model: nn.Module,
    calibration: Iterable[Any] | None = None,
    dtype: str = "int8",
    per_channel: bool = True,
    scheme: str = "static",
    *,
    observer: str = "minmax",
    skip: Sequence[str] = (),
    weight_bits: int = 8,
    group_size: int | None = 32,
    equalize: bool = False,
    bias_correction: bool = False,
) -> nn.Module:
    """A copy of a trained model that computes with 8-bit numbers; the model stays as it is.

    Of what `convert` made after quantization-aware training the static scheme takes the scales as
    they were learned; only values that no such layer reads are calibrated, and per_channel and
    weight_bits are for other layers.

    Args:
        model: it is run in eval mode.
        calibration: for the static scheme: batches of inputs as the model takes them (a tuple of
            them, if it takes several). From them it learns which range every value has. Some
            hundred images that are like those to come.
        dtype: "int8"; for weights only also "int4", "float16" or "bfloat16".
        per_channel: a scale for each output channel of a weight, else one for all.
        scheme: "static": all in integers, ranges known beforehand (`static.py`). "dynamic":
            products of integers, ranges found when the values come; also for recurrent layers and
            embeddings (`dynamic.py`). "weight_only": only the weights of linear and recurrent
            layers and embeddings are narrow (`weight_only.py`). The last two need no calibration.
        observer: how ranges are chosen, of `observers.OBSERVERS`.
        skip: dotted names of layers that stay in float.
        weight_bits: 2 to 8: fewer levels for weights (they are stored in 8 bits all the same).
        group_size: of int4: how many weights of a row share a scale; None: all of them.
        equalize: of the static scheme: first make the channels of successive layers alike
            (`equalize.py`): for one scale for all of them (per_channel=False).
        bias_correction: of the static scheme: let biases make up for what rounded weights do to
            the mean of each channel (`bias_correction.py`).

    Raises:
        ValueError: an unknown scheme, dtype or observer; no calibration batches; a layer without a
            form on integers (it is named); values or weights that are not finite.
        RuntimeError: the model cannot be traced (see `minidl.trace`).
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme {scheme!r}: expected one of {', '.join(SCHEMES)}")
    for option, wanted in (("equalize", equalize), ("bias_correction", bias_correction)):
        if wanted and scheme != "static":
            raise ValueError(f"{option} is for the static scheme, not {scheme!r}")
    if scheme == "weight_only":
        return weight_only(model, dtype, group_size=group_size, skip=skip)
    if dtype != "int8":
        raise ValueError(f"the {scheme} scheme makes int8, not {dtype!r}: see scheme='weight_only'")
    if not 2 <= weight_bits <= 8:
        raise ValueError(f"weight_bits is from 2 to 8, got {weight_bits}")
    if scheme == "dynamic":
        return dynamic(model, per_channel=per_channel, weight_bits=weight_bits, skip=skip)
    if observer not in OBSERVERS:
        raise ValueError(f"observer {observer!r}: expected one of {', '.join(OBSERVERS)}")
    batches = list(calibration or ())
    if not batches:
        raise ValueError("there are no batches to calibrate with: give at least one")
    first = batches[0] if isinstance(batches[0], tuple | list) else (batches[0],)
    graph = trace(model, *first)
    grids = learned(model, graph)
    graph = depthwise(fold(graph, grids))
    known = {name for name, _ in model.named_modules()}
    if unknown := [name for name in skip if name not in known]:
        raise ValueError(f"skip: {type(model).__name__} has no layer {unknown[0]!r}")
    lowering = Lowering(graph, skip, per_channel, weight_bits, grids)
    if equalize:
        if grids:
            raise ValueError("equalize would leave the scales that the network was trained with")
        lowering.graph = equalized(graph, lowering.is_product)
    lowering.take_learned()
    measured = calibrate(lowering.graph, lowering.wanted(), batches, observer)
    lowering.ranges.update(measured)
    if bias_correction:
        lowering.graph = correct_biases(
            lowering.graph, batches, lowering.is_product, lowering.rounded
        )
    return Quantized(lowering.lower())
