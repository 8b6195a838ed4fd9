"""Optimizers and schedules against PyTorch's: same numbers, same state, same learning rates."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

import minidl
from minidl import nn, optim
from minidl.optim import lr_scheduler

pytestmark = pytest.mark.torch
theirs = torch.optim.lr_scheduler

OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    ("Adam", {"lr": 0.01}),
    ("Adam", {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.1, "amsgrad": True}),
    ("AdamW", {"lr": 0.01}),
    ("AdamW", {"lr": 0.01, "weight_decay": 0.3, "amsgrad": True, "maximize": True}),
    ("RMSprop", {"lr": 0.01}),
    ("RMSprop", {"lr": 0.01, "momentum": 0.9, "centered": True, "weight_decay": 0.1, "eps": 1e-2}),
    ("Adagrad", {"lr": 0.1}),
    (
        "Adagrad",
        {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5},
    ),
    ("Adadelta", {}),
    ("Adadelta", {"lr": 0.5, "rho": 0.7, "eps": 1e-3, "weight_decay": 0.1}),
]


def pair(shape: tuple[int, ...], seed: int) -> tuple[Any, Any]:
    values = np.random.default_rng(seed).normal(size=shape).astype("f")
    return nn.Parameter(minidl.tensor(values)), torch.nn.Parameter(torch.tensor(values))


def give_gradients(pairs: list[tuple[Any, Any]], t: int) -> None:
    for i, (a, b) in enumerate(pairs):
        g = np.random.default_rng([t, i]).normal(size=a.shape).astype("f")
        a.grad, b.grad = minidl.tensor(g), torch.tensor(g)


def to_torch(state: Any) -> Any:
    if isinstance(state, dict):
        return {k: to_torch(v) for k, v in state.items()}
    return torch.tensor(state.array) if isinstance(state, minidl.Tensor) else state


def to_minidl(state: Any) -> Any:
    if isinstance(state, dict):
        return {k: to_minidl(v) for k, v in state.items()}
    return minidl.tensor(state.numpy()) if isinstance(state, torch.Tensor) else state


@pytest.mark.parametrize(("name", "settings"), OPTIMIZERS)
def test_optimizer(name, settings):
    pairs = [pair((5, 4), 0), pair((3,), 1)]
    groups = [[{"params": [p[i]]} for p in pairs] for i in (0, 1)]
    groups[0][1]["lr"] = groups[1][1]["lr"] = 0.02
    a = getattr(optim, name)(groups[0], **settings)
    b = getattr(torch.optim, name)(groups[1], **settings)

    def steps(start, end):
        for t in range(start, end):
            give_gradients(pairs, t)
            a.step()
            b.step()
        for ours, their in pairs:
            np.testing.assert_allclose(ours.array, their.detach().numpy(), rtol=2e-5, atol=2e-6)

    steps(0, 100)
    mine, other = a.state_dict(), b.state_dict()
    assert set(mine) == set(other)
    assert {k: set(v) for k, v in mine["state"].items()} == {
        k: {n for n, x in v.items() if x is not None} for k, v in other["state"].items()
    }
    for group, reference in zip(mine["param_groups"], other["param_groups"]):
        assert set(group) <= set(reference)
        assert group == {k: v for k, v in reference.items() if k in group}
    # Each goes on from the other's state.
    mine, other = to_torch(copy.deepcopy(mine)), to_minidl(copy.deepcopy(other))
    b.load_state_dict({**mine, "param_groups": copy.deepcopy(b.state_dict()["param_groups"])})
    a.load_state_dict(other)
    steps(100, 120)


def test_defaults_are_pytorchs():
    for name in {name for name, _ in OPTIMIZERS}:
        ours, their = pair((2,), 0)
        mine = getattr(optim, name)([ours]).param_groups[0]
        reference = getattr(torch.optim, name)([their]).param_groups[0]
        for key in set(mine) - {"params"}:
            assert mine[key] == reference[key], (name, key)


def sequential(m: Any, o: Any) -> Any:
    parts = [m.LinearLR(o, 0.1, 1.0, 4), m.CosineAnnealingLR(o, 20, 1e-3), m.ExponentialLR(o, 0.9)]
    return m.SequentialLR(o, parts, [5, 20])


SCHEDULES = {
    "LambdaLR": lambda m, o: m.LambdaLR(o, [lambda t: 0.95**t, lambda t: 1 / (1 + t)]),
    "StepLR": lambda m, o: m.StepLR(o, 7),
    "MultiStepLR": lambda m, o: m.MultiStepLR(o, [30, 3, 8], 0.3),
    "ConstantLR": lambda m, o: m.ConstantLR(o),
    "LinearLR": lambda m, o: m.LinearLR(o),
    "LinearLR down": lambda m, o: m.LinearLR(o, 1.0, 0.1, 30),
    "ExponentialLR": lambda m, o: m.ExponentialLR(o, 0.93),
    "CosineAnnealingLR": lambda m, o: m.CosineAnnealingLR(o, 15, 1e-3),
    "CosineAnnealingWarmRestarts": lambda m, o: m.CosineAnnealingWarmRestarts(o, 5, 2, 1e-3),
    "OneCycleLR": lambda m, o: m.OneCycleLR(o, [0.5, 1.0], total_steps=61),
    "OneCycleLR three phases": lambda m, o: m.OneCycleLR(
        o, 0.5, epochs=10, steps_per_epoch=7, three_phase=True, anneal_strategy="linear"
    ),
    "SequentialLR": sequential,
    "two": lambda m, o: (m.LinearLR(o, 0.2, 1.0, 10), m.StepLR(o, 7, 0.5)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule(name):
    found: list[Any] = []
    for side, module, engine in [(0, lr_scheduler, optim), (1, theirs, torch.optim)]:
        p, q = pair((1,), 0)[side], pair((1,), 1)[side]
        optimizer = engine.SGD([{"params": [p]}, {"params": [q], "lr": 0.3}], lr=0.5, momentum=0.9)
        made = SCHEDULES[name](module, optimizer)
        schedulers = made if isinstance(made, tuple) else (made,)
        found.append([])
        for t in range(60):
            found[-1].append([(g["lr"], g["momentum"]) for g in optimizer.param_groups])
            assert schedulers[-1].get_last_lr() == [g["lr"] for g in optimizer.param_groups]
            if name != "two" and t == 29:  # as from a checkpoint
                made.load_state_dict(made.state_dict())
            optimizer.step()
            for scheduler in schedulers:
                scheduler.step()
    np.testing.assert_allclose(found[0], found[1], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("threshold_mode", ["rel", "abs"])
@pytest.mark.parametrize("cooldown", [0, 3])
def test_plateau(mode, threshold_mode, cooldown):
    rng = np.random.default_rng(0)
    metrics = 1 + np.exp(-np.arange(80) / 10) + rng.normal(size=80) / 50
    found = []
    for side, module, engine in [(0, lr_scheduler, optim), (1, theirs, torch.optim)]:
        optimizer = engine.SGD([pair((1,), 0)[side]], lr=0.5)
        scheduler = module.ReduceLROnPlateau(
            optimizer, mode, 0.5, 2, threshold=0.01, threshold_mode=threshold_mode,
            cooldown=cooldown, min_lr=1e-2,
        )  # fmt: skip
        found.append([])
        for metric in metrics if mode == "min" else -metrics + 4:
            scheduler.step(float(metric))
            found[-1].append(scheduler.get_last_lr()[0])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-12)
    assert len(set(found[0])) > 3 and not math.isnan(found[0][-1])
