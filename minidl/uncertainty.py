"""Monte-Carlo dropout: what a network does not know (Gal & Ghahramani 2016).

A network with dropout is many networks that share their weights. Leave dropout on when it answers,
ask several times, and see whether these networks agree: with p_s the class probabilities of
network s,

    p = mean of p_s                     the answer
    H[p]                                its entropy: all that is uncertain about it, in nats
    H[p] - mean of H[p_s]               of that, what the networks disagree about: little data
                                        there (the mutual information; Houlsby et al. 2011)

What is left, mean of H[p_s], they agree about: an image that is a bad 4 for everybody.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

import minidl
from minidl import nn
from minidl.attack import deployed
from minidl.nn import functional as F
from minidl.nn.dropout import DropConnectLinear, DropoutNd
from minidl.nn.rnn import RNNBase
from minidl.tensor import Tensor

__all__ = ["Uncertainty", "mc_dropout"]

DROPPING = (DropoutNd, DropConnectLinear, RNNBase)  # layers that drop while in training mode


class Uncertainty(NamedTuple):
    """What `mc_dropout` found.

    Attributes:
        probabilities: (N, classes), the mean over the samples.
        entropy: (N,) in nats, from 0 (certain) to log(classes).
        mutual_information: (N,) in nats, at least 0: the disagreement.
        samples: (S, N, classes), the answers one by one.
    """

    probabilities: Tensor
    entropy: Tensor
    mutual_information: Tensor
    samples: Tensor


def mc_dropout(model: nn.Module, x: Tensor, samples: int = 50) -> Uncertainty:
    """Ask a classifier several times with its dropout on.

    Only dropout is: batch norm keeps to its running statistics. The model's training flags are
    afterwards what they were. The masks follow from `minidl.manual_seed`.

    Args:
        model: gives logits (N, classes), and has a layer that drops.
        x: the images.
        samples: S, how often.

    Raises:
        ValueError: the model has no dropout (or p = 0 everywhere): all its answers are the same;
            samples < 1.
    """
    if samples < 1:
        raise ValueError(f"samples is at least 1, got {samples}")
    layers = [m for m in model.modules() if isinstance(m, DROPPING) and chance(m) > 0]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layer that drops (nn.Dropout, ...): it would give the "
            f"same answer {samples} times"
        )
    with minidl.no_grad(), deployed(model):
        for layer in layers:
            layer.training = True
        p = np.stack([F.softmax(model(x), dim=1).cpu().numpy() for _ in range(samples)])
    mean = p.mean(axis=0)
    H = entropy(mean)
    disagreement = np.maximum(H - entropy(p).mean(axis=0), 0)  # rounding may make it -1e-8
    return Uncertainty(*map(Tensor, (mean, H, disagreement, p)))


def chance(layer: nn.Module) -> float:
    """The probability that a layer drops something."""
    return float(getattr(layer, "p", 0.0) or getattr(layer, "dropout", 0.0))


def entropy(p: np.ndarray) -> np.ndarray:
    """-Σ p log p over the last dimension, with 0 log 0 = 0."""
    return -(p * np.log(np.where(p > 0, p, 1))).sum(axis=-1)
