"""Mixed precision: products in 16 bits, weights and their updates in 32 (Micikevicius et al. 2018).

    scaler = GradScaler()
    for x, y in loader:
        optimizer.zero_grad()
        with autocast(dtype="float16"):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

float16 has 10 bits of fraction and 5 of exponent: nothing between 0 and 6e-8, nothing above 65504,
and next to 1 nothing nearer than 0.001. The three parts of the paper, and what each is against:

    autocast       sums of products are kept in float32 and rounded once      (section 3.3)
    GradScaler     gradients below 6e-8 would be 0: the loss is multiplied    (section 3.2)
    MasterWeights  w - lr · g is w where lr · g is below w / 2048: weights
                   are kept in float32 too                                    (section 3.1)

On a GPU 16 bits are faster. On a CPU they are not: there this is for looking at what they do.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from contextlib import ContextDecorator
from typing import Any

import numpy as np

from minidl import backend
from minidl.autograd import mode, written
from minidl.op import Op
from minidl.ops.elementwise import astype
from minidl.ops.half import DTYPES, PRODUCTS
from minidl.optim.optimizer import Optimizer
from minidl.tensor import Tensor, float32

__all__ = ["GradScaler", "MasterWeights", "autocast"]

# Autocast ---------------------------------------------------------------------------------

LOWER = frozenset(product.op.name for product in PRODUCTS)  # these run in 16 bits
UNTOUCHED = frozenset({"astype", "to_device"})  # all others run in float32, but for these two

lock = threading.Lock()
count = 0  # of enabled blocks, in all threads; ops call `cast_inputs` only while there are any


class autocast(ContextDecorator):
    """Within it, the matrix products of `ops.half.PRODUCTS` are of 16-bit numbers.

    Their float32 inputs are rounded, on the tape, so that gradients too are rounded where they pass
    a product. Sums are kept in float32. All other ops run in float32: what comes in 16 bits is
    widened, and nothing is lost by it. (PyTorch leaves many of these in the type that they meet,
    for speed.) float64 stays as it is, and whatever it meets. Weights stay in float32: call
    `backward` and the optimizer outside of the block.

    Args:
        device_type: "cpu" or "cuda": only of tensors there; None: everywhere.
        dtype: "float16" or "bfloat16", or the dtype.
        enabled: False: nothing is cast, also inside of another autocast.
        cache_enabled: PyTorch's; nothing is cached here.

    Raises:
        ValueError: another device type or dtype.
    """

    def __init__(
        self,
        device_type: str | None = None,
        dtype: Any = "float16",
        enabled: bool = True,
        cache_enabled: bool | None = None,
    ) -> None:
        if device_type not in (None, "cpu", "cuda"):
            raise ValueError(
                f"device_type is cpu or cuda, got {device_type!r}: the number format is "
                'autocast(dtype="float16")'
            )
        if (name := dtype if isinstance(dtype, str) else np.dtype(dtype).name) not in DTYPES:
            raise ValueError(f"dtype is float16 or bfloat16, got {name!r}")
        self.device_type, self.dtype, self.enabled = device_type, np.dtype(name), enabled

    def __enter__(self) -> autocast:
        mode.autocast += (self,)
        look_in(self.enabled)
        return self

    def __exit__(self, *_: object) -> None:
        mode.autocast = mode.autocast[:-1]
        look_in(-self.enabled)

    def casts(self, x: Any, dtype: Any) -> bool:
        """Whether a tensor is to be cast."""
        return (
            isinstance(x, Tensor)
            and x.dtype != dtype
            and (x.dtype == float32 or x.dtype.name in DTYPES)
            and self.device_type in (None, backend.device_type(x.array))
        )


def look_in(entered: int) -> None:
    """Have `op.call` look in here before it runs an op, as long as there is an enabled block."""
    global count
    ops: Any = importlib.import_module("minidl.op")  # the name `op` in minidl is the decorator
    with lock:
        count += entered
        ops.before_call = cast_inputs if count else None


def cast_inputs(op: Op, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """An op's inputs in the type that it runs in."""
    if not mode.autocast or op.name in UNTOUCHED:  # it is another thread that is in a block
        return inputs
    block = mode.autocast[-1]
    if not block.enabled:
        return inputs
    if any(getattr(x, "dtype", None) == np.float64 and np.ndim(x) for x in inputs):
        return inputs
    dtype = block.dtype if op.name in LOWER else float32
    return tuple(astype(x, dtype=dtype) if block.casts(x, dtype) else x for x in inputs)


# Loss scaling -----------------------------------------------------------------------------


class GradScaler:
    """Multiplies the loss, so that small gradients are not flushed to 0 (section 3.2).

    All gradients are multiplied with it, by the chain rule, and divided by it in float32 before the
    optimizer sees them. The factor is as large as it can be: where a gradient became infinite or
    NaN, the step is left out and the factor is multiplied by `backoff_factor`; after
    `growth_interval` steps without, by `growth_factor`.

    Args:
        device: PyTorch's; gradients are unscaled where they are.
        enabled: False: everything passes as it is, and `step` is the optimizer's.

    Raises:
        ValueError: growth_factor is not above 1, or backoff_factor not below.
    """

    def __init__(
        self,
        device: str = "cuda",
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
    ) -> None:
        if not growth_factor > 1.0:
            raise ValueError(f"growth_factor must be above 1, got {growth_factor}")
        if not 0.0 < backoff_factor < 1.0:
            raise ValueError(f"backoff_factor must be between 0 and 1, got {backoff_factor}")
        self._scale, self._growth_tracker = float(init_scale), 0
        self._growth_factor, self._backoff_factor = growth_factor, backoff_factor
        self._growth_interval, self._enabled = growth_interval, enabled
        self._found_inf: dict[Any, bool] = {}  # of optimizers whose gradients are unscaled
        self._stepped: set[Any] = set()

    def scale(self, outputs: Any) -> Any:
        """A tensor times the factor, or several (a list, a tuple)."""
        if not self._enabled:
            return outputs
        if isinstance(outputs, Tensor):
            return outputs * self._scale
        return type(outputs)(self.scale(x) for x in outputs)

    def unscale_(self, optimizer: Any) -> None:
        """Divide an optimizer's gradients by the factor; for what looks at them before the step.

        Raises:
            RuntimeError: it was done already since the last `update`; there are no gradients.
            ValueError: a gradient of 16 bits: divided it would be flushed to 0 after all.
        """
        if not self._enabled:
            return
        if optimizer in self._stepped:
            raise RuntimeError("unscale_() comes before step(), and after it update()")
        if optimizer in self._found_inf:
            raise RuntimeError("unscale_() was called already since the last update()")
        if isinstance(optimizer, MasterWeights):
            optimizer.gather()
        params = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad.array for p in params if p.grad is not None]
        if not gradients:
            raise RuntimeError("there are no gradients: scaler.scale(loss).backward() comes first")
        for g in gradients:
            if g.dtype.name in DTYPES:
                raise ValueError(
                    f"a gradient of shape {g.shape} is in {g.dtype}, too coarse to be divided: "
                    "keep the weights in float32 under autocast, or take MasterWeights(optimizer)"
                )
        found_inf = False
        for g in gradients:
            g *= 1.0 / self._scale
            written(g)
            found_inf |= not bool(np.isfinite(g).all())
        self._found_inf[optimizer] = found_inf

    def step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """`optimizer.step(...)` with unscaled gradients, if they are finite.

        Returns:
            What the optimizer returned; None if the step was left out.

        Raises:
            RuntimeError: a closure (its backward could not be checked); a second step before
                `update`; or as `unscale_`.
        """
        if not self._enabled:
            return optimizer.step(*args, **kwargs)
        if args or "closure" in kwargs:
            raise RuntimeError("GradScaler.step takes no closure")
        if optimizer in self._stepped:
            raise RuntimeError("step() was called already since the last update()")
        if optimizer not in self._found_inf:
            self.unscale_(optimizer)
        self._stepped.add(optimizer)
        return None if self._found_inf[optimizer] else optimizer.step(**kwargs)

    def update(self, new_scale: float | None = None) -> None:
        """Change the factor by what was found since the last `update`; or to a number.

        Raises:
            RuntimeError: nothing was looked at: no `step` or `unscale_`.
        """
        if not self._enabled:
            return
        if new_scale is not None:
            self._scale = float(new_scale)
        elif not self._found_inf:
            raise RuntimeError("update() comes after step(optimizer)")
        elif any(self._found_inf.values()):
            self._scale *= self._backoff_factor
            self._growth_tracker = 0
        else:
            self._growth_tracker += 1
            if self._growth_tracker == self._growth_interval:
                grown = self._scale * self._growth_factor
                self._scale = grown if grown < 2.0**128 else self._scale
                self._growth_tracker = 0
        self._found_inf.clear()
        self._stepped.clear()

    def get_scale(self) -> float:
        """The factor; 1 if not enabled."""
        return self._scale if self._enabled else 1.0

    def is_enabled(self) -> bool:
        return self._enabled

    def state_dict(self) -> dict[str, Any]:
        """Numbers by name; nothing if not enabled."""
        if not self._enabled:
            return {}
        return {
            "scale": self._scale,
            "growth_factor": self._growth_factor,
            "backoff_factor": self._backoff_factor,
            "growth_interval": self._growth_interval,
            "_growth_tracker": self._growth_tracker,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            RuntimeError: it is that of a scaler that was not enabled.
        """
        if not self._enabled:
            return
        if not state_dict:
            raise RuntimeError("the state is empty: it is of a GradScaler that was not enabled")
        self._scale, self._growth_factor = state_dict["scale"], state_dict["growth_factor"]
        self._backoff_factor = state_dict["backoff_factor"]
        self._growth_interval = state_dict["growth_interval"]
        self._growth_tracker = state_dict["_growth_tracker"]


# Master weights ---------------------------------------------------------------------------


class MasterWeights(Optimizer):
    """An optimizer for parameters of 16 bits: it changes copies of 32, which are then rounded.

        model.half()
        optimizer = MasterWeights(optim.SGD(model.parameters(), lr=0.1, momentum=0.9))

    The gradients move from the parameters to the copies, where they are float32: what clips them or
    looks at them finds them in `param_groups` (after `GradScaler.unscale_`, or `gather`).

    Args:
        optimizer: over the parameters, before its first step. Its groups hold the copies from now
            on. Parameters of 32 bits stay what they are.

    Raises:
        ValueError: no parameter is of 16 bits; or the optimizer has made steps.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        if optimizer.state:
            raise ValueError("MasterWeights(optimizer) comes before the optimizer's first step")
        self.optimizer = optimizer
        self.masters: dict[Tensor, Tensor] = {}  # a parameter -> its copy
        for group in optimizer.param_groups:
            for i, p in enumerate(group["params"]):
                if p.dtype.name in DTYPES:
                    master = Tensor(p.array.astype(np.float32), requires_grad=True)
                    self.masters[p] = group["params"][i] = master
        if not self.masters:
            raise ValueError("all parameters are of 32 bits: they are their own master weights")

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # not made yet, or being copied
            raise AttributeError(name)
        return getattr(self.optimizer, name)  # param_groups, defaults, state

    def gather(self) -> None:
        """Move the gradients from the parameters to the copies, where they add up."""
        for p, master in self.masters.items():
            if p.grad is not None:
                g = Tensor(p.grad.array.astype(np.float32))
                master.grad = g if master.grad is None else master.grad + g
                p.grad = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As `Optimizer.step`."""

        def gathered() -> Any:
            loss = closure() if closure else None
            self.gather()
            return loss

        loss = self.optimizer.step(gathered)
        self.round()
        return loss

    def round(self) -> None:
        """Write the copies, rounded, over the parameters."""
        for p, master in self.masters.items():
            p.array[...] = astype(master.array, dtype=p.dtype)
            written(p.array)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)
        for p in self.masters:
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's, and "masters": the copies, in the order of the parameters."""
        return {**self.optimizer.state_dict(), "masters": list(self.masters.values())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; the parameters become what the copies round to.

        Raises:
            ValueError: other parameters. Nothing is changed then.
        """
        saved = state_dict["masters"]
        shapes = [x.shape for x in saved], [x.shape for x in self.masters]
        if shapes[0] != shapes[1]:
            raise ValueError(f"the state has master weights of {shapes[0]}, not {shapes[1]}")
        self.optimizer.load_state_dict(state_dict)
        for master, x in zip(self.masters.values(), saved):
            master.array[...] = backend.to_device(x.array, master.device)
            written(master.array)
        self.round()
