"""Words as numbers, and back."""

from __future__ import annotations

import collections
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from minidl.serialization import atomic_path

__all__ = ["BOS", "EOS", "PAD", "UNK", "Vocabulary", "tokenize"]

PAD, BOS, EOS, UNK = range(4)  # padding; begin, end of a sentence; an unknown word
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
KINDS = ("word", "character", "bpe")
WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


def tokenize(caption: str) -> list[str]:
    """Lower-case words without punctuation: "A man's T-shirt." -> ["a", "man's", "t-shirt"]."""
    return WORD.findall(caption.lower())


class Vocabulary:
    """The tokens that a model can say, numbered from 0; the first four are `SPECIAL`.

    ===========  ========================================================================
    kind         a token is
    ===========  ========================================================================
    "word"       a word that occurs often enough; others are <unk>
    "character"  a letter or a space: any word can be spelt
    "bpe"        a frequent run of bytes (Sennrich et al. 2016): common words are one token,
                 rare ones several, and nothing is unknown. Needs the package tokenizers
    ===========  ========================================================================

    Make one with `Vocabulary.build` or `Vocabulary.load`.
    """

    def __init__(self, tokens: Sequence[str], kind: str = "word", bpe: str | None = None) -> None:
        """
        Args:
            tokens: after the special ones.
            kind: see above.
            bpe: of "bpe": the tokenizer's state, in JSON.
        """
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r}: expected one of {', '.join(KINDS)}")
        self.tokens, self.kind, self.bpe = [*SPECIAL, *tokens], kind, bpe
        self.index = {token: number for number, token in enumerate(self.tokens)}
        if len(self.index) != len(self.tokens):
            twice = [t for t, n in collections.Counter(self.tokens).items() if n > 1]
            raise ValueError(f"tokens occur twice: {twice[:5]}")
        self._bpe = None if bpe is None else bpe_module().Tokenizer.from_str(bpe)

    @classmethod
    def build(
        cls, captions: Iterable[str], kind: str = "word", min_count: int = 1, size: int = 1000
    ) -> Vocabulary:
        """The tokens of some captions (of the training set: others are not to be seen).

        Args:
            captions: the sentences.
            kind: "word", "character" or "bpe".
            min_count: leave out words, or characters, that occur less often.
            size: of "bpe": the number of tokens aimed at (at least 260: the bytes).

        Raises:
            ValueError: no such kind; min_count < 1; there are no words.
            ImportError: "bpe", and tokenizers is not installed.
        """
        texts = [" ".join(tokenize(caption)) for caption in captions]
        if not any(texts):
            raise ValueError("a vocabulary of nothing: the captions have no words")
        if min_count < 1:
            raise ValueError(f"min_count is at least 1, got {min_count}")
        if kind == "bpe":
            return cls.build_bpe(texts, size)
        pieces = (text.split() if kind == "word" else text for text in texts)
        counts = collections.Counter(token for piece in pieces for token in piece)
        # The most frequent first, then by the alphabet: the same whatever the captions' order.
        order = sorted(counts, key=lambda token: (-counts[token], token))
        return cls([token for token in order if counts[token] >= min_count], kind)

    @classmethod
    def build_bpe(cls, texts: Iterable[str], size: int) -> Vocabulary:
        module = bpe_module()
        tokenizer = module.Tokenizer(module.models.BPE())
        tokenizer.pre_tokenizer = module.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = module.decoders.ByteLevel()
        trainer = module.trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=list(SPECIAL),
            initial_alphabet=module.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        count = tokenizer.get_vocab_size()
        tokens = [tokenizer.id_to_token(number) for number in range(len(SPECIAL), count)]
        return cls(tokens, "bpe", tokenizer.to_str())

    def __len__(self) -> int:
        return len(self.tokens)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash((self.kind, *self.tokens))

    def encode(self, caption: str) -> list[int]:
        """Numbers of a caption's tokens, between BOS and EOS.

        Raises:
            ValueError: the caption has no words.
        """
        words = tokenize(caption)
        if not words:
            raise ValueError(f"an empty caption: {caption!r}")
        text = " ".join(words)
        if self._bpe is not None:
            numbers = self._bpe.encode(text).ids
        else:
            pieces = words if self.kind == "word" else text
            numbers = [self.index.get(piece, UNK) for piece in pieces]
        return [BOS, *numbers, EOS]

    def decode(self, numbers: Iterable[int]) -> str:
        """The sentence: special tokens are left out (but <unk> is shown), and it ends at EOS."""
        kept = []
        for number in map(int, numbers):
            if number == EOS:
                break
            if number not in (PAD, BOS):
                kept.append(number)
        if self._bpe is not None:
            return str(self._bpe.decode(kept))
        return (" " if self.kind == "word" else "").join(self.tokens[number] for number in kept)

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"kind": self.kind, "tokens": self.tokens[len(SPECIAL) :], "bpe": self.bpe}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Vocabulary:
        return cls(content["tokens"], content["kind"], content["bpe"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON."""
        with atomic_path(path) as part:
            part.write_text(json.dumps(self.to_dict(), ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Vocabulary:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is something else.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: not a vocabulary ({type(error).__name__}: {error})"
            ) from None

    def __repr__(self) -> str:
        return f"Vocabulary({len(self):,} tokens, {self.kind})"


def bpe_module() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ImportError(
            "byte-pair tokens need the package tokenizers: pip install 'minidl[captions]'"
        ) from None
    return tokenizers
