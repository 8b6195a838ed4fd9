"""A training step of the captioner against the same network in PyTorch.

    python benchmarks/captioning.py          # needs torch; --quick: a rough look

The same 64 scenes and captions, shapes and optimizer; both know how many captions still run at each
step and compute only those. Both do at once, for all steps, what need not wait: the words'
embedding and the output layer. How it measures: see turns.py. Writes results/captioning.md, .json
and .png beside this file.
"""

from __future__ import annotations

import itertools
from typing import Any

from turns import Call, Case, Section, main

HIDDEN, EMBEDDING, ATTENTION = 256, 128, 64
WIDTHS, MORE = (16, 32, 64, 128), 2


def batch_of_scenes(image_size: int) -> tuple[Any, Any, Any]:
    """Vocabulary, batch, and the words that come out."""
    from minidl.captioning import Vocabulary, caption_loader
    from minidl.data import ShapeScenes

    scenes = ShapeScenes("train", 64, image_size=image_size)
    vocabulary = Vocabulary.build(itertools.chain(*scenes.captions))
    batch, targets = next(iter(caption_loader(scenes, vocabulary, 64, shuffle=True, seed=0)))
    return vocabulary, batch, targets


def minidl_step(decoder: str, frozen: bool) -> Call:
    import minidl.nn.functional as F
    from minidl import optim, transfer
    from minidl.captioning import Captioner, Encoder, ShowAndTell, ShowAttend, convolutions

    vocabulary, batch, targets = batch_of_scenes(64)
    sizes: Any = (vocabulary, WIDTHS[-1] + 2, HIDDEN, EMBEDDING)
    encoder = Encoder(convolutions(WIDTHS, more=MORE))
    if decoder == "attend":
        model = Captioner(encoder, ShowAttend(*sizes, attention=ATTENTION))
    else:
        model = Captioner(encoder, ShowAndTell(*sizes))
    if frozen:
        transfer.freeze(model, "encoder")
        batch = batch._replace(images=model.eval().annotations(batch.images).detach())
    model.train()
    optimizer = optim.Adam([p for p in model.parameters() if p.requires_grad])

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(batch), targets).backward()
        optimizer.step()

    return step


def torch_step(decoder: str, frozen: bool) -> Call:
    import torch
    from torch import nn
    from torch.nn import functional as F

    vocabulary, batch, targets = batch_of_scenes(64)
    images, words, lengths, targets = (torch.tensor(x.numpy()) for x in (*batch[:3], targets))
    running = [int((lengths > t).sum()) for t in range(int(lengths[0]))]
    features, V = WIDTHS[-1] + 2, len(vocabulary)

    layers: list[nn.Module] = []
    for i, (c, o) in enumerate(itertools.pairwise((3, *WIDTHS, *(WIDTHS[-1],) * MORE))):
        layers += [nn.Conv2d(c, o, 3, padding=1, bias=False)]
        layers += [nn.MaxPool2d(2)] if i < len(WIDTHS) - 1 else []
        layers += [nn.BatchNorm2d(o), nn.ReLU()]
    cnn = nn.Sequential(*layers)

    def annotations() -> Any:
        a = cnn(images)
        y, x = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in a.shape[2:]), indexing="ij")
        where = torch.stack([y, x]).expand(len(a), -1, -1, -1)
        return torch.cat([a, where], dim=1).flatten(2).transpose(1, 2)

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(V, EMBEDDING)
            self.cell = nn.LSTMCell(EMBEDDING + features, HIDDEN)
            self.first = nn.Linear(features, 2 * HIDDEN)
            self.U, self.W = nn.Linear(features, ATTENTION), nn.Linear(HIDDEN, ATTENTION, False)
            self.w, self.beta = nn.Linear(ATTENTION, 1, False), nn.Linear(HIDDEN, 1)
            self.L_h, self.L_z = nn.Linear(HIDDEN, EMBEDDING), nn.Linear(features, EMBEDDING, False)
            self.output = nn.Linear(EMBEDDING, V)

        def forward(self, a: Any) -> Any:
            h, c = torch.tanh(self.first(a.mean(1))).chunk(2, dim=1)
            Ua, x = self.U(a), self.embed(words)
            said = []
            for t, n in enumerate(running):
                h, c, a, Ua = h[:n], c[:n], a[:n], Ua[:n]
                e = self.w(torch.tanh(Ua + self.W(h)[:, None])).squeeze(2)
                z = torch.bmm(e.softmax(1)[:, None], a)[:, 0]
                z = torch.sigmoid(self.beta(h)) * z
                h, c = self.cell(torch.cat([x[:n, t], z], dim=1), (h, c))
                said.append((x[:n, t], h, z))
            x, h, z = (torch.cat(parts) for parts in zip(*said))
            return self.output(F.dropout(torch.tanh(x + self.L_h(h) + self.L_z(z)), 0.3))

    class Tell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.image = nn.Embedding(V, EMBEDDING), nn.Linear(features, EMBEDDING)
            self.rnn, self.output = nn.LSTM(EMBEDDING, HIDDEN), nn.Linear(HIDDEN, V)

        def forward(self, a: Any) -> Any:
            x = torch.cat([self.image(a.mean(1))[:, None], self.embed(words)], dim=1)
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths + 1, batch_first=True)
            return self.output(F.dropout(self.rnn(packed)[0].data[len(a) :], 0.3))

    model = Attend() if decoder == "attend" else Tell()
    parameters = [*model.parameters()] if frozen else [*cnn.parameters(), *model.parameters()]
    optimizer = torch.optim.Adam(parameters)
    looked = annotations().detach()

    def step() -> None:
        optimizer.zero_grad()
        scores = model(looked if frozen else annotations())
        F.cross_entropy(scores, targets).backward()
        optimizer.step()

    return step


def sections() -> dict[str, Section]:
    cases = [
        Case(
            f"{name}, {'encoder frozen, features cached' if frozen else 'all of it learns'}",
            {
                "minidl": lambda d=decoder, f=frozen: minidl_step(d, f),
                "PyTorch": lambda d=decoder, f=frozen: torch_step(d, f),
            },
            memory=True,
        )
        for frozen in (False, True)
        for decoder, name in (("attend", "Show, Attend and Tell"), ("tell", "Show and Tell"))
    ]
    title = "A training step: 64 captions of scenes of 3×64×64, LSTM of 256"
    return {"step": Section(title, "Target: at least 1.0.", cases)}


if __name__ == "__main__":
    main("captioning", "Captioning against PyTorch", sections())
