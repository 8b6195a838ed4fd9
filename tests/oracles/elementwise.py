"""Oracles of `minidl.ops.elementwise`."""

import math
import operator

import numpy as np

from tests.oracles import loops, pytorch


def each(f):
    """An oracle that calls f on the elements of the broadcast inputs, one by one."""

    def oracle(*xs, **settings):
        xs = [np.asarray(x) for x in xs]
        shape = np.broadcast_shapes(*(x.shape for x in xs))
        values = []
        for at in np.ndindex(shape):
            elements = []
            for x in xs:
                own = at[len(shape) - x.ndim :]
                own = tuple(0 if n == 1 else i for i, n in zip(own, x.shape, strict=True))
                elements.append(x[own].item())
            values.append(f(*elements, **settings))
        return np.array(values).reshape(shape)

    return oracle


def plain(name, f):
    loops(name)(each(f))


def logistic(x):
    return 1 / (1 + math.exp(-x))


def held(x, min, max):
    if min is not None and x < min:
        return min
    return max if max is not None and x > max else x


def whole(f):
    """f of numbers that may be infinite or NaN."""
    return lambda x, **settings: float(f(x, **settings)) if math.isfinite(x) else x


def signum(x):
    return type(x)((x > 0) - (x < 0))


def half_even(x, decimals):
    return float(round(x, decimals))


plain("add", operator.add)
plain("sub", operator.sub)
plain("mul", operator.mul)
plain("div", operator.truediv)
plain("neg", operator.neg)
plain("pow", operator.pow)
plain("exp", math.exp)
plain("log", math.log)
plain("log1p", math.log1p)
plain("sqrt", math.sqrt)
plain("abs", lambda x: x if x > 0 else -x)
plain("sin", math.sin)
plain("cos", math.cos)
plain("tanh", lambda x: (math.exp(2 * x) - 1) / (math.exp(2 * x) + 1))
plain("sigmoid", logistic)
plain("softplus", lambda x: math.log(1 + math.exp(x)))
plain("relu", lambda x: x if x > 0 else 0.0)
plain("erf", lambda x: 1 - math.erfc(x))
plain("clamp", held)
plain("maximum", lambda x, y: x if x > y else y)
plain("minimum", lambda x, y: x if x < y else y)
plain("where", lambda condition, x, y: x if condition else y)
plain("clone", lambda x: x)
plain("sign", signum)
plain("floor", whole(math.floor))
plain("ceil", whole(math.ceil))
plain("round", half_even)
plain("floor_divide", lambda x, y: math.floor(x / y) if isinstance(x, int) else float(x // y))
plain("isnan", lambda x: x != x)
plain("isinf", lambda x: abs(x) == math.inf)
plain("isfinite", lambda x: x - x == 0)
plain("logical_not", lambda x: not x)
plain("logical_and", lambda x, y: bool(x) and bool(y))
plain("logical_or", lambda x, y: bool(x) or bool(y))
plain("logical_xor", lambda x, y: bool(x) != bool(y))
plain("bitwise_not", lambda x: not x if isinstance(x, bool) else -x - 1)
plain("bitwise_and", operator.and_)
plain("bitwise_or", operator.or_)
plain("bitwise_xor", operator.xor)
for name in ("eq", "ne", "lt", "le", "gt", "ge"):
    plain(name, getattr(operator, name))


@loops("astype")
def _(x, *, dtype):
    return np.array([dtype.type(v) for v in x.ravel().tolist()]).reshape(x.shape)


@loops("to_device")
def _(x, *, device, non_blocking):
    return np.array(x.tolist())


# PyTorch ----------------------------------------------------------------------------------


def as_named(name, torch_name=None):
    def oracle(*xs, **settings):
        import torch

        xs = [torch.tensor(x, dtype=torch.float64) if isinstance(x, float) else x for x in xs]
        return getattr(torch, torch_name or name)(*xs, **settings)

    pytorch(name)(oracle)


NAMES = (
    "add sub mul div neg exp log log1p sqrt abs sin cos tanh sigmoid relu erf maximum minimum "
    "clone sign floor ceil round floor_divide isnan isinf isfinite eq ne lt le gt ge logical_not "
    "logical_and logical_or logical_xor bitwise_not bitwise_and bitwise_or bitwise_xor clamp"
)
for name in NAMES.split():
    as_named(name)


@pytorch("pow")
def _(x, y):
    import torch

    return torch.pow(x, y)


@pytorch("softplus")
def _(x):
    import torch

    return torch.nn.functional.softplus(x, threshold=1e9)


@pytorch("where")
def _(condition, x, y):
    import torch

    return torch.where(condition, x, y)


@pytorch("astype")
def _(x, *, dtype):
    import torch

    return x.to(getattr(torch, dtype.name))


@pytorch("to_device")
def _(x, *, device, non_blocking):
    return x.to(device, non_blocking=non_blocking)
