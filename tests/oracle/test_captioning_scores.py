"""BLEU, ROUGE-L, CIDEr-D: the package's figures, and figures that can be checked by hand."""

from __future__ import annotations

import math

import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from minidl.captioning import corpus_bleu, metrics

SAID = ["A man in a blue shirt is standing on the street.", "a dog runs", "two children play"]
TRUE = [
    ["a man in a red shirt is standing on a street", "Man standing."],
    ["a brown dog runs on grass", "the dog is running"],
    ["two children play in the sand", "children at the beach"],
]


def test_figures_of_the_package() -> None:
    truth = {
        0: ["a man in a red shirt is standing on a street", "man standing"],
        1: TRUE[1],
        2: TRUE[2],
    }
    said = {0: ["a man in a blue shirt is standing on the street"], 1: [SAID[1]], 2: [SAID[2]]}
    scores, _ = Bleu(4).compute_score(truth, said, verbose=0)
    for n in (1, 2, 3, 4):
        assert corpus_bleu(SAID, TRUE, n) == pytest.approx(scores[n - 1], rel=1e-12) != 0
    assert metrics.rouge_l(SAID, TRUE) == pytest.approx(Rouge().compute_score(truth, said)[0])
    assert metrics.cider_d(SAID, TRUE) == pytest.approx(Cider().compute_score(truth, said)[0]) != 0


def test_bleu_by_hand() -> None:
    """Papineni et al. 2002, example 2, and what follows from their equations."""
    cat = [["The cat is on the mat.", "There is a cat on the mat."]]
    assert corpus_bleu(["the the the the the the the"], cat, 1) == pytest.approx(2 / 7)
    # 3 of 4 words, 1 of 3 pairs, one word shorter than the closer reference: e^(1 - 5/4).
    short = corpus_bleu(["a b x c"], [["a b c d e"]], 2)
    assert short == pytest.approx(math.sqrt(3 / 4 * 1 / 3) * math.exp(1 - 5 / 4))
    assert corpus_bleu(SAID, [[s] for s in SAID]) == pytest.approx(1)


def test_bleu_is_not_smoothed() -> None:
    assert 0 < corpus_bleu(["a b x c"], [["a b c d e"]], 3) < 1e-4
    assert 0 < corpus_bleu(["a b x c"], [["a b c d e"]], 4) < 1e-3


def test_cider_and_rouge_by_hand() -> None:
    same = [[s] for s in SAID]
    assert metrics.rouge_l(SAID, same) == pytest.approx(1)
    four = ["a b c d e", "f g h i j", "k l m n o"]
    assert metrics.cider_d(four, [[s] for s in four]) == pytest.approx(10)
    assert metrics.cider_d(four, [[s] for s in reversed(four)]) == pytest.approx(10 / 3)
    # The longest common subsequence of "a x c" and "a b c d" is "a c": P = 2/3, R = 1/2, β = 1.2.
    p, r, beta2 = 2 / 3, 1 / 2, 1.44
    expected = (1 + beta2) * p * r / (r + beta2 * p)
    assert metrics.rouge_l(["a x c"], [["a b c d"]]) == pytest.approx(expected)
