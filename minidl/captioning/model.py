"""The captioner: a convolutional encoder that looks, a recurrent decoder that tells.

    encoder    image -> annotation vectors a_1 ... a_L, one for each place of a grid
    decoder    p(word | words before, a)
      ShowAndTell    sees the image once, as the first word (Vinyals et al. 2015)
      ShowAttend     looks again before every word, where it chooses (Xu et al. 2015)

    captioner = Captioner(Encoder(convolutions()), ShowAttend(vocabulary, features=130))
    logits = captioner(batch)                              # of `caption_loader`
    F.cross_entropy(logits, words_that_come_out).backward()
    captioner.eval().generate(images, beam=3)              # ["a small red star above ...", ...]

Padding costs nothing and changes nothing: captions come longest first, a step computes those that
still run, and the logits of all steps lie one after the other: (sum of lengths, V).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

import minidl
import minidl.nn.functional as F
from minidl import nn
from minidl.attack import deployed
from minidl.backend import random, to_device
from minidl.captioning import decoding
from minidl.captioning.batches import CaptionBatch, collate
from minidl.captioning.vocabulary import BOS, EOS, PAD, UNK, Vocabulary
from minidl.nn.utils.rnn import pack_padded_sequence
from minidl.ops.attention import additive_scores
from minidl.tensor import Tensor

__all__ = ["Captioner", "Encoder", "ShowAndTell", "ShowAttend", "convolutions", "trunk"]

CELLS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


# The eye ----------------------------------------------------------------------------------


def convolutions(
    widths: Sequence[int] = (32, 64, 96, 128), in_channels: int = 3, more: int = 0
) -> nn.Sequential:
    """3×3 convolutions, max pooling between them, batch norm: (N, C, H, W) -> (N, D, H', W').

    Pooling comes before batch norm, which then has a quarter of the numbers to look at: the largest
    of what is scaled by a positive γ is what the largest is scaled to.

    Args:
        widths: channels of each; the last is D. The image is halved len(widths) - 1 times.
        in_channels: C.
        more: so many convolutions of the last width follow, without pooling. With four widths a
            place of the grid sees 38 pixels across, and 16 more with each of these: to say "two" of
            things that lie apart, it has to see both.
    """
    layers: list[nn.Module] = []
    for i, width in enumerate([*widths, *([widths[-1]] * more)]):
        layers += [nn.Conv2d(in_channels, width, 3, padding=1, bias=False)]
        layers += [nn.MaxPool2d(2)] if i < len(widths) - 1 else []
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
        in_channels = width
    return nn.Sequential(*layers)


def trunk(classifier: nn.Module) -> nn.Sequential:
    """The convolutions of a classifier (`models.resnet18()`, ...), without its pooling and head.

    They are the classifier's own layers, not copies.

    Raises:
        ValueError: it has no global pooling and no `Flatten` to be cut at.
    """
    kept: dict[str, nn.Module] = {}
    for name, module in classifier.named_children():
        if isinstance(module, nn.AdaptiveAvgPool2d | nn.Flatten):
            return nn.Sequential(kept)
        kept[name] = module
    raise ValueError(
        f"{type(classifier).__name__} has no AdaptiveAvgPool2d or Flatten among its layers "
        f"({', '.join(kept)}): where do its convolutions end?"
    )


class Encoder(nn.Module):
    """Annotation vectors: (N, C, H, W) -> (N, L, D), L the places of the grid, row by row.

    Args:
        cnn: (N, C, H, W) -> (N, D, H', W').
        coordinates: append y and x, in [-1, 1], to every vector, which is then D + 2 long (Liu et
            al. 2018): attention mixes vectors, and would not know where they came from.
    """

    def __init__(self, cnn: nn.Module, coordinates: bool = True) -> None:
        super().__init__()
        self.cnn, self.coordinates = cnn, coordinates

    def forward(self, images: Tensor) -> Tensor:
        a = self.cnn(images)
        if a.ndim != 4:
            raise ValueError(
                f"the encoder's network must give a grid (N, D, H, W), got {tuple(a.shape)}: cut "
                "off its pooling and head, captioning.trunk(network)"
            )
        n, _, h, w = a.shape
        if self.coordinates:
            grid = np.stack(
                np.meshgrid(np.linspace(-1, 1, h), np.linspace(-1, 1, w), indexing="ij")
            )
            grid = np.broadcast_to(grid.astype(a.dtype), (n, 2, h, w))
            a = minidl.cat([a, Tensor(to_device(np.ascontiguousarray(grid), a.device))], dim=1)
        return a.flatten(2).transpose(1, 2)


# The mouth --------------------------------------------------------------------------------


class Decoder(nn.Module):
    """What both decoders share: words in, logits out, one step at a time.

    A subclass says how to `start` and how to `advance`. A *state* is a tuple of tensors; its first
    `self.per_layer` ones are the recurrent network's (layers, N, H), the others are (N, ...).
    """

    output: nn.Linear  # what `readout` gives -> logits

    def __init__(
        self,
        vocabulary: Vocabulary,
        features: int,
        inputs: int,
        hidden: int,
        embedding: int,
        cell: str,
        layers: int,
        dropout: float,
        word_dropout: float,
    ) -> None:
        super().__init__()
        if not 0 <= word_dropout <= 1:
            raise ValueError(f"word_dropout is a probability, got {word_dropout}")
        if cell not in CELLS:
            raise ValueError(f"cell {cell!r}: expected one of {', '.join(CELLS)}")
        self.vocabulary, self.features = vocabulary, features
        self.embed = nn.Embedding(len(vocabulary), embedding)
        nn.init.uniform_(self.embed.weight, -0.1, 0.1)
        self.rnn = CELLS[cell](inputs, hidden, layers, dropout=dropout if layers > 1 else 0.0)
        self.per_layer = self.rnn.states
        self.drop = nn.Dropout(dropout)
        self.word_dropout = word_dropout
        self.teacher_forcing = 1.0
        """While training: how often the true word goes in; else one that the model said itself
        (scheduled sampling; Bengio et al. 2015, who lower it from 1 as training goes on)."""

    def start(self, a: Tensor) -> tuple[Tensor, ...]:
        """The state before BOS, from annotation vectors (N, L, D)."""
        raise NotImplementedError

    def advance(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One step, embedded words in: (N, E) -> (what `readout` takes, (N, M); the next state)."""
        raise NotImplementedError

    def readout(self, m: Tensor) -> Tensor:
        """What the last layer takes. No later step waits for it: it is computed for all at once."""
        return m

    def logits(self, m: Tensor) -> Tensor:
        """(N, M) -> (N, V)."""
        return self.output(self.readout(m))

    def step(self, words: Any, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One step: words (N,) -> (logits of the next words (N, V), the next state)."""
        m, state = self.advance(self.embed(words), state)
        return self.logits(m), state

    def select(self, state: tuple[Tensor, ...], rows: Any) -> tuple[Tensor, ...]:
        """Some of a state's sequences (an index or a slice), in a new order."""
        return tuple(
            part[:, rows] if i < self.per_layer else part[rows] for i, part in enumerate(state)
        )

    def recur(self, x: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The recurrent network's step: (N, I) and its states -> (N, H) and the next."""
        hx = states if self.per_layer > 1 else states[0]
        out, hx = self.rnn(x.unsqueeze(0), hx)
        return out.squeeze(0), hx if self.per_layer > 1 else (hx,)

    def forward(self, a: Tensor, words: Tensor, lengths: Tensor) -> Tensor:
        """Teacher forcing: the logits of each next word, given the true words before it.

        Args:
            a: annotation vectors (N, L, D).
            words: (N, T), as in `CaptionBatch`: from BOS on.
            lengths: (N,), longest first.

        Returns:
            (sum of lengths, V): all first words, then all second words, ...

        Raises:
            ValueError: shapes do not fit; lengths not in order.
        """
        if self.training and self.word_dropout > 0:
            lost = random.generator().random(words.shape) < self.word_dropout
            lost &= words.cpu().numpy() != BOS
            words = Tensor(to_device(np.where(lost, UNK, words.cpu().numpy()), words.device))
        return self.output(self.drop(self.readout(minidl.cat(self.run(a, words, lengths)))))

    def run(self, a: Tensor, words: Tensor, lengths: Tensor) -> list[Tensor]:
        """Step by step, those that still run: for each step, (how many, M)."""
        state, n = self.start(a), len(a)
        steps: list[Tensor] = []
        for t, still in enumerate(self.check(a, words, lengths)):
            if still < n:
                state, n = self.select(state, slice(still)), still
            now = words[:n, t]
            if t > 0 and self.training and self.teacher_forcing < 1:
                now = self.mixed(now, steps[-1][:n])
            m, state = self.advance(self.embed(now), state)
            steps.append(m)
        return steps

    def mixed(self, true: Tensor, m: Tensor) -> Tensor:
        """True words, or with probability 1 - `teacher_forcing` what the model would say."""
        rng = random.generator()
        with minidl.no_grad():
            p = F.softmax(self.logits(m), dim=1).cpu().numpy()
        cumulative = p.cumsum(axis=1)
        said = (cumulative < rng.random((len(p), 1)) * cumulative[:, -1:]).sum(axis=1)
        forced = rng.random(len(p)) < self.teacher_forcing
        words = np.where(forced, true.cpu().numpy(), said)
        return Tensor(to_device(words, true.device))

    def check(self, a: Tensor, words: Tensor, lengths: Tensor) -> list[int]:
        """How many captions still run at each step."""
        n = lengths.cpu().numpy()
        if a.ndim != 3 or a.shape[2] != self.features:
            raise ValueError(
                f"annotation vectors are (N, L, {self.features}), got {tuple(a.shape)}: does the "
                "encoder belong to this decoder (features=)?"
            )
        if words.ndim != 2 or len(words) != len(a) or n.shape != (len(a),):
            raise ValueError(
                f"{len(a)} images need words (N, T) and lengths (N,), got {tuple(words.shape)} "
                f"and {n.shape}"
            )
        if (np.diff(n) > 0).any() or n[-1] < 1 or n[0] > words.shape[1]:
            raise ValueError(
                f"lengths must come longest first, from 1 to {words.shape[1]}, got {n.tolist()}"
            )
        return running(n)


def running(lengths: np.ndarray) -> list[int]:
    """How many captions still run at each step, of lengths in descending order."""
    return [int((lengths > t).sum()) for t in range(lengths[0])]


class ShowAndTell(Decoder):
    """The image is the first word (Vinyals et al. 2015, equations 10 to 12):

    x_{-1} = CNN(I);  x_t = W_e S_t;  p_{t+1} = LSTM(x_t)

    CNN(I) is a linear map of the mean annotation vector.

    Args:
        vocabulary: the words.
        features: D, the length of an annotation vector.
        hidden: H of the recurrent network.
        embedding: E, the length of x.
        cell: "lstm", "gru" or "rnn".
        layers: of the recurrent network.
        dropout: of what goes into the last layer (and between recurrent layers).
        word_dropout: while training, so many of the words that go in are <unk> (Bowman et al. 2016,
            section 3.1): what comes next has to be seen, and cannot be guessed from the words
            before ("red" was never followed by "triangle").
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        features: int,
        hidden: int = 256,
        embedding: int = 128,
        cell: str = "lstm",
        layers: int = 1,
        dropout: float = 0.3,
        word_dropout: float = 0.0,
    ) -> None:
        sizes = embedding, hidden, embedding, cell, layers
        super().__init__(vocabulary, features, *sizes, dropout, word_dropout)
        self.image = nn.Linear(features, embedding)
        self.output = nn.Linear(hidden, len(vocabulary))

    def start(self, a: Tensor) -> tuple[Tensor, ...]:
        x = self.image(a.mean(dim=1))
        zeros = self.rnn.initial(None, x.unsqueeze(0), False)
        return self.recur(x, tuple(zeros))[1]

    def advance(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.recur(x, state)

    def run(self, a: Tensor, words: Tensor, lengths: Tensor) -> list[Tensor]:
        if self.training and self.teacher_forcing < 1:
            return super().run(a, words, lengths)
        self.check(a, words, lengths)  # nothing waits for what is said: all steps at once
        image = self.image(a.mean(dim=1)).unsqueeze(1)
        x = minidl.cat([image, self.embed(words)], dim=1)
        packed = pack_padded_sequence(x, lengths + 1, batch_first=True)
        return [self.rnn(packed)[0].data[len(a) :]]


class ShowAttend(Decoder):
    """Look again before every word (Xu et al. 2015, deterministic "soft" attention):

        e_ti = wᵀ tanh(U a_i + W h_{t-1})    how well place i fits what is to be said   (4)
        α_t  = softmax(e_t)                                                             (5)
        z_t  = β_t Σ_i α_ti a_i,  β_t = σ(f_β(h_{t-1}))                     (13; section 4.2.1)
        h_t  = LSTM([E y_{t-1}, z_t])                                                   (1 to 3)
        p(y_t) ∝ exp(L_o tanh(E y_{t-1} + L_h h_t + L_z z_t))                           (7)

    The first state is computed from the mean annotation vector. (Equation 7 has no tanh; deep
    output layers have one, Pascanu et al. 2014.)

    Args:
        vocabulary, features, hidden, embedding, cell, layers, dropout, word_dropout: as for
            `ShowAndTell`.
        attention: the length of what the tanh is taken of.

    Attributes:
        maps: α of the last forward pass: for each step, (how many captions still run, L).
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        features: int,
        hidden: int = 256,
        embedding: int = 128,
        cell: str = "lstm",
        layers: int = 1,
        dropout: float = 0.3,
        attention: int = 64,
        word_dropout: float = 0.0,
    ) -> None:
        sizes = embedding + features, hidden, embedding, cell, layers
        super().__init__(vocabulary, features, *sizes, dropout, word_dropout)
        self.first = nn.Linear(features, self.per_layer * layers * hidden)
        self.U = nn.Linear(features, attention)
        self.W = nn.Linear(hidden, attention, bias=False)
        self.w = nn.Linear(attention, 1, bias=False)
        self.beta = nn.Linear(hidden, 1)
        self.L_h = nn.Linear(hidden, embedding)
        self.L_z = nn.Linear(features, embedding, bias=False)
        self.output = nn.Linear(embedding, len(vocabulary))
        self.maps: list[np.ndarray] = []

    def start(self, a: Tensor) -> tuple[Tensor, ...]:
        first = F.tanh(self.first(a.mean(dim=1)))
        shape = (len(a), self.per_layer, self.rnn.num_layers, self.rnn.hidden_size)
        states = first.reshape(shape).permute(1, 2, 0, 3)
        self.maps = []
        return *(states[i] for i in range(self.per_layer)), a, self.U(a)

    def advance(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        *before, a, Ua = state
        h = before[0][-1]
        if type(self.w) is nn.Linear:
            e = additive_scores(Ua, self.W(h), self.w.weight)
        else:  # quantized: its weight alone is not what it computes with
            e = self.w(F.tanh(Ua + self.W(h).unsqueeze(1))).squeeze(2)
        alpha = F.softmax(e, dim=1)
        self.maps.append(alpha.array)
        z = F.sigmoid(self.beta(h)) * (alpha.unsqueeze(1) @ a).squeeze(1)
        out, states = self.recur(minidl.cat([x, z], dim=1), tuple(before))
        return minidl.cat([x, out, z], dim=1), (*states, a, Ua)

    def readout(self, m: Tensor) -> Tensor:
        E, H = self.embed.embedding_dim, self.rnn.hidden_size
        x, h, z = m[:, :E], m[:, E : E + H], m[:, E + H :]
        return F.tanh(x + self.L_h(h) + self.L_z(z))


# Both -------------------------------------------------------------------------------------


class Captioner(nn.Module):
    """An encoder and a decoder. See the module's docstring.

    Args:
        encoder: (N, C, H, W) -> annotation vectors (N, L, D).
        decoder: a `ShowAndTell` or `ShowAttend`; it knows the words.
    """

    def __init__(self, encoder: nn.Module, decoder: Decoder) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    @property
    def vocabulary(self) -> Vocabulary:
        return self.decoder.vocabulary

    def annotations(self, images: Tensor) -> Tensor:
        """(N, L, D) of images (N, C, H, W); what is (N, L, D) already is returned as it is."""
        return self.encoder(images) if images.ndim == 4 else images

    def forward(self, batch: CaptionBatch) -> Tensor:
        """The logits of all words that come out, (sum of lengths, V); see `Decoder.forward`."""
        a = self.annotations(batch.images)
        if len(a) != len(batch.words):  # several captions of an image
            a = a[batch.image_of]
        return self.decoder(a, batch.words, batch.lengths)

    def generate(
        self, images: Tensor, beam: int = 1, max_length: int = 30, length_penalty: float = 0.0,
        **sampling: Any,
    ) -> list[str]:  # fmt: skip
        """Say what is in the images (in eval mode).

        Args:
            images: (N, C, H, W), or annotation vectors (N, L, D).
            beam: how many sentences are pursued at a time; 1: the likeliest word, step by step.
            max_length: of a caption, in tokens.
            length_penalty, sampling: see `hypotheses`.

        Returns:
            A caption for each image.
        """
        found = self.hypotheses(images, beam, max_length, length_penalty, **sampling)
        return [self.vocabulary.decode(alternatives[0].tokens) for alternatives in found]

    def hypotheses(
        self, images: Tensor, beam: int = 1, max_length: int = 30, length_penalty: float = 0.0,
        **sampling: Any,
    ) -> list[list[decoding.Hypothesis]]:  # fmt: skip
        """Sentences with their likelihoods, for each image the best first.

        Args:
            images, beam, max_length: as for `generate`.
            length_penalty: α of Wu et al. 2016 (see `decoding.beam_search`).
            sampling: draw the words instead: any of temperature, top_k, top_p, seed (see
                `decoding.sample`).

        Raises:
            ValueError: sampling together with a beam; arguments out of range.
        """
        if sampling and beam != 1:
            raise ValueError(f"sampling ({', '.join(sampling)}) and beam={beam} exclude each other")
        limits: dict[str, Any] = {
            "bos": BOS,
            "eos": EOS,
            "banned": (PAD, BOS, UNK),
            "max_length": max_length,
        }
        with minidl.no_grad(), deployed(self):
            a = self.annotations(images)
            state, n = self.decoder.start(a), len(a)
            if sampling:
                drawn = decoding.sample(self.decoder, state, n, **limits, **sampling)
                return [[hypothesis] for hypothesis in drawn]
            if beam == 1:
                return [[h] for h in decoding.greedy(self.decoder, state, n, **limits)]
            return decoding.beam_search(
                self.decoder, state, n, **limits, beam=beam, length_penalty=length_penalty
            )

    def log_likelihood(self, images: Tensor, captions: Sequence[str | Sequence[int]]) -> np.ndarray:
        """log p(caption | image), in nats, of one caption for each image (in eval mode): (N,).

        Args:
            images: (N, C, H, W), or annotation vectors (N, L, D).
            captions: N of them: as text, or as tokens without BOS (as a `Hypothesis` has them).

        Raises:
            ValueError: not as many captions as images; an empty caption.
        """
        batch, targets, order = self.batch(images, captions)
        with minidl.no_grad(), deployed(self):
            log_p = F.log_softmax(self(batch), dim=1).cpu().numpy().astype(np.float64)
        said = log_p[np.arange(len(log_p)), targets.numpy()]
        rows = np.concatenate([np.arange(n) for n in running(batch.lengths.cpu().numpy())])
        totals = np.zeros(len(captions))
        np.add.at(totals, order[rows], said)
        return totals

    def attention(
        self, images: Tensor, captions: Sequence[str | Sequence[int]]
    ) -> list[np.ndarray]:
        """Where the model looks for each token of a caption (of a text, the last is EOS): (T, L).

        Args:
            images, captions: as for `log_likelihood`.

        Raises:
            ValueError: as `log_likelihood`; the decoder has no attention.
        """
        if not isinstance(self.decoder, ShowAttend):
            raise ValueError(f"{type(self.decoder).__name__} has no attention; ShowAttend has")
        batch, _, order = self.batch(images, captions)
        with minidl.no_grad(), deployed(self):
            self(batch)
        maps: list[list[np.ndarray]] = [[] for _ in captions]
        for step in self.decoder.maps:
            for row, alpha in enumerate(to_device(step, "cpu")):
                maps[order[row]].append(alpha)
        return [np.stack(steps) for steps in maps]

    def batch(
        self, images: Tensor, captions: Sequence[str | Sequence[int]]
    ) -> tuple[CaptionBatch, Tensor, np.ndarray]:
        """One caption for each image, as the decoder takes them; which image each row is of."""
        if isinstance(captions, str) or len(captions) != len(images):
            raise ValueError(f"{len(images)} images need a list of as many captions")
        encode = self.vocabulary.encode
        numbers = [encode(c) if isinstance(c, str) else [BOS, *c] for c in captions]
        if [BOS] in numbers:
            raise ValueError("an empty caption: it has no tokens")
        order = np.argsort([-len(n) for n in numbers], kind="stable")
        batch, targets = collate([(np.zeros(0), [numbers[i]]) for i in order])
        batch = batch.to(images.device)._replace(images=images[to_device(order, images.device)])
        return batch, targets, order
