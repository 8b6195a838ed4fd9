"""Learning-rate schedules: the learning rate as a function of the number of steps."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from minidl.optim.optimizer import Optimizer


class LRScheduler:
    """Base of the schedules. Call `step()` after every epoch (or batch, as the schedule counts).

    A subclass writes `value`: the learning rate at time t. So a schedule is a formula, and
    resuming it needs t alone. If somebody else changed a group's learning rate meanwhile (a
    second schedule, or you), `step` scales what it finds by value(t) / value(t - 1) instead.
    """

    scales = True  # False: what it finds is overwritten, whoever wrote it

    def __init__(self, optimizer: Optimizer, last_epoch: int = -1) -> None:
        """
        Args:
            optimizer: whose groups' "lr" is to be set.
            last_epoch: t to go on after; -1 starts at 0.

        Raises:
            TypeError: not an optimizer.
            KeyError: `last_epoch` is given, but the optimizer has seen no schedule ("initial_lr").
        """
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"a schedule needs an Optimizer, got {type(optimizer).__name__}")
        self.optimizer = optimizer
        for i, group in enumerate(optimizer.param_groups):
            if last_epoch == -1:
                group.setdefault("initial_lr", group["lr"])
            elif "initial_lr" not in group:
                raise KeyError(f"param_groups[{i}] has no 'initial_lr' to resume from")
        self.base_lrs: list[float] = [group["initial_lr"] for group in optimizer.param_groups]
        self.last_epoch: float = last_epoch
        self._last_lr: list[float] = []
        self.start()

    def start(self) -> None:
        """Set the learning rate for the first step."""
        self.step()

    def value(self, t: float, base: float, group: int) -> float:
        """The learning rate at time t of a group whose own learning rate is `base`."""
        raise NotImplementedError

    def step(self, epoch: float | None = None) -> None:
        """Advance by one (or go to `epoch`), and set the learning rates."""
        before = self.last_epoch
        self.last_epoch = t = before + 1 if epoch is None else epoch
        self._last_lr = []
        for i, (group, base) in enumerate(zip(self.optimizer.param_groups, self.base_lrs)):
            lr = self.value(t, base, i)
            if self.scales and epoch is None:
                previous = self.value(before, base, i) if before >= 0 else base
                if group["lr"] != previous and previous != 0:
                    lr *= group["lr"] / previous
            group["lr"] = lr
            self._last_lr.append(lr)

    def get_last_lr(self) -> list[float]:
        """The learning rate of each group, as `step` last set it."""
        return list(self._last_lr)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer and functions."""
        return {k: v for k, v in vars(self).items() if k != "optimizer" and not has_function(v)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        vars(self).update(state_dict)


def has_function(value: Any) -> bool:
    return callable(value) or (isinstance(value, list) and any(map(callable, value)))


class LambdaLR(LRScheduler):
    """lr = base · λ(t), for one function or one per group."""

    scales = False

    def __init__(
        self,
        optimizer: Optimizer,
        lr_lambda: Callable[[Any], float] | Sequence[Callable[[Any], float]],
        last_epoch: int = -1,
    ) -> None:
        n = len(optimizer.param_groups)
        self.lr_lambdas = [lr_lambda] * n if callable(lr_lambda) else list(lr_lambda)
        if len(self.lr_lambdas) != n:
            raise ValueError(f"{n} groups need {n} functions, not {len(self.lr_lambdas)}")
        super().__init__(optimizer, last_epoch)

    def value(self, t: float, base: float, group: int) -> float:
        return base * self.lr_lambdas[group](t)


class StepLR(LRScheduler):
    """lr = base · γ^⌊t / step_size⌋."""

    def __init__(
        self, optimizer: Optimizer, step_size: int, gamma: float = 0.1, last_epoch: int = -1
    ) -> None:
        self.step_size, self.gamma = step_size, gamma
        super().__init__(optimizer, last_epoch)

    def value(self, t: float, base: float, group: int) -> float:
        return base * self.gamma ** (t // self.step_size)


class MultiStepLR(LRScheduler):
    """lr = base · γ^(how many milestones are at most t)."""

    def __init__(
        self,
        optimizer: Optimizer,
        milestones: Iterable[int],
        gamma: float = 0.1,
        last_epoch: int = -1,
    ) -> None:
        self.milestones, self.gamma = sorted(milestones), gamma
        super().__init__(optimizer, last_epoch)

    def value(self, t: float, base: float, group: int) -> float:
        return base * self.gamma ** bisect_right(self.milestones, t)


class ConstantLR(LRScheduler):
    """lr = base · factor for t < total_iters, then base."""

    def __init__(
        self,
        optimizer: Optimizer,
        factor: float = 1 / 3,
        total_iters: int = 5,
        last_epoch: int = -1,
    ) -> None:
        if not 0 <= factor <= 1:
            raise ValueError(f"factor must be in [0, 1], got {factor}")
        self.factor, self.total_iters = factor, total_iters
        super().__init__(optimizer, last_epoch)

    def value(self, t: float, base: float, group: int) -> float:
        return base * (self.factor if t < self.total_iters else 1.0)


class LinearLR(LRScheduler):
    """From base · start_factor to base · end_factor in total_iters steps: a warm-up."""

    def __init__(
        self,
        optimizer: Optimizer,
        start_factor: float = 1 / 3,
        end_factor: float = 1.0,
        total_iters: int = 5,
        last_epoch: int = -1,
    ) -> None:
        if not 0 < start_factor <= 1 or not 0 <= end_factor <= 1:
            raise ValueError(
                f"start_factor must be in (0, 1] and end_factor in [0, 1], got {start_factor} and "
                f"{end_factor}"
            )
        self.start_factor, self.end_factor, self.total_iters = start_factor, end_factor, total_iters
        super().__init__(optimizer, last_epoch)

    def value(self, t: float, base: float, group: int) -> float:
        done = min(t, self.total_iters) / self.total_iters
        return base * (self.start_factor + (self.end_factor - self.start_factor) * done)


class ExponentialLR(LRScheduler):
    """lr = base · γᵗ."""

    def __init__(self, optimizer: Optimizer, gamma: float, last_epoch: int = -1) -> None:
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    def value(self, t: float, base: float, group: int) -> float:
        return base * self.gamma**t


class CosineAnnealingLR(LRScheduler):
    """lr = η + (base - η) (1 + cos(π t / T)) / 2 with η = eta_min, T = T_max.

    Loshchilov and Hutter 2017 (SGDR), equation 5, without the restarts.
    """

    def __init__(
        self, optimizer: Optimizer, T_max: int, eta_min: float = 0.0, last_epoch: int = -1
    ) -> None:
        self.T_max, self.eta_min = T_max, eta_min
        super().__init__(optimizer, last_epoch)

    def value(self, t: float, base: float, group: int) -> float:
        return self.eta_min + (base - self.eta_min) * (1 + math.cos(math.pi * t / self.T_max)) / 2


class CosineAnnealingWarmRestarts(LRScheduler):
    """The cosine over T_0 steps, again from the top over T_0 · T_mult, ... (SGDR, section 3)."""

    scales = False

    def __init__(
        self,
        optimizer: Optimizer,
        T_0: int,
        T_mult: int = 1,
        eta_min: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        if T_0 < 1 or T_mult < 1:
            raise ValueError(f"T_0 and T_mult must be at least 1, got {T_0} and {T_mult}")
        self.T_0, self.T_mult, self.eta_min = T_0, T_mult, eta_min
        super().__init__(optimizer, last_epoch)

    def value(self, t: float, base: float, group: int) -> float:
        length: float = self.T_0
        while t >= length:  # t becomes the time since the last restart
            t, length = t - length, length * self.T_mult
        return self.eta_min + (base - self.eta_min) * (1 + math.cos(math.pi * t / length)) / 2


class OneCycleLR(LRScheduler):
    """Up to max_lr and down again, momentum the other way round (Smith and Topin 2017).

    Counts batches. From max_lr / div_factor up in the first `pct_start` of the steps, then down to
    max_lr / div_factor / final_div_factor.
    """

    scales = False

    def __init__(
        self,
        optimizer: Optimizer,
        max_lr: float | Sequence[float],
        total_steps: int | None = None,
        epochs: int | None = None,
        steps_per_epoch: int | None = None,
        pct_start: float = 0.3,
        anneal_strategy: str = "cos",
        cycle_momentum: bool = True,
        base_momentum: float = 0.85,
        max_momentum: float = 0.95,
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
        three_phase: bool = False,
        last_epoch: int = -1,
    ) -> None:
        if total_steps is None:
            if epochs is None or steps_per_epoch is None:
                raise ValueError("OneCycleLR needs total_steps, or epochs and steps_per_epoch")
            total_steps = epochs * steps_per_epoch
        if total_steps <= 0 or not 0 <= pct_start <= 1:
            raise ValueError(
                "total_steps must be positive and pct_start in [0, 1], "
                f"got {total_steps} and {pct_start}"
            )
        if anneal_strategy not in ("cos", "linear"):
            raise ValueError(f"anneal_strategy {anneal_strategy!r}: expected 'cos' or 'linear'")
        groups = optimizer.param_groups
        self.max_lrs = [max_lr] * len(groups) if isinstance(max_lr, float | int) else list(max_lr)
        if len(self.max_lrs) != len(groups):
            raise ValueError(f"{len(groups)} groups need as many max_lr, not {len(self.max_lrs)}")
        if cycle_momentum and not {"momentum", "betas"} & set(optimizer.defaults):
            raise ValueError("cycle_momentum=True needs an optimizer with momentum or betas")
        self.total_steps, self.anneal_strategy = total_steps, anneal_strategy
        self.cycle_momentum = cycle_momentum
        # Where each phase ends, and the ends of (learning rate / max_lr, momentum) there.
        first, last = 1 / div_factor, 1 / div_factor / final_div_factor
        top = pct_start * total_steps - 1
        self.phases = [(0.0, first, max_momentum), (top, 1.0, base_momentum)]
        if three_phase:
            self.phases.append((2 * top, first, max_momentum))
        self.phases.append((total_steps - 1.0, last, max_momentum))
        if last_epoch == -1:
            for group, highest in zip(groups, self.max_lrs):
                group["initial_lr"] = highest * first
        super().__init__(optimizer, last_epoch)

    def at(self, t: float, column: int) -> float:
        """The learning rate's factor (column 1) or the momentum (column 2) at time t."""
        if t > self.total_steps:
            raise ValueError(f"OneCycleLR was made for {self.total_steps} steps, this is step {t}")
        i = 1
        while i < len(self.phases) - 1 and t > self.phases[i][0]:
            i += 1
        before, after = self.phases[i - 1 : i + 1]
        done = (t - before[0]) / (after[0] - before[0])
        if self.anneal_strategy == "cos":
            done = (1 - math.cos(math.pi * done)) / 2
        return before[column] + (after[column] - before[column]) * done

    def value(self, t: float, base: float, group: int) -> float:
        return self.max_lrs[group] * self.at(t, 1)

    def step(self, epoch: float | None = None) -> None:
        super().step(epoch)
        if self.cycle_momentum:
            momentum = self.at(self.last_epoch, 2)
            for group in self.optimizer.param_groups:
                if "betas" in group:
                    group["betas"] = (momentum, *group["betas"][1:])
                else:
                    group["momentum"] = momentum


class SequentialLR(LRScheduler):
    """One schedule after the other: number i from milestones[i - 1] on, counting from 0 again."""

    def __init__(
        self,
        optimizer: Optimizer,
        schedulers: Sequence[LRScheduler],
        milestones: Sequence[int],
        last_epoch: int = -1,
    ) -> None:
        if len(schedulers) != len(milestones) + 1:
            raise ValueError(
                f"{len(schedulers)} schedules need {len(schedulers) - 1} milestones, "
                f"not {len(milestones)}"
            )
        for scheduler in schedulers:
            if scheduler.optimizer is not optimizer:
                raise ValueError("all schedules must be made for the same optimizer")
        self.schedulers, self.milestones = list(schedulers), list(milestones)
        super().__init__(optimizer, last_epoch)

    def start(self) -> None:
        self.last_epoch += 1
        self.schedulers[0].step(0)  # undoes what the later ones set when they were made
        self._last_lr = self.schedulers[0].get_last_lr()

    def step(self, epoch: float | None = None) -> None:
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        i = bisect_right(self.milestones, self.last_epoch)
        start = self.milestones[i - 1] if i else 0
        at_start = epoch is not None or self.last_epoch == start
        self.schedulers[i].step(self.last_epoch - start if at_start else None)
        self._last_lr = self.schedulers[i].get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        own = {k: v for k, v in vars(self).items() if k not in ("optimizer", "schedulers")}
        return {**own, "schedulers": [scheduler.state_dict() for scheduler in self.schedulers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for scheduler, state in zip(self.schedulers, state_dict["schedulers"], strict=True):
            scheduler.load_state_dict(state)
        vars(self).update({k: v for k, v in state_dict.items() if k != "schedulers"})


def warm_up(optimizer: Optimizer, steps: int, then: LRScheduler) -> LRScheduler:
    """`then`, after a gradual warm-up from base / steps to base (Goyal et al. 2017, section 2.2).

    Args:
        optimizer: whose learning rate is set.
        steps: how long the warm-up takes; 0: none.
        then: the schedule that follows; counts from 0 when the warm-up is over.
    """
    if steps <= 1:
        return then
    rise = LinearLR(optimizer, start_factor=1 / steps, total_iters=steps - 1)
    return SequentialLR(optimizer, [rise, then], milestones=[steps])


class ReduceLROnPlateau(LRScheduler):
    """Multiply the learning rate by `factor` when a metric has not improved for `patience` epochs.

    Call ``step(metric)``.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        mode: str = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: str = "rel",
        cooldown: int = 0,
        min_lr: float | Sequence[float] = 0.0,
        eps: float = 1e-8,
    ) -> None:
        if factor >= 1:
            raise ValueError(f"factor must be below 1, got {factor}")
        if mode not in ("min", "max") or threshold_mode not in ("rel", "abs"):
            raise ValueError(
                "mode is 'min' or 'max', threshold_mode 'rel' or 'abs'; "
                f"got {mode!r}, {threshold_mode!r}"
            )
        self.mode, self.factor, self.patience = mode, factor, patience
        self.threshold, self.threshold_mode = threshold, threshold_mode
        self.cooldown, self.eps = cooldown, eps
        n = len(optimizer.param_groups)
        self.min_lrs = [min_lr] * n if isinstance(min_lr, float | int) else list(min_lr)
        self.best = math.inf if mode == "min" else -math.inf
        self.num_bad_epochs = self.cooldown_counter = 0
        super().__init__(optimizer)

    def start(self) -> None:
        self.last_epoch = 0
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def improved(self, metric: float) -> bool:
        sign = 1 if self.mode == "max" else -1
        if self.threshold_mode == "rel":
            return sign * metric > sign * self.best * (1 + sign * self.threshold)
        return sign * metric > sign * self.best + self.threshold

    def step(self, metrics: float, epoch: float | None = None) -> None:  # type: ignore[override]
        metric = float(metrics)
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        if self.improved(metric):
            self.best, self.num_bad_epochs = metric, 0
        else:
            self.num_bad_epochs += 1
        if self.cooldown_counter > 0:
            self.cooldown_counter -= 1
            self.num_bad_epochs = 0
        if self.num_bad_epochs > self.patience:
            for group, lowest in zip(self.optimizer.param_groups, self.min_lrs):
                lower = max(group["lr"] * self.factor, lowest)
                if group["lr"] - lower > self.eps:
                    group["lr"] = lower
            self.cooldown_counter, self.num_bad_epochs = self.cooldown, 0
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
