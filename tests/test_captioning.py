"""Captioners and how they speak: gradients, batches, sampling, search."""

import itertools

import numpy as np
import pytest

import minidl
import minidl.nn.functional as F
from minidl import models, nn, optim, transfer
from minidl.captioning import (
    Captioner,
    Encoder,
    ShowAndTell,
    ShowAttend,
    Vocabulary,
    beam_search,
    caption_loader,
    convolutions,
    greedy,
    sample,
    trunk,
)
from minidl.captioning.batches import CaptionBatch, collate
from minidl.captioning.vocabulary import EOS
from minidl.data import ShapeScenes
from minidl.tensor import Tensor

WORDS = Vocabulary.build(["a small red star", "two blue dogs above a cat"])
CAPTIONS = ["a cat", "two small red dogs above a blue star", "a dogs", "red"]
D = 5

decoders = pytest.mark.parametrize(
    "make",
    [
        lambda **k: ShowAndTell(WORDS, D, 8, 6, "lstm", **k),
        lambda **k: ShowAndTell(WORDS, D, 8, 6, "gru", layers=2, **k),
        lambda **k: ShowAndTell(WORDS, D, 8, 6, "rnn", **k),
        lambda **k: ShowAttend(WORDS, D, 8, 6, "lstm", attention=7, **k),
        lambda **k: ShowAttend(WORDS, D, 8, 6, "gru", layers=2, attention=7, **k),
        lambda **k: ShowAttend(WORDS, D, 8, 6, "rnn", attention=7, **k),
    ],
    ids=["tell-lstm", "tell-gru-2", "tell-rnn", "attend-lstm", "attend-gru-2", "attend-rnn"],
)


def captioner(make, dropout=0.0):
    """With annotation vectors for images: its encoder is never asked."""
    model = Captioner(nn.Identity(), make(dropout=dropout))
    for parameter in model.parameters():  # large enough to be told from nothing
        nn.init.normal_(parameter, std=0.5)
    return model


def annotations(n=4, places=4):
    return minidl.tensor(np.random.default_rng(1).normal(size=(n, places, D)).astype("f"))


def batch_of(a, captions):
    return collate([(image, [WORDS.encode(c)]) for image, c in zip(a.numpy(), captions)])


# Models -----------------------------------------------------------------------------------


@decoders
def test_a_caption_costs_the_same_in_any_batch(make):
    model, a = captioner(make), annotations()
    together = model.log_likelihood(a, CAPTIONS)
    alone = [model.log_likelihood(a[i : i + 1], CAPTIONS[i : i + 1])[0] for i in range(4)]
    np.testing.assert_allclose(together, alone, rtol=2e-6)
    assert len(set(together.round(3))) == 4
    # And so does the loss: its sum over words is minus the sum of the log-likelihoods.
    batch, targets = batch_of(a, CAPTIONS)
    loss = F.cross_entropy(model(batch), targets, reduction="sum")
    assert loss.item() == pytest.approx(-together.sum(), rel=1e-5)


@decoders
def test_captions_of_an_image_share_its_annotations(make):
    """The encoder looks once, and loss and gradients are those of an image for each caption."""
    a = annotations()
    several = [CAPTIONS, CAPTIONS[1:3], CAPTIONS[3:], CAPTIONS[::2]]
    found = []
    for together in (True, False):
        minidl.manual_seed(0)
        model = captioner(make)
        x = Tensor(a.numpy(), requires_grad=True)
        model.encoder.forward = lambda images, x=x: x[images[:, 0, 0, 0].astype("int64")]
        groups = several if together else [[c] for captions in several for c in captions]
        which = range(4) if together else [i for i, c in enumerate(several) for _ in c]
        batch, targets = collate(
            [
                (np.full((1, 1, 1), i, "f"), list(map(WORDS.encode, g)))
                for i, g in zip(which, groups)
            ]
        )
        assert len(batch.images) == len(groups) and len(batch.words) == 9
        loss = F.cross_entropy(model(batch), targets, reduction="sum")
        loss.backward()
        found.append([loss.numpy(), x.grad.numpy(), *(p.grad.numpy() for p in model.parameters())])
    for one, other in zip(*found):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@decoders
def test_what_stands_in_the_padding_is_no_matter(make):
    model = captioner(make)
    batch, targets = batch_of(annotations(), CAPTIONS)
    words = batch.words.numpy().copy()
    words[np.arange(words.shape[1]) >= batch.lengths.numpy()[:, None]] = 7
    other = batch._replace(words=Tensor(words))
    assert (words != batch.words.numpy()).any()
    gradients = []
    for b in (batch, other):
        model.zero_grad()
        F.cross_entropy(model(b), targets).backward()
        gradients.append([p.grad.numpy() for p in model.parameters()])
    assert all(map(np.array_equal, *gradients))
    assert all(np.abs(g).max() > 0 for g in gradients[0])  # every parameter learns


@decoders
def test_gradients_against_differences(make):
    model = captioner(make).double()
    batch, targets = batch_of(annotations().double(), CAPTIONS)
    names, parameters = zip(*model.named_parameters())

    def loss(*values):
        for parameter, value in zip(parameters, values):
            assert parameter.shape == value.shape
        return F.cross_entropy(model(batch), targets)

    out = loss(*parameters)
    out.backward()
    rng = np.random.default_rng(0)
    for name, parameter in zip(names, parameters):
        direction = rng.normal(size=parameter.shape)
        start, ends = parameter.numpy().copy(), []
        for sign in (1, -1):
            parameter.array[...] = start + sign * 1e-6 * direction
            ends.append(loss(*parameters).item())
        parameter.array[...] = start
        slope = (ends[0] - ends[1]) / 2e-6
        found = float((parameter.grad.numpy() * direction).sum())
        assert found == pytest.approx(slope, rel=1e-5, abs=1e-8), name
        assert abs(1.001 * found - slope) > 1e-5 * abs(slope) + 1e-8 or abs(slope) < 1e-6


@decoders
def test_step_by_step_is_all_at_once(make):
    """The recurrence that generates is the one that learned."""
    model = captioner(make).eval()
    a = annotations()
    found = model.hypotheses(a, max_length=6)
    text = [model.vocabulary.decode(h[0].tokens) for h in found]
    ended = [i for i, h in enumerate(found) if h[0].tokens[-1] == EOS and text[i]]
    if ended:
        expected = model.log_likelihood(a[ended], [text[i] for i in ended])
        np.testing.assert_allclose([found[i][0].log_likelihood for i in ended], expected, rtol=1e-5)
    batch, _ = batch_of(a, CAPTIONS)
    parts = model.decoder.logits(
        minidl.cat(super(ShowAndTell, model.decoder).run(batch.images, batch.words, batch.lengths))
        if isinstance(model.decoder, ShowAndTell)
        else minidl.cat(model.decoder.run(batch.images, batch.words, batch.lengths))
    )
    np.testing.assert_allclose(parts.numpy(), model(batch).numpy(), rtol=1e-5, atol=1e-5)


@decoders
def test_scheduled_sampling(make):
    model = captioner(make)
    batch, _ = batch_of(annotations(), CAPTIONS)
    true = model(batch).numpy()
    model.decoder.teacher_forcing = 0.0
    minidl.manual_seed(1)
    said, again = model(batch).numpy(), model(batch).numpy()
    minidl.manual_seed(1)
    assert np.array_equal(said, model(batch).numpy()) and not np.array_equal(said, again)
    first = len(CAPTIONS)  # BOS is always true, so the first step is as before
    np.testing.assert_allclose(said[:first], true[:first], rtol=1e-5, atol=1e-6)
    assert not np.allclose(said[first:], true[first:], atol=1e-3)
    np.testing.assert_allclose(model.eval()(batch).numpy(), true, rtol=1e-5, atol=1e-6)


def test_words_said_by_the_model_are_drawn_from_its_distribution():
    decoder = ShowAndTell(WORDS, D, 8, 6)
    n = 4000
    m = minidl.tensor(np.repeat(np.random.default_rng(0).normal(size=(1, 8)) * 4, n, 0).astype("f"))
    decoder.teacher_forcing = 0.25
    words = decoder.mixed(minidl.tensor(np.full(n, 2)), m).numpy()
    p = 0.75 * F.softmax(decoder.logits(m[:1]), dim=1).numpy()[0]
    p[2] += 0.25
    found = np.bincount(words, minlength=len(WORDS)) / n
    assert np.abs(found - p).max() < 4 * np.sqrt(0.25 / n)


@pytest.mark.parametrize("kind", [ShowAndTell, ShowAttend])
def test_word_dropout(kind):
    """All words but BOS are lost: in training only, and then the words do not matter."""
    model = captioner(lambda **k: kind(WORDS, D, 8, 6, word_dropout=1.0, **k))
    model.decoder.drop.p = 0.0
    a = annotations(2)
    one, _ = batch_of(a, ["red star star", "red star star"])
    two, _ = batch_of(a, ["blue dogs red", "blue dogs red"])
    model.train()
    assert np.array_equal(model(one).numpy(), model(two).numpy())
    model.eval()
    assert not np.array_equal(model(one).numpy(), model(two).numpy())
    with pytest.raises(ValueError, match="word_dropout is a probability"):
        kind(WORDS, D, word_dropout=1.5)


def test_attention_is_kept_and_looks_where_it_pays():
    """One place says which word comes; attention must find it, wherever it is."""
    rng = np.random.default_rng(0)
    words = ["red", "blue", "star", "dogs"]
    model = Captioner(nn.Identity(), ShowAttend(WORDS, D, 16, 8, attention=16, dropout=0.0))
    optimizer = optim.Adam(model.parameters(), 0.02)

    def examples(n):
        where, what = rng.integers(6, size=n), rng.integers(4, size=n)
        a = 0.1 * rng.normal(size=(n, 6, D))
        a[np.arange(n), where, 4] = 3
        a[np.arange(n), where, what] = 3
        return minidl.tensor(a.astype("f")), [words[i] for i in what], where

    for _ in range(60):
        a, captions, _ = examples(64)
        batch, targets, _ = model.batch(a, captions)
        optimizer.zero_grad()
        F.cross_entropy(model(batch), targets).backward()
        optimizer.step()
    a, captions, where = examples(50)
    assert model.generate(a) == captions
    maps = model.attention(a, captions)
    assert all(m.shape == (2, 6) for m in maps)
    np.testing.assert_allclose([m.sum(1) for m in maps], 1, rtol=1e-5)
    assert np.mean([m[0].argmax() == w for m, w in zip(maps, where)]) > 0.9


def test_an_encoder_gives_a_grid_with_coordinates():
    encoder = Encoder(convolutions((4, 6), in_channels=1))
    images = minidl.rand(2, 1, 8, 12)
    a = encoder(images)
    assert a.shape == (2, 4 * 6, 6 + 2)
    grid = a.numpy()[0, :, -2:].reshape(4, 6, 2)
    np.testing.assert_allclose(grid[:, 0, 0], np.linspace(-1, 1, 4), rtol=1e-6)
    np.testing.assert_allclose(grid[2, :, 1], np.linspace(-1, 1, 6), rtol=1e-6)
    plain = Encoder(encoder.cnn, coordinates=False).eval()
    np.testing.assert_array_equal(
        plain(images).numpy(), encoder.cnn(images).numpy().reshape(2, 6, 24).transpose(0, 2, 1)
    )
    with pytest.raises(ValueError, match=r"captioning.trunk"):
        Encoder(nn.Flatten())(images)


@pytest.mark.parametrize(
    ("network", "channels"),
    [(models.resnet8(), 64), (models.cnn(in_channels=3, image_size=16), 64)],
    ids=["resnet8", "cnn"],
)
def test_the_trunk_of_a_classifier(network, channels):
    network.eval()
    x = minidl.rand(2, 3, 16, 16)
    part = trunk(network)
    out = part(x)
    assert out.shape == (2, channels, 4, 4)
    assert next(part.parameters()) is next(network.parameters())
    if isinstance(network, nn.Sequential):
        tail = network[len(part) :]
    else:
        tail = nn.Sequential(network.avgpool, nn.Flatten(), network.fc)
    np.testing.assert_allclose(tail(out).numpy(), network(x).numpy(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="where do its convolutions end"):
        trunk(nn.Sequential(nn.Conv2d(3, 3, 3)))


def test_frozen_encoder_does_not_learn_and_its_features_serve_in_its_place():
    data = ShapeScenes("val", 6)
    words = Vocabulary.build(itertools.chain(*data.captions))
    model = Captioner(Encoder(convolutions((4, 6, 6))), ShowAttend(words, 8, 16, 8))
    transfer.freeze(model, "encoder")
    model.train()
    loader = caption_loader(data, words, 4, shuffle=True)
    before = {k: v.numpy().copy() for k, v in model.encoder.state_dict().items()}
    optimizer = optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)
    losses = []
    for _ in range(3):
        for batch, targets in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch), targets)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    after = {k: v.numpy() for k, v in model.encoder.state_dict().items()}
    assert all(np.array_equal(before[k], after[k]) for k in before)
    images = minidl.tensor(np.stack([data[i][0] for i in range(6)]))
    captions = [c[0] for c in data.captions]
    a = model.annotations(images)
    assert not a.requires_grad
    np.testing.assert_allclose(
        model.log_likelihood(images, captions), model.log_likelihood(a, captions), rtol=1e-6
    )


def test_captioners_refuse():
    model = captioner(lambda **k: ShowAndTell(WORDS, D, 8, 6, **k))
    a = annotations()
    batch, _ = batch_of(a, CAPTIONS)
    wrong_order = batch._replace(lengths=Tensor(batch.lengths.numpy()[::-1].copy()))
    for call, message in (
        (lambda: ShowAndTell(WORDS, D, cell="lstms"), "expected one of lstm, gru, rnn"),
        (lambda: model(batch._replace(images=minidl.rand(4, 2, D + 1))), "annotation vectors"),
        (lambda: model(batch._replace(words=batch.words[:2])), "need words"),
        (lambda: model(wrong_order), "longest first"),
        (lambda: model.log_likelihood(a, CAPTIONS[:2]), "as many captions"),
        (lambda: model.log_likelihood(a[:1], " "), "a list of as many captions"),
        (lambda: model.log_likelihood(a[:1], [" . "]), "empty caption"),
        (lambda: model.log_likelihood(a[:1], [()]), "empty caption"),
        (lambda: model.attention(a, CAPTIONS), "has no attention"),
        (lambda: model.generate(a, beam=2, top_k=3), "exclude each other"),
        (lambda: model.generate(a, beam=0), "beam is at least 1"),
        (lambda: model.generate(a, max_length=0), "max_length is at least 1"),
        (lambda: model.generate(a, beam=2, length_penalty=-1), "length_penalty"),
        (lambda: model.generate(a, top_p=0.0), "top_p"),
        (lambda: model.generate(a, temperature=0), "temperature"),
        (lambda: model.generate(a, top_k=0), "top_k is at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_speaking_leaves_the_model_as_it_was():
    model = captioner(lambda **k: ShowAttend(WORDS, D, 8, 6, **k), dropout=0.5)
    model.train()
    one, other = (model.generate(annotations(), beam=3, max_length=5) for _ in range(2))
    assert one == other and model.training and model.decoder.drop.training
    assert all(p.grad is None for p in model.parameters())


# Decoding ---------------------------------------------------------------------------------


class Toy:
    """A language of a tree: p of the next word, given the words before. Word 0 begins, 1 ends.

    The likeliest first word is 2 (0.6), but what follows it is a toss-up among four (0.25 each);
    after 3 (0.4), 4 is almost sure. So "3 4" (0.4 · 0.9 = 0.36) beats "2 x" (0.6 · 0.25 = 0.15).
    """

    tree = {  # noqa: RUF012
        (): {2: 0.6, 3: 0.4},
        (2,): {2: 0.25, 3: 0.25, 4: 0.25, 5: 0.25},
        (3,): {4: 0.9, 5: 0.1},
    }
    V = 6

    def step(self, words, state):
        sentences = [s + ((int(w),) if w else ()) for s, w in zip(state, words.numpy())]
        p = np.full((len(sentences), self.V), 1e-9)
        for row, sentence in zip(p, sentences):
            for word, chance in self.tree.get(sentence, {1: 1.0}).items():
                row[word] = chance
        return Tensor(np.log(p)), sentences

    def select(self, state, rows):
        return [state[i] for i in rows]


ENDS = {"bos": 0, "eos": 1}


def test_greedy_is_wrong_where_beam_is_right():
    toy = Toy()
    (one,) = greedy(toy, [()], 1, **ENDS)
    assert one.tokens == (2, 2, 1) and one.log_likelihood == pytest.approx(np.log(0.15))
    ((best, second),) = beam_search(toy, [()], 1, **ENDS, beam=2)
    assert best.tokens == (3, 4, 1) and best.log_likelihood == pytest.approx(np.log(0.36))
    assert second.tokens == (2, 2, 1)  # of 2 2, 2 3, 2 4, 2 5 the first
    (all_of_them,) = beam_search(toy, [()], 1, **ENDS, beam=6)
    assert [h.tokens[:-1] for h in all_of_them] == [(3, 4), (2, 2), (2, 3), (2, 4), (2, 5), (3, 5)]
    np.testing.assert_allclose(
        np.exp([h.log_likelihood for h in all_of_them]), [0.36, 0.15, 0.15, 0.15, 0.15, 0.04],
        rtol=1e-6,
    )  # fmt: skip


def test_beam_of_one_is_greedy():
    toy = Toy()
    assert beam_search(toy, [()] * 2, 2, **ENDS, beam=1) == [
        [h] for h in greedy(toy, [()] * 2, 2, **ENDS)
    ]


class Lengths(Toy):
    """Short: 1 at once (0.3). Long: 2 2 2 (0.7 · 0.6 · 0.6), then 1."""

    tree = {  # noqa: RUF012
        (): {1: 0.3, 2: 0.7}, (2,): {2: 0.6, 3: 0.4}, (2, 2): {2: 0.6, 3: 0.4},
    }  # fmt: skip


def test_length_normalisation_by_hand():
    toy = Lengths()
    short, long = np.log(0.3), np.log(0.7 * 0.6 * 0.6)  # -1.204, -1.378
    (found,) = beam_search(toy, [()], 1, **ENDS, beam=3)
    assert found[0].tokens == (1,) and found[0].score == pytest.approx(short)
    (found,) = beam_search(toy, [()], 1, **ENDS, beam=3, length_penalty=1.0)
    assert found[0].tokens == (2, 2, 2, 1)
    assert found[0].score == pytest.approx(long / (9 / 6))  # (5 + 4) / 6, above -1.204 / 1
    assert found[0].log_likelihood == pytest.approx(long)


def exhaustive(toy, length):
    """Every sentence of at most `length` words, with its likelihood, by brute force."""
    found = {}
    for n in range(1, length + 1):
        for words in itertools.product(range(2, toy.V), repeat=n - 1):
            total, before = 0.0, ()
            for word in (*words, 1):
                total += np.log(toy.tree.get(before, {1: 1.0}).get(word, 1e-9))
                before = (*before, word)
            found[(*words, 1)] = total
    return sorted(found.items(), key=lambda item: -item[1])


@pytest.mark.parametrize("seed", range(5))
def test_a_wide_beam_finds_the_best_of_all_sentences(seed):
    rng = np.random.default_rng(seed)

    class Random(Toy):
        tree = {  # noqa: RUF012
            before: dict(zip(range(1, 6), rng.dirichlet(np.full(5, 0.7))))
            for n in range(4)
            for before in itertools.product(range(2, 6), repeat=n)
        }

    toy = Random()
    best = exhaustive(toy, 4)[:8]
    ((*found,), again) = beam_search(toy, [()] * 2, 2, **ENDS, beam=64, max_length=4)
    assert found == again and len(found) == 64
    ended = [h for h in found if h.tokens[-1] == 1][:8]
    assert [h.tokens for h in ended] == [tokens for tokens, _ in best]
    np.testing.assert_allclose([h.log_likelihood for h in ended], [x for _, x in best], rtol=1e-6)


def test_sentences_do_not_disturb_one_another():
    """In a batch with others that end sooner or later, each comes out as alone."""
    model = captioner(lambda **k: ShowAttend(WORDS, D, 8, 6, **k)).double()
    a = annotations(7).double()
    for options in ({}, {"beam": 3}, {"beam": 4, "length_penalty": 0.7}):
        together = model.hypotheses(a, max_length=8, **options)
        alone = [model.hypotheses(a[i : i + 1], max_length=8, **options)[0] for i in range(7)]
        assert [[h.tokens for h in row] for row in together] == [
            [h.tokens for h in row] for row in alone
        ]
        for one, other in zip(itertools.chain(*together), itertools.chain(*alone)):
            assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-9)
        said = [row[0] for row in together]
        np.testing.assert_allclose(
            model.log_likelihood(a, [h.tokens for h in said]), [h.log_likelihood for h in said]
        )
    maps = model.attention(a[:2], [(3, 4), (EOS,)])  # what a search may say, an empty one too
    assert [m.shape for m in maps] == [(2, a.shape[1]), (1, a.shape[1])]
    lengths = {len(row[0].tokens) for row in model.hypotheses(a, max_length=8)}
    assert len(lengths) > 1  # some ended, others went on


def test_beam_is_never_worse_than_greedy_here_and_both_say_no_special_words():
    model = captioner(lambda **k: ShowAttend(WORDS, D, 8, 6, **k))
    a = annotations(12)
    one, three = model.hypotheses(a, max_length=9), model.hypotheses(a, beam=3, max_length=9)
    assert sum(t[0].log_likelihood for t in three) > sum(o[0].log_likelihood for o in one)
    for row in three:
        scores = [h.score for h in row]
        assert len(row) == 3 and scores == sorted(scores, reverse=True)
        assert all(word == EOS or word > 3 for h in row for word in h.tokens)
        assert all(EOS not in h.tokens[:-1] for h in row)


def test_sampling_is_from_the_distribution():
    toy, n = Toy(), 4000
    drawn = [h.tokens for h in sample(toy, [()] * n, n, **ENDS, seed=0)]
    assert drawn == [h.tokens for h in sample(toy, [()] * n, n, **ENDS, seed=0)]
    assert drawn != [h.tokens for h in sample(toy, [()] * n, n, **ENDS, seed=1)]
    share = np.mean([tokens == (3, 4, 1) for tokens in drawn])
    assert share == pytest.approx(0.36, abs=0.03)
    assert {t[:-1] for t in drawn} == {(2, 2), (2, 3), (2, 4), (2, 5), (3, 4), (3, 5)}
    cold = [h.tokens[0] for h in sample(toy, [()] * n, n, **ENDS, seed=0, temperature=0.5)]
    assert np.mean(np.array(cold) == 2) == pytest.approx(0.36 / (0.36 + 0.16), abs=0.03)


def test_top_k_and_nucleus_leave_out_the_tail():
    toy, n = Toy(), 500
    top = {h.tokens[:-1] for h in sample(toy, [()] * n, n, **ENDS, seed=0, top_k=1)}
    assert top == {(2, 2)}
    two = {h.tokens[:-1] for h in sample(toy, [()] * n, n, **ENDS, seed=0, top_k=2)}
    assert two == {(2, 2), (2, 3), (3, 4), (3, 5)}
    # 0.6 is not 0.7 yet, so 3 is in; then 0.25 + 0.25 + 0.25 >= 0.7; and 0.9 alone.
    nucleus = {h.tokens[:-1] for h in sample(toy, [()] * n, n, **ENDS, seed=0, top_p=0.7)}
    assert nucleus == {(2, 2), (2, 3), (2, 4), (3, 4)}
    (one,) = sample(toy, [()], 1, **ENDS, seed=0, top_k=1)
    assert one.log_likelihood == pytest.approx(np.log(0.15))  # the model's own, not the cut one's


def test_a_sentence_that_does_not_end_is_cut_off():
    limits = {**ENDS, "max_length": 2}
    (one,) = greedy(Toy(), [()], 1, **limits)
    (drawn,) = sample(Toy(), [()], 1, **limits, seed=0)
    ((best,),) = beam_search(Toy(), [()], 1, **limits, beam=1)
    assert all(len(h.tokens) == 2 and 1 not in h.tokens for h in (one, drawn, best))


def test_banned_words_are_not_said():
    (one,) = greedy(Toy(), [()], 1, **ENDS, banned=(2,))
    assert one.tokens == (3, 4, 1)
    ((one, *_),) = beam_search(Toy(), [()], 1, **ENDS, banned=(3,), beam=2)
    assert one.tokens == (2, 2, 1)


def test_batches_go_where_the_model_is():
    batch, _ = batch_of(annotations(), CAPTIONS)
    moved = batch.to("cpu")
    assert isinstance(moved, CaptionBatch) and np.array_equal(moved.words.numpy(), batch.words)
