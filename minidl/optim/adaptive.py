"""Optimizers that give each parameter a step size of its own."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from minidl.backend import cuda_launch
from minidl.backend.native import native
from minidl.optim.optimizer import Optimizer, Update
from minidl.tensor import Tensor


def moving_average(mean: Any, x: Any, beta: float, scratch: Any) -> None:
    """mean ← beta · mean + (1 - beta) · x, in place."""
    np.multiply(mean, beta, out=mean)
    mean += np.multiply(x, 1 - beta, out=scratch)


def moving_average_of_square(mean: Any, x: Any, beta: float, scratch: Any) -> None:
    """mean ← beta · mean + (1 - beta) · x², in place."""
    np.multiply(mean, beta, out=mean)
    np.multiply(x, x, out=scratch)
    mean += np.multiply(scratch, 1 - beta, out=scratch)


def remember(state: dict[str, Any], p: Any, *names: str) -> list[Any]:
    """The arrays that an optimizer keeps for a parameter; zeros in the first step."""
    for name in names:
        if name not in state:
            state[name] = Tensor(np.zeros_like(p))
    return [state[name].array for name in names]


def remembered(updates: list[Update], *names: str) -> list[list[Any]]:
    """`remember` for all parameters: for each name a list of arrays."""
    return [list(arrays) for arrays in zip(*(remember(u.state, u.p, *names) for u in updates))]


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015, algorithm 1); with `amsgrad` as Reddi et al. 2018.

    m ← β₁ m + (1 - β₁) g;  v ← β₂ v + (1 - β₂) g²;
    p ← p - lr · m̂ / (√v̂ + ε)  with  m̂ = m / (1 - β₁ᵗ),  v̂ = v / (1 - β₂ᵗ).
    """

    decoupled = False  # whether weight decay bypasses the moments

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "amsgrad": amsgrad, "maximize": maximize,
        })  # fmt: skip

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        if max(group["betas"]) >= 1:
            raise ValueError(f"betas must be below 1, got {group['betas']}")

    def update(self, p: Any, g: Any, state: dict[str, Any], group: dict[str, Any]) -> None:
        lr, (beta1, beta2), weight_decay = group["lr"], group["betas"], group["weight_decay"]
        t = state["step"] = state.get("step", 0) + 1
        m, v = remember(state, p, "exp_avg", "exp_avg_sq")
        scratch = self.scratch(p, "step")

        if self.decoupled:
            np.multiply(p, 1 - lr * weight_decay, out=p)
        else:
            g = self.decayed(p, g, weight_decay)
        moving_average(m, g, beta1, scratch)
        moving_average_of_square(v, g, beta2, scratch)
        if group["amsgrad"]:
            (largest,) = remember(state, p, "max_exp_avg_sq")
            v = np.maximum(largest, v, out=largest)

        np.sqrt(v, out=scratch)
        np.divide(scratch, math.sqrt(1 - beta2**t), out=scratch)
        np.add(scratch, group["eps"], out=scratch)
        np.divide(m, scratch, out=scratch)
        p -= np.multiply(scratch, lr / (1 - beta1**t), out=scratch)

    def update_fused(self, updates: list[Update], group: dict[str, Any]) -> bool:
        lr, (beta1, beta2), weight_decay = group["lr"], group["betas"], group["weight_decay"]
        step_sizes, corrections = [], []
        for u in updates:
            t = u.state["step"] = u.state.get("step", 0) + 1
            step_sizes.append(lr / (1 - beta1**t))
            corrections.append(math.sqrt(1 - beta2**t))
        m, v = remembered(updates, "exp_avg", "exp_avg_sq")
        largest = remembered(updates, "max_exp_avg_sq")[0] if group["amsgrad"] else []
        decay, shrink = (0.0, 1 - lr * weight_decay) if self.decoupled else (weight_decay, 1.0)
        native.adam(  # type: ignore[union-attr]
            [u.p for u in updates], [u.g for u in updates], m, v, largest, step_sizes, corrections,
            beta1, beta2, group["eps"], decay, shrink, group["maximize"],
        )  # fmt: skip
        return True

    def update_on_gpu(self, update: Update, group: dict[str, Any]) -> bool:
        if group["maximize"] or group["amsgrad"]:
            return False
        p, g, state = update
        t = state["step"] = state.get("step", 0) + 1
        m, v = remember(state, p, "exp_avg", "exp_avg_sq")
        cuda_launch.adam(
            *(a.reshape(-1) for a in (p, g, m, v)), step=t, decoupled=self.decoupled,
            **{k: group[k] for k in ("lr", "betas", "eps", "weight_decay")},
        )  # fmt: skip
        return True


class AdamW(Adam):
    """Adam with p ← (1 - lr · weight_decay) p before each step (Loshchilov and Hutter 2019)."""

    decoupled = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize)


class RMSprop(Optimizer):
    """RMSprop (Hinton 2012, lecture 6e); `centered` as Graves 2013, equation 38 ff.

    v ← α v + (1 - α) g²;  p ← p - lr · g / (√v + ε). Centered: v - m² in the place of v, where m
    is the moving average of g. Momentum accumulates the quotients.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, {
            "lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay,
            "momentum": momentum, "centered": centered, "maximize": maximize,
        })  # fmt: skip

    def update(self, p: Any, g: Any, state: dict[str, Any], group: dict[str, Any]) -> None:
        g = self.decayed(p, g, group["weight_decay"])
        state["step"] = state.get("step", 0) + 1
        (v,) = remember(state, p, "square_avg")
        scratch = self.scratch(p, "step")

        moving_average_of_square(v, g, group["alpha"], scratch)
        if group["centered"]:
            (m,) = remember(state, p, "grad_avg")
            moving_average(m, g, group["alpha"], scratch)
            np.multiply(m, m, out=scratch)
            np.subtract(v, scratch, out=scratch)
            np.sqrt(scratch, out=scratch)
        else:
            np.sqrt(v, out=scratch)
        np.add(scratch, group["eps"], out=scratch)
        np.divide(g, scratch, out=scratch)
        if group["momentum"]:
            (buffer,) = remember(state, p, "momentum_buffer")
            np.multiply(buffer, group["momentum"], out=buffer)
            buffer += scratch
            np.multiply(buffer, group["lr"], out=scratch)
        else:
            np.multiply(scratch, group["lr"], out=scratch)
        p -= scratch

    def update_fused(self, updates: list[Update], group: dict[str, Any]) -> bool:
        for u in updates:
            u.state["step"] = u.state.get("step", 0) + 1
        (v,) = remembered(updates, "square_avg")
        m = remembered(updates, "grad_avg")[0] if group["centered"] else []
        buffers = remembered(updates, "momentum_buffer")[0] if group["momentum"] else []
        native.rmsprop(  # type: ignore[union-attr]
            [u.p for u in updates], [u.g for u in updates], v, m, buffers, group["lr"],
            group["alpha"], group["eps"], group["weight_decay"], group["momentum"],
            group["maximize"],
        )  # fmt: skip
        return True


class Adagrad(Optimizer):
    """Adagrad (Duchi et al. 2011): p ← p - lr · g / (√Σg² + ε)."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, {
            "lr": lr, "lr_decay": lr_decay, "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value, "eps": eps,
            "maximize": maximize,
        })  # fmt: skip

    def update(self, p: Any, g: Any, state: dict[str, Any], group: dict[str, Any]) -> None:
        g = self.decayed(p, g, group["weight_decay"])
        if not state:
            state["step"] = 0
            state["sum"] = Tensor(np.full_like(p, group["initial_accumulator_value"]))
        state["step"] += 1
        lr = group["lr"] / (1 + (state["step"] - 1) * group["lr_decay"])
        total, scratch = state["sum"].array, self.scratch(p, "step")

        total += np.multiply(g, g, out=scratch)
        np.sqrt(total, out=scratch)
        np.add(scratch, group["eps"], out=scratch)
        np.divide(g, scratch, out=scratch)
        p -= np.multiply(scratch, lr, out=scratch)


class Adadelta(Optimizer):
    """Adadelta (Zeiler 2012, algorithm 1).

    v ← ρ v + (1 - ρ) g²;  Δ = g · √(u + ε) / √(v + ε);  u ← ρ u + (1 - ρ) Δ²;  p ← p - lr · Δ.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, {
            "lr": lr, "rho": rho, "eps": eps, "weight_decay": weight_decay, "maximize": maximize,
        })  # fmt: skip

    def update(self, p: Any, g: Any, state: dict[str, Any], group: dict[str, Any]) -> None:
        rho, eps = group["rho"], group["eps"]
        g = self.decayed(p, g, group["weight_decay"])
        state["step"] = state.get("step", 0) + 1
        v, u = remember(state, p, "square_avg", "acc_delta")
        delta, scratch = self.scratch(p, "delta"), self.scratch(p, "step")

        moving_average_of_square(v, g, rho, scratch)
        np.sqrt(np.add(u, eps, out=delta), out=delta)
        np.sqrt(np.add(v, eps, out=scratch), out=scratch)
        np.divide(delta, scratch, out=delta)
        np.multiply(delta, g, out=delta)
        moving_average_of_square(u, delta, rho, scratch)
        p -= np.multiply(delta, group["lr"], out=delta)
