"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from minidl.backend import cuda_launch
from minidl.backend.native import native
from minidl.optim.optimizer import Optimizer, Update, axpy
from minidl.tensor import Tensor


class SGD(Optimizer):
    """Stochastic gradient descent with momentum (Sutskever et al. 2013, in PyTorch's form).

    g ← ∇ + weight_decay · p;  v ← momentum · v + (1 - dampening) · g  (at first v = g);
    p ← p - lr · v, or with Nesterov's momentum p ← p - lr · (g + momentum · v).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
            "nesterov": nesterov, "maximize": maximize,
        })  # fmt: skip

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("nesterov needs momentum > 0 and dampening = 0")

    def update(self, p: Any, g: Any, state: dict[str, Any], group: dict[str, Any]) -> None:
        g = self.decayed(p, g, group["weight_decay"])
        scratch = self.scratch(p, "step")
        momentum = group["momentum"]
        if momentum:
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = Tensor(g.copy())
                v = g
            else:
                v = state["momentum_buffer"].array
                np.multiply(v, momentum, out=v)
                if group["dampening"]:
                    v += np.multiply(g, 1 - group["dampening"], out=scratch)
                else:
                    v += g
            g = axpy(momentum, v, g, scratch) if group["nesterov"] else v
        p -= np.multiply(g, group["lr"], out=scratch)

    def update_fused(self, updates: list[Update], group: dict[str, Any]) -> bool:
        first, buffers = [], []
        for u in updates if group["momentum"] else ():
            first.append(u.state.get("momentum_buffer") is None)
            if first[-1]:
                u.state["momentum_buffer"] = Tensor(np.empty_like(u.p))
            buffers.append(u.state["momentum_buffer"].array)
        native.sgd(  # type: ignore[union-attr]
            [u.p for u in updates], [u.g for u in updates], buffers, first, group["lr"],
            group["momentum"], group["dampening"], group["weight_decay"], group["nesterov"],
            group["maximize"],
        )  # fmt: skip
        return True

    def update_on_gpu(self, update: Update, group: dict[str, Any]) -> bool:
        if group["maximize"]:
            return False
        p, g, state = update
        momentum = group["momentum"]
        first = bool(momentum) and state.get("momentum_buffer") is None
        if first:
            state["momentum_buffer"] = Tensor(np.zeros_like(p))
        v = state["momentum_buffer"].array if momentum else g  # without momentum it is not read
        cuda_launch.sgd(
            p.reshape(-1), g.reshape(-1), v.reshape(-1), first=first,
            **{k: group[k] for k in ("lr", "momentum", "dampening", "weight_decay", "nesterov")},
        )  # fmt: skip
        return True
