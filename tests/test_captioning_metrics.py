"""Metrics of captions; those that need a package are in tests/oracle."""

import sys

import numpy as np
import pytest

import minidl
import minidl.nn.functional as F
from minidl import nn, optim
from minidl.captioning import Captioner, Encoder, ShowAndTell, Vocabulary, metrics
from minidl.data import Dataset

SAID = ["a red star", "A Blue cat.", "a dog"]
TRUE = [["a red star", "one star"], ["a blue cat"], ["two dogs", "a dog sits"]]


def test_exact_match_and_distinct():
    assert metrics.exact_match(SAID, TRUE) == pytest.approx(2 / 3)
    assert metrics.distinct([*SAID, "a red, star"]) == 3


def test_a_derangement_leaves_nothing_in_its_place():
    for n in (2, 3, 10, 101):
        moved = metrics.derangement(n, seed=n)
        assert sorted(moved) == list(range(n)) and (moved != np.arange(n)).all()
    assert np.array_equal(metrics.derangement(20), metrics.derangement(20))
    assert not np.array_equal(metrics.derangement(20), metrics.derangement(20, 1))
    with pytest.raises(ValueError, match="at least 2"):
        metrics.derangement(1)


def test_shuffling_finds_out_who_does_not_look():
    truth = [[f"a{i}", "always"] for i in range(20)]
    seeing, blind = [f"a{i}" for i in range(20)], ["always"] * 20
    assert metrics.exact_match(seeing, truth) == metrics.exact_match(blind, truth) == 1
    assert metrics.shuffled(metrics.exact_match, seeing, truth) == 0
    assert metrics.shuffled(metrics.exact_match, blind, truth) == 1


@pytest.mark.parametrize(
    ("said", "true", "message"),
    [
        (["a"], [], "1 hypotheses and the references of 0"),
        ([], [], "0 hypotheses"),
        ("a", [["a"]], "a list of captions"),
        (["a"], ["a"], "lists of them"),
        (["a", "b"], [["a"], [" . "]], "image 1 has no references"),
    ],
)
def test_metrics_refuse(said, true, message):
    with pytest.raises(ValueError, match=message):
        metrics.exact_match(said, true)


def test_the_missing_package_is_named(monkeypatch):
    for module in ("bleu.bleu", "rouge.rouge", "cider.cider"):
        monkeypatch.setitem(sys.modules, f"pycocoevalcap.{module}", None)
    for metric in (metrics.corpus_bleu, metrics.rouge_l, metrics.cider_d):
        with pytest.raises(ImportError, match=r"pip install 'minidl\[captions\]'"):
            metric(SAID, TRUE)
    with pytest.raises(ValueError, match="n is from 1 to 4"):
        metrics.corpus_bleu(SAID, TRUE, 5)


class Lamps(Dataset):
    """One of four lamps is on; the caption says which."""

    names = ("first", "second", "third", "fourth")

    def __init__(self, n=40):
        rng = np.random.default_rng(0)
        self.which = rng.integers(4, size=n)
        self.images = 0.1 * rng.random((n, 1, 4, 4)).astype("f")
        self.images[np.arange(n), 0, self.which] += 1
        self.captions = [[f"the {self.names[i]} lamp", self.names[i]] for i in self.which]

    def __len__(self):
        return len(self.which)

    def __getitem__(self, index):
        return self.images[index], self.captions[index]


@pytest.fixture(scope="module")
def trained():
    minidl.manual_seed(0)
    data = Lamps()
    words = Vocabulary.build([c for some in data.captions for c in some])
    # One place that sees all (Show and Tell takes the mean over places, so it must know where).
    encoder = Encoder(nn.Conv2d(1, 6, 4), coordinates=False)
    model = Captioner(encoder, ShowAndTell(words, 6, 16, 8, dropout=0.0))
    optimizer = optim.Adam(model.parameters(), 0.02)
    images = minidl.tensor(data.images)
    for step in range(120):
        batch, targets, _ = model.batch(images, [c[step % 2] for c in data.captions])
        optimizer.zero_grad()
        F.cross_entropy(model(batch), targets).backward()
        optimizer.step()
    return model, data


def test_a_model_that_looks(trained):
    model, data = trained
    report = metrics.evaluate(model, data, beam=2, batch_size=16)
    assert report.exact == 1 and 0.05 < report.shuffled_exact < 0.5
    assert report.perplexity < 1.5 and report.shuffled_perplexity > 2 * report.perplexity
    assert report.rank < 2.5 and 4 <= report.distinct <= 8
    assert report.hypotheses == model.generate(minidl.tensor(data.images), beam=2)
    # Perplexity by hand, caption by caption.
    pairs = [(i, c) for i, some in enumerate(data.captions) for c in some]
    images = minidl.tensor(data.images[[i for i, _ in pairs]])
    total = model.log_likelihood(images, [c for _, c in pairs]).sum()
    tokens = sum(len(c.split()) + 1 for _, c in pairs)
    assert report.perplexity == pytest.approx(np.exp(-total / tokens), rel=1e-5)
    with pytest.raises(ValueError, match="at least 10"):
        metrics.evaluate(model, Lamps(9))


def test_a_model_that_does_not_look(trained):
    model, data = trained
    blind = Captioner(model.encoder, ShowAndTell(model.vocabulary, 6, 16, 8))
    blind.decoder.load_state_dict(model.decoder.state_dict())
    for parameter in blind.decoder.image.parameters():
        parameter.array[...] = 0
    report = metrics.evaluate(blind, data)
    assert report.distinct == 1 and report.rank == 5.5
    assert report.perplexity == pytest.approx(report.shuffled_perplexity, rel=1e-6)


def test_retrieval_by_hand(trained):
    model, data = trained
    images, captions = minidl.tensor(data.images[:12]), [c[0] for c in data.captions[:12]]
    ranks = metrics.retrieval(model, images, captions, among=12)
    table = np.array([model.log_likelihood(images, [c] * 12) for c in captions])  # caption, image
    own = np.diag(table)[:, None]
    expected = 1 + (table > own).sum(1) + ((table == own).sum(1) - 1) / 2
    np.testing.assert_allclose(ranks, expected, atol=1)  # rounding may swap two that are alike
    assert np.mean(ranks == expected) > 0.7
    with pytest.raises(ValueError, match="among is from 2"):
        metrics.retrieval(model, images, captions, among=13)
