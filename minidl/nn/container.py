"""Modules that hold modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from minidl.nn.module import Module, frame, indent
from minidl.nn.parameter import Parameter
from minidl.tensor import Tensor


class Numbered(Module):
    """What containers with the names "0", "1", ... share."""

    kind: type

    def _items(self) -> dict[str, Any]:
        return {name: v for name, v in vars(self).items() if isinstance(v, self.kind)}

    def _key(self, index: int) -> str:
        names = list(self._items())
        if not -len(names) <= index < len(names):
            raise IndexError(f"index {index} is out of range: there are {len(names)} items")
        return names[index]

    def _replace(self, values: Iterable[Any]) -> None:
        values = list(values)
        for name in self._items():
            delattr(self, name)
        for i, value in enumerate(values):
            setattr(self, str(i), value)

    def __len__(self) -> int:
        return len(self._items())

    def __iter__(self) -> Iterator[Any]:
        return iter(list(self._items().values()))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return type(self)(list(self)[index])  # type: ignore[call-arg]
        return getattr(self, self._key(index))

    def __setitem__(self, index: int, value: Any) -> None:
        setattr(self, self._key(index), self._checked(value))

    def __delitem__(self, index: int | slice) -> None:
        values = list(self)
        del values[index]
        self._replace(values)

    def _checked(self, value: Any) -> Any:
        if not isinstance(value, self.kind):
            raise TypeError(
                f"{type(self).__name__} holds {self.kind.__name__}s, got {type(value).__name__}"
            )
        return value

    def append(self, value: Any) -> Any:
        """Add one at the end; return self."""
        setattr(self, str(len(self)), self._checked(value))
        return self

    def extend(self, values: Iterable[Any]) -> Any:
        """Add several at the end; return self."""
        for value in values:
            self.append(value)
        return self

    def insert(self, index: int, value: Any) -> None:
        """Put one before another."""
        values = list(self)
        values.insert(index, self._checked(value))
        self._replace(values)


class Sequential(Numbered):
    """Modules one after the other: ``Sequential(a, b)``, or a dict of names and modules.

    A slice of it is a Sequential of the same modules, under their names.
    """

    kind = Module

    def __init__(self, *args: Any) -> None:
        super().__init__()
        if len(args) == 1 and isinstance(args[0], Mapping):
            for name, module in args[0].items():
                self.add_module(name, self._checked(module))
        else:
            self.extend(args)

    def forward(self, input: Any) -> Any:
        for module in self:
            input = module(input)
        return input

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return type(self)(dict(list(self._items().items())[index]))
        return super().__getitem__(index)

    def __delitem__(self, index: int | slice) -> None:
        items = self._items()
        doomed = list(items)[index]
        for name in [doomed] if isinstance(doomed, str) else doomed:
            delattr(self, name)
        if all(name.isdigit() for name in items):
            self._replace(self)


class ModuleList(Numbered):
    """A list of modules."""

    kind = Module

    def __init__(self, modules: Iterable[Module] | None = None) -> None:
        super().__init__()
        self.extend(modules or ())

    def __repr__(self) -> str:
        # As PyTorch prints it: equal neighbours on one line, "(0-2): 3 x Linear(...)".
        runs: list[list[Any]] = []
        for i, text in enumerate(map(repr, self)):
            if runs and runs[-1][2] == text:
                runs[-1][1] = i
            else:
                runs.append([i, i, text])
        lines = [
            f"({a}): {indent(text)}" if a == b else f"({a}-{b}): {b - a + 1} x {indent(text)}"
            for a, b, text in runs
        ]
        return frame(type(self).__name__, "", lines)


class ModuleDict(Module):
    """A dict of modules."""

    def __init__(self, modules: Mapping[str, Module] | None = None) -> None:
        super().__init__()
        self.update(modules or {})

    def __getitem__(self, key: str) -> Module:
        return dict(self.items())[key]

    def __setitem__(self, key: str, module: Module) -> None:
        self.add_module(key, module)

    def __delitem__(self, key: str) -> None:
        self[key]
        delattr(self, key)

    def __len__(self) -> int:
        return len(self.items())

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __contains__(self, key: str) -> bool:
        return key in self.keys()

    def keys(self) -> list[str]:
        return [key for key, _ in self.items()]

    def values(self) -> list[Module]:
        return [module for _, module in self.items()]

    def items(self) -> list[tuple[str, Module]]:
        return [(k, v) for k, v in vars(self).items() if isinstance(v, Module)]

    def update(self, modules: Mapping[str, Module]) -> None:
        for key, module in modules.items():
            self[key] = module

    def pop(self, key: str) -> Module:
        module = self[key]
        del self[key]
        return module

    def clear(self) -> None:
        for key in self.keys():
            del self[key]


class ParameterList(Numbered):
    """A list of parameters; a plain tensor becomes one."""

    kind = Parameter

    def __init__(self, values: Iterable[Any] | None = None) -> None:
        super().__init__()
        self.extend(values or ())

    def _checked(self, value: Any) -> Any:
        if isinstance(value, Tensor) and not isinstance(value, Parameter):
            value = Parameter(value.detach())
        return super()._checked(value)

    def __repr__(self) -> str:
        lines = [
            f"({i}): Parameter containing: [{p.dtype} of size {'x'.join(map(str, p.shape))}]"
            for i, p in enumerate(self)
        ]
        return frame("ParameterList", "", lines)
