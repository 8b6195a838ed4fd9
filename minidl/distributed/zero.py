"""Optimizer state cut over the ranks: ZeRO, stage 1 (Rajbhandari et al. 2020).

Adam remembers two numbers for each parameter, and under data parallelism every rank remembers the
same. Here each rank keeps them, and does the step, for its share of the parameters only; then all
ranks get the new parameters from their owners. What is learned is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import minidl.distributed as dist
from minidl.autograd import enable_grad
from minidl.distributed.communicator import Communicator
from minidl.distributed.data_parallel import share
from minidl.optim.optimizer import Optimizer
from minidl.tensor import Tensor


class ZeroRedundancyOptimizer(Optimizer):
    """Any optimizer, its state cut over the ranks; for parameters of a `DataParallel`.

        optimizer = dist.ZeroRedundancyOptimizer(net.parameters(), optim.Adam, lr=1e-3)

    Parameters are dealt out whole: the largest first, each to the rank that has least.

    Args:
        params: as for an optimizer; the same on all ranks.
        optimizer_class: `optim.SGD`, `optim.Adam`, ...
        communicator: of the ranks (default: all).
        defaults: the optimizer's settings.
    """

    def __init__(
        self,
        params: Iterable[Any],
        optimizer_class: Callable[..., Optimizer],
        communicator: Communicator | None = None,
        **defaults: Any,
    ) -> None:
        self.communicator = communicator or dist.communicator()
        self.everything: dict[str, Any] | None = None  # the state_dict, once consolidated
        params = list(params)
        whole = optimizer_class(params, **defaults)  # it checks, and completes the settings
        super().__init__(whole.param_groups, whole.defaults)

        load = [0] * self.communicator.world_size
        self.owner: dict[Tensor, int] = {}
        for p in sorted(self._all(), key=lambda p: -p.numel()):
            self.owner[p] = rank = load.index(min(load))
            load[rank] += p.numel()
        mine = [{**group, "params": self._of(self.communicator.rank, group)}
                for group in self.param_groups]  # fmt: skip
        self.local = optimizer_class(mine, **defaults)

    def _all(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _of(self, rank: int, group: dict[str, Any]) -> list[Tensor]:
        return [p for p in group["params"] if self.owner[p] == rank]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "local"):
            raise RuntimeError("the parameters are dealt out already: give all groups at the start")
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with enable_grad():
                loss = closure()
        self._settings_to_local()
        self.local.step()
        changed = [p for p in self._all() if p.grad is not None]  # the same on all ranks
        for rank in range(self.communicator.world_size):
            share([p for p in changed if self.owner[p] == rank], self.communicator, rank)
        self.everything = None
        return loss

    def _settings_to_local(self) -> None:
        """Schedules change `param_groups`."""
        for group, local in zip(self.param_groups, self.local.param_groups):
            local.update({name: v for name, v in group.items() if name != "params"})

    # Saving and loading -------------------------------------------------------------------

    def own_state_dict(self) -> dict[str, Any]:
        """This rank's part of `state_dict`: the state of its share of the parameters only."""
        numbers = {p: i for i, p in enumerate(self._all())}
        state = {numbers[p]: dict(state) for p, state in self.local.state.items() if state}
        return {**super().state_dict(), "state": state}

    def consolidate_state_dict(self) -> None:
        """Bring all ranks' state together, for `state_dict`. (All ranks must call it.)"""
        mine = {
            number: {k: v.cpu().array if isinstance(v, Tensor) else v for k, v in state.items()}
            for number, state in self.own_state_dict()["state"].items()
        }
        found: dict[int, Any] = {}
        for part in self.communicator.all_gather_object(mine):
            found |= part
        state = {
            number: {k: Tensor(v) if hasattr(v, "dtype") else v for k, v in found[number].items()}
            for number in sorted(found)
        }
        self.everything = {**super().state_dict(), "state": state}

    def state_dict(self) -> dict[str, Any]:
        """That of the optimizer in one process: it can be loaded there, and by any number of ranks.

        Raises:
            RuntimeError: `consolidate_state_dict` was not called since the last step.
        """
        if self.everything is None:
            raise RuntimeError(
                "each rank has a part of the state: consolidate_state_dict() comes first, on all"
            )
        return {**self.everything, "param_groups": super().state_dict()["param_groups"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # checks; each rank then keeps its own part
        mine = {p: s for p, s in self.state.items() if self.owner[p] == self.communicator.rank}
        self.local.state, self.state, self.everything = mine, {}, None
