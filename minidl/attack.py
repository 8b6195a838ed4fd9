"""Adversarial examples: images changed a little, and on purpose, so that a network errs.

    x_adv = x + ε · sign(∇ₓ J(θ, x, y))                  (Goodfellow et al. 2015, equation 1)

A network is nearly linear in its pixels. A step of ε in the direction in which the loss J grows
fastest changes each pixel by ε and no more, but its effects on J add up over all pixels: many
small steps, none of which is seen, make a large one. `fgsm` is that one step; `bim` and `pgd` take
several, each projected back to the ball of radius ε around x; `adversarial_train` teaches a
network to stand them.

Images are Tensors of any shape (N, ...), floating, in the range `clip`; ε has their unit. An attack
sees the network as it is deployed, in eval mode (no dropout, batch norm with its running
statistics), and leaves it as it was: parameters, their gradients, buffers, training flags. It
computes the gradient of the input only: none of a weight (see `minidl.grad`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

import minidl
from minidl import backend, nn
from minidl.backend import random
from minidl.nn import functional as F
from minidl.tensor import Tensor

Clip = tuple[float, float] | None
Loss = Callable[[Tensor, Tensor], Tensor]
Attack = Callable[[nn.Module, Tensor, Tensor, float], Tensor]  # (model, x, y, epsilon) -> x_adv


# The attacks ------------------------------------------------------------------------------


def input_gradient(model: nn.Module, x: Tensor, y: Tensor, loss: Loss = F.cross_entropy) -> Tensor:
    """∇ₓ J(θ, x, y): the gradient of the loss with respect to the images, shaped as they are."""
    x = Tensor(x.array, requires_grad=True)
    with minidl.enable_grad(), deployed(model):
        (gradient,) = minidl.grad(loss(model(x), y), x)
    assert gradient is not None
    return gradient


def fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epsilon: float,
    clip: Clip = (0, 1),
    targeted: bool = False,
    loss: Loss = F.cross_entropy,
) -> Tensor:
    """The fast gradient sign method (Goodfellow et al. 2015, section 4).

    Args:
        model: any module that gives logits.
        x: images (N, ...), floating, in the range `clip`.
        y: their labels (N,), or where `targeted` the labels that the network shall be made to say.
        epsilon: how much each pixel may change, at least 0.
        clip: the range of a pixel, to which the result is cut; None: not at all.
        targeted: go downhill, towards y, in place of uphill, away from it.
        loss: of (logits, y): J.

    Returns:
        The adversarial images, shaped as x; outside the tape.

    Raises:
        TypeError: images that are not floating Tensors.
        ValueError: epsilon < 0; pixels that are NaN or outside `clip`; as many labels as images
            are wanted.
    """
    check(x, y, epsilon, clip)
    uphill = np.sign(input_gradient(model, x, y, loss).array)
    return Tensor(cut(x.array + (-epsilon if targeted else epsilon) * uphill, clip))


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epsilon: float,
    alpha: float | None = None,
    steps: int = 40,
    norm: str = "inf",
    random_start: bool = True,
    clip: Clip = (0, 1),
    targeted: bool = False,
    loss: Loss = F.cross_entropy,
    seed: int | None = None,
) -> Tensor:
    """Projected gradient descent (Madry et al. 2018, equation 1 ff.).

    x_{t+1} = Π(x_t + α · d_t), where Π projects to the ball of radius ε around x, and d_t is the
    gradient's sign (norm "inf") or the gradient divided by its length (norm 2, each image's own).

    Args:
        model, x, y, epsilon, clip, targeted, loss: as for `fgsm`; epsilon in the unit of `norm`.
        alpha: the length of a step; None: 2.5 · ε / steps, enough to get anywhere in the ball.
        steps: how many.
        norm: "inf" or "2".
        random_start: begin somewhere in the ball, evenly at random, not at x.
        seed: of the random start; None: minidl's random numbers (`minidl.manual_seed`).

    Returns:
        The images after the last step.

    Raises:
        TypeError, ValueError: as `fgsm`; another norm; steps < 1; alpha < 0.
    """
    check(x, y, epsilon, clip)
    if norm not in ("inf", "2"):
        raise ValueError(f"norm is 'inf' or '2', got {norm!r}")
    if steps < 1:
        raise ValueError(f"steps is at least 1, got {steps}")
    alpha = 2.5 * epsilon / steps if alpha is None else alpha
    if not alpha >= 0:
        raise ValueError(f"alpha is the length of a step, at least 0, got {alpha}")
    step = -alpha if targeted else alpha
    start = x.array
    x_t = start
    if random_start:
        x_t = cut(start + random_in_ball(start, epsilon, norm, seed), clip)
    for _ in range(steps):
        g = input_gradient(model, Tensor(x_t), y, loss).array
        direction = np.sign(g) if norm == "inf" else g / (lengths(g) + TINY)
        x_t = cut(start + project(x_t + step * direction - start, epsilon, norm), clip)
    return Tensor(x_t)


def bim(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epsilon: float,
    alpha: float | None = None,
    steps: int = 10,
    clip: Clip = (0, 1),
    targeted: bool = False,
    loss: Loss = F.cross_entropy,
) -> Tensor:
    """The basic iterative method (Kurakin et al. 2017, section 2.2): `fgsm` in small steps.

    The same as `pgd` from x itself, with steps of ε / steps (or `alpha`) in the norm "inf".
    """
    check(x, y, epsilon, clip)  # before the division
    alpha = epsilon / max(steps, 1) if alpha is None else alpha
    return pgd(model, x, y, epsilon, alpha, steps, "inf", False, clip, targeted, loss)


def random_sign(x: Tensor, epsilon: float, clip: Clip = (0, 1), seed: int | None = None) -> Tensor:
    """x + ε · (-1 or +1, at random): the control of every experiment with `fgsm`.

    Noise of the same size in every pixel; only the direction is nobody's choice.
    """
    check(x, None, epsilon, clip)
    plus = draw(x.array, seed) < 0.5
    return Tensor(cut(np.where(plus, x.array + epsilon, x.array - epsilon), clip))


# Standing them ----------------------------------------------------------------------------


def adversarial_loss(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    x_adv: Tensor,
    alpha: float = 0.5,
    loss: Loss = F.cross_entropy,
) -> Tensor:
    """J̃ = α J(θ, x, y) + (1 - α) J(θ, x_adv, y)  (Goodfellow et al. 2015, section 6).

    With α = 0 the network sees adversarial images alone, as in Madry et al. 2018.
    """
    bad = loss(model(x_adv), y)
    return bad if alpha == 0 else alpha * loss(model(x), y) + (1 - alpha) * bad


def adversarial_train(
    model: nn.Module,
    loader: Any,
    optimizer: Any,
    epsilon: float,
    *,
    epochs: int,
    alpha: float = 0.5,
    attack: Attack = fgsm,
    ramp_epochs: float = 0.0,
    scheduler: Any = None,
    loss: Loss = F.cross_entropy,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """Train on `adversarial_loss`, each batch attacked anew as the network changes.

    Ctrl-C ends it between two steps of the optimizer: the model keeps what it has learned.

    Args:
        model: trained in place.
        loader: of (images, labels), images in the attack's range.
        optimizer: over the model's parameters.
        epsilon: of the attack, at the end of the ramp.
        epochs: how often to go through the loader.
        alpha: the weight of the clean loss, in [0, 1].
        attack: `fgsm`, `bim`, or ``lambda *a: pgd(*a, steps=7)``.
        ramp_epochs: ε grows evenly from 0 over so many epochs. (Strong attacks on a network that
            knows nothing yet teach it to say the same for every image.)
        scheduler: stepped after every batch.
        on_epoch: called with each epoch's record.

    Returns:
        A record for each epoch: "epoch", "loss" (the mean of J̃) and "epsilon" (the last).

    Raises:
        ValueError: alpha outside [0, 1]; the loader is empty; else as the attack.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is the clean loss's weight, in [0, 1], got {alpha}")
    log: list[dict[str, float]] = []
    device = next(iter(model.parameters())).device
    model.train()
    for epoch in range(epochs):
        total, samples = 0.0, 0
        for step, (x, y) in enumerate(loader):
            x, y = x.to(device), y.to(device)
            done = epoch + (step + 1) / len(loader)
            now = epsilon * min(1.0, done / ramp_epochs) if ramp_epochs else epsilon
            x_adv = attack(model, x, y, now)
            J = adversarial_loss(model, x, y, x_adv, alpha, loss)
            optimizer.zero_grad()
            J.backward()
            optimizer.step()
            if scheduler:
                scheduler.step()
            total += J.item() * len(y)
            samples += len(y)
        if not samples:
            raise ValueError("nothing to train on: the loader gave no batch")
        log.append({"epoch": epoch + 1, "loss": total / samples, "epsilon": now})
        if on_epoch:
            on_epoch(log[-1])
    return log


@minidl.no_grad()
def accuracy(
    model: nn.Module, batches: Iterable[Any], attack: Attack = fgsm, epsilon: float = 0.0
) -> float:
    """The share of images, in [0, 1], that the model names rightly after an attack.

    Args:
        batches: of (images, labels).
        attack: (model, x, y, epsilon) -> images, made against `model` (or another one: a closure).

    Raises:
        ValueError: there are no images.
    """
    right = samples = 0
    for x, y in batches:
        x_adv = attack(model, x, y, epsilon) if epsilon else x
        with deployed(model):
            right += int((model(x_adv).argmax(dim=1) == y).sum().item())
        samples += len(y)
    if not samples:
        raise ValueError("no images: the accuracy of nothing is not defined")
    return right / samples


# What they are made of --------------------------------------------------------------------

TINY = 1e-12  # a gradient of length 0 has no direction: the step is then 0


@contextmanager
def deployed(model: nn.Module) -> Iterator[None]:
    """Eval mode inside a ``with`` block; afterwards each module's own flag is what it was."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def check(x: Any, y: Any, epsilon: float, clip: Clip) -> None:
    """Refuse what an attack would turn into nonsense."""
    if not isinstance(x, Tensor) or x.dtype.kind != "f":
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"images are floating Tensors, got {kind}: for bytes, x.float() / 255 with clip=(0, 1)"
        )
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon is at least 0 and finite, got {epsilon}")
    if clip is not None and not clip[0] < clip[1]:
        raise ValueError(f"clip is (smallest, largest) of a pixel, got {tuple(clip)}")
    if y is not None and (not isinstance(y, Tensor) or y.ndim == 0 or len(y) != len(x)):
        given = f"labels of shape {y.shape}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"{len(x)} images want a Tensor with one label each, got {given}")
    if not x.numel():
        return
    low, high = float(x.array.min()), float(x.array.max())
    if math.isnan(low) or math.isinf(low) or math.isinf(high):
        bad = ~np.isfinite(x.array).reshape(len(x), -1).all(axis=1)
        raise ValueError(f"image {int(bad.argmax())} has a pixel that is NaN or infinite")
    if clip is not None and not (clip[0] <= low and high <= clip[1]):
        raise ValueError(
            f"pixels are in [{low:g}, {high:g}], outside clip = {tuple(clip)}: scale the images, "
            "or give their range as clip (of normalised images, its smallest and largest value)"
        )


def cut(x: Any, clip: Clip) -> Any:
    return x if clip is None else np.clip(x, clip[0], clip[1])


def lengths(x: Any) -> Any:
    """The Euclidean length of each image, shaped (N, 1, ...)."""
    return np.sqrt((x * x).sum(axis=tuple(range(1, x.ndim)), keepdims=True))


def project(delta: Any, epsilon: float, norm: str) -> Any:
    """The nearest point of the ball of radius epsilon."""
    if norm == "inf":
        return np.clip(delta, -epsilon, epsilon)
    return delta * np.minimum(1.0, epsilon / (lengths(delta) + TINY)).astype(delta.dtype)


def draw(like: Any, seed: int | None) -> Any:
    """Random numbers in [0, 1), shaped as an array and where it is; the same on every device."""
    key = random.default_generator.next_key() if seed is None else random.Key(seed, 0)
    u = random.uniform(key, like.size).reshape(like.shape).astype(like.dtype)
    return backend.to_device(u, backend.device_name(like))


def random_in_ball(x: Any, epsilon: float, norm: str, seed: int | None) -> Any:
    """Evenly distributed points of the ball, one for each image."""
    if norm == "inf":
        return (2 * draw(x, seed) - 1) * epsilon
    key = random.default_generator.next_key() if seed is None else random.Key(seed, 0)
    rng = random.generator(key)
    direction = rng.standard_normal(x.shape)
    d = max(math.prod(x.shape[1:]), 1)
    # In d dimensions the share of the ball within radius r grows as r^d.
    radius = epsilon * rng.random((len(x),) + (1,) * (x.ndim - 1)) ** (1 / d)
    delta = (direction / (lengths(direction) + TINY) * radius).astype(x.dtype)
    return backend.to_device(delta, backend.device_name(x))
