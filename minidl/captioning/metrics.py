"""How good are captions? And would they be as good if the model were blind?

BLEU (Papineni et al. 2002), ROUGE-L (Lin 2004) and CIDEr-D (Vedantam et al. 2015) are those of the
COCO caption challenge, by its own code (the package pycocoevalcap): figures can be compared with
published ones. They compare words with words, so a sentence that fits many pictures scores well
with no picture at all. Hence the others: exact match, where a grammar says what is true; whether
scores collapse when pictures are permuted (`shuffled`); whether a caption is likelier with its own
picture than with others (`retrieval`); how many different captions there are (`distinct`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

import minidl
from minidl.attack import deployed
from minidl.backend import random
from minidl.captioning.model import Captioner
from minidl.captioning.vocabulary import tokenize
from minidl.data import DataLoader
from minidl.tensor import Tensor

__all__ = [
    "Report", "cider_d", "corpus_bleu", "derangement", "distinct", "evaluate", "exact_match",
    "retrieval", "rouge_l", "shuffled",
]  # fmt: skip

References = Sequence[Sequence[str]]


# Sentences against sentences --------------------------------------------------------------


def corpus_bleu(hypotheses: Sequence[str], references: References, n: int = 4) -> float:
    """BLEU-n of a corpus, in [0, 1]: how many of its 1- to n-grams are in the references.

    Without a single matching n-gram it is next to nothing: there is no smoothing but 1e-15 added to
    the number of matches. (Packages agree where all n-grams have matches; here they differ.) The
    length that the brevity penalty asks for is that of the closest reference.

    Args:
        hypotheses: a caption for each image.
        references: for each image, a list of captions. All are tokenized by `tokenize`.
        n: up to which n-grams, 1 to 4.

    Raises:
        ValueError: not as many lists of references as hypotheses; no references; n out of range.
        ImportError: pycocoevalcap is not installed.
    """
    if not 1 <= n <= 4:
        raise ValueError(f"n is from 1 to 4, got {n}")
    truth, said = as_coco(hypotheses, references)
    score, _ = scorer("bleu.bleu", "Bleu")(n).compute_score(truth, said, verbose=0)
    return float(score[n - 1])


def rouge_l(hypotheses: Sequence[str], references: References) -> float:
    """ROUGE-L, in [0, 1]: the longest common subsequence, as F measure with β = 1.2.

    Arguments and errors as for `corpus_bleu`.
    """
    return float(
        scorer("rouge.rouge", "Rouge")().compute_score(*as_coco(hypotheses, references))[0]
    )


def cider_d(hypotheses: Sequence[str], references: References) -> float:
    """CIDEr-D, in [0, 10]: likeness of n-grams, each weighted by how rare it is in the references.

    (With the references of one image alone nothing is rare, and it is 0.) Arguments and errors as
    for `corpus_bleu`.
    """
    return float(
        scorer("cider.cider", "Cider")().compute_score(*as_coco(hypotheses, references))[0]
    )


def scorer(module: str, name: str) -> Any:
    import importlib

    try:
        return getattr(importlib.import_module(f"pycocoevalcap.{module}"), name)
    except ImportError:
        raise ImportError(
            "BLEU, ROUGE-L and CIDEr-D need the package pycocoevalcap: pip install "
            "'minidl[captions]'"
        ) from None


def as_coco(hypotheses: Sequence[str], references: References) -> tuple[Any, Any]:
    """Tokenized, as the package takes them: {image: [sentence, ...]}."""
    check(hypotheses, references)
    truth = {i: [clean(r) for r in some] for i, some in enumerate(references)}
    return truth, {i: [clean(h)] for i, h in enumerate(hypotheses)}


def clean(sentence: str) -> str:
    return " ".join(tokenize(sentence))


def check(hypotheses: Sequence[str], references: References) -> None:
    if isinstance(hypotheses, str) or any(isinstance(some, str) for some in references):
        raise ValueError("hypotheses are a list of captions, references a list of lists of them")
    if len(hypotheses) != len(references) or not hypotheses:
        raise ValueError(
            f"{len(hypotheses)} hypotheses and the references of {len(references)} images"
        )
    for i, some in enumerate(references):
        if not any(tokenize(reference) for reference in some):
            raise ValueError(f"image {i} has no references with words in them: {list(some)}")


def exact_match(hypotheses: Sequence[str], references: References) -> float:
    """The share of captions that are, word for word, among the references of their image."""
    check(hypotheses, references)
    hits = [clean(h) in map(clean, some) for h, some in zip(hypotheses, references)]
    return float(np.mean(hits))


def distinct(hypotheses: Sequence[str]) -> int:
    """How many different captions there are. One: the model does not look."""
    return len({clean(hypothesis) for hypothesis in hypotheses})


def derangement(n: int, seed: int = 0) -> np.ndarray:
    """A permutation of range(n) that leaves nothing in its place.

    Raises:
        ValueError: n < 2: there is none.
    """
    if n < 2:
        raise ValueError(f"images are shuffled among at least 2, got {n}")
    order = random.generator(random.Key(seed, 0)).permutation(n)
    moved = np.empty(n, dtype=np.int64)
    moved[order] = np.roll(order, 1)  # one cycle through all
    return moved


def shuffled(
    metric: Callable[[Sequence[str], References], float], hypotheses: Sequence[str],
    references: References, seed: int = 0,
) -> float:  # fmt: skip
    """A metric of captions of *other* images: what is left needs no looking.

    (A caption depends on its image only, so permuted images give the same captions, permuted.)
    """
    return metric([hypotheses[i] for i in derangement(len(hypotheses), seed)], references)


# Sentences against images -----------------------------------------------------------------


def retrieval(
    model: Captioner, images: Tensor, captions: Sequence[str], among: int = 10, seed: int = 0
) -> np.ndarray:
    """The rank of a caption's own image by log p(caption | image), among others at random.

    Args:
        images: (N, C, H, W), or annotation vectors (N, L, D).
        captions: one for each.
        among: how many images are compared, its own included.
        seed: which others.

    Returns:
        (N,) ranks from 1, of equal likelihoods the mean; blind, they are (among + 1) / 2 on
        average.

    Raises:
        ValueError: fewer images than `among`; among < 2.
    """
    n = len(images)
    if not 2 <= among <= n:
        raise ValueError(f"among is from 2 to the number of images, {n}; got {among}")
    rng = random.generator(random.Key(seed, 0))
    # Of each caption: its own image, and the next ones in an order in which it is the first.
    others = np.stack([(i + 1 + rng.permutation(n - 1)[: among - 1]) % n for i in range(n)])
    with minidl.no_grad(), deployed(model):
        a = model.annotations(images)
    own = model.log_likelihood(a, captions)
    theirs = np.stack([model.log_likelihood(a[others[:, k]], captions) for k in range(among - 1)])
    return 1 + (theirs > own).sum(axis=0) + (theirs == own).sum(axis=0) / 2


class Report(NamedTuple):
    """What `evaluate` found. "Shuffled": with the images of others.

    Attributes:
        exact, shuffled_exact: share of captions that are word for word right.
        bleu, shuffled_bleu: BLEU-1 to -4; None without the package.
        rouge_l, cider_d: None without the package.
        perplexity, shuffled_perplexity: of the references' tokens: exp(-mean log p).
        rank: mean rank of a reference's own image among ten (blind: 5.5).
        distinct: how many different captions.
        hypotheses: the captions.
    """

    exact: float
    shuffled_exact: float
    bleu: list[float] | None
    shuffled_bleu: list[float] | None
    rouge_l: float | None
    cider_d: float | None
    perplexity: float
    shuffled_perplexity: float
    rank: float
    distinct: int
    hypotheses: list[str]


def evaluate(model: Captioner, dataset: Any, beam: int = 1, batch_size: int = 100) -> Report:
    """Caption a dataset's images, and measure all that is measured here.

    Args:
        dataset: of (image, captions), at least 10; images in eval form (no augmentation).
        beam: as for `Captioner.generate`.

    Raises:
        ValueError: fewer than 10 images.
    """
    n, references = len(dataset), dataset.captions
    if n < 10:
        raise ValueError(f"to evaluate takes at least 10 images, got {n}")
    device = next(iter(model.parameters())).device
    with minidl.no_grad(), deployed(model):
        loader = DataLoader(dataset, batch_size, collate_fn=only_images, seed=0)
        a = minidl.cat([model.annotations(images.to(device)) for images in loader])
    said: list[str] = []
    for start in range(0, n, batch_size):
        said += model.generate(a[start : start + batch_size], beam)

    wrong = derangement(n)
    total, shuffled_total, tokens = 0.0, 0.0, 0
    for k in range(max(map(len, references))):  # the first caption of each image, the second, ...
        rows = np.array([i for i in range(n) if k < len(references[i])])
        texts = [references[i][k] for i in rows]
        total += model.log_likelihood(a[rows], texts).sum()
        shuffled_total += model.log_likelihood(a[wrong[rows]], texts).sum()
        tokens += sum(len(model.vocabulary.encode(text)) - 1 for text in texts)
    ranks = retrieval(model, a, [captions[0] for captions in references])

    words: dict[str, Any] = dict.fromkeys(("bleu", "shuffled_bleu", "rouge_l", "cider_d"))
    try:
        scorer("bleu.bleu", "Bleu")
    except ImportError:
        pass
    else:
        blind = [said[i] for i in derangement(n)]
        words = {
            "bleu": [corpus_bleu(said, references, k) for k in (1, 2, 3, 4)],
            "shuffled_bleu": [corpus_bleu(blind, references, k) for k in (1, 2, 3, 4)],
            "rouge_l": rouge_l(said, references),
            "cider_d": cider_d(said, references),
        }
    return Report(
        exact=exact_match(said, references),
        shuffled_exact=shuffled(exact_match, said, references),
        perplexity=float(np.exp(-total / tokens)),
        shuffled_perplexity=float(np.exp(-shuffled_total / tokens)),
        rank=float(ranks.mean()),
        distinct=distinct(said),
        hypotheses=said,
        **words,
    )


def only_images(samples: list[Any]) -> Tensor:
    return Tensor(np.stack([np.asarray(image) for image, _ in samples]))
