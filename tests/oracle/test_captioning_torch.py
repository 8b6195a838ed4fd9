"""Decoders against PyTorch's layers with the same weights: the loss, and every gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import minidl
from minidl import nn
from minidl.captioning import Captioner, ShowAndTell, ShowAttend, Vocabulary
from minidl.nn import functional as ours

WORDS = Vocabulary.build([f"word{i}" for i in range(20)])
CAPTIONS = ["word3 word4", "word1 word2 word9 word1", "word5", "word19 word7 word7 word8 word0"]
D, H, E = 7, 12, 9

CELLS = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}


class Twin:
    """A decoder written out for one caption at a time: no batches, no padding."""

    def __init__(self, decoder: Any, cell: str, layers: int) -> None:
        self.kind, self.layers = type(decoder), layers
        self.p = {
            name: torch.tensor(value.numpy(), requires_grad=True)
            for name, value in decoder.named_parameters()
        }
        x = D + E if self.kind is ShowAttend else E
        self.rnn = CELLS[cell](x, H, layers).double()
        for name, _ in list(self.rnn.named_parameters()):
            setattr(self.rnn, name, torch.nn.Parameter(self.p[f"rnn.{name}"].detach().clone()))

    def linear(self, name: str, x: Any) -> Any:
        return F.linear(x, self.p[f"{name}.weight"], self.p.get(f"{name}.bias"))

    def gradients(self) -> dict[str, np.ndarray]:
        recurrent = {f"rnn.{k}": v for k, v in self.rnn.named_parameters()}
        return {k: v.grad.numpy() for k, v in (self.p | recurrent).items()}

    def scores(self, a: Any, numbers: list[int]) -> Any:
        """Annotation vectors (L, D), one caption -> (length, V)."""
        y = self.p["embed.weight"][numbers[:-1]]
        if self.kind is ShowAndTell:
            x = torch.cat([self.linear("image", a.mean(0))[None], y])
            return self.linear("output", self.rnn(x)[0][1:])
        first = torch.tanh(self.linear("first", a.mean(0))).reshape(-1, self.layers, H)
        hx = tuple(first) if len(first) == 2 else first[0]
        out = []
        for word in y:
            h = hx[0][-1] if len(first) == 2 else hx[-1]
            e = self.linear("w", torch.tanh(self.linear("U", a) + self.linear("W", h)))[:, 0]
            z = torch.sigmoid(self.linear("beta", h)) * (e.softmax(0)[:, None] * a).sum(0)
            o, hx = self.rnn(torch.cat([word, z])[None], hx)
            m = torch.tanh(word + self.linear("L_h", o[0]) + self.linear("L_z", z))
            out.append(self.linear("output", m))
        return torch.stack(out)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kind", [ShowAndTell, ShowAttend])
def test_loss_and_gradients(kind: Any, cell: str, layers: int) -> None:
    more = {"attention": 5} if kind is ShowAttend else {}
    decoder = kind(WORDS, D, H, E, cell, layers, dropout=0.0, **more).double()
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.5)
    model, twin = Captioner(nn.Identity(), decoder), Twin(decoder, cell, layers)
    a = np.random.default_rng(0).normal(size=(4, 6, D))
    images = minidl.tensor(a)
    images.requires_grad_()
    batch, targets, _ = model.batch(images, CAPTIONS)
    loss = ours.cross_entropy(model(batch), targets)
    loss.backward()

    theirs = torch.tensor(a, requires_grad=True)
    total, words = 0.0, 0
    for image, caption in zip(theirs, CAPTIONS):
        numbers = WORDS.encode(caption)
        scores = twin.scores(image, numbers)
        total = total + F.cross_entropy(scores, torch.tensor(numbers[1:]), reduction="sum")
        words += len(numbers) - 1
    (total / words).backward()

    assert loss.item() == pytest.approx((total / words).item(), rel=1e-12)
    expected = twin.gradients()
    assert expected.keys() == dict(decoder.named_parameters()).keys()
    for name, parameter in decoder.named_parameters():
        np.testing.assert_allclose(
            parameter.grad.numpy(), expected[name], rtol=1e-9, atol=1e-12, err_msg=name
        )
    np.testing.assert_allclose(images.grad.numpy(), theirs.grad.numpy(), rtol=1e-9, atol=1e-12)
