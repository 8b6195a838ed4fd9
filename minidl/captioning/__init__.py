"""Captions: a network that looks and a network that tells (Vinyals et al. 2015, Xu et al. 2015).

Where to read first: `model.py`; then `decoding.py`.
"""

from minidl.captioning.batches import BucketSampler, CaptionBatch, CaptionPairs, caption_loader
from minidl.captioning.decoding import Hypothesis, beam_search, greedy, sample
from minidl.captioning.metrics import corpus_bleu
from minidl.captioning.model import (
    Captioner,
    Encoder,
    ShowAndTell,
    ShowAttend,
    convolutions,
    trunk,
)
from minidl.captioning.vocabulary import Vocabulary, tokenize

__all__ = [
    "BucketSampler", "CaptionBatch", "CaptionPairs", "Captioner", "Encoder", "Hypothesis",
    "ShowAndTell", "ShowAttend", "Vocabulary", "beam_search", "caption_loader", "convolutions",
    "corpus_bleu", "greedy", "sample", "tokenize", "trunk",
]  # fmt: skip
