"""Optimizers against the textbook, one number at a time; schedules against their formulas."""

import copy
import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import minidl
from minidl import nn, optim
from minidl.optim import lr_scheduler

# The textbook: p, g are numbers, s is what is remembered, t counts steps from 1 -----------------


def sgd(p, g, s, t, lr, momentum=0, dampening=0, weight_decay=0, nesterov=False):
    g = g + weight_decay * p
    if momentum:
        s["v"] = g if t == 1 else momentum * s["v"] + (1 - dampening) * g
        g = g + momentum * s["v"] if nesterov else s["v"]
    return p - lr * g


def adam(
    p, g, s, t, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, amsgrad=False, decoupled=False
):
    if decoupled:
        p = p - lr * weight_decay * p
    else:
        g = g + weight_decay * p
    s["m"] = betas[0] * s.get("m", 0) + (1 - betas[0]) * g
    s["v"] = betas[1] * s.get("v", 0) + (1 - betas[1]) * g**2
    v = s["largest"] = max(s.get("largest", 0), s["v"]) if amsgrad else s["v"]
    m_hat, v_hat = s["m"] / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
    return p - lr * m_hat / (math.sqrt(v_hat) + eps)


def adamw(p, g, s, t, lr, weight_decay=0.01, **kwargs):
    return adam(p, g, s, t, lr, weight_decay=weight_decay, decoupled=True, **kwargs)


def rmsprop(p, g, s, t, lr, alpha=0.99, eps=1e-8, weight_decay=0, momentum=0, centered=False):
    g = g + weight_decay * p
    s["v"] = alpha * s.get("v", 0) + (1 - alpha) * g**2
    s["m"] = alpha * s.get("m", 0) + (1 - alpha) * g
    quotient = g / (math.sqrt(s["v"] - (s["m"] ** 2 if centered else 0)) + eps)
    s["b"] = momentum * s.get("b", 0) + quotient
    return p - lr * s["b"]


def adagrad(p, g, s, t, lr, lr_decay=0, weight_decay=0, initial_accumulator_value=0, eps=1e-10):
    g = g + weight_decay * p
    s["sum"] = s.get("sum", initial_accumulator_value) + g**2
    return p - lr / (1 + (t - 1) * lr_decay) * g / (math.sqrt(s["sum"]) + eps)


def adadelta(p, g, s, t, lr, rho=0.9, eps=1e-6, weight_decay=0):
    g = g + weight_decay * p
    s["v"] = rho * s.get("v", 0) + (1 - rho) * g**2
    delta = g * math.sqrt(s.get("u", 0) + eps) / math.sqrt(s["v"] + eps)
    s["u"] = rho * s.get("u", 0) + (1 - rho) * delta**2
    return p - lr * delta


CASES: list[tuple[Any, Callable[..., float], dict[str, Any]]] = [
    (optim.SGD, sgd, {"lr": 0.1}),
    (optim.SGD, sgd, {"lr": 0.1, "momentum": 0.9}),
    (optim.SGD, sgd, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05}),
    (optim.SGD, sgd, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05}),
    (optim.Adam, adam, {"lr": 0.1}),
    (optim.Adam, adam, {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}),
    (optim.Adam, adam, {"lr": 0.1, "betas": (0.8, 0.9), "amsgrad": True}),
    (optim.AdamW, adamw, {"lr": 0.1}),
    (optim.AdamW, adamw, {"lr": 0.1, "weight_decay": 0.3, "amsgrad": True}),
    (optim.RMSprop, rmsprop, {"lr": 0.1}),
    (optim.RMSprop, rmsprop, {"lr": 0.1, "alpha": 0.8, "momentum": 0.7, "weight_decay": 0.1}),
    (optim.RMSprop, rmsprop, {"lr": 0.1, "alpha": 0.8, "centered": True, "eps": 1e-2}),
    (optim.Adagrad, adagrad, {"lr": 0.1}),
    (
        optim.Adagrad,
        adagrad,
        {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5},
    ),
    (optim.Adadelta, adadelta, {"lr": 1.0}),
    (optim.Adadelta, adadelta, {"lr": 0.5, "rho": 0.7, "eps": 1e-3, "weight_decay": 0.1}),
]
IDS = [f"{o.__name__}-{'-'.join(k)}" for o, _, k in CASES]


def leaf(*shape: int, dtype: str = "float64", seed: int = 0) -> nn.Parameter:
    return nn.Parameter(minidl.Tensor(np.random.default_rng(seed).normal(size=shape).astype(dtype)))


def give_gradients(parameters: list[nn.Parameter], t: int) -> None:
    for i, p in enumerate(parameters):
        g = np.random.default_rng([t, i]).normal(size=p.shape)
        p.grad = minidl.Tensor(g.astype(p.dtype))


@pytest.mark.parametrize(("make", "textbook", "settings"), CASES, ids=IDS)
def test_optimizer_is_the_textbooks(make, textbook, settings):
    ours = [leaf(3, 4), leaf(2, seed=1)]
    numbers = [list(p.array.ravel()) for p in ours]
    remembered: list[Any] = [[{} for _ in n] for n in numbers]
    optimizer = make(ours, **settings)
    for t in range(1, 21):
        give_gradients(ours, t)
        gradients = [list(p.grad.array.ravel()) for p in ours]
        optimizer.step()
        for ps, gs, ss in zip(numbers, gradients, remembered):
            for i in range(len(ps)):
                ps[i] = textbook(ps[i], gs[i], ss[i], t, **settings)
        for p, g in zip(ours, gradients):
            np.testing.assert_array_equal(p.grad.array.ravel(), g, "the gradient was changed")
    for p, expected in zip(ours, numbers):
        np.testing.assert_allclose(p.array.ravel(), expected, rtol=1e-12)


def test_every_optimizer_is_tested():
    tested = {make for make, _, _ in CASES}
    exported = {getattr(optim, name) for name in optim.__all__}
    optimizers = {o for o in exported if isinstance(o, type) and o is not optim.Optimizer}
    assert optimizers == tested


@pytest.mark.parametrize(("make", "textbook", "settings"), CASES, ids=IDS)
def test_step_is_in_place_and_stays_float32(make, textbook, settings):
    p = leaf(3, 4, dtype="float32")
    array = p.array
    optimizer = make([p], **settings)
    for t in range(2):
        give_gradients([p], t)
        optimizer.step()
    assert p.array is array and array.dtype == np.float32
    for value in optimizer.state_dict()["state"].get(0, {}).values():
        assert isinstance(value, int) or value.dtype == np.float32


@pytest.mark.parametrize(("make", "textbook", "settings"), CASES, ids=IDS)
def test_step_needs_no_new_memory(make, textbook, settings):
    p = leaf(256, 256, dtype="float32")
    optimizer = make([p], **settings)
    for t in range(2):
        give_gradients([p], t)
        optimizer.step()
    tracemalloc.start()
    optimizer.step()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < p.array.nbytes / 4


@pytest.mark.parametrize(("make", "textbook", "settings"), CASES, ids=IDS)
def test_resumed_run_has_the_same_bits(make, textbook, settings):
    def train(optimizer, parameters, steps):
        for t in steps:
            give_gradients(parameters, t)
            optimizer.step()

    whole = [leaf(3, 4, dtype="float32"), leaf(5, dtype="float32")]
    optimizer = make(whole, **settings)
    train(optimizer, whole, range(4))
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = [nn.Parameter(p.detach().clone()) for p in whole]
    train(optimizer, whole, range(4, 8))

    other = make(resumed, **{**settings, "lr": 77.0})
    other.load_state_dict(saved)
    train(other, resumed, range(4, 8))
    for a, b in zip(whole, resumed):
        np.testing.assert_array_equal(a.array, b.array)


def test_maximize_goes_the_other_way():
    a, b = leaf(3), leaf(3)
    down, up = optim.SGD([a], lr=0.1), optim.SGD([b], lr=0.1, maximize=True)
    give_gradients([a, b], 0)
    b.grad = a.grad
    start = a.array.copy()
    down.step()
    up.step()
    np.testing.assert_allclose(b.array - start, start - a.array)


def test_state_dict_is_pytorchs():
    a, b, c = leaf(2), leaf(3), leaf(4)
    optimizer = optim.SGD([{"params": [a, b]}, {"params": c, "lr": 0.5}], lr=0.1, momentum=0.9)
    give_gradients([a, c], 0)  # b has no gradient: nothing is remembered of it
    optimizer.step()
    state = optimizer.state_dict()
    assert list(state) == ["state", "param_groups"]
    assert list(state["state"]) == [0, 2] and list(state["state"][0]) == ["momentum_buffer"]
    assert [group["params"] for group in state["param_groups"]] == [[0, 1], [2]]
    assert [group["lr"] for group in state["param_groups"]] == [0.1, 0.5]
    assert optim.SGD([a], lr=0.1).state_dict()["state"] == {}


def test_groups_have_their_own_settings():
    a, b = leaf(2), leaf(2)
    before = a.array.copy()
    optimizer = optim.SGD([{"params": [a]}], lr=0.1)
    optimizer.add_param_group({"params": [b], "lr": 1.0})
    give_gradients([a, b], 0)
    b.grad = a.grad
    optimizer.step()
    np.testing.assert_allclose(b.array - before, 10 * (a.array - before))


def test_closure_is_called_with_gradients_on():
    p = leaf(3)
    optimizer = optim.SGD([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    with minidl.no_grad():
        first = optimizer.step(closure)
        assert optimizer.step(closure).item() < first.item()


def test_zero_grad():
    p = leaf(3)
    give_gradients([p], 0)
    optimizer = optim.SGD([p], lr=0.1)
    optimizer.zero_grad(set_to_none=False)
    assert p.grad.tolist() == [0, 0, 0]
    optimizer.zero_grad()
    assert p.grad is None


def test_backward_through_a_changed_parameter_is_refused():
    p = leaf(3)
    optimizer = optim.SGD([p], lr=0.1)
    loss = (p * p).sum()
    give_gradients([p], 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: optim.SGD([], lr=0.1), ValueError, "no parameters"),
        (lambda: optim.SGD(leaf(2), lr=0.1), TypeError, "list of Tensors"),
        (lambda: optim.SGD([3.0], lr=0.1), TypeError, "float"),
        (lambda: optim.SGD([leaf(2) * 2], lr=0.1), ValueError, "leaf"),
        (lambda: optim.SGD([p := leaf(2), p], lr=0.1), ValueError, "twice"),
        (lambda: optim.SGD([leaf(2)], lr=-1.0), ValueError, "lr must not be negative, got -1"),
        (lambda: optim.SGD([leaf(2)], lr=math.nan), ValueError, "lr"),
        (lambda: optim.SGD([leaf(2)], nesterov=True), ValueError, "nesterov"),
        (lambda: optim.Adam([leaf(2)], betas=(0.9, 1.0)), ValueError, "betas"),
        (lambda: optim.Adam([leaf(2)], betas=(-0.1, 0.9)), ValueError, "betas"),
        (lambda: optim.RMSprop([leaf(2)], alpha=1.5), ValueError, "alpha"),
        (lambda: optim.Adadelta([leaf(2)], rho=1.5), ValueError, "rho"),
    ],
)
def test_bad_settings_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_foreign_state_is_refused_and_nothing_changes():
    p = leaf(3)
    optimizer = optim.SGD([p], lr=0.1, momentum=0.9)
    give_gradients([p], 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    for foreign in [
        optim.SGD([leaf(3), leaf(3)], lr=7.0).state_dict(),
        {
            "state": {0: {"momentum_buffer": minidl.zeros(4)}},
            "param_groups": [{**before["param_groups"][0], "lr": 7.0}],
        },
    ]:
        with pytest.raises(ValueError, match="parameter"):
            optimizer.load_state_dict(foreign)
        assert optimizer.param_groups[0]["lr"] == 0.1
        buffer = optimizer.state_dict()["state"][0]["momentum_buffer"]
        np.testing.assert_array_equal(buffer.array, before["state"][0]["momentum_buffer"].array)


# Schedules --------------------------------------------------------------------------------------


def rates(make: Callable[[Any], Any], steps: int, lr: float = 0.8) -> list[float]:
    """The learning rates of so many steps."""
    optimizer = optim.SGD([leaf(1)], lr=lr, momentum=0.9)
    scheduler = make(optimizer)
    found = []
    for _ in range(steps):
        assert scheduler.get_last_lr() == [optimizer.param_groups[0]["lr"]]
        found.append(scheduler.get_last_lr()[0])
        scheduler.step()
    return found


def cosine(t: float, T: float) -> float:
    return (1 + math.cos(math.pi * t / T)) / 2


SCHEDULES: dict[str, tuple[Callable[[Any], Any], list[float]]] = {
    "LambdaLR": (lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (t + 1)), [0.8, 0.4, 0.8 / 3]),
    "StepLR": (lambda o: lr_scheduler.StepLR(o, 2, 0.5), [0.8, 0.8, 0.4, 0.4, 0.2]),
    "MultiStepLR": (lambda o: lr_scheduler.MultiStepLR(o, [3, 1], 0.5), [0.8, 0.4, 0.4, 0.2, 0.2]),
    "ConstantLR": (lambda o: lr_scheduler.ConstantLR(o, 0.5, 2), [0.4, 0.4, 0.8, 0.8]),
    "LinearLR": (lambda o: lr_scheduler.LinearLR(o, 0.25, 1.0, 3), [0.2, 0.4, 0.6, 0.8, 0.8]),
    "ExponentialLR": (lambda o: lr_scheduler.ExponentialLR(o, 0.5), [0.8, 0.4, 0.2, 0.1]),
    "CosineAnnealingLR": (
        lambda o: lr_scheduler.CosineAnnealingLR(o, 4, eta_min=0.2),
        [0.2 + 0.6 * cosine(t, 4) for t in range(10)],  # goes up again after T_max
    ),
    "CosineAnnealingWarmRestarts": (
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2, 2),
        [0.8 * cosine(t, T) for T in (2, 4, 8) for t in range(T)],
    ),
    "OneCycleLR": (
        lambda o: lr_scheduler.OneCycleLR(o, 1.0, 11, pct_start=0.5, anneal_strategy="linear",
                                          div_factor=10, final_div_factor=10),
        [0.1 + 0.2 * t for t in range(5)] + [1 - 0.18 * (t - 4.5) for t in range(5, 11)],
    ),
    "SequentialLR": (
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.5, 1.0, 2), lr_scheduler.ExponentialLR(o, 0.5)], [3]
        ),
        [0.4, 0.6, 0.8, 0.8, 0.4, 0.2],
    ),
    "warm_up": (
        lambda o: lr_scheduler.warm_up(o, 4, lr_scheduler.StepLR(o, 2, 0.5)),
        [0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.4, 0.4, 0.2],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_follows_its_formula(name):
    make, expected = SCHEDULES[name]
    np.testing.assert_allclose(rates(make, len(expected)), expected, rtol=1e-12, atol=1e-15)


def test_every_schedule_is_tested():
    schedules = {
        name for name, value in vars(lr_scheduler).items()
        if isinstance(value, type) and issubclass(value, lr_scheduler.LRScheduler)
    }  # fmt: skip
    assert schedules - {"LRScheduler"} <= {*SCHEDULES, "ReduceLROnPlateau"}


@pytest.mark.parametrize("name", SCHEDULES)
def test_resumed_schedule_goes_on(name):
    make, expected = SCHEDULES[name]
    optimizer = optim.SGD([leaf(1)], lr=0.8, momentum=0.9)
    scheduler = make(optimizer)
    scheduler.step()
    scheduler.step()
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    other = optim.SGD([leaf(1)], lr=0.8, momentum=0.9)
    resumed = make(other)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for _ in range(2, len(expected) - 1):
        scheduler.step()
        resumed.step()
        assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
        assert resumed.get_last_lr() == scheduler.get_last_lr()


def test_two_schedules_multiply():
    optimizer = optim.SGD([leaf(1)], lr=1.0)
    first = lr_scheduler.ExponentialLR(optimizer, 0.9)
    second = lr_scheduler.MultiStepLR(optimizer, [2, 4], 0.1)
    for t in range(6):
        expected = 0.9**t * 0.1 ** ((t >= 2) + (t >= 4))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-12)
        first.step()
        second.step()


def test_a_learning_rate_set_by_hand_stays():
    optimizer = optim.SGD([leaf(1)], lr=1.0)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    scheduler.step()
    optimizer.param_groups[0]["lr"] = 8.0
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(4.0)


def test_one_cycle_moves_momentum_the_other_way():
    optimizer = optim.Adam([leaf(1)], betas=(0.9, 0.99))
    scheduler = lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=10, pct_start=0.5)
    seen = []
    for _ in range(10):
        seen.append((optimizer.param_groups[0]["lr"], *optimizer.param_groups[0]["betas"]))
        scheduler.step()
    assert seen[0] == pytest.approx((0.04, 0.95, 0.99))
    assert seen[4] == pytest.approx((1.0, 0.85, 0.99))
    assert seen[9] == pytest.approx((0.04 / 1e4, 0.95, 0.99))
    with pytest.raises(ValueError, match="10 steps"):
        scheduler.step()


def test_plateau():
    optimizer = optim.SGD([leaf(1)], lr=1.0)
    scheduler = lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.1, patience=1, cooldown=1, threshold=0.1, min_lr=0.05
    )
    seen = []
    for loss in [1.0, 0.95, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]:  # .95 is no improvement of 10 %
        scheduler.step(loss)
        seen.append(optimizer.param_groups[0]["lr"])
    np.testing.assert_allclose(seen, [1, 1, 1, 1, 0.1, 0.1, 0.1, 0.05, 0.05])


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda o: lr_scheduler.StepLR(None, 2), TypeError),
        (lambda o: lr_scheduler.StepLR(o, 2, last_epoch=3), KeyError),
        (lambda o: lr_scheduler.LambdaLR(o, [abs, abs]), ValueError),
        (lambda o: lr_scheduler.ConstantLR(o, 2.0), ValueError),
        (lambda o: lr_scheduler.LinearLR(o, 0.0), ValueError),
        (lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 0), ValueError),
        (lambda o: lr_scheduler.OneCycleLR(o, 1.0), ValueError),
        (lambda o: lr_scheduler.OneCycleLR(o, 1.0, 10, anneal_strategy="sin"), ValueError),
        (lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.StepLR(o, 2)], [3]), ValueError),
        (lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=1.0), ValueError),
        (lambda o: lr_scheduler.ReduceLROnPlateau(o, mode="least"), ValueError),
    ],
)
def test_bad_schedules_are_refused(make, error):
    with pytest.raises(error):
        make(optim.SGD([leaf(1)], lr=1.0, momentum=0.9))
