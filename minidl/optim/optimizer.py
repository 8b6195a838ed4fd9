"""What all optimizers share: groups of parameters, their state, and the step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from minidl import backend
from minidl.autograd import enable_grad, written
from minidl.backend.native import native
from minidl.nn.module import zero_grad
from minidl.tensor import Tensor


class Update(NamedTuple):
    """A parameter's array, its gradient, and what the optimizer remembers of it."""

    p: Any
    g: Any
    state: dict[str, Any]

    def dtype(self) -> Any:
        """The dtype, if the kernels can read and write all these arrays; else None."""
        states = [v.array for v in self.state.values() if isinstance(v, Tensor)]
        dtype = self.p.dtype
        for a in (self.p, self.g, *states):
            if type(a) is not np.ndarray or a.dtype != dtype:
                return None
            if not (a.flags.c_contiguous and a.flags.aligned):
                return None
        return dtype if dtype in (np.float32, np.float64) else None

    def on_gpu(self) -> bool:
        """Whether a CUDA kernel can read and write the parameter and its gradient."""
        return all(
            backend.device_type(a) == "cuda" and a.dtype == np.float32 and a.flags.c_contiguous
            for a in (self.p, self.g)
        )


class Optimizer:
    """Changes parameters by their gradients. A subclass writes `update`, on bare arrays.

    Attributes:
        fused: whether a kernel does a step, in C++ for all parameters in one call, in CUDA for
            one parameter, where there is one; `update` is its formula. (PyTorch's name, there an
            argument.)
        param_groups: a list of dicts: "params", and the settings that hold for them ("lr", ...).
            Schedules and users change settings here.
        state: what the optimizer remembers of each parameter: Tensors, and the number of steps.
    """

    fused = True

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        """
        Args:
            params: parameters, or dicts {"params": parameters, setting: value, ...}.
            defaults: the settings of groups that do not say otherwise.

        Raises:
            ValueError: no parameters; a parameter twice; a setting out of range.
            TypeError: something is not a Tensor.
        """
        self.defaults = defaults
        self.state: dict[Tensor, dict[str, Any]] = {}
        self.param_groups: list[dict[str, Any]] = []
        self._scratch: dict[Any, Any] = {}
        if isinstance(params, Tensor | dict):
            raise TypeError(f"params is a list of Tensors or dicts, got a {type(params).__name__}")
        groups = list(params)
        if not groups:
            raise ValueError("the optimizer got no parameters (a used-up generator is empty)")
        for group in groups if isinstance(groups[0], dict) else [{"params": groups}]:
            self.add_param_group(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own: ``{"params": [...], "lr": 0.01}``."""
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        known = {p for group in self.param_groups for p in group["params"]}
        for p in params:
            if not isinstance(p, Tensor):
                raise TypeError(f"an optimizer takes Tensors, got {type(p).__name__}")
            if not p.is_leaf:
                raise ValueError(f"a parameter is a leaf, this tensor was made by {p.grad_fn}")
            if p in known:
                raise ValueError(f"a parameter of shape {p.shape} is given twice")
            known.add(p)
        group = {**self.defaults, **param_group, "params": params}
        self.check(group)
        self.param_groups.append(group)

    def check(self, group: dict[str, Any]) -> None:
        """Refuse settings that are out of range."""
        for name in ("lr", "eps", "weight_decay", "momentum", "lr_decay"):
            if not group.get(name, 0.0) >= 0.0:
                raise ValueError(f"{name} must not be negative, got {group[name]}")
        for name in ("betas", "rho", "alpha"):
            values = group.get(name, 0.0)
            if not all(0.0 <= v <= 1.0 for v in np.atleast_1d(values)):
                raise ValueError(f"{name} must be in [0, 1], got {values}")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Change every parameter that has a gradient.

        Args:
            closure: computes the loss again and its gradients.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with enable_grad():
                loss = closure()
        for group in self.param_groups:
            updates = [
                Update(p.array, p.grad.array, self.state.setdefault(p, {}))
                for p in group["params"]
                if p.grad is not None
            ]
            alike: dict[Any, list[Update]] = {}  # by dtype, or None: not for the kernels
            for u in updates:
                key = u.dtype() if self.fused and native is not None else None
                alike.setdefault(key, []).append(u)
            for dtype, some in alike.items():
                if dtype is None or not self.update_fused(some, group):
                    for u in some:
                        if self.fused and u.on_gpu() and self.update_on_gpu(u, group):
                            continue
                        g = u.g
                        if group.get("maximize"):
                            g = np.negative(g, out=self.scratch(g, "negative"))
                        self.update(u.p, g, u.state, group)
            for u in updates:
                written(u.p)
        return loss

    def update_fused(self, updates: list[Update], group: dict[str, Any]) -> bool:
        """Do what `update` does for all of these, of one dtype, by one kernel in C++.

        Returns:
            False: there is no such kernel; nothing is changed.
        """
        return False

    def update_on_gpu(self, update: Update, group: dict[str, Any]) -> bool:
        """Do what `update` does by one CUDA kernel.

        Returns:
            False: there is no such kernel; nothing is changed.
        """
        return False

    def update(self, p: Any, g: Any, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Change the array `p` in place by its gradient `g` (which stays as it is)."""
        raise NotImplementedError

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients (or, with `set_to_none=False`, fill them with zeros)."""
        zero_grad((p for group in self.param_groups for p in group["params"]), set_to_none)

    def scratch(self, like: Any, name: str) -> Any:
        """An array like another, with any values: for a step's intermediate results.

        All parameters share one buffer for each name, since fresh memory in every step costs
        more than the arithmetic.
        """
        key = name, like.dtype, backend.device_name(like)
        buffer = self._scratch.get(key)
        if buffer is None or buffer.size < like.size:
            buffer = backend.array_module(like).empty(like.size, like.dtype)
            self._scratch[key] = buffer
        return buffer[: like.size].reshape(like.shape)

    def decayed(self, p: Any, g: Any, weight_decay: float) -> Any:
        """g + weight_decay · p: the gradient of the loss with an L2 penalty."""
        return axpy(weight_decay, p, g, self.scratch(p, "decay")) if weight_decay else g

    # Saving and loading -------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """``{"state": {0: {...}, ...}, "param_groups": [{"params": [0, ...], "lr": ...}]}``:
        parameters are numbered in the order in which they were given. Arrays are not copied."""
        numbers: dict[Tensor, int] = {}
        groups = []
        for group in self.param_groups:
            for p in group["params"]:
                numbers[p] = len(numbers)
            groups.append({**group, "params": [numbers[p] for p in group["params"]]})
        state = {numbers[p]: dict(values) for p, values in self.state.items() if values}
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken (its arrays are copied).

        Raises:
            ValueError: other groups, other numbers of parameters, other shapes. Nothing is
                changed then.
        """
        saved_groups = state_dict["param_groups"]
        sizes = [len(group["params"]) for group in self.param_groups]
        saved_sizes = [len(group["params"]) for group in saved_groups]
        if sizes != saved_sizes:
            raise ValueError(
                f"the optimizer has groups of {sizes} parameters, the state_dict of {saved_sizes}"
            )
        params = {
            number: p
            for group, saved in zip(self.param_groups, saved_groups)
            for p, number in zip(group["params"], saved["params"])
        }
        state: dict[Tensor, dict[str, Any]] = {}
        for number, values in state_dict["state"].items():
            p = params[number]
            state[p] = {}
            for name, value in values.items():
                if isinstance(value, Tensor) and name == "step":
                    value = value.item()
                elif isinstance(value, Tensor):
                    if value.shape != p.shape:
                        raise ValueError(
                            f"{name} of parameter {number}: expected {p.shape}, got {value.shape}"
                        )
                    array = value.array.astype(p.dtype, copy=True)
                    value = Tensor(backend.to_device(array, p.device))
                state[p][name] = value
        self.state = state
        for group, saved in zip(self.param_groups, saved_groups):
            group.update({name: value for name, value in saved.items() if name != "params"})

    def __repr__(self) -> str:
        lines = [type(self).__name__ + " ("]
        for i, group in enumerate(self.param_groups):
            lines += [f"Parameter Group {i}"]
            lines += [f"    {name}: {group[name]}" for name in sorted(group) if name != "params"]
        return "\n".join([*lines, ")"])


def axpy(a: float, x: Any, y: Any, out: Any) -> Any:
    """out = a·x + y, without a temporary; `out` may be x but not y."""
    np.multiply(x, a, out=out)
    return np.add(out, y, out=out)
