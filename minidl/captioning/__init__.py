"""Captions: a network that looks and a network that tells (Vinyals et al. 2015, Xu et al. 2015)."""

from minidl.captioning.batches import BucketSampler, CaptionBatch, CaptionPairs, caption_loader
from minidl.captioning.vocabulary import Vocabulary, tokenize

__all__ = [
    "BucketSampler", "CaptionBatch", "CaptionPairs", "Vocabulary", "caption_loader", "tokenize",
]  # fmt: skip
