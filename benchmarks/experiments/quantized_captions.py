"""What do few bits cost a captioner? BLEU-4 and likelihood of its sentences, by scheme.

    python benchmarks/experiments/quantized_captions.py

Trains one captioner with attention (an LSTM) on drawn scenes (ten minutes on one core), then
quantizes it, all of it or the decoder alone. Writes results/quantized_captions.md and .json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from captions import WIDTHS, claims, fit, vocabulary_of
from common import RESULTS, table

import minidl
from minidl.captioning import Captioner, Encoder, ShowAttend, convolutions, metrics
from minidl.cli import kernels_in_words
from minidl.data import ShapeScenes
from minidl.quantization import half, quantize

INT4 = {"scheme": "weight_only", "dtype": "int4"}
WAYS: dict[str, Any] = {
    "float32": lambda model: model,
    "float16": half,
    "int8, dynamic": lambda model: quantize(model, None, scheme="dynamic"),
    "int8, dynamic, decoder only": lambda model: quantize(
        model, None, scheme="dynamic", skip=["encoder"]
    ),
    "int8, weights of the decoder": lambda model: quantize(model, None, scheme="weight_only"),
    "int4, weights of the decoder, groups of 32": lambda model: quantize(model, None, **INT4),
    "int4, weights of the decoder, a scale a row": lambda model: quantize(
        model, None, **INT4, group_size=None
    ),
}
DYNAMIC = "int8, dynamic"


def size(model: Any) -> float:
    """Of its checkpoint, in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        minidl.save(model.state_dict(), file)
        return file.stat().st_size / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scenes", type=int, default=12_000, help="to train on")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--weights", type=Path, help="of a captioner trained so before: not again")
    parser.add_argument("--test", type=int, default=500, help="scenes to describe")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    minidl.manual_seed(0)
    train_set, test_set = ShapeScenes("train", args.scenes), ShapeScenes("val", args.test)
    words = vocabulary_of(train_set)
    model = Captioner(Encoder(convolutions(WIDTHS, more=2)), ShowAttend(words, WIDTHS[-1] + 2))
    if args.weights:
        model.load_state_dict(minidl.load(args.weights))
    else:
        fit(model, train_set, args.epochs, 0.003)
    found: dict[str, Any] = {}
    for name, make in WAYS.items():
        small = make(model)
        report = metrics.evaluate(small, test_set, beam=3)._asdict()
        said = report.pop("hypotheses")
        first = found["float32"]["said"] if found else said
        report["kept"] = sum(a == b for a, b in zip(said, first, strict=True)) / len(said)
        found[name] = {**report, "said": said, "MiB": size(small), "decoder": size(small.decoder)}
        print(name, report, flush=True)

    numbers = {name: {k: v for k, v in row.items() if k != "said"} for name, row in found.items()}
    exact = found["float32"]
    rows = [
        [name, f"{100 * row['bleu'][3]:.2f}", f"{100 * row['exact']:.1f} %",
         f"{100 * row['kept']:.1f} %", f"{row['perplexity']:.4f}", f"{row['MiB']:.2f}",
         f"{row['decoder'] / exact['decoder']:.2f}"]
        for name, row in found.items()
    ]  # fmt: skip
    lost = 100 * (exact["bleu"][3] - found[DYNAMIC]["bleu"][3])
    text = [
        "# A captioner in few bits",
        "Written by `benchmarks/experiments/quantized_captions.py`.",
        f"{args.scenes:,} scenes of 3×64×64, {args.epochs} epochs; attention, an LSTM of 256. "
        f"BLEU-4 (of 100) of {args.test} other scenes, beam 3. *Kept*: sentences that are word for "
        "word those of float32. *Perplexity* of the references. Nothing is calibrated or trained "
        "again.",
        table(["", "BLEU-4", "exact", "kept", "perplexity", "MiB", "decoder's share"], rows),
        claims([("int8 dynamic: at most 1 point of BLEU-4", lost, lost <= 1)]),
        f"{kernels_in_words()}.",
    ]
    (args.out / "quantized_captions.md").write_text("\n\n".join(text) + "\n")
    (args.out / "quantized_captions.json").write_text(json.dumps(numbers, indent=1) + "\n")
    print("\n\n".join(text))


if __name__ == "__main__":
    main()
