"""Module: a function that holds parameters.

A module's parameters, buffers and submodules are simply its attributes: ``self.weight =
nn.Parameter(...)`` is all it takes, and ``vars(module)`` is the only book kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np

from minidl import backend
from minidl.autograd import written
from minidl.nn.parameter import Parameter
from minidl.tensor import Tensor

Self = TypeVar("Self", bound="Module")


class Module:
    """Base of all layers and networks.

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc1, self.fc2 = nn.Linear(784, 128), nn.Linear(128, 10)

            def forward(self, x):
                return self.fc2(F.relu(self.fc1(x)))

    Attributes:
        training: whether dropout drops and batch norm uses the batch's statistics; see `train`.
        frozen: whether `train` leaves this module in eval mode (`minidl.transfer.freeze`).
    """

    training: bool = True
    frozen: bool = False
    _buffers: Mapping[str, bool] = MappingProxyType({})  # name -> goes into the state_dict
    _hooks: dict[str, list[Callable[..., Any]]] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the output; a subclass says how. Call ``module(x)``, which also runs hooks."""
        raise NotImplementedError(f"{type(self).__name__} needs a method forward(self, ...)")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._hooks is None:
            return self.forward(*args, **kwargs)
        for hook in list(self._hooks["before"]):
            changed = hook(self, args)
            if changed is not None:
                args = changed if isinstance(changed, tuple) else (changed,)
        output = self.forward(*args, **kwargs)
        for hook in list(self._hooks["after"]):
            changed = hook(self, args, output)
            if changed is not None:
                output = changed
        return output

    def __setattr__(self, name: str, value: Any) -> None:
        before = vars(self).get(name)
        if isinstance(before, Parameter) and not isinstance(value, Parameter | None):
            raise TypeError(
                f"{name} is a parameter of {type(self).__name__} and would stop being one: assign "
                f"an nn.Parameter or None, got {type(value).__name__}. To change its values, write "
                f"under `with minidl.no_grad():` {name}.copy_(values)"
            )
        if name in self._buffers and not isinstance(value, Tensor | None):
            raise TypeError(f"{name} is a buffer: assign a Tensor, got {type(value).__name__}")
        object.__setattr__(self, name, value)

    # What it holds ------------------------------------------------------------------------

    def register_parameter(self, name: str, param: Parameter | None) -> None:
        """The same as ``self.name = param``, for a name that is not known in advance.

        Raises:
            KeyError: the name is taken, or is no name.
            TypeError: not a Parameter.
        """
        self._check_name(name)
        if not isinstance(param, Parameter | None):
            raise TypeError(f"parameter {name!r} is {type(param).__name__}, not nn.Parameter")
        setattr(self, name, param)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """A tensor that moves and is saved with the module but is not learned.

        Args:
            name: becomes an attribute.
            tensor: the values; None: nothing yet.
            persistent: whether it belongs to the `state_dict`.

        Raises:
            KeyError: the name is taken, or is no name.
            TypeError: not a Tensor.
        """
        if name not in self._buffers:
            self._check_name(name)
        if not isinstance(tensor, Tensor | None):
            raise TypeError(f"buffer {name!r} is {type(tensor).__name__}, not Tensor")
        self._buffers = {**self._buffers, name: persistent}
        setattr(self, name, tensor)

    def add_module(self, name: str, module: Module | None) -> None:
        """The same as ``self.name = module``, for a name that is not known in advance."""
        if not isinstance(module, Module | None):
            raise TypeError(f"submodule {name!r} is {type(module).__name__}, not nn.Module")
        if not isinstance(vars(self).get(name), Module):
            self._check_name(name)
        setattr(self, name, module)

    register_module = add_module

    def _check_name(self, name: str) -> None:
        if not name or "." in name:
            raise KeyError(f"a name is not empty and has no dot, got {name!r}")
        if hasattr(self, name) and getattr(self, name) is not None:
            raise KeyError(f"{type(self).__name__} has an attribute {name!r} already")

    def _own_parameters(self) -> Iterator[tuple[str, Parameter]]:
        return ((k, v) for k, v in vars(self).items() if isinstance(v, Parameter))

    def _own_buffers(self, only_persistent: bool = False) -> Iterator[tuple[str, Tensor]]:
        for name, persistent in self._buffers.items():
            value = vars(self).get(name)
            wanted = persistent or not only_persistent
            if wanted and isinstance(value, Tensor) and not isinstance(value, Parameter):
                yield name, value

    def _own_state(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._own_parameters()
        yield from self._own_buffers(only_persistent=True)

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """(name, module) for each direct submodule, in the order of assignment."""
        seen = set()
        for name, value in list(vars(self).items()):
            if isinstance(value, Module) and value not in seen:
                seen.add(value)
                yield name, value

    def children(self) -> Iterator[Module]:
        return (module for _, module in self.named_children())

    def named_modules(
        self, memo: set[Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Module]]:
        """(dotted path, module) for this module (path "") and all below it."""
        memo = set() if memo is None else memo
        if self in memo:
            return
        if remove_duplicate:
            memo.add(self)
        yield prefix, self
        for name, value in list(vars(self).items()):
            if isinstance(value, Module):
                yield from value.named_modules(memo, join(prefix, name), remove_duplicate)

    def modules(self) -> Iterator[Module]:
        return (module for _, module in self.named_modules())

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Parameter]]:
        """(dotted name, parameter); a shared parameter comes once, under its first name."""
        return self._named(Module._own_parameters, prefix, recurse, remove_duplicate)

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        return (parameter for _, parameter in self.named_parameters(recurse=recurse))

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """(dotted name, buffer)."""
        return self._named(Module._own_buffers, prefix, recurse, remove_duplicate)

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        return (buffer for _, buffer in self.named_buffers(recurse=recurse))

    def _named(
        self,
        own: Callable[[Module], Iterable[tuple[str, Any]]],
        prefix: str = "",
        recurse: bool = True,
        remove_duplicate: bool = True,
    ) -> Iterator[tuple[str, Any]]:
        seen = set()
        modules: Iterable[tuple[str, Module]] = [(prefix, self)]
        if recurse:
            modules = self.named_modules(None, prefix, remove_duplicate)
        for path, module in modules:
            for name, tensor in own(module):
                if tensor not in seen:
                    if remove_duplicate:
                        seen.add(tensor)
                    yield join(path, name), tensor

    def get_submodule(self, target: str) -> Module:
        """The module at a dotted path: ``net.get_submodule("layer1.0.conv1")``.

        Raises:
            AttributeError: there is none.
        """
        module: Any = self
        for name in target.split(".") if target else []:
            module = vars(module).get(name)
            if not isinstance(module, Module):
                raise AttributeError(f"{type(self).__name__} has no submodule {target!r}")
        return module

    def get_parameter(self, target: str) -> Parameter:
        """The parameter with a dotted name.

        Raises:
            AttributeError: there is none.
        """
        path, _, name = target.rpartition(".")
        parameter = vars(self.get_submodule(path)).get(name)
        if not isinstance(parameter, Parameter):
            raise AttributeError(f"{type(self).__name__} has no parameter {target!r}")
        return parameter

    # Saving and loading -------------------------------------------------------------------

    def state_dict(self, *, prefix: str = "") -> dict[str, Tensor]:
        """Parameters and persistent buffers by dotted name: views, not copies."""
        named = self._named(Module._own_state, prefix.rstrip("."), remove_duplicate=False)
        return {name: tensor.detach() for name, tensor in named}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True
    ) -> IncompatibleKeys:
        """Copy values into parameters and buffers: all of them, or none if anything is wrong.

        Args:
            state_dict: tensors or arrays by dotted name, as `state_dict` gives them.
            strict: False: tolerate missing and unexpected names (never wrong shapes).

        Returns:
            The missing and the unexpected names.

        Raises:
            RuntimeError: lists every missing and unexpected name and every shape or kind of
                numbers that does not fit. The module is as it was.
        """
        own = dict(self._named(Module._own_state, remove_duplicate=False))
        missing = [name for name in own if name not in state_dict]
        unexpected = [name for name in state_dict if name not in own]
        problems = []
        if strict and missing:
            problems.append(f"Missing key(s) in state_dict: {', '.join(map(repr, missing))}")
        if strict and unexpected:
            problems.append(f"Unexpected key(s) in state_dict: {', '.join(map(repr, unexpected))}")
        arrays = {}
        for name, tensor in own.items():
            if name not in state_dict:
                continue
            value = state_dict[name]
            array = value.array if isinstance(value, Tensor) else np.asarray(value)
            if array.shape != tensor.shape:
                problems.append(
                    f"size mismatch for {name}: expected {tensor.shape}, received {array.shape}"
                )
            elif (array.dtype.kind in "fV") != (tensor.dtype.kind in "fV"):
                problems.append(
                    f"dtype mismatch for {name}: expected {tensor.dtype}, received {array.dtype}"
                )
            else:
                arrays[name] = backend.to_device(array, tensor.device)
        if problems:
            raise RuntimeError(
                f"Error(s) in loading state_dict for {type(self).__name__}:\n\t"
                + "\n\t".join(problems)
            )
        for name, array in arrays.items():
            own[name].array[...] = array
            written(own[name].array)
        return IncompatibleKeys(missing, unexpected)

    # Modes --------------------------------------------------------------------------------

    def train(self: Self, mode: bool = True) -> Self:
        """Switch to training (dropout drops, batch norm uses the batch's statistics), all but
        frozen modules."""
        if not isinstance(mode, bool):
            raise ValueError(f"train(mode) takes True or False, got {mode!r}")
        self.training = mode and not self.frozen
        for module in self.children():
            module.train(mode)
        return self

    def eval(self: Self) -> Self:
        """Switch to evaluation: the output depends on the input alone."""
        return self.train(False)

    def requires_grad_(self: Self, requires_grad: bool = True) -> Self:
        """Have all parameters learn, or freeze them."""
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad)
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients (or, with `set_to_none=False`, fill them with zeros)."""
        zero_grad(self.parameters(), set_to_none)

    def apply(self: Self, fn: Callable[[Module], Any]) -> Self:
        """Call a function on every module below this one, then on this one."""
        for module in self.children():
            module.apply(fn)
        fn(self)
        return self

    # To another place or dtype ------------------------------------------------------------

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        """``net.to("cuda")``, ``net.to(minidl.float64)``, ``net.to("cuda", minidl.float16)``,
        ``net.to(tensor)``: in place. The dtype is that of floating numbers; integers keep theirs.

        Raises:
            RuntimeError: there is no such device here.
            TypeError: the dtype is not floating.
        """
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        for a in args:
            if isinstance(a, Tensor):
                device, dtype = a.device, a.dtype
            elif isinstance(a, str) and a.split(":")[0] in ("cpu", "cuda"):
                device = a
            elif a is not None and not isinstance(a, bool):
                dtype = a
        if dtype is not None and np.dtype(dtype).kind != "f":
            raise TypeError(f"a module's numbers are floating, it cannot become {np.dtype(dtype)}")

        def convert(array: Any) -> Any:
            if dtype is not None and array.dtype.kind == "f":
                array = array.astype(dtype, copy=False)
            return array if device is None else backend.to_device(array, str(device))

        for module in self.modules():
            for _, parameter in module._own_parameters():
                parameter.array = convert(parameter.array)
                if parameter.grad is not None:
                    parameter.grad = Tensor(convert(parameter.grad.array))
            for name, buffer in list(module._own_buffers()):
                setattr(module, name, Tensor(convert(buffer.array)))
        return self

    def cuda(self: Self, device: int | str = 0) -> Self:
        return self.to(device if isinstance(device, str) else f"cuda:{device}")

    def cpu(self: Self) -> Self:
        return self.to("cpu")

    def half(self: Self) -> Self:
        """All floating numbers as float16."""
        return self.to(np.float16)

    def double(self: Self) -> Self:
        """All floating numbers as float64."""
        return self.to(np.float64)

    def float(self: Self) -> Self:
        """All floating numbers as float32."""
        return self.to(np.float32)

    # Hooks --------------------------------------------------------------------------------

    def register_forward_pre_hook(self, hook: Callable[[Module, tuple[Any, ...]], Any]) -> Hook:
        """Call ``hook(module, args)`` before `forward`; what it returns replaces the arguments."""
        return Hook(self, "before", hook)

    def register_forward_hook(self, hook: Callable[[Module, tuple[Any, ...], Any], Any]) -> Hook:
        """Call ``hook(module, args, output)`` after `forward`; a result replaces the output."""
        return Hook(self, "after", hook)

    # Printing -----------------------------------------------------------------------------

    def extra_repr(self) -> str:
        """What stands between a layer's parentheses."""
        return ""

    def __repr__(self) -> str:
        lines = [f"({name}): {indent(repr(v))}" for name, v in vars(self).items()
                 if isinstance(v, Module)]  # fmt: skip
        return frame(type(self).__name__, self.extra_repr(), lines)


class IncompatibleKeys(NamedTuple):
    """What `load_state_dict` found missing and unexpected."""

    missing_keys: list[str]
    unexpected_keys: list[str]

    def __repr__(self) -> str:
        if not self.missing_keys and not self.unexpected_keys:
            return "<All keys matched successfully>"
        return f"IncompatibleKeys(missing_keys={self.missing_keys}, " + (
            f"unexpected_keys={self.unexpected_keys})"
        )


class Hook:
    """Removes a module's hook again."""

    def __init__(self, module: Module, kind: str, hook: Callable[..., Any]) -> None:
        self.module, self.kind, self.hook = module, kind, hook
        if module._hooks is None:
            module._hooks = {"before": [], "after": []}
        module._hooks[kind].append(hook)

    def remove(self) -> None:
        hooks = self.module._hooks
        if hooks is not None and self.hook in hooks[self.kind]:
            hooks[self.kind].remove(self.hook)
            if not any(hooks.values()):
                self.module._hooks = None


def zero_grad(parameters: Iterable[Tensor], set_to_none: bool = True) -> None:
    """Forget gradients, or fill them with zeros."""
    for parameter in parameters:
        if set_to_none:
            parameter.grad = None
        elif parameter.grad is not None:
            parameter.grad = Tensor(parameter.grad.array * 0)


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def indent(text: str) -> str:
    """All lines but the first moved right, as PyTorch prints submodules."""
    return text.replace("\n", "\n  ")


def frame(name: str, extra: str, lines: list[str]) -> str:
    """``Name(extra)``, or one indented line per submodule between the parentheses."""
    if extra and lines:
        lines = extra.split("\n") + lines
    if not lines:
        return f"{name}({extra})"
    return f"{name}(\n  " + "\n  ".join(lines) + "\n)"
