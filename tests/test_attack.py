"""Adversarial examples: the definitions, what an attack must leave alone, and what it refuses."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest

import minidl
import minidl.nn.functional as F
from minidl import nn, optim
from minidl.attack import (
    accuracy,
    adversarial_loss,
    adversarial_train,
    bim,
    fgsm,
    input_gradient,
    pgd,
    random_sign,
)
from minidl.data import DataLoader, Digits
from minidl.tensor import Tensor

EPSILON = 0.1


def network() -> nn.Sequential:
    minidl.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(),
        nn.Linear(4 * 36, 10),
    )  # fmt: skip
    model(minidl.rand(16, 1, 8, 8))  # so that the running statistics are not the first ones
    return model


def batch(n: int = 6) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(0)
    x = rng.uniform(0.2, 0.8, (n, 1, 8, 8)).astype(np.float32)
    return minidl.tensor(x), minidl.tensor(rng.integers(0, 10, n))


ATTACKS: dict[str, Any] = {
    "fgsm": fgsm,
    "bim": bim,
    "pgd": lambda *a, **k: pgd(*a, steps=5, seed=1, **k),
    "pgd_l2": lambda *a, **k: pgd(*a, steps=5, norm="2", seed=1, **k),
}
every_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=list(ATTACKS))


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    return F.cross_entropy(model(x), y).item()


def test_fgsm_is_its_equation() -> None:
    model, (x, y) = network(), batch()
    model.eval()
    leaf = minidl.tensor(x.numpy().copy(), requires_grad=True)
    F.cross_entropy(model(leaf), y).backward()
    expected = np.clip(x.numpy() + EPSILON * np.sign(leaf.grad.numpy()), 0, 1)
    np.testing.assert_array_equal(fgsm(model, x, y, EPSILON).numpy(), expected)
    expected = np.clip(x.numpy() - EPSILON * np.sign(leaf.grad.numpy()), 0, 1)
    np.testing.assert_array_equal(fgsm(model, x, y, EPSILON, targeted=True).numpy(), expected)


def test_one_step_from_x_is_fgsm() -> None:
    model, (x, y) = network(), batch()
    one = pgd(model, x, y, EPSILON, alpha=EPSILON, steps=1, random_start=False)
    np.testing.assert_allclose(one.numpy(), fgsm(model, x, y, EPSILON).numpy(), atol=1e-7)
    np.testing.assert_array_equal(bim(model, x, y, EPSILON, steps=1).numpy(), one.numpy())


@every_attack
def test_goes_uphill_or_towards_a_target(attack: Any) -> None:
    model, (x, y) = network(), batch()
    before = loss_of(model, x, y)
    assert loss_of(model, attack(model, x, y, EPSILON), y) > before
    assert loss_of(model, attack(model, x, y, EPSILON, targeted=True), y) < before


@every_attack
def test_stays_in_the_ball_and_in_the_range(attack: Any) -> None:
    model, (x, y) = network(), batch()
    x_adv = attack(model, x, y, 0.5)
    delta = x_adv.numpy() - x.numpy()
    if attack is ATTACKS["pgd_l2"]:
        lengths = np.linalg.norm(delta.reshape(len(delta), -1), axis=1)
        assert (lengths <= 0.5 + 1e-6).all() and lengths.max() > 0.4
    else:
        assert np.abs(delta).max() <= 0.5 + 1e-6 and np.abs(delta).max() > 0.4
    assert x_adv.numpy().min() >= 0 and x_adv.numpy().max() <= 1
    beyond = attack(model, x, y, 0.5, clip=None)
    assert attack is ATTACKS["pgd_l2"] or beyond.numpy().min() < 0


@every_attack
def test_leaves_everything_as_it_was(attack: Any) -> None:
    model, (x, y) = network(), batch()
    model.train()
    model[1].eval()  # a frozen batch norm within a network in training
    F.cross_entropy(model(x), y).backward()
    state = {k: v.numpy().copy() for k, v in model.state_dict().items()}
    gradients = [p.grad.numpy().copy() for p in model.parameters()]
    flags = [m.training for m in model.modules()]
    pixels = x.numpy().copy()
    with minidl.no_grad():  # an attack needs a gradient, wherever it is called
        x_adv = attack(model, x, y, EPSILON)
    assert not x_adv.requires_grad and x.grad is None and x_adv.dtype == x.dtype
    np.testing.assert_array_equal(x.numpy(), pixels)
    for k, v in model.state_dict().items():
        np.testing.assert_array_equal(v.numpy(), state[k])
    for p, g in zip(model.parameters(), gradients, strict=True):
        np.testing.assert_array_equal(p.grad.numpy(), g)
    assert [m.training for m in model.modules()] == flags


def test_flags_come_back_after_an_error() -> None:
    model, (x, y) = network(), batch()
    with pytest.raises(ValueError):
        fgsm(model, x, minidl.tensor(np.full(len(y), 99)), EPSILON)
    assert all(m.training for m in model.modules())


def test_only_the_input_gradient_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    from minidl.ops import conv

    called = []
    weight = conv.conv2d_weight
    monkeypatch.setattr(conv, "conv2d_weight", lambda *a, **k: called.append(1) or weight(*a, **k))
    model, (x, y) = network(), batch()
    fgsm(model, x, y, EPSILON)
    assert not called
    F.cross_entropy(model(x), y).backward()
    assert called


def test_the_tape_is_gone_afterwards() -> None:
    model, (x, y) = network(), batch()
    seen = []
    model[0].register_forward_hook(lambda m, a, out: seen.append(weakref.ref(out)))
    fgsm(model, x, y, EPSILON)
    assert seen and all(ref() is None for ref in seen)


def test_an_image_is_attacked_alone() -> None:
    """Whatever else is in the batch."""
    model, (x, y) = network(), batch()
    together = fgsm(model, x, y, EPSILON).numpy()
    alone = fgsm(model, x[2:3], y[2:3], EPSILON).numpy()
    np.testing.assert_array_equal(alone, together[2:3])


def test_seeds() -> None:
    model, (x, y) = network(), batch()
    for norm in ("inf", "2"):
        a, b, c = (pgd(model, x, y, EPSILON, steps=2, norm=norm, seed=s).numpy() for s in (1, 1, 2))
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)
    minidl.manual_seed(3)
    a = pgd(model, x, y, EPSILON, steps=2).numpy()
    b = pgd(model, x, y, EPSILON, steps=2).numpy()
    minidl.manual_seed(3)
    np.testing.assert_array_equal(a, pgd(model, x, y, EPSILON, steps=2).numpy())
    assert not np.array_equal(a, b)


def test_random_sign_changes_every_pixel_by_epsilon() -> None:
    x, _ = batch()
    delta = random_sign(x, EPSILON, seed=0).numpy() - x.numpy()
    np.testing.assert_allclose(np.abs(delta), EPSILON, rtol=1e-5)
    assert 0.4 < (delta > 0).mean() < 0.6


def test_epsilon_0_and_no_images() -> None:
    model, (x, y) = network(), batch()
    np.testing.assert_array_equal(fgsm(model, x, y, 0.0).numpy(), x.numpy())
    np.testing.assert_array_equal(pgd(model, x, y, 0.0, steps=1).numpy(), x.numpy())
    assert fgsm(model, x[:0], y[:0], 0.1).shape == (0, 1, 8, 8)


@pytest.mark.parametrize(
    ("error", "words", "change"),
    [
        (TypeError, "got uint8", lambda x, y: {"x": Tensor((x.array * 255).astype(np.uint8))}),
        (TypeError, "got ndarray", lambda x, y: {"x": x.numpy()}),
        (ValueError, "epsilon is at least 0", lambda x, y: {"epsilon": -0.1}),
        (ValueError, "epsilon is at least 0", lambda x, y: {"epsilon": float("nan")}),
        (ValueError, "epsilon is at least 0", lambda x, y: {"epsilon": float("inf")}),
        (ValueError, r"6 images want .* of shape \(5,\)", lambda x, y: {"y": y[:5]}),
        (ValueError, r"6 images want .* of shape \(\)", lambda x, y: {"y": y[0]}),
        (ValueError, "6 images want .* got ndarray", lambda x, y: {"y": y.numpy()}),
        (ValueError, "shape", lambda x, y: {"y": y.reshape((-1, 1))}),
        ((IndexError, ValueError), "class|label|target", lambda x, y: {"y": y + 100}),
        (ValueError, r"clip is \(smallest, largest\)", lambda x, y: {"clip": (1, 0)}),
        (ValueError, "outside clip", lambda x, y: {"x": x * 255}),
        (ValueError, r"outside clip = \(-1, 0\)", lambda x, y: {"clip": (-1, 0)}),
        (ValueError, "image 1 has a pixel that is NaN", lambda x, y: {"x": with_nan(x)}),
    ],
)
def test_refuses(error: type[Exception], words: str, change: Any) -> None:
    model, (x, y) = network(), batch()
    call = {"x": x, "y": y, "epsilon": EPSILON} | change(x, y)
    for attack in (fgsm, bim, pgd):
        with pytest.raises(error, match=words):
            attack(model, **call)


def with_nan(x: Tensor) -> Tensor:
    a = x.numpy().copy()
    a[1, 0, 2, 3] = np.nan
    return Tensor(a)


@pytest.mark.parametrize(
    "settings", [{"norm": "1"}, {"steps": 0}, {"alpha": -1.0}, {"alpha": float("nan")}]
)
def test_pgd_refuses(settings: dict[str, Any]) -> None:
    model, (x, y) = network(), batch()
    with pytest.raises(ValueError, match=next(iter(settings))):
        pgd(model, x, y, EPSILON, **settings)


def test_adversarial_loss_is_its_equation() -> None:
    model, (x, y) = network(), batch()
    model.eval()
    x_adv = fgsm(model, x, y, EPSILON)
    J, J_adv = F.cross_entropy(model(x), y).item(), F.cross_entropy(model(x_adv), y).item()
    for alpha in (0.0, 0.25, 1.0):
        expected = alpha * J + (1 - alpha) * J_adv
        assert adversarial_loss(model, x, y, x_adv, alpha).item() == pytest.approx(expected, 1e-5)


def digits(train: bool) -> DataLoader:
    return DataLoader(Digits(train=train), batch_size=64 if train else 360, shuffle=train)


def trained(adversarially: bool) -> nn.Module:
    minidl.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = optim.Adam(model.parameters(), lr=1e-2)
    records: list[dict[str, float]] = []
    log = adversarial_train(
        model, digits(True), optimizer, 0.1 if adversarially else 0.0, epochs=15, ramp_epochs=3,
        on_epoch=records.append,
    )  # fmt: skip
    assert log == records and [r["epoch"] for r in log] == list(range(1, 16))
    assert log[-1]["loss"] < log[2]["loss"]
    return model


def test_the_papers_claims_on_digits() -> None:
    """A step of the gradient's sign fools, random signs do not, and training helps."""
    plain, hardened, test = trained(False), trained(True), list(digits(False))
    clean = accuracy(plain, test)
    assert clean > 0.87
    assert accuracy(plain, test, lambda m, x, y, e: random_sign(x, e, seed=0), 0.1) > clean - 0.03
    under_attack = accuracy(plain, test, fgsm, 0.1)
    assert under_attack < clean - 0.3
    assert accuracy(plain, test, lambda *a: pgd(*a, steps=10, seed=0), 0.1) <= under_attack
    assert accuracy(hardened, test) > 0.87
    assert accuracy(hardened, test, fgsm, 0.1) > under_attack + 0.15
    # Images made against one network fool another, though less (Szegedy et al. 2014).
    transferred = accuracy(plain, test, lambda _, *rest: fgsm(hardened, *rest), 0.1)
    assert under_attack < transferred < clean - 0.1


def test_training_refuses() -> None:
    model = nn.Linear(4, 2)
    optimizer = optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="alpha"):
        adversarial_train(model, [], optimizer, 0.1, epochs=1, alpha=1.5)
    with pytest.raises(ValueError, match="no batch"):
        adversarial_train(model, [], optimizer, 0.1, epochs=1)
    with pytest.raises(ValueError, match="no images"):
        accuracy(model, [])


def test_the_gradient_can_be_shown_as_a_picture() -> None:
    model, (x, y) = network(), batch()
    signs = np.sign(input_gradient(model, x, y).numpy())
    assert signs.shape == x.shape and set(np.unique(signs)) <= {-1.0, 0.0, 1.0}
