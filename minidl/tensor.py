"""Tensor: an array, and how it was made."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from os import PathLike
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from minidl import backend

if TYPE_CHECKING:
    from minidl.autograd import Node
    from minidl.ops.methods import Methods
else:
    Methods = object  # its functions are attached by minidl.ops, which builds on this file

float16, float32, float64 = np.dtype("float16"), np.dtype("float32"), np.dtype("float64")
bfloat16 = np.dtype(ml_dtypes.bfloat16)  # its kind is "V", floats' is "f"
int8, int16, int32 = np.dtype("int8"), np.dtype("int16"), np.dtype("int32")
int64, uint8, bool_ = np.dtype("int64"), np.dtype("uint8"), np.dtype("bool")


class Tensor(Methods):
    """An array on a device, and the tape behind it.

    Operators and methods (``x + y``, ``x.sum()``, ...) are the ops of `minidl.ops`; they are
    listed in `minidl.ops.methods`.

    Attributes:
        array: the bare NumPy or CuPy array.
        grad: after `backward`, the gradient with respect to this leaf, a Tensor; else None.
        node: the step on the tape that made this tensor; None for a leaf.
        hooks: a leaf's hooks, by kind; None: there are none. ("claim": what takes its gradients in
            place of `.grad`, such as `distributed.DataParallel`.)
    """

    __slots__ = ("__weakref__", "_requires_grad", "array", "grad", "hooks", "node")
    __array_ufunc__ = None  # ndarray * tensor is left to Tensor.__rmul__

    array: Any
    grad: Tensor | None
    node: Node | None
    hooks: dict[str, list[Callable[[Any], Any]]] | None

    def __init__(self, array: Any, requires_grad: bool = False) -> None:
        """Wrap an array without copying it.

        Raises:
            TypeError: not an array; or `requires_grad` of an array that is not floating.
        """
        if isinstance(array, Tensor):
            array = array.array
        if not hasattr(array, "dtype"):
            raise TypeError(
                f"Tensor(array) wraps an array, got {type(array).__name__}; "
                "minidl.tensor(data) makes one of numbers and lists"
            )
        self.array = np.asarray(array) if isinstance(array, np.generic) else array
        self.grad = self.node = self.hooks = None
        self._requires_grad = False
        if requires_grad:
            self.requires_grad = True

    @staticmethod
    def on_tape(array: Any, node: Node) -> Tensor:
        """A Tensor for an array that a step of the tape made."""
        self = Tensor(array)
        self.node, self._requires_grad = node, True
        return self

    # What it is ---------------------------------------------------------------------------

    @property
    def requires_grad(self) -> bool:
        """Whether `backward` computes a gradient for this tensor."""
        return self._requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        if self.node is not None:
            if not value:
                raise RuntimeError(
                    "requires_grad can be changed on leaves only, this tensor is the result of "
                    f"{self.node.op.name}: use x.detach()"
                )
            return
        if value and not self.is_floating_point():
            raise RuntimeError(f"only floating tensors have gradients, this one is {self.dtype}")
        self._requires_grad = bool(value)

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        """Set `requires_grad`; return self."""
        self.requires_grad = requires_grad
        return self

    @property
    def is_leaf(self) -> bool:
        """Whether no recorded op made this tensor."""
        return self.node is None

    @property
    def grad_fn(self) -> Node | None:
        """PyTorch's name for `node`."""
        return self.node

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def ndim(self) -> int:
        return self.array.ndim

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    @property
    def device(self) -> backend.device:
        """ "cpu", "cuda:0", ...: a str."""
        return backend.device(backend.device_name(self.array))

    @property
    def is_cuda(self) -> bool:
        return backend.device_type(self.array) == "cuda"

    def size(self, dim: int | None = None) -> Any:
        """The shape, or its length along one dimension."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def numel(self) -> int:
        return self.array.size

    def element_size(self) -> int:
        return self.array.itemsize

    def is_floating_point(self) -> bool:
        return self.array.dtype.kind in "fV"

    def is_contiguous(self) -> bool:
        return self.array.flags.c_contiguous

    # Out of the tensor --------------------------------------------------------------------

    def numpy(self) -> np.ndarray:
        """The values as a read-only NumPy view (no copy).

        Raises:
            RuntimeError: the tensor is on a GPU; ``x.cpu().numpy()`` copies it.
        """
        if self.is_cuda:
            raise RuntimeError(f"this tensor is on {self.device}: use x.cpu().numpy()")
        view = self.array.view()
        view.flags.writeable = False
        return view

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.numpy(), dtype=dtype, copy=copy)

    def item(self) -> Any:
        """The value of a tensor of one element, as a Python number."""
        if self.array.size != 1:
            raise ValueError(f"item() needs one element, this tensor has shape {self.shape}")
        return self.array.item()

    def tolist(self) -> Any:
        """The values as nested lists of Python numbers."""
        return self.array.tolist()

    def __bool__(self) -> bool:
        if self.array.size != 1:
            raise ValueError(
                f"the truth of a tensor of shape {self.shape} is ambiguous: use .any() or .all()"
            )
        return bool(self.array.item())

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __index__(self) -> int:
        if self.array.dtype.kind not in "iu":
            raise TypeError(f"only an integer tensor can be an index, this one is {self.dtype}")
        return int(self.item())

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if spec and self.array.size == 1 else str(self)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a 0-d tensor")
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        if not self.shape:
            raise TypeError("iteration over a 0-d tensor")
        return (self[i] for i in range(self.shape[0]))

    def __repr__(self) -> str:
        values = np.array2string(
            backend.to_device(self.array, "cpu"), separator=", ", precision=4, prefix="tensor("
        )
        notes = [f"dtype={self.dtype}"] if self.dtype not in (float32, int64, bool_) else []
        notes += [f"device={self.device!r}"] if self.is_cuda else []
        if self.node is not None:
            notes.append(f"grad_fn=<{self.node.op.name}>")
        elif self.requires_grad:
            notes.append("requires_grad=True")
        return f"tensor({', '.join([values, *notes])})"

    __hash__ = object.__hash__

    # The tape -----------------------------------------------------------------------------

    def backward(
        self,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
    ) -> None:
        """Add the gradient of this tensor to `.grad` of every leaf that it was made from.

        Args:
            gradient: the gradient of something with respect to this tensor, of its shape; may be
                left out for a tensor of one element (it is 1 then).
            retain_graph: keep the tape for another backward (default: `create_graph`).
            create_graph: record the backward pass, so that it can be differentiated.

        Raises:
            RuntimeError: nothing here requires a gradient; the tape was freed; an array that the
                tape needs was changed meanwhile; `gradient` is missing or has another shape.
        """
        from minidl.autograd import backward

        backward(self, gradient, retain_graph, create_graph)

    def explain(
        self,
        path: str | PathLike[str] | None = None,
        *,
        gradient: Tensor | None = None,
        names: Any = None,
        steps: int | None = 200,
    ) -> None:
        """Print the backward walk step by step, or write it as a page: see `minidl.explain`.

        Nothing is changed: no `.grad` is written, and the tape can still be walked.

        Args:
            path: of the HTML page to write; None: print text.
            gradient: the gradient to start with, as for `backward`.
            names: a dict of names and tensors, or a module; the caller's variables are found.
            steps: show no more than this many; None: all.
        """
        from minidl.explain import explain

        explain(self, path, gradient=gradient, names=names, steps=steps)

    def detach(self) -> Tensor:
        """The same array (not a copy), with no tape behind it."""
        return Tensor(self.array)

    @property
    def data(self) -> Tensor:
        """The same as `detach()`; setting it puts another array in place of this one."""
        return Tensor(self.array)

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.shape != self.shape:
            raise ValueError(f"data has shape {self.shape}, got {value.shape}")
        self.array = value.array

    def register_hook(self, hook: Callable[[Tensor], Tensor | None]) -> Handle:
        """Call ``hook(grad)`` when this tensor's gradient is complete, before it is used.

        What it returns, if not None, takes the gradient's place. Returns a handle that can
        `remove()` the hook.
        """
        if not self._requires_grad:
            raise RuntimeError("a hook needs a tensor that requires a gradient")
        return Handle(self.node or self, "grad", hook)

    def register_post_accumulate_grad_hook(self, hook: Callable[[Tensor], None]) -> Handle:
        """Call ``hook(leaf)`` as soon as this leaf's `.grad` is complete, within the backward pass.

        Data parallel training starts sending the gradient here, while the walk goes on.
        """
        if self.node is not None:
            raise RuntimeError("only a leaf accumulates its gradient: use register_hook")
        return Handle(self, "accumulated", hook)

    def retain_grad(self) -> None:
        """Have `backward` set `.grad` of this tensor too, though it is not a leaf."""
        if self.node is not None:
            this = weakref.ref(self)

            def keep(g: Tensor) -> None:
                if (tensor := this()) is not None:
                    tensor.grad = g.clone() if tensor.grad is None else tensor.grad + g

            self.register_hook(keep)

    # In place -----------------------------------------------------------------------------

    def write_(self, values: Any, op: str = "an in-place method") -> Tensor:
        """Overwrite the values (broadcast to this shape and dtype); all in-place methods end here.

        Raises:
            RuntimeError: the tensor is on the tape, or is a leaf that will be.
        """
        from minidl.autograd import mode, written

        if self._requires_grad and mode.enabled:
            raise RuntimeError(
                f"{op} would change a tensor that requires a gradient, which the tape cannot see. "
                "Write it without changing (x = x + y, minidl.where(mask, y, x)), or, to update a "
                "parameter, do it under `with minidl.no_grad():`"
            )
        self.array[...] = values
        written(self.array)
        return self

    def __setitem__(self, index: Any, value: Any) -> None:
        from minidl.autograd import mode, written

        if mode.enabled:
            raise RuntimeError(
                "x[index] = value is refused, since the tape cannot see it. Build the result "
                "instead: minidl.where(mask, value, x), minidl.cat or minidl.stack; to fill a "
                "constant, do it under `with minidl.no_grad():` or before minidl.tensor(array)"
            )
        self.array[raw(index)] = raw(value)
        written(self.array)

    # To another place or dtype ------------------------------------------------------------

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """``x.to("cuda")``, ``x.to(minidl.float64)``, ``x.to(other)``: on the tape, so
        gradients flow back to where x is.

        With ``non_blocking=True`` a copy from pinned memory (`pin_memory`) to a GPU goes on while
        the program does; what is computed with it waits by itself.

        Raises:
            RuntimeError: there is no such device here.
        """
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        for a in args:
            if isinstance(a, Tensor):
                device, dtype = a.device, a.dtype
            elif isinstance(a, str):
                device = a
            elif a is not None and not isinstance(a, bool):
                dtype = a
        x: Tensor = self
        if dtype is not None and np.dtype(dtype) != x.dtype:
            x = x.astype(dtype)
        if device is not None and backend.parse_device(device) != backend.parse_device(x.device):
            x = x.to_device(str(device), bool(kwargs.get("non_blocking", False)))
        return x

    def pin_memory(self) -> Tensor:
        """A copy in memory from which a GPU reads by itself, for ``to("cuda", non_blocking=True)``.

        Raises:
            RuntimeError: the tensor is on a GPU already; or there is none.
        """
        if self.is_cuda:
            raise RuntimeError(f"only a tensor on the CPU can be pinned, this is on {self.device}")
        return Tensor(backend.pinned(self.array), self.requires_grad)

    def cpu(self) -> Tensor:
        return self.to("cpu")

    def cuda(self, index: int = 0) -> Tensor:
        return self.to(f"cuda:{index}")


class Handle:
    """Removes a hook again."""

    def __init__(self, owner: Any, kind: str, hook: Callable[[Any], Any]) -> None:
        owner.hooks = owner.hooks or {}
        self.hooks = owner.hooks.setdefault(kind, [])
        self.hook = hook
        self.hooks.append(hook)

    def remove(self) -> None:
        if self.hook in self.hooks:
            self.hooks.remove(self.hook)


def raw(x: Any) -> Any:
    """Tensors replaced by their arrays, also inside tuples and lists."""
    if isinstance(x, Tensor):
        return x.array
    if isinstance(x, tuple | list):
        return type(x)(raw(v) for v in x)
    return x


def tensor(
    data: Any, dtype: Any = None, device: str | None = None, requires_grad: bool = False
) -> Tensor:
    """A Tensor from numbers, nested lists, or an array (copied).

    An array keeps its dtype; Python numbers become float32, int64 or bool.

    Raises:
        TypeError: the data cannot be made an array of numbers.
    """
    if isinstance(data, Tensor):
        data = data.array
    if not hasattr(data, "dtype"):
        values = np.asarray(raw(data))
        if dtype is None and values.dtype == float64 and not has_numpy_floats(data):
            dtype = float32
        data = values
    if data.dtype.kind not in "biuf":
        raise TypeError(f"a tensor holds numbers, got {data.dtype} from {type(data).__name__}")
    data = data.astype(dtype or data.dtype, copy=True)
    return Tensor(backend.to_device(data, device or backend.device_name(data)), requires_grad)


def has_numpy_floats(data: Any) -> bool:
    """Whether the first number in nested lists is NumPy's rather than Python's."""
    while isinstance(data, list | tuple) and len(data):
        data = data[0]
    return hasattr(data, "dtype")


def from_numpy(array: np.ndarray) -> Tensor:
    """A Tensor that shares an array's memory. (The tape cannot see what you write to the array.)"""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"from_numpy takes a numpy.ndarray, got {type(array).__name__}")
    return Tensor(array)
