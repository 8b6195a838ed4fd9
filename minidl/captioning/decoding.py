"""From next-word probabilities to sentences: greedy, beam search, sampling.

A model here is whatever has

    step(words (N,), state) -> (logits (N, V), state)      one more word for N sentences
    select(state, rows) -> state                           some of them, in a new order

All sentences of a batch advance together; one that has ended leaves the batch. Nothing is random
but `sample`, which depends on its seed only; of words that are equally likely, the one with the
lower number is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from minidl.backend import random, to_device
from minidl.tensor import Tensor

__all__ = ["Hypothesis", "beam_search", "greedy", "sample"]


class Hypothesis(NamedTuple):
    """A sentence, as a search found it.

    Attributes:
        tokens: without BOS; ends with EOS, unless the length ran out.
        log_likelihood: Σ log p of its tokens, in nats.
        score: what the search maximised: the log-likelihood over the length penalty.
    """

    tokens: tuple[int, ...]
    log_likelihood: float
    score: float


class Model(Protocol):
    def step(self, words: Any, state: Any) -> tuple[Tensor, Any]: ...
    def select(self, state: Any, rows: Any) -> Any: ...


def advance(
    model: Model, words: np.ndarray, state: Any, banned: Iterable[int]
) -> tuple[np.ndarray, Any]:
    """log p of the next words, (N, V) float64; -inf for what must not be said."""
    logits, state = model.step(Tensor(to_device(words, device_of(state))), state)
    x = to_device(logits.array, "cpu").astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    log_p = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    log_p[:, list(banned)] = -np.inf
    return log_p, state


def device_of(state: Any) -> str:
    first = state[0] if isinstance(state, tuple) and state else state
    return first.device if isinstance(first, Tensor) else "cpu"


def check(max_length: int, **least_one: float) -> None:
    for name, value in {"max_length": max_length, **least_one}.items():
        if value < 1:
            raise ValueError(f"{name} is at least 1, got {value}")


def greedy(
    model: Model, state: Any, n: int, *, bos: int, eos: int, banned: Sequence[int] = (),
    max_length: int = 30,
) -> list[Hypothesis]:  # fmt: skip
    """The likeliest word at every step. It is not the likeliest sentence: see `beam_search`.

    Args:
        model: see above.
        state: of the n sentences that begin.
        bos, eos: what a sentence begins and ends with.
        banned: words that are never said.
        max_length: words, EOS included.

    Returns:
        A hypothesis for each sentence.

    Raises:
        ValueError: max_length < 1.
    """
    check(max_length)
    return follow(model, state, n, bos, eos, banned, max_length, lambda log_p, _: log_p.argmax(1))


def sample(
    model: Model, state: Any, n: int, *, bos: int, eos: int, banned: Sequence[int] = (),
    max_length: int = 30, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0,
    seed: int | None = None,
) -> list[Hypothesis]:  # fmt: skip
    """Draw every word at random.

    Args:
        model, state, n, bos, eos, banned, max_length: as for `greedy`.
        temperature: divides the log-probabilities; below 1: rather the likely words.
        top_k: only the k likeliest words (Fan et al. 2018).
        top_p: only the fewest likeliest words that together have at least this probability
            (*nucleus*; Holtzman et al. 2020).
        seed: of the draw; by default minidl's global generator.

    Returns:
        A hypothesis for each sentence. Its log-likelihood is that of the model, undistorted.

    Raises:
        ValueError: arguments out of range.
    """
    check(max_length, top_k=1 if top_k is None else top_k)
    if not temperature > 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature is above 0 and top_p in (0, 1], got {temperature} and {top_p}"
        )
    key = random.default_generator.next_key() if seed is None else random.Key(seed, 0)
    # A row of numbers for each sentence, so that it is drawn alike in any batch of as many.
    u = random.generator(key).random((n, max_length))

    def draw(log_p: np.ndarray, where: tuple[np.ndarray, int]) -> np.ndarray:
        rows, t = where
        order = np.argsort(-log_p, axis=1, kind="stable")
        p = np.exp(np.take_along_axis(log_p, order, axis=1) / temperature)
        p /= p.sum(axis=1, keepdims=True)
        before = p.cumsum(axis=1) - p  # the probability of all that are likelier
        kept = before < top_p
        kept[:, 0] = True
        if top_k is not None:
            kept[:, top_k:] = False
        cumulative = np.where(kept, p, 0).cumsum(axis=1)
        drawn = (cumulative <= u[rows, t][:, None] * cumulative[:, -1:]).sum(axis=1)
        return np.take_along_axis(order, drawn[:, None], axis=1)[:, 0]

    return follow(model, state, n, bos, eos, banned, max_length, draw)


def follow(
    model: Model, state: Any, n: int, bos: int, eos: int, banned: Sequence[int], max_length: int,
    choose: Any,
) -> list[Hypothesis]:  # fmt: skip
    """One sentence each: `choose` the next words of (log p (N, V), (which sentences, step))."""
    tokens: list[list[int]] = [[] for _ in range(n)]
    total = np.zeros(n)
    alive, words = np.arange(n), np.full(n, bos)
    for t in range(max_length):
        if not len(alive):
            break
        log_p, state = advance(model, words, state, banned)
        words = choose(log_p, (alive, t))
        total[alive] += log_p[np.arange(len(alive)), words]
        for row, word in zip(alive, words):
            tokens[row].append(int(word))
        going = np.flatnonzero(words != eos)
        if len(going) < len(alive):
            alive, words, state = alive[going], words[going], model.select(state, going)
    return [Hypothesis(tuple(w), float(x), float(x)) for w, x in zip(tokens, total)]


def beam_search(
    model: Model, state: Any, n: int, *, bos: int, eos: int, banned: Sequence[int] = (),
    max_length: int = 30, beam: int = 3, length_penalty: float = 0.0,
) -> list[list[Hypothesis]]:  # fmt: skip
    """Pursue the `beam` best beginnings of every sentence at a time.

    Log-likelihoods fall with every word, so they favour short sentences. Sentences Y are therefore
    compared by log p(Y) / lp(Y), lp(Y) = ((5 + |Y|) / 6)^α (Wu et al. 2016, equation 14).

    Args:
        model, state, n, bos, eos, banned, max_length: as for `greedy`.
        beam: how many beginnings; with 1 it is `greedy`.
        length_penalty: α; 0: compare log-likelihoods, about 0.6 to 1: neither short nor long.

    Returns:
        For each sentence at most `beam` hypotheses, the best first. Those whose length ran out are
        among them only where too few have ended.

    Raises:
        ValueError: beam or max_length < 1; length_penalty < 0.
    """
    check(max_length, beam=beam)
    if length_penalty < 0:
        raise ValueError(f"length_penalty is at least 0, got {length_penalty}")

    def score(log_p: float, length: int) -> float:
        return log_p / ((5 + length) / 6) ** length_penalty

    ended: list[list[Hypothesis]] = [[] for _ in range(n)]
    begun: list[list[tuple[tuple[int, ...], float]]] = [[((), 0.0)] for _ in range(n)]
    for t in range(1, max_length + 1):
        rows = [(i, tokens, total) for i in range(n) for tokens, total in begun[i]]
        if not rows:
            break
        words = np.array([tokens[-1] if tokens else bos for _, tokens, _ in rows])
        log_p, state = advance(model, words, state, banned)
        log_p += np.array([total for _, _, total in rows])[:, None]
        parents: list[int] = []  # the row that each beginning goes on from
        first = 0
        for i in range(n):
            count = len(begun[i])
            following: list[tuple[tuple[int, ...], float]] = []
            if count:
                flat = log_p[first : first + count].reshape(-1)
                # Twice as many as needed: half of them may end here.
                for at in best(flat, 2 * beam):
                    parent, word = first + int(at) // log_p.shape[1], int(at) % log_p.shape[1]
                    tokens, total = (*rows[parent][1], word), float(flat[at])
                    if word == eos:
                        ended[i].append(Hypothesis(tokens, total, score(total, t)))
                    elif len(following) < beam:
                        following.append((tokens, total))
                        parents.append(parent)
                first += count
                ended[i] = sorted(ended[i], key=lambda h: -h.score)[:beam]
                # No beginning can overtake: log p only falls, and the penalty is largest at last.
                if following and len(ended[i]) == beam and t < max_length:
                    hope = max(score(following[0][1], length) for length in (t + 1, max_length))
                    if hope <= ended[i][-1].score:
                        del parents[len(parents) - len(following) :]
                        following = []
            begun[i] = following
        state = model.select(state, np.array(parents, dtype=np.int64))
    for i in range(n):
        unfinished = [Hypothesis(w, total, score(total, max_length)) for w, total in begun[i]]
        ended[i] += unfinished[: beam - len(ended[i])]
    return ended


def best(values: np.ndarray, count: int) -> np.ndarray:
    """Where the largest finite values are: largest first, of equal ones the first."""
    if count < len(values):
        some = np.flatnonzero(values >= np.partition(values, -count)[-count])
    else:
        some = np.arange(len(values))
    order = some[np.argsort(-values[some], kind="stable")][:count]
    return order[np.isfinite(values[order])]
