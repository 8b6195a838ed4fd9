"""What each operator of ONNX becomes: a layer of `minidl.nn` with its weights, or a function.

A function below is registered for some operators and makes the layer of a `Node`. What it does not
know, an attribute or a form, it refuses by name; nothing is left out silently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from minidl import nn
from minidl.autograd import mode
from minidl.nn import functional as F
from minidl.onnx import operators
from minidl.onnx.export import GATES
from minidl.onnx.operators import explicit_pads
from minidl.ops import elementwise as e
from minidl.ops import quantized, reduce, shape
from minidl.ops.linalg import einsum, matmul
from minidl.ops.softmax import log_softmax, logsumexp, softmax
from minidl.quantization.fake_quantize import fake_quantize
from minidl.tensor import Tensor

if TYPE_CHECKING:
    from minidl.onnx.load import Reader

HELP = (
    "Cut it out of the file (onnx.utils.extract_model), have it exported otherwise, or write a "
    "function for it in minidl.onnx.layers.LAYERS"
)
Layer = nn.Module | Callable[..., Any]
LAYERS: dict[str, Callable[[Node], Layer | Sequence[Layer]]] = {}


def layer(*ops: str) -> Callable[[Any], Any]:
    """A function that makes the layer of a node: a Module, or a function of the inputs that it did
    not take as constants; or several, of which each runs on what the one before made."""

    def register(function: Any) -> Any:
        LAYERS.update(dict.fromkeys(ops, function))
        return function

    return register


class Node:
    """A node, as the functions below see it: its attributes are taken one by one."""

    def __init__(self, reader: Reader, proto: Any) -> None:
        value = reader.onnx.helper.get_attribute_value
        self.reader, self.proto, self.op, self.name = reader, proto, proto.op_type, proto.name
        self.inputs, self.outputs = list(proto.input), list(proto.output)
        self.opset = reader.opset
        self.attributes = {a.name: value(a) for a in proto.attribute}
        self.consumed: set[int] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute."""
        value = self.attributes.pop(name, default)
        if isinstance(value, float):
            return float(str(np.float32(value)))  # as it was written: 1e-05, not 9.99999975e-06
        return value.decode() if isinstance(value, bytes) else value

    def constant(self, i: int) -> np.ndarray | None:
        """An input that is known beforehand, which the layer is not given then; None: absent.

        Raises:
            ValueError: it is known only when the network runs.
        """
        name = self.input(i)
        if name and name not in self.reader.constants:
            raise self.refused(f"input {name!r} must be a constant")
        self.consumed.add(i)
        return self.reader.constants[name] if name else None

    def known(self, i: int) -> bool:
        """Whether an input is a constant, or absent."""
        return not self.input(i) or self.input(i) in self.reader.constants

    def input(self, i: int) -> str:
        return self.inputs[i] if i < len(self.inputs) else ""

    def rank(self, i: int = 0) -> int | None:
        return self.reader.ranks.get(self.input(i))

    def refused(self, why: str) -> ValueError:
        return ValueError(
            f"node {self.name or self.outputs[0]!r} ({self.op}, opset {self.opset}) cannot be "
            f"imported: {why}. {HELP}"
        )


def parameter(array: np.ndarray) -> nn.Parameter:
    return nn.Parameter(Tensor(np.array(array)))


def ints(x: Any) -> list[int]:
    """Numbers, in a NumPy array or a Tensor or a list."""
    x = x.numpy() if isinstance(x, Tensor) else x
    return [int(n) for n in np.reshape(x, -1)]


# Elementwise ------------------------------------------------------------------------------

SIMPLE: dict[str, Callable[..., Any]] = {
    "Add": lambda x, y: x + y, "Sub": lambda x, y: x - y, "Mul": lambda x, y: x * y,
    "Pow": lambda x, y: alike(e.pow_(x, y), x),
    "Neg": e.neg, "Exp": e.exp, "Log": e.log, "Sqrt": e.sqrt,
    "Abs": e.abs_, "Sin": e.sin, "Cos": e.cos, "Erf": e.erf, "Sign": e.sign, "Floor": e.floor,
    "Ceil": e.ceil, "Round": e.round_, "IsNaN": e.isnan, "Softplus": e.softplus,
    "Reciprocal": lambda x: 1 / x, "Not": e.logical_not, "And": e.logical_and, "Or": e.logical_or,
    "Xor": e.logical_xor, "Equal": e.eq, "Less": e.lt, "LessOrEqual": e.le, "Greater": e.gt,
    "GreaterOrEqual": e.ge, "Where": e.where, "Identity": lambda x: x,
    "Softsign": lambda x: x / (1 + e.abs_(x)), "Mish": lambda x: x * e.tanh(e.softplus(x)),
    "HardSwish": lambda x: x * e.clamp(x / 6 + 0.5, min=0, max=1),
    "PRelu": lambda x, slope: e.where(x < 0, x * slope, x),
    "MatMul": matmul, "GlobalMaxPool": lambda x: reduce.amax(x, dim=spatial(x), keepdim=True),
}  # fmt: skip


@layer(*SIMPLE)
def _(node: Node) -> Layer:
    if node.op == "MatMul" and node.known(1) and node.rank(1) == 2 and not node.known(0):
        weight = node.constant(1)
        assert weight is not None
        return dense(weight.T, None)
    return SIMPLE[node.op]


def alike(y: Any, x: Any) -> Any:
    return y if y.dtype == x.dtype else e.astype(y, dtype=x.dtype)


def spatial(x: Any) -> tuple[int, ...]:
    return tuple(range(2, x.ndim))


@layer("Div")
def _(node: Node) -> Layer:
    def div(x: Any, y: Any) -> Any:
        """Of integers: towards 0."""
        if x.dtype.kind == "f":
            return x / y
        return e.astype(e.sign(x) * e.sign(y) * (e.abs_(x) // e.abs_(y)), dtype=x.dtype)

    return div


FOLDED: dict[str, Callable[..., Any]] = {"Sum": e.add, "Max": e.maximum, "Min": e.minimum,
                                         "Mean": e.add}  # fmt: skip


@layer(*FOLDED)
def _(node: Node) -> Layer:
    def fold(*xs: Any) -> Any:
        y = xs[0]
        for x in xs[1:]:
            y = FOLDED[node.op](y, x)
        return y / len(xs) if node.op == "Mean" else y

    return fold


ACTIVATIONS: dict[str, Callable[[Node], nn.Module]] = {
    "Relu": lambda n: nn.ReLU(), "Sigmoid": lambda n: nn.Sigmoid(), "Tanh": lambda n: nn.Tanh(),
    "Elu": lambda n: nn.ELU(n.get("alpha", 1.0)),
    "LeakyRelu": lambda n: nn.LeakyReLU(n.get("alpha", 0.01)),
    "Gelu": lambda n: nn.GELU(n.get("approximate", "none")),
}  # fmt: skip


@layer(*ACTIVATIONS)
def _(node: Node) -> Layer:
    return ACTIVATIONS[node.op](node)


@layer("Swish")
def _(node: Node) -> Layer:
    alpha = node.get("alpha", 1.0)
    return lambda x: x * e.sigmoid(x * alpha)


@layer("HardSigmoid")
def _(node: Node) -> Layer:
    alpha, beta = node.get("alpha", 0.2), node.get("beta", 0.5)
    return lambda x: e.clamp(x * alpha + beta, min=0, max=1)


@layer("Clip")
def _(node: Node) -> Layer:
    if node.opset < 11:
        low, high = node.get("min"), node.get("max")
    elif node.known(1) and node.known(2):
        low, high = (None if v is None else v.item() for v in map(node.constant, (1, 2)))
    else:
        return lambda x, low=None, high=None: bounded(x, low, high)
    if (low, high) == (0, 6):
        return nn.ReLU6()
    return (lambda x: x) if low is high is None else lambda x: e.clamp(x, min=low, max=high)


def bounded(x: Any, low: Any, high: Any) -> Any:
    x = x if low is None else e.maximum(x, low)
    return x if high is None else e.minimum(x, high)


@layer("Cast")
def _(node: Node) -> Layer:
    dtype = node.reader.onnx.helper.tensor_dtype_to_np_dtype(node.get("to"))
    node.get("saturate"), node.get("round_mode")  # of eight-bit floats
    return lambda x: e.astype(x, dtype=dtype)


@layer("CastLike")
def _(node: Node) -> Layer:
    node.get("saturate"), node.get("round_mode")
    return lambda x, like: e.astype(x, dtype=like.dtype)


@layer("Dropout")
def _(node: Node) -> Layer:
    if node.opset < 12:
        return nn.Dropout(node.get("ratio", 0.5))
    node.get("seed")
    ratio = node.constant(1)
    if (training := node.constant(2)) is not None and training.item():
        raise node.refused("it drops also when it is not trained")
    return nn.Dropout(0.5 if ratio is None else ratio.item())


@layer("Softmax", "LogSoftmax")
def _(node: Node) -> Layer:
    f = softmax if node.op == "Softmax" else log_softmax
    if node.opset >= 13:
        axis = node.get("axis", -1)
        return nn.Softmax(axis) if node.op == "Softmax" else nn.LogSoftmax(axis)
    axis = node.get("axis", 1)

    def flat(x: Any) -> Any:
        """Until opset 12: over this and all following axes."""
        start = math.prod(x.shape[: axis % x.ndim])
        return shape.reshape(f(shape.reshape(x, shape=(start, -1)), dim=1), shape=x.shape)

    return flat


# Products ---------------------------------------------------------------------------------


def dense(weight: np.ndarray, bias: np.ndarray | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    made.weight = parameter(weight)
    made.bias = None if bias is None else parameter(bias)
    return made


@layer("Gemm")
def _(node: Node) -> Layer:
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    of_a, of_b = node.get("transA", 0), node.get("transB", 0)
    if not of_a and not node.known(0) and node.known(1) and node.known(2):
        weight, bias = node.constant(1), node.constant(2)
        assert weight is not None
        weight = weight if of_b else weight.T
        if bias is None or bias.size == 1 or bias.shape in ((len(weight),), (1, len(weight))):
            weight = weight if alpha == 1 else (alpha * weight).astype(weight.dtype)
            if bias is not None:
                bias = np.broadcast_to(bias.reshape(-1), len(weight))
                bias = bias if beta == 1 else (beta * bias).astype(bias.dtype)
            return dense(weight, bias)
        node.consumed.clear()

    def gemm(a: Any, b: Any, c: Any = None) -> Any:
        a = shape.permute(a, dims=(1, 0)) if of_a else a
        b = shape.permute(b, dims=(1, 0)) if of_b else b
        y = matmul(a, b) * alpha
        return y if c is None else y + c * beta

    return gemm


class Window:
    """The attributes of what slides over images: convolution and pooling."""

    def __init__(self, node: Node, kernel: Any = None) -> None:
        self.kernel = tuple(node.get("kernel_shape", kernel or ()))
        self.axes = len(self.kernel)
        if self.axes not in (1, 2):
            raise node.refused(f"{self.axes} axes, where 1 or 2 are possible")
        self.stride = tuple(node.get("strides", (1,) * self.axes))
        self.dilation = tuple(node.get("dilations", (1,) * self.axes))
        self.auto_pad, self.pads = node.get("auto_pad", "NOTSET"), node.get("pads")

    def padding(self, size: Sequence[int]) -> tuple[int, ...]:
        """The beginning of each axis, then the end of each."""
        return explicit_pads(
            self.auto_pad, self.pads, size, self.kernel, self.stride, self.dilation
        )

    def symmetric(self) -> tuple[int, ...] | None:
        """The padding, if it is that at both ends whatever the size, and at most half a window (as
        pooling wants it); else None."""
        if self.auto_pad.startswith("SAME"):
            return None
        pads = self.padding((0,) * self.axes)
        before, after = pads[: self.axes], pads[self.axes :]
        fits = all(2 * p <= k for p, k in zip(before, self.kernel))
        return before if before == after and fits else None

    def pad(self, x: Any, value: float = 0.0) -> Any:
        pads = self.padding(x.shape[2:])
        pairs = zip(pads[: self.axes], pads[self.axes :])
        return shape.pad(x, [n for pair in reversed([*pairs]) for n in pair], value)

    def stages(
        self, make: Callable[[tuple[int, ...]], Layer], lowest: bool = False
    ) -> Sequence[Layer]:
        """A layer made with its padding; or, made without, after a function that pads: with 0, or
        with the lowest number that there is."""
        padding = self.symmetric()
        if padding is not None:
            return [make(padding)]

        def pad(x: Any) -> Any:
            return self.pad(x, farthest(x.dtype, -1) if lowest else 0)

        return [pad, make((0,) * self.axes)]

    def of_images(self, x: Any, pool: Callable[..., Any]) -> Any:
        """``pool(x, kernel, stride, dilation)``, of sequences as of images one pixel high."""
        if self.axes == 2:
            return pool(x, self.kernel, self.stride, self.dilation)
        x = shape.reshape(x, shape=(*x.shape[:2], 1, x.shape[2]))
        y = pool(x, *((1, *v) for v in (self.kernel, self.stride, self.dilation)))
        return shape.reshape(y, shape=(*y.shape[:2], y.shape[3]))


@layer("Conv")
def _(node: Node) -> Any:
    if not node.known(1) or not node.known(2):
        raise node.refused("its weights are computed while it runs")
    weight, bias = node.constant(1), node.constant(2)
    assert weight is not None
    window, group = Window(node, weight.shape[2:]), node.get("group", 1)

    def make(padding: tuple[int, ...]) -> nn.Module:
        kind: Any = nn.Conv2d if window.axes == 2 else nn.Conv1d
        made = kind(
            weight.shape[1] * group, len(weight), window.kernel, window.stride, padding,
            window.dilation, group, bias is not None,
        )  # fmt: skip
        made.weight = parameter(weight)
        made.bias = None if bias is None else parameter(bias)
        return made

    return window.stages(make)


@layer("ConvTranspose")
def _(node: Node) -> Any:
    weight, bias = node.constant(1), node.constant(2)
    assert weight is not None
    window, group = Window(node, weight.shape[2:]), node.get("group", 1)
    padding, more = window.symmetric(), tuple(node.get("output_padding", (0,) * window.axes))
    if padding is None or window.axes != 2 or node.get("output_shape"):
        raise node.refused("only images, and equal padding at both ends, are possible")
    made = nn.ConvTranspose2d(
        len(weight), weight.shape[1] * group, window.kernel, window.stride, padding, more, group,
        bias is not None, window.dilation,
    )  # fmt: skip
    made.weight = parameter(weight)
    made.bias = None if bias is None else parameter(bias)
    return made


@layer("Einsum")
def _(node: Node) -> Layer:
    equation = node.get("equation")
    return lambda *xs: einsum(equation, *xs)


# Recurrent layers, and tables --------------------------------------------------------------


class Recurrent(nn.Module):
    """A recurrent layer of `nn`, with ONNX's shapes.

    Args:
        layer: `nn.RNN`, `nn.LSTM` or `nn.GRU`.
        reverse: it reads from the end.
        batch_first: ONNX's layout 1.
    """

    def __init__(self, layer: nn.Module, reverse: bool, batch_first: bool) -> None:
        super().__init__()
        self.layer, self.reverse, self.batch_first = layer, reverse, batch_first

    def forward(self, x: Tensor, lengths: Any = None, *first: Any) -> tuple[Tensor, ...]:
        """x (T, N, I), and states to start from, (D, N, H): all hidden states (T, D, N, H) and the
        states after the last step (D, N, H); or, batch first, (N, T, D, H) and (N, D, H)."""
        layer: Any = self.layer
        x = x.transpose(0, 1) if self.batch_first else x
        hx: Any = None
        if given := [s for s in first if s is not None]:
            zeros = np.zeros(given[0].shape, x.dtype)  # of an LSTM, h or c may be absent
            states = [zeros if s is None else s for s in (*first, None)[: layer.states]]
            states = [s if isinstance(s, Tensor) else Tensor(s).to(x.device) for s in states]
            states = [s.transpose(0, 1) if self.batch_first else s for s in states]
            hx = states[0] if layer.states == 1 else tuple(states)
        y, last = layer(x.flip(0) if self.reverse else x, hx)
        y = y.flip(0) if self.reverse else y
        y = y.reshape((*y.shape[:2], layer.directions, layer.hidden_size))
        ends = (last,) if layer.states == 1 else last
        if self.batch_first:
            return y.transpose(0, 1), *(s.transpose(0, 1) for s in ends)
        return y.permute(0, 2, 1, 3), *ends


@layer("LSTM", "GRU", "RNN")
def _(node: Node) -> Layer:
    w, r, b = (node.constant(i) for i in (1, 2, 3))
    assert w is not None and r is not None
    direction, hidden = node.get("direction", "forward"), node.get("hidden_size", r.shape[2])
    usual = {"LSTM": ["sigmoid", "tanh", "tanh"], "GRU": ["sigmoid", "tanh"], "RNN": ["tanh"]}
    given = node.get("activations", usual[node.op] * len(w))
    given = [name.decode().lower() if isinstance(name, bytes) else name for name in given]
    if node.get("linear_before_reset", 0) != (node.op == "GRU"):
        raise node.refused("a GRU with linear_before_reset=0 computes otherwise")
    if node.input(4) or node.input(7) or node.get("input_forget", 0):
        raise node.refused("sequences of unequal length, peepholes and coupled gates are not there")
    if given != usual[node.op] * len(w) and (node.op != "RNN" or {*given} != {"relu"}):
        raise node.refused(f"activations {given}")
    how: dict[str, Any] = {"nonlinearity": given[0]} if node.op == "RNN" else {}
    kind: Any = getattr(nn, node.op)
    made = kind(w.shape[2], hidden, bias=b is not None, bidirectional=len(w) == 2, **how)
    order = np.argsort(GATES[node.op.lower()][1])
    rows = np.concatenate([np.arange(hidden) + gate * hidden for gate in order])
    for d in range(len(w)):
        biases = [] if b is None else np.split(b[d], 2)
        for name, value in zip(made.names(0, d), (w[d], r[d], *biases)):
            setattr(made, name, parameter(value[rows]))
    return Recurrent(made, direction == "reverse", bool(node.get("layout", 0)))


# Normalization ----------------------------------------------------------------------------


@layer("BatchNormalization")
def _(node: Node) -> Layer:
    weight, bias, mean, var = (node.constant(i) for i in (1, 2, 3, 4))
    assert weight is not None and bias is not None and mean is not None and var is not None
    eps, momentum = node.get("epsilon", 1e-5), round(1 - node.get("momentum", 0.9), 6)
    if node.get("training_mode", 0) or not node.get("spatial", 1):
        raise node.refused("it is to use the batch's statistics, or those of each pixel")
    kind = nn.BatchNorm1d if node.rank() in (2, 3) else nn.BatchNorm2d
    made = kind(len(weight), eps, momentum)
    made.weight, made.bias = parameter(weight), parameter(bias)
    made.running_mean, made.running_var = Tensor(np.array(mean)), Tensor(np.array(var))
    return made


@layer("LayerNormalization")
def _(node: Node) -> Layer:
    weight, bias = node.constant(1), node.constant(2)
    assert weight is not None
    axis, eps, rank = node.get("axis", -1), node.get("epsilon", 1e-5), node.rank()
    node.get("stash_type")
    if axis >= 0:
        if rank is None:
            raise node.refused("the rank of its input is not known")
        axis -= rank
    if weight.ndim != -axis:
        raise node.refused(f"weights of shape {weight.shape} for {-axis} axes")
    made = nn.LayerNorm(weight.shape, eps, bias=bias is not None)
    made.weight, made.bias = parameter(weight), None if bias is None else parameter(bias)
    return made


@layer("InstanceNormalization")
def _(node: Node) -> Layer:
    weight, bias = node.constant(1), node.constant(2)
    assert weight is not None and bias is not None
    made = nn.GroupNorm(len(weight), len(weight), node.get("epsilon", 1e-5))
    made.weight, made.bias = parameter(weight), parameter(bias)
    return made


@layer("LRN")
def _(node: Node) -> Layer:
    size, bias = node.get("size"), node.get("bias", 1.0)
    alpha, beta = node.get("alpha", 1e-4), node.get("beta", 0.75)

    def lrn(x: Any) -> Any:
        """x / (bias + alpha / size · Σ x²)^beta, over neighbouring channels."""
        pads = [0, 0] * (x.ndim - 2) + [(size - 1) // 2, size // 2]
        squares = shape.pad(x * x, pads)
        total = 0
        for i in range(size):
            total = total + squares[:, i : i + x.shape[1]]
        return x / (total * (alpha / size) + bias) ** beta

    return lrn


# Pooling ----------------------------------------------------------------------------------


@layer("MaxPool")
def _(node: Node) -> Any:
    window, ceil = Window(node), bool(node.get("ceil_mode", 0))
    if node.get("storage_order", 0):
        raise node.refused("storage_order is for the indices, which are not there")

    def make(padding: tuple[int, ...]) -> Layer:
        if window.axes == 2:
            kernel, stride, dilation = window.kernel, window.stride, window.dilation
            return nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=ceil)  # type: ignore[arg-type]
        pads = (0, *padding)
        return lambda x: window.of_images(
            x, lambda x, k, s, d: F.max_pool2d(x, k, s, pads, d, ceil)
        )

    return window.stages(make, lowest=True)


@layer("AveragePool")
def _(node: Node) -> Any:
    window, ceil = Window(node), bool(node.get("ceil_mode", 0))
    counted = bool(node.get("count_include_pad", 0))
    if set(window.dilation) != {1}:
        raise node.refused("windows with gaps")

    def make(padding: tuple[int, ...]) -> Layer:
        if window.axes == 2:
            return nn.AvgPool2d(window.kernel, window.stride, padding, ceil, counted)  # type: ignore[arg-type]
        pads = (0, *padding)
        return lambda x: window.of_images(
            x, lambda x, k, s, d: F.avg_pool2d(x, k, s, pads, ceil, counted)
        )

    if window.symmetric() is not None or counted:
        return window.stages(make)
    mean = make((0,) * window.axes)

    def inside(x: Any) -> Any:
        """Only pixels of the image count."""
        ones = Tensor(np.ones((1, 1, *x.shape[2:]), x.dtype)).to(x.device)
        return mean(window.pad(x)) / mean(window.pad(ones))

    return inside


@layer("GlobalAveragePool")
def _(node: Node) -> Layer:
    if node.rank() in (4, None):
        return nn.AdaptiveAvgPool2d((1, 1))
    return lambda x: reduce.mean(x, dim=spatial(x), keepdim=True)


# Along axes -------------------------------------------------------------------------------

REDUCTIONS: dict[str, Callable[..., Any]] = {
    "ReduceSum": reduce.sum_, "ReduceMean": reduce.mean, "ReduceMax": reduce.amax,
    "ReduceMin": reduce.amin, "ReduceLogSumExp": logsumexp,
    "ReduceSumSquare": lambda x, **how: reduce.sum_(x * x, **how),
    "ReduceL1": lambda x, **how: reduce.sum_(e.abs_(x), **how),
    "ReduceL2": lambda x, **how: e.sqrt(reduce.sum_(x * x, **how)),
}  # fmt: skip


EXTREMES = {"ReduceMax": -1, "ReduceLogSumExp": -1, "ReduceMin": 1}


def farthest(dtype: Any, sign: int) -> Any:
    """The lowest or the highest number of a type."""
    if dtype.kind == "f":
        return sign * math.inf
    if dtype.kind == "b":
        return sign > 0
    return int(np.iinfo(dtype).max if sign > 0 else np.iinfo(dtype).min)


@layer(*REDUCTIONS)
def _(node: Node) -> Any:
    keep, empty = bool(node.get("keepdims", 1)), bool(node.get("noop_with_empty_axes", 0))
    given, f = node.get("axes"), REDUCTIONS[node.op]

    def reduced(x: Any, axes: Any = None) -> Any:
        axes = given if axes is None else ints(axes)
        if not axes and empty:
            return x
        dims = tuple(n % x.ndim for n in axes) if axes else tuple(range(x.ndim))
        if node.op in EXTREMES and 0 in (x.shape[dim] for dim in dims):
            size = [1 if d in dims else n for d, n in enumerate(x.shape) if keep or d not in dims]
            return np.full(size, farthest(x.dtype, EXTREMES[node.op]), x.dtype)
        return f(x, dim=dims, keepdim=keep)

    if node.op == "ReduceMean" and node.rank() == 4 and not node.known(0) and node.known(1):
        axes = given if given is not None else node.constant(1)
        if axes is not None and sorted(n % 4 for n in ints(axes)) == [2, 3]:  # a global pooling
            flat: Layer = nn.Flatten(1)
            return [nn.AdaptiveAvgPool2d((1, 1)), *([] if keep else [flat])]
        node.consumed.clear()
    return reduced


@layer("ArgMax", "ArgMin")
def _(node: Node) -> Layer:
    axis, keep = node.get("axis", 0), bool(node.get("keepdims", 1))
    if node.get("select_last_index", 0):
        raise node.refused("of equal numbers the last")
    f = reduce.argmax if node.op == "ArgMax" else reduce.argmin
    return lambda x: f(x, dim=axis, keepdim=keep)


@layer("CumSum")
def _(node: Node) -> Layer:
    if node.get("exclusive", 0) or node.get("reverse", 0):
        raise node.refused("sums that go backwards or leave a number out")
    return lambda x, axis: alike(reduce.cumsum(x, dim=ints(axis)[0]), x)


@layer("Concat")
def _(node: Node) -> Layer:
    axis = node.get("axis")
    return lambda *xs: shape.cat_(*xs, dim=axis)


@layer("Split")
def _(node: Node) -> Layer:
    axis, given, count = node.get("axis", 0), node.get("split"), len(node.outputs)
    node.get("num_outputs")

    def split(x: Any, sizes: Any = None) -> Any:
        n = x.shape[axis]
        step = -(-n // count)
        sizes = given if sizes is None else ints(sizes)
        ends = np.cumsum(sizes or [min(step, n - i * step) for i in range(count)])
        at = (slice(None),) * (axis % x.ndim)
        return tuple(x[(*at, slice(b - s, b))] for s, b in zip(np.diff([0, *ends]), ends.tolist()))

    return split


# Shapes -----------------------------------------------------------------------------------


@layer("Constant")
def _(node: Node) -> Layer:
    (name,) = node.attributes
    value = node.get(name)
    if name == "value":
        value = node.reader.onnx.numpy_helper.to_array(value)
    elif name.startswith(("value_int", "value_float")):
        value = np.array(value, np.int64 if "int" in name else np.float32)
    else:
        raise node.refused(f"a constant of kind {name}")
    return lambda: value


@layer("ConstantOfShape")
def _(node: Node) -> Layer:
    value = node.get("value")
    value = (
        np.zeros(1, np.float32) if value is None else node.reader.onnx.numpy_helper.to_array(value)
    )
    return lambda size: np.full(ints(size), value[0], value.dtype)


@layer("Shape")
def _(node: Node) -> Layer:
    start, end = node.get("start", 0), node.get("end")
    return lambda x: np.array(x.shape[start:end], np.int64)


@layer("Size")
def _(node: Node) -> Layer:
    return lambda x: np.array(math.prod(x.shape), np.int64)


@layer("Reshape")
def _(node: Node) -> Layer:
    whole = node.get("allowzero", 0)

    def reshape(x: Any, size: Any) -> Any:
        size = ints(size)
        if not whole:
            size = [x.shape[i] if n == 0 else n for i, n in enumerate(size)]
        return shape.reshape(x, shape=tuple(size))

    return reshape


@layer("Flatten")
def _(node: Node) -> Layer:
    axis = node.get("axis", 1)
    if axis == 1:
        return nn.Flatten(1)
    return lambda x: shape.reshape(
        x, shape=(math.prod(x.shape[: axis % x.ndim if axis < 0 else axis]), -1)
    )


@layer("Transpose")
def _(node: Node) -> Layer:
    order = node.get("perm")
    return lambda x: shape.permute(x, dims=tuple(order or reversed(range(x.ndim))))


@layer("Squeeze", "Unsqueeze")
def _(node: Node) -> Layer:
    given = node.get("axes")

    def squeeze(x: Any, axes: Any = None) -> Any:
        axes = given if axes is None else ints(axes)
        out = [n % x.ndim for n in axes] if axes else [i for i, n in enumerate(x.shape) if n == 1]
        return shape.reshape(x, shape=tuple(n for i, n in enumerate(x.shape) if i not in out))

    def unsqueeze(x: Any, axes: Any = None) -> Any:
        axes, size = given if axes is None else ints(axes), list(x.shape)
        for n in sorted(n % (x.ndim + len(axes)) for n in axes):
            size.insert(n, 1)
        return shape.reshape(x, shape=tuple(size))

    return squeeze if node.op == "Squeeze" else unsqueeze


@layer("Expand")
def _(node: Node) -> Layer:
    def expand(x: Any, size: Any) -> Any:
        return shape.expand(x, shape=np.broadcast_shapes(x.shape, tuple(ints(size))))

    return expand


@layer("Slice")
def _(node: Node) -> Layer:
    given = [node.get(name) for name in ("starts", "ends", "axes")] if node.opset < 10 else []

    def cut(x: Any, *bounds: Any) -> Any:
        bounds = tuple(None if b is None else ints(b) for b in (*(given or bounds), None, None))
        starts, ends, axes, steps = bounds[:4]
        assert starts is not None and ends is not None
        index = [slice(None)] * x.ndim
        for k, axis in enumerate(range(len(starts)) if axes is None else axes):
            step = 1 if steps is None else steps[k]
            n = x.shape[axis]
            end = None if step < 0 and ends[k] < -n else ends[k]
            index[axis] = slice(starts[k], end, step)
        return x[tuple(index)]

    return cut


@layer("Gather")
def _(node: Node) -> Layer:
    axis = node.get("axis", 0)
    if node.known(0) and not node.known(1) and axis == 0 and node.rank(0) == 2:
        table = node.constant(0)
        assert table is not None
        if table.dtype.kind == "f":
            made = nn.Embedding(*table.shape)
            made.weight = parameter(table)
            return made
        node.consumed.clear()

    def take(x: Any, indices: Any) -> Any:
        indices = indices.numpy() if isinstance(indices, Tensor) else indices
        index: Any = int(indices) if indices.ndim == 0 else indices
        return x[(*(slice(None),) * (axis % x.ndim), index)]

    return take


@layer("GatherElements")
def _(node: Node) -> Layer:
    axis = node.get("axis", 0)
    return lambda x, index: shape.gather(
        x, e.where(index < 0, index + x.shape[axis], index), dim=axis
    )


@layer("Pad")
def _(node: Node) -> Layer:
    kind, given, filling = node.get("mode", "constant"), node.get("pads"), node.get("value", 0.0)
    names = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}

    def pad(x: Any, pads: Any = None, value: Any = None, axes: Any = None) -> Any:
        pads = given if pads is None else ints(pads)
        axes = range(x.ndim) if axes is None else [n % x.ndim for n in ints(axes)]
        both = dict.fromkeys(range(x.ndim), (0, 0))
        both.update(zip(axes, zip(pads[: len(axes)], pads[len(axes) :])))
        pairs = [n for axis in reversed(range(x.ndim)) for n in both[axis]]
        if kind != "constant":
            return F.pad(x, pairs, names[kind])
        return shape.pad(x, pairs, filling if value is None else value.item())

    return pad


@layer("Trilu")
def _(node: Node) -> Layer:
    f = shape.triu if node.get("upper", 1) else shape.tril
    return lambda x, k=None: f(x, diagonal=0 if k is None else ints(k)[0])


# Integers ---------------------------------------------------------------------------------


@layer("QuantizeLinear")
def _(node: Node) -> Layer:
    axis = node.get("axis", 1)
    node.get("saturate")
    return lambda x, scale, zero=None: operators.quantize_linear(x, scale, zero, axis=axis)


@layer("DequantizeLinear")
def _(node: Node) -> Layer:
    axis, constants = node.get("axis", 1), node.reader.constants
    if node.known(0) and node.known(1):
        q, scale = (constants[name] for name in node.inputs[:2])
        node.reader.dequantized[node.outputs[0]] = q, scale, axis
    maker = node.reader.makers.get(node.inputs[0])
    if maker is not None and maker.op_type == "QuantizeLinear":
        pairs = (
            list(zip(node.inputs[1:], maker.input[1:], strict=True))
            if len(node.inputs) == len(maker.input)
            else []
        )
        if len(pairs) == 2 and all(
            a in constants and b in constants and np.array_equal(constants[a], constants[b])
            for a, b in pairs
        ):
            scale, zero = (node.constant(i) for i in (1, 2))
            node.inputs[0] = maker.input[0]
            return Rounding(scale, zero, axis)  # type: ignore[arg-type]
    return lambda q, scale, zero=None: operators.dequantize_linear(q, scale, zero, axis=axis)


@layer("DynamicQuantizeLinear")
def _(node: Node) -> Layer:
    return operators.dynamic_quantize_linear


@layer("MatMulInteger", "QLinearMatMul")
def _(node: Node) -> Layer:
    products = {"MatMulInteger": operators.matmul_integer}
    return products.get(node.op, operators.qlinear_matmul)


@layer("ConvInteger", "QLinearConv")
def _(node: Node) -> Layer:
    f = operators.conv_integer if node.op == "ConvInteger" else operators.qlinear_conv
    names = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
    how = {name: node.get(name) for name in names if name in node.attributes}
    return lambda *xs: f(*xs, **how)


class Rounding(nn.Module):
    """QuantizeLinear and DequantizeLinear: x rounded to the numbers that integers stand for.

    Gradients go straight through, where nothing is clipped (`fake_quantize.py`).
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: np.ndarray, zero_point: np.ndarray, axis: int) -> None:
        super().__init__()
        self.register_buffer("scale", Tensor(scale))
        self.register_buffer("zero_point", Tensor(zero_point))
        self.axis = axis

    def forward(self, input: Tensor) -> Tensor:
        if input.requires_grad and mode.enabled:
            limits = np.iinfo(self.zero_point.dtype)
            return fake_quantize(
                input, self.scale, self.zero_point.astype(input.dtype), quant_min=limits.min,
                quant_max=limits.max, axis=self.axis,
            )  # fmt: skip
        q = quantized.quantize_linear(input, self.scale, self.zero_point, axis=self.axis)
        return quantized.dequantize_linear(q, self.scale, self.zero_point, axis=self.axis)

    def extra_repr(self) -> str:
        return f"{self.zero_point.dtype}, scales={self.scale.numel()}"
