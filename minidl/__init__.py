"""minidl: a small deep learning engine to read, to learn from, and to train with.

    import minidl
    from minidl import nn, optim
    import minidl.nn.functional as F

Names, signatures and defaults are PyTorch's. Submodules are imported when they are first used.
"""

from typing import TYPE_CHECKING, Any

from minidl import autograd, ops
from minidl.autograd import (
    enable_grad,
    grad,
    gradcheck,
    is_grad_enabled,
    no_grad,
    set_grad_enabled,
)
from minidl.backend import device
from minidl.backend.random import manual_seed
from minidl.backend.threads import get_num_threads, set_num_threads
from minidl.creation import (
    arange,
    as_tensor,
    empty,
    empty_like,
    eye,
    full,
    full_like,
    get_rng_state,
    initial_seed,
    is_tensor,
    linspace,
    ones,
    ones_like,
    rand,
    rand_like,
    randint,
    randn,
    randn_like,
    randperm,
    set_rng_state,
    zeros,
    zeros_like,
)
from minidl.explain import record_source, source
from minidl.graph import draw
from minidl.op import kernels, use
from minidl.ops.elementwise import where
from minidl.ops.linalg import einsum
from minidl.ops.methods import cat, stack
from minidl.recompute import checkpoint
from minidl.tensor import (
    Tensor,
    bfloat16,
    bool_,
    float16,
    float32,
    float64,
    from_numpy,
    int8,
    int16,
    int32,
    int64,
    tensor,
    uint8,
)

if TYPE_CHECKING:
    from minidl import accelerator, amp, backends, cuda, data, models, nn, optim, utils
    from minidl.amp import autocast
    from minidl.serialization import load, save

    __version__: str

# The methods as functions: minidl.exp(x) is x.exp(), minidl.flatten(x, 1) is x.flatten(1).
abs = Tensor.abs
add = Tensor.add
all = Tensor.all
allclose = Tensor.allclose
amax = Tensor.amax
amin = Tensor.amin
any = Tensor.any
argmax = Tensor.argmax
argmin = Tensor.argmin
argsort = Tensor.argsort
bmm = Tensor.bmm
ceil = Tensor.ceil
chunk = Tensor.chunk
clamp = Tensor.clamp
clip = Tensor.clip
clone = Tensor.clone
cos = Tensor.cos
cumsum = Tensor.cumsum
div = Tensor.div
dot = Tensor.dot
eq = Tensor.eq
equal = Tensor.equal
erf = Tensor.erf
exp = Tensor.exp
flatten = Tensor.flatten
flip = Tensor.flip
floor = Tensor.floor
gather = Tensor.gather
ge = Tensor.ge
gt = Tensor.gt
index_select = Tensor.index_select
isfinite = Tensor.isfinite
isinf = Tensor.isinf
isnan = Tensor.isnan
le = Tensor.le
log = Tensor.log
log1p = Tensor.log1p
log_softmax = Tensor.log_softmax
logical_and = Tensor.logical_and
logical_not = Tensor.logical_not
logical_or = Tensor.logical_or
logical_xor = Tensor.logical_xor
logsumexp = Tensor.logsumexp
lt = Tensor.lt
masked_fill = Tensor.masked_fill
masked_select = Tensor.masked_select
matmul = Tensor.matmul
max = Tensor.max
maximum = Tensor.maximum
mean = Tensor.mean
min = Tensor.min
minimum = Tensor.minimum
mm = Tensor.mm
mul = Tensor.mul
mv = Tensor.mv
narrow = Tensor.narrow
ne = Tensor.ne
neg = Tensor.neg
nonzero = Tensor.nonzero
norm = Tensor.norm
outer = Tensor.outer
permute = Tensor.permute
pow = Tensor.pow
prod = Tensor.prod
reciprocal = Tensor.reciprocal
relu = Tensor.relu
reshape = Tensor.reshape
roll = Tensor.roll
round = Tensor.round
rsqrt = Tensor.rsqrt
sigmoid = Tensor.sigmoid
sign = Tensor.sign
sin = Tensor.sin
softmax = Tensor.softmax
sort = Tensor.sort
split = Tensor.split
sqrt = Tensor.sqrt
square = Tensor.square
squeeze = Tensor.squeeze
std = Tensor.std
sub = Tensor.sub
sum = Tensor.sum
swapaxes = Tensor.swapaxes
t = Tensor.t
take_along_dim = Tensor.take_along_dim
tanh = Tensor.tanh
topk = Tensor.topk
transpose = Tensor.transpose
tril = Tensor.tril
triu = Tensor.triu
unbind = Tensor.unbind
unsqueeze = Tensor.unsqueeze
var = Tensor.var

half, float, double = float16, float32, float64
short, int, long, bool = int16, int32, int64, bool_

__all__ = [
    "Tensor",
    "__version__",
    "abs",
    "accelerator",
    "add",
    "all",
    "allclose",
    "amax",
    "amin",
    "amp",
    "any",
    "arange",
    "argmax",
    "argmin",
    "argsort",
    "as_tensor",
    "autocast",
    "autograd",
    "backends",
    "bfloat16",
    "bmm",
    "bool",
    "bool_",
    "cat",
    "ceil",
    "checkpoint",
    "chunk",
    "clamp",
    "clip",
    "clone",
    "cos",
    "cuda",
    "cumsum",
    "data",
    "device",
    "div",
    "dot",
    "double",
    "draw",
    "einsum",
    "empty",
    "empty_like",
    "enable_grad",
    "eq",
    "equal",
    "erf",
    "exp",
    "eye",
    "flatten",
    "flip",
    "float",
    "float16",
    "float32",
    "float64",
    "floor",
    "from_numpy",
    "full",
    "full_like",
    "gather",
    "ge",
    "get_num_threads",
    "get_rng_state",
    "grad",
    "gradcheck",
    "gt",
    "half",
    "index_select",
    "initial_seed",
    "int",
    "int8",
    "int16",
    "int32",
    "int64",
    "is_grad_enabled",
    "is_tensor",
    "isfinite",
    "isinf",
    "isnan",
    "kernels",
    "le",
    "linspace",
    "load",
    "log",
    "log1p",
    "log_softmax",
    "logical_and",
    "logical_not",
    "logical_or",
    "logical_xor",
    "logsumexp",
    "long",
    "lt",
    "manual_seed",
    "masked_fill",
    "masked_select",
    "matmul",
    "max",
    "maximum",
    "mean",
    "min",
    "minimum",
    "mm",
    "models",
    "mul",
    "mv",
    "narrow",
    "ne",
    "neg",
    "nn",
    "no_grad",
    "nonzero",
    "norm",
    "ones",
    "ones_like",
    "ops",
    "optim",
    "outer",
    "permute",
    "pow",
    "prod",
    "rand",
    "rand_like",
    "randint",
    "randn",
    "randn_like",
    "randperm",
    "reciprocal",
    "record_source",
    "relu",
    "reshape",
    "roll",
    "round",
    "rsqrt",
    "save",
    "set_grad_enabled",
    "set_num_threads",
    "set_rng_state",
    "short",
    "sigmoid",
    "sign",
    "sin",
    "softmax",
    "sort",
    "source",
    "split",
    "sqrt",
    "square",
    "squeeze",
    "stack",
    "std",
    "sub",
    "sum",
    "swapaxes",
    "t",
    "take_along_dim",
    "tanh",
    "tensor",
    "topk",
    "transpose",
    "tril",
    "triu",
    "uint8",
    "unbind",
    "unsqueeze",
    "use",
    "utils",
    "var",
    "where",
    "zeros",
    "zeros_like",
]

LAZY = {"autocast": "minidl.amp", "load": "minidl.serialization", "save": "minidl.serialization"}


def __getattr__(name: str) -> Any:
    from importlib import import_module, util

    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("minidl")
    elif name in LAZY:
        value = getattr(import_module(LAZY[name]), name)
    elif not name.startswith("_") and util.find_spec(f"minidl.{name}"):
        return import_module(f"minidl.{name}")
    else:
        raise AttributeError(f"module 'minidl' has no attribute {name!r}")
    globals()[name] = value
    return value
