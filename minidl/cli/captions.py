"""minidl caption train, minidl caption IMAGE."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from minidl.cli.base import (
    Live,
    Overwrite,
    Resume,
    Root,
    Seed,
    Threads,
    app,
    choose,
    command,
    console,
    kernels_in_words,
    make_scheduler,
    use_threads,
)


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


@functools.partial(command, group=caption, name="train")
def caption_train(
    data: Annotated[
        str, typer.Option(help="scenes (drawn here, no files needed), flickr8k or coco.")
    ] = "scenes",
    root: Root = None,
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
    resume: Resume = False,
    overwrite: Overwrite = False,
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
