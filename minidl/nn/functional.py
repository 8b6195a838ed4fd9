"""PyTorch's ``torch.nn.functional``: the same names, signatures and defaults, over `minidl.ops`.

Here arguments are checked and brought into the form that the ops take (numbers to pairs, missing
batch dimensions added), and what is more than one op is put together from ops. Nothing here has
a gradient of its own.

``inplace=`` is accepted where PyTorch has it, and changes nothing: minidl's ops make new arrays.
Activations take tensors of any shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from minidl import backend
from minidl.autograd import mode
from minidl.backend import random
from minidl.ops import conv, elementwise, linalg, loss, pool, reduce, shape
from minidl.ops import dropout as dropout_op
from minidl.ops import embedding as embedding_op
from minidl.ops import rnn as rnn_op
from minidl.ops import softmax as softmax_op
from minidl.ops.elementwise import clamp, exp, log, where
from minidl.ops.elementwise import softplus as log_1_exp
from minidl.ops.norm import scale_shift, standardize, statistics_of
from minidl.tensor import Tensor, raw

Size = int | Sequence[int]
INTEGER = (int, np.integer)

__all__ = [
    "adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "batch_norm",
    "binary_cross_entropy", "binary_cross_entropy_with_logits", "conv1d", "conv2d",
    "conv_transpose2d", "cosine_similarity", "cross_entropy", "dropout", "dropout2d", "elu",
    "embedding", "gelu", "group_norm", "gru", "hardtanh", "huber_loss", "instance_norm",
    "interpolate", "kl_div", "l1_loss", "layer_norm", "leaky_relu", "linear", "locked_dropout",
    "log_softmax", "logsigmoid", "lstm", "max_pool2d", "mse_loss", "nll_loss", "normalize",
    "one_hot", "pad", "relu", "relu6", "rnn", "sigmoid", "silu", "smooth_l1_loss", "softmax",
    "softplus", "tanh",
]  # fmt: skip


# Checks -----------------------------------------------------------------------------------


def pair(name: str, value: Size, least: int = 0) -> tuple[int, int]:
    """3 -> (3, 3); (3, 5) -> (3, 5).

    Raises:
        ValueError: not one or two integers of at least `least`.
    """
    two = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(two) == 2:
        a, b = two
        if isinstance(a, INTEGER) and isinstance(b, INTEGER) and a >= least and b >= least:
            return int(a), int(b)
    raise ValueError(f"{name} is an int of at least {least} or two of them, got {value!r}")


def with_batch(name: str, input: Tensor, ndim: int, what: str) -> tuple[Tensor, bool]:
    """The input with a batch dimension, and whether it had one.

    Raises:
        ValueError: it has neither `ndim` dimensions nor one less.
    """
    if input.ndim not in (ndim, ndim - 1):
        raise ValueError(f"{name} takes input of shape {what}, got {tuple(input.shape)}")
    return (input, True) if input.ndim == ndim else (input.unsqueeze(0), False)


def check_alike(name: str, input: Tensor, **others: Any) -> None:
    """All of one dtype and on one device: nothing is converted silently, but by autocast.

    Raises:
        TypeError: which is not, and what to do.
    """
    for other, x in others.items():
        if x is None:
            continue
        by_autocast = mode.autocast and max(x.dtype.itemsize, input.dtype.itemsize) <= 4
        if x.dtype != input.dtype and not by_autocast:
            raise TypeError(
                f"{name}: input is {input.dtype}, {other} is {x.dtype}; convert one of them, "
                f"input.to({other}.dtype)"
            )
        on_cpu = isinstance(x.array, np.ndarray) and isinstance(input.array, np.ndarray)
        if not on_cpu and x.device != input.device:
            raise TypeError(
                f"{name}: input is on {input.device}, {other} on {x.device}; move one of them, "
                f"input.to({other}.device)"
            )


def check_shape(name: str, what: str, x: Any, expected: tuple[int, ...]) -> None:
    """Raises ValueError unless x is None or has the expected shape."""
    if x is not None and tuple(x.shape) != tuple(expected):
        raise ValueError(f"{name}: {what} has shape {tuple(x.shape)}, expected {tuple(expected)}")


# Layers with weights ----------------------------------------------------------------------


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b: (..., in), (out, in), (out,) -> (..., out).

    Raises:
        ValueError: shapes do not fit.
        TypeError: dtypes or devices differ.
    """
    check_alike("linear", input, weight=weight, bias=bias)
    if weight.ndim != 2 or input.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"linear: input of shape {tuple(input.shape)} and weight {tuple(weight.shape)} do not "
            "fit: expected (..., in) and (out, in)"
        )
    check_shape("linear", "bias", bias, weight.shape[:1])
    return linalg.linear(input, weight, bias)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution: (N,C,H,W) or (C,H,W), (O,C/groups,kH,kW), (O,) -> (N,O,H',W') or (O,H',W').

    Args:
        padding: rows and columns of zeros on each side; "valid": none; "same": as many as it
            takes for an output of the input's size (the odd one goes to the bottom and right).

    Raises:
        ValueError: shapes or settings do not fit.
        TypeError: dtypes or devices differ.
    """
    x, had_batch = with_batch("conv2d", input, 4, "(N, C, H, W) or (C, H, W)")
    y = convolve("conv2d", x, weight, bias, stride, padding, dilation, groups)
    return y if had_batch else y.squeeze(0)


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution along one dimension: (N,C,L) or (C,L), (O,C/groups,k), (O,) -> (N,O,L').

    It is `conv2d` on images of height 1. Raises as `conv2d`.
    """
    x, had_batch = with_batch("conv1d", input, 3, "(N, C, L) or (C, L)")
    if weight.ndim != 3:
        raise ValueError(f"conv1d: weight is (O, C/groups, k), got {tuple(weight.shape)}")

    def across(value: Any, neutral: int) -> Any:
        if isinstance(value, str):
            return value
        return (neutral, *((value,) if isinstance(value, int) else value))

    y = convolve(
        "conv1d",
        x.unsqueeze(2),
        weight.unsqueeze(2),
        bias,
        across(stride, 1),
        across(padding, 0),
        across(dilation, 1),
        groups,
    ).squeeze(2)
    return y if had_batch else y.squeeze(0)


def convolve(
    name: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    relu: bool = False,
) -> Tensor:
    """`conv2d` with a batch, then perhaps ReLU; all checks are here."""
    check_alike(name, x, weight=weight, bias=bias)
    if weight.ndim != 4:
        raise ValueError(f"{name}: weight is (O, C/groups, kH, kW), got {tuple(weight.shape)}")
    if groups < 1 or x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        raise ValueError(
            f"{name}: input has {x.shape[1]} channels, weight has shape {tuple(weight.shape)} and "
            f"groups is {groups}: expected weight (O, {x.shape[1]}/groups, ...), with O and "
            f"{x.shape[1]} multiples of groups"
        )
    check_shape(name, "bias", bias, weight.shape[:1])
    x, how = window(name, x, weight.shape[2:], stride, padding, dilation)
    return (conv.conv2d_relu if relu else conv.conv2d)(x, weight, bias, **how, groups=groups)


def window(
    name: str, x: Tensor, kernel: tuple[int, ...], stride: Any, padding: Any, dilation: Any
) -> tuple[Tensor, dict[str, Any]]:
    """How a kernel slides, in numbers; and x, perhaps with a row or column of zeros more."""
    stride, dilation = pair("stride", stride, 1), pair("dilation", dilation, 1)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        if stride != (1, 1):
            raise ValueError(f"{name}: padding='same' needs stride 1, got {stride}")
        total = [d * (k - 1) for d, k in zip(dilation, kernel)]
        if any(n % 2 for n in total):
            x = shape.pad(x, (0, total[1] % 2, 0, total[0] % 2))
        padding = [n // 2 for n in total]
    elif isinstance(padding, str):
        raise ValueError(f"{name}: padding is a number, two, 'same' or 'valid', got {padding!r}")
    return x, {"stride": stride, "padding": pair("padding", padding), "dilation": dilation}


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> Tensor:
    """Transposed convolution: (N,C,H,W) or (C,H,W), (C,O/groups,kH,kW), (O,) -> (N,O,H',W').

    What carries gradients back through `conv2d`, used forwards: H' is the height of an image of
    which a convolution with this weight makes H rows, ``(H-1)·stride - 2·padding +
    dilation·(kH-1) + 1``. With a stride there are several such heights; `output_padding` adds to
    the smallest.

    Raises:
        ValueError: shapes or settings do not fit; `output_padding` is not below the stride.
        TypeError: dtypes or devices differ.
    """
    name = "conv_transpose2d"
    x, had_batch = with_batch(name, input, 4, "(N, C, H, W) or (C, H, W)")
    check_alike(name, x, weight=weight, bias=bias)
    if weight.ndim != 4 or groups < 1 or x.shape[1] != weight.shape[0] or x.shape[1] % groups:
        raise ValueError(
            f"{name}: input has {x.shape[1]} channels, weight has shape {tuple(weight.shape)} and "
            f"groups is {groups}: expected weight ({x.shape[1]}, O/groups, kH, kW), with "
            f"{x.shape[1]} a multiple of groups"
        )
    check_shape(name, "bias", bias, (weight.shape[1] * groups,))
    stride, dilation = pair("stride", stride, 1), pair("dilation", dilation, 1)
    padding, extra = pair("padding", padding), pair("output_padding", output_padding)
    if any(e >= s for e, s in zip(extra, stride)):
        raise ValueError(f"{name}: output_padding {extra} must be below the stride {stride}")
    height, width = (
        (n - 1) * s - 2 * p + d * (k - 1) + 1 + e
        for n, s, p, d, k, e in zip(
            x.shape[2:], stride, padding, dilation, weight.shape[2:], extra, strict=True
        )
    )
    if height < 1 or width < 1:
        raise ValueError(f"{name}: the output would be {height} x {width}: use less padding")
    y = conv.conv2d_input(
        x,
        weight,
        input_size=(height, width),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )
    y = y if bias is None else y + bias.reshape(1, -1, 1, 1)
    return y if had_batch else y.squeeze(0)


def embedding(input: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    """Rows of a table by number: indices of any shape, (V,D) -> (*shape, D).

    Args:
        padding_idx: this row gets no gradient. (Negative ones count from the end.)

    Raises:
        IndexError: an index is outside the table; which one, and where.
        TypeError: indices are not integers.
        ValueError: the weight is no table, or it has no row `padding_idx`.
    """
    if weight.ndim != 2:
        raise ValueError(f"embedding: weight is (rows, D), got {tuple(weight.shape)}")
    y = embedding_op.embedding(weight, input)
    if padding_idx is None:
        return y
    rows = weight.shape[0]
    if not -rows <= padding_idx < rows:
        raise ValueError(f"embedding: padding_idx is {padding_idx}, the table has {rows} rows")
    return where((input == padding_idx % rows).unsqueeze(-1), y.detach(), y)


def one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    """Class numbers of any shape -> int64 (*shape, num_classes), 1 at the class and 0 elsewhere.

    Args:
        num_classes: -1: the largest class there is, plus 1.

    Raises:
        TypeError: classes are not integers.
        ValueError: a class is negative or not below `num_classes`.
    """
    labels = tensor.array
    if labels.dtype.kind not in "iu":
        raise TypeError(f"one_hot takes integers, got {labels.dtype}")
    if labels.size == 0 and num_classes < 1:
        raise ValueError("one_hot: of no labels the number of classes is unknown: num_classes=...")
    classes = int(labels.max()) + 1 if num_classes == -1 else num_classes
    if labels.size and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        raise ValueError(
            f"one_hot: classes lie in [0, {classes}), got {int(labels.min())} to "
            f"{int(labels.max())}"
        )
    every = backend.array_module(labels).arange(classes)
    return Tensor((labels[..., None] == every).astype(np.int64))


# Pooling ----------------------------------------------------------------------------------


def windows(
    name: str, kernel_size: Size, stride: Size | None, padding: Size
) -> dict[str, tuple[int, int]]:
    """The settings of a pool; the stride is the kernel's size if none is given.

    Raises:
        ValueError: padding is more than half the kernel, so that a window might see only padding.
    """
    kernel, pad_ = pair("kernel_size", kernel_size, 1), pair("padding", padding)
    if any(2 * p > k for p, k in zip(pad_, kernel)):
        raise ValueError(f"{name}: padding {pad_} is more than half of kernel_size {kernel}")
    return {
        "kernel_size": kernel,
        "stride": kernel if stride is None or stride == () else pair("stride", stride, 1),
        "padding": pad_,
    }


def max_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """The maximum of each window: (N,C,H,W) or (C,H,W) -> (N,C,H',W') or (C,H',W').

    Of equal pixels the first gets the gradient; NaN wins. With `return_indices` also the winners'
    positions h·W + w.

    Raises:
        ValueError: settings do not fit the image.
    """
    x, had_batch = with_batch("max_pool2d", input, 4, "(N, C, H, W) or (C, H, W)")
    how: dict[str, Any] = windows("max_pool2d", kernel_size, stride, padding)
    how |= {"dilation": pair("dilation", dilation, 1), "ceil_mode": bool(ceil_mode)}
    y = pool.max_pool2d(x, **how)
    y = y if had_batch else y.squeeze(0)
    if not return_indices:
        return y
    index = pool.max_pool2d_index(x, **how).astype(np.int64)
    return y, index if had_batch else index.squeeze(0)


def avg_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """The mean of each window: (N,C,H,W) or (C,H,W) -> (N,C,H',W') or (C,H',W').

    Args:
        count_include_pad: the zeros of the padding count in the mean.
        divisor_override: what to divide the sums by instead.

    Raises:
        ValueError: settings do not fit the image.
    """
    x, had_batch = with_batch("avg_pool2d", input, 4, "(N, C, H, W) or (C, H, W)")
    if divisor_override == 0:
        raise ValueError("avg_pool2d: divisor_override must not be 0")
    y = pool.avg_pool2d(
        x,
        **windows("avg_pool2d", kernel_size, stride, padding),
        ceil_mode=bool(ceil_mode),
        count_include_pad=bool(count_include_pad),
        divisor_override=divisor_override,
    )
    return y if had_batch else y.squeeze(0)


def target_size(name: str, input: Tensor, output_size: Any) -> tuple[int, int]:
    """None in an output size means: as the input."""
    two = output_size if isinstance(output_size, tuple | list) else (output_size, output_size)
    if len(two) != 2:
        raise ValueError(f"{name}: output_size is one number or two, got {output_size!r}")
    full = [n if wanted is None else wanted for n, wanted in zip(input.shape[-2:], two)]
    if 0 in input.shape[-2:]:
        raise ValueError(f"{name}: an image of shape {tuple(input.shape)} has no pixels")
    return pair("output_size", full, 1)


def adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Tensor:
    """Means over windows that divide the image into output_size, as evenly as it goes."""
    name = "adaptive_avg_pool2d"
    x, had_batch = with_batch(name, input, 4, "(N, C, H, W) or (C, H, W)")
    y = pool.adaptive_avg_pool2d(x, output_size=target_size(name, x, output_size))
    return y if had_batch else y.squeeze(0)


def adaptive_max_pool2d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """Maxima of windows that divide the image into output_size, as evenly as it goes."""
    name = "adaptive_max_pool2d"
    x, had_batch = with_batch(name, input, 4, "(N, C, H, W) or (C, H, W)")
    index = pool.adaptive_max_pool2d_index(x, output_size=target_size(name, x, output_size))
    y = x.flatten(2).gather(2, index.flatten(2)).reshape(index.shape)
    y, index = (y, index) if had_batch else (y.squeeze(0), index.squeeze(0))
    return (y, index) if return_indices else y


# Activations ------------------------------------------------------------------------------


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """max(x, 0)."""
    return elementwise.relu(input)


def sigmoid(input: Tensor) -> Tensor:
    """σ(x) = 1 / (1 + exp(-x))."""
    return elementwise.sigmoid(input)


def tanh(input: Tensor) -> Tensor:
    """(exp(x) - exp(-x)) / (exp(x) + exp(-x))."""
    return elementwise.tanh(input)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """x where x > 0, else slope · x."""
    return where(input > 0, input, input * negative_slope)


def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """x where x > 0, else α (eˣ - 1) (Clevert et al. 2016)."""
    return where(input > 0, input, (exp(clamp(input, max=0)) - 1) * alpha)


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """x Φ(x) (Hendrycks & Gimpel 2016); approximate="tanh" for its approximation."""
    return elementwise.gelu(input, approximate)


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """x σ(x)."""
    return input * sigmoid(input)


def softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """log(1 + exp(βx)) / β; x itself where βx is above the threshold."""
    scaled = input * beta
    return where(scaled > threshold, input, log_1_exp(scaled) / beta)


def logsigmoid(input: Tensor) -> Tensor:
    """log σ(x), which never overflows."""
    return -log_1_exp(-input)


def hardtanh(
    input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Tensor:
    """x, held between two values; beyond and at them the gradient is 0."""
    if min_val >= max_val:
        raise ValueError(f"hardtanh: min_val {min_val} must be below max_val {max_val}")
    return where(input <= min_val, min_val, where(input >= max_val, max_val, input))


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """min(max(x, 0), 6)."""
    return hardtanh(input, 0.0, 6.0)


def check_dim(name: str, dim: int | None) -> int:
    if dim is None:
        raise TypeError(f"{name}: along which dimension? {name}(x, dim=-1) for the last")
    return dim


def softmax(input: Tensor, dim: int | None = None, dtype: Any = None) -> Tensor:
    """exp(x) / Σ exp(x) along dim (which must be given), in `dtype` if it is given."""
    input = input if dtype is None else input.to(dtype)
    return softmax_op.softmax(input, dim=check_dim("softmax", dim))


def log_softmax(input: Tensor, dim: int | None = None, dtype: Any = None) -> Tensor:
    """log softmax(x) along dim (which must be given), in `dtype` if it is given."""
    input = input if dtype is None else input.to(dtype)
    return softmax_op.log_softmax(input, dim=check_dim("log_softmax", dim))


# Dropout ----------------------------------------------------------------------------------


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Each number is set to 0 with probability p, else divided by 1 - p.

    The random numbers follow from `minidl.manual_seed` and the count of calls since.

    Raises:
        ValueError: p is not in [0, 1].
    """
    return drop("dropout", input, p, training, None)


def dropout2d(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Each channel of (N,C,H,W) or (N,C,L) is set to 0 with probability p, else divided by 1 - p
    (Tompson et al. 2015).

    Raises:
        ValueError: p is not in [0, 1]; the input has no channels.
    """
    if input.ndim not in (3, 4):
        raise ValueError(f"dropout2d takes (N, C, H, W) or (N, C, L), got {tuple(input.shape)}")
    ones = (1,) * (input.ndim - 2)
    return drop("dropout2d", input, p, training, (*input.shape[:2], *ones))


def locked_dropout(
    input: Tensor, p: float = 0.5, training: bool = True, batch_first: bool = False
) -> Tensor:
    """Each feature of each sequence (T, N, features) is set to 0 with probability p at all steps,
    else divided by 1 - p (Gal & Ghahramani 2016).

    Raises:
        ValueError: p is not in [0, 1]; the input has other than three dimensions.
    """
    if input.ndim != 3:
        order = "(N, T, features)" if batch_first else "(T, N, features)"
        raise ValueError(f"locked_dropout takes {order}, got {tuple(input.shape)}")
    a, b, features = input.shape
    mask_shape = (a, 1, features) if batch_first else (1, b, features)
    return drop("locked_dropout", input, p, training, mask_shape)


def drop(name: str, input: Tensor, p: float, training: bool, mask_shape: Any) -> Tensor:
    if not 0 <= p <= 1:
        raise ValueError(f"{name}: p is a probability, in [0, 1]; got {p}")
    if not training or p == 0:
        return input
    key = random.default_generator.next_key()
    return dropout_op.dropout(input, p=float(p), key=key, mask_shape=mask_shape)


# Normalisation ----------------------------------------------------------------------------


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Each channel of (N,C,...) to mean 0 and variance 1 over the batch, times weight plus bias
    (Ioffe & Szegedy 2015).

    While training the statistics are the batch's, and the running ones follow them:
    running ← (1 - momentum) running + momentum batch, the variance with n - 1. Otherwise the
    running ones are used.

    Raises:
        ValueError: shapes do not fit; training on one value a channel; no running statistics
            where they are needed.
        TypeError: dtypes or devices differ.
    """
    name = "batch_norm"
    if input.ndim < 2:
        raise ValueError(f"{name} takes (N, C, ...), got {tuple(input.shape)}")
    check_alike(name, input, weight=weight, bias=bias)
    channels = input.shape[1]
    per_channel = {"weight": weight, "bias": bias, "running_mean": running_mean}
    for what, x in (per_channel | {"running_var": running_var}).items():
        check_shape(name, what, x, (channels,))
    along = (1, channels) + (1,) * (input.ndim - 2)
    w, b = (None if x is None else x.reshape(along) for x in (weight, bias))

    if not training:
        if running_mean is None or running_var is None:
            raise ValueError(f"{name}: training=False needs running_mean and running_var")
        return rescale(input, running_mean, running_var, weight, bias, eps)

    dims = (0, *range(2, input.ndim))
    count = input.numel() // max(channels, 1)
    if count == 1:
        raise ValueError(
            f"{name}: one value a channel, shape {tuple(input.shape)}, has no variance to train "
            "with: use a larger batch, or call eval()"
        )
    statistics = mean, var = statistics_of(input.array, dims)
    if running_mean is not None:
        follow(running_mean, mean.reshape(channels), momentum)
    if running_var is not None:
        follow(running_var, var.reshape(channels) * (count / (count - 1)), momentum)
    return standardize(input, w, b, dim=dims, eps=eps, statistics=statistics)


def rescale(input: Tensor, mean: Tensor, var: Tensor, weight: Any, bias: Any, eps: float) -> Tensor:
    """(x - mean) / √(var + ε) · weight + bias, with given statistics: x · scale + shift."""
    return scale_shift(input, *scale_and_shift(mean, var, weight, bias, eps))


def scale_and_shift(mean: Tensor, var: Tensor, weight: Any, bias: Any, eps: float) -> Any:
    scale = (var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


def follow(running: Tensor, batch: Any, momentum: float) -> None:
    """running ← (1 - momentum) running + momentum batch, in place."""
    running.write_(running.array * (1 - momentum) + batch * momentum, "batch_norm")


def layer_norm(
    input: Tensor,
    normalized_shape: Size,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Each sample's last dimensions, of shape `normalized_shape`, to mean 0 and variance 1, times
    weight plus bias of that shape (Ba et al. 2016).

    Raises:
        ValueError: shapes do not fit.
        TypeError: dtypes or devices differ.
    """
    last = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not last or tuple(input.shape[-len(last) :]) != last:
        raise ValueError(
            f"layer_norm: input of shape {tuple(input.shape)} does not end in normalized_shape "
            f"{last}"
        )
    check_alike("layer_norm", input, weight=weight, bias=bias)
    check_shape("layer_norm", "weight", weight, last)
    check_shape("layer_norm", "bias", bias, last)
    return standardize(input, weight, bias, dim=tuple(range(-len(last), 0)), eps=eps)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Each sample's channels (N,C,...), in `num_groups` groups, to mean 0 and variance 1 a group,
    times weight plus bias of each channel (Wu & He 2018).

    Raises:
        ValueError: shapes do not fit; the channels do not divide into the groups.
        TypeError: dtypes or devices differ.
    """
    if input.ndim < 2:
        raise ValueError(f"group_norm takes (N, C, ...), got {tuple(input.shape)}")
    n, channels, *size = input.shape
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"group_norm: {channels} channels do not divide into {num_groups} groups")
    check_alike("group_norm", input, weight=weight, bias=bias)
    check_shape("group_norm", "weight", weight, (channels,))
    check_shape("group_norm", "bias", bias, (channels,))
    grouped = (num_groups, channels // num_groups)
    w, b = (
        None if x is None else x.reshape((1, *grouped) + (1,) * len(size)) for x in (weight, bias)
    )
    y = standardize(
        input.reshape((n, *grouped, *size)), w, b, dim=tuple(range(2, 3 + len(size))), eps=eps
    )
    return y.reshape(input.shape)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Each channel of each sample (N,C,...) to mean 0 and variance 1 (Ulyanov et al. 2016): a
    `group_norm` with one channel a group.

    Running statistics, if given, follow the means over the batch; without `use_input_stats` they
    are used. Raises as `batch_norm`.
    """
    if not use_input_stats:
        return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    if input.ndim < 3 or math.prod(input.shape[2:]) == 1:
        raise ValueError(
            f"instance_norm takes (N, C, ...) with more than one value a channel, got "
            f"{tuple(input.shape)}"
        )
    dims = tuple(range(2, input.ndim))
    if running_mean is not None:
        follow(running_mean, input.array.mean(axis=(0, *dims)), momentum)
    if running_var is not None:
        follow(running_var, input.array.var(axis=dims, ddof=1).mean(axis=0), momentum)
    return group_norm(input, input.shape[1], weight, bias, eps)


def normalize(
    input: Tensor, p: float = 2.0, dim: int | tuple[int, ...] = 1, eps: float = 1e-12
) -> Tensor:
    """x / max(‖x‖ₚ, ε), the norm along dim."""
    return input / clamp(reduce.norm(input, p=p, dim=dim, keepdim=True), min=eps)


def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """<x1, x2> / (max(‖x1‖, ε) max(‖x2‖, ε)) along dim."""
    norms = (clamp(reduce.norm(x, dim=dim), min=eps) for x in (x1, x2))
    return (x1 * x2).sum(dim) / math.prod(norms)


# Losses -----------------------------------------------------------------------------------


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """-log softmax(scores)[label].

    Args:
        input: scores (N,C,d1,...) or (C,).
        target: labels (N,d1,...), integers; or probabilities, shaped and typed as the scores.
        weight: (C,), a factor for each class.
        ignore_index: samples of this label do not count.
        label_smoothing: this share of each target is spread evenly over all classes.

    Raises:
        TypeError, ValueError: labels that do not fit: which, where, and what would.
    """
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"cross_entropy: label_smoothing is in [0, 1], got {label_smoothing}")
    return loss.cross_entropy_loss(input, target, weight, ignore_index, reduction, label_smoothing)


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """-log p[label], of log-probabilities (N,C,d1,...) or (C,); see `cross_entropy`."""
    return loss.nll_loss(input, target, weight, ignore_index, reduction)


def mse_loss(input: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    """(x - y)², of equal shapes."""
    return loss.mse_loss(input, target, reduction)


def l1_loss(input: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    """|x - y|, of equal shapes."""
    return loss.l1_loss(input, target, reduction)


def smooth_l1_loss(
    input: Tensor, target: Tensor, *, reduction: str = "mean", beta: float = 1.0
) -> Tensor:
    """d²/2β where |d| < β, |d| - β/2 beyond."""
    return loss.smooth_l1_loss(input, target, reduction, beta)


def huber_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0
) -> Tensor:
    """d²/2 where |d| < δ, δ(|d| - δ/2) beyond (Huber 1964)."""
    return loss.huber_loss(input, target, reduction, delta)


def binary_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, reduction: str = "mean"
) -> Tensor:
    """-(y log p + (1 - y) log(1 - p)) of probabilities p; logarithms are at least -100.

    Raises:
        ValueError: shapes differ; a probability is outside [0, 1].
    """
    return loss.binary_cross_entropy(input, target, weight, reduction)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """`binary_cross_entropy` of σ(x), which never overflows. `pos_weight` multiplies the y term."""
    return loss.binary_cross_entropy_with_logits(input, target, weight, reduction, pos_weight)


def kl_div(
    input: Tensor, target: Tensor, *, reduction: str = "mean", log_target: bool = False
) -> Tensor:
    """KL(target ‖ exp(input)), a term an element: target (log target - input).

    Args:
        input: log-probabilities.
        reduction: besides the usual, "batchmean": the sum divided by the batch size, which is
            the divergence. ("mean" divides by the number of elements, as in PyTorch.)
        log_target: the target is log-probabilities too.
    """
    if log_target:
        terms = exp(target) * (target - input)
    else:
        positive = target > 0  # 0 log 0 = 0
        terms = where(positive, target * log(where(positive, target, 1)), 0) - target * input
    if reduction == "batchmean":
        return terms.sum() / max(terms.shape[0] if terms.ndim else 1, 1)
    return loss.reduced(terms, reduction)


# Images -----------------------------------------------------------------------------------


def pad(
    input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> Tensor:
    """A border: ``pad`` is (left, right) of the last dimension, then of the one before it, ...

    Args:
        mode: "constant" (with `value`, 0 by default), "reflect" (about the edge pixel, which is
            not repeated), "replicate" (the edge pixel) or "circular". Negative numbers crop.

    Raises:
        ValueError: an unknown mode; more numbers than dimensions; more reflected than there is.
    """
    if mode == "constant":
        return shape.pad(input, tuple(pad), 0.0 if value is None else value)
    if mode not in ("reflect", "replicate", "circular"):
        raise ValueError(
            f"pad: mode is 'constant', 'reflect', 'replicate' or 'circular', got {mode!r}"
        )
    if value is not None:
        raise ValueError(f"pad: value is for mode 'constant', not for {mode!r}")
    if len(pad) % 2 or len(pad) > 2 * input.ndim:
        raise ValueError(
            f"pad: {len(pad)} numbers for {input.ndim} dimensions: two each, last dimension first"
        )
    for k in range(len(pad) // 2):
        axis, left, right = input.ndim - 1 - k, pad[2 * k], pad[2 * k + 1]
        n = input.shape[axis]
        most = {"reflect": n - 1, "circular": n, "replicate": math.inf if n else 0}[mode]
        if max(left, right) > most:
            raise ValueError(
                f"pad: {max(left, right)} on dimension {axis} of length {n}: mode {mode!r} takes "
                f"at most {most}"
            )
        at = np.arange(-left, n + right)
        if mode == "reflect":
            at = np.abs(at)
            at = n - 1 - np.abs(n - 1 - at)
        elif mode == "replicate":
            at = np.clip(at, 0, n - 1)
        else:
            at = at % max(n, 1)
        if (left, right) != (0, 0):
            positions = backend.to_device(at, input.device)
            input = input[(slice(None),) * axis + (positions,)]
    return input


def interpolate(
    input: Tensor,
    size: Size | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
) -> Tensor:
    """Images (N,C,H,W) in another size.

    Args:
        size: the new height and width; or
        scale_factor: what to multiply them by.
        mode: "nearest" or "bilinear".
        align_corners: for "bilinear": the corner pixels' centres stay where they are, rather
            than the image's edges.

    Raises:
        ValueError: both or none of size and scale_factor; an unknown mode.
    """
    if input.ndim != 4:
        raise ValueError(f"interpolate takes (N, C, H, W), got {tuple(input.shape)}")
    if mode not in ("nearest", "bilinear"):
        raise ValueError(f"interpolate: mode is 'nearest' or 'bilinear', got {mode!r}")
    if (size is None) == (scale_factor is None):
        raise ValueError("interpolate: give either size or scale_factor")
    if mode == "nearest" and align_corners is not None:
        raise ValueError("interpolate: align_corners is for mode='bilinear'")
    if scale_factor is None:
        new = pair("size", size, 1)  # type: ignore[arg-type]
        steps = [n / m for n, m in zip(input.shape[2:], new)]
    else:
        factors = scale_factor if isinstance(scale_factor, Sequence) else (scale_factor,) * 2
        new = pair("size", [math.floor(n * f) for n, f in zip(input.shape[2:], factors)], 1)
        steps = [1 / f for f in factors]

    if mode == "nearest":
        rows, columns = (
            backend.to_device(
                np.minimum((np.arange(m) * step).astype(np.int64), n - 1), input.device
            )
            for n, m, step in zip(input.shape[2:], new, steps)
        )
        return input[:, :, rows[:, None], columns]

    # Linear along each axis, so two matrices do it: rows @ image @ columns.
    rows, columns = (
        backend.to_device(
            linear_weights(n, m, step, bool(align_corners)).astype(input.dtype), input.device
        )
        for n, m, step in zip(input.shape[2:], new, steps)
    )
    return rows @ (input @ columns.T)


def linear_weights(length: int, new: int, step: float, align_corners: bool) -> np.ndarray:
    """(new, length): how much each old pixel counts in each new one."""
    if align_corners:
        at = np.arange(new) * ((length - 1) / max(new - 1, 1))
    else:
        at = np.clip((np.arange(new) + 0.5) * step - 0.5, 0, length - 1)
    left = np.minimum(np.floor(at).astype(np.int64), length - 1)
    right, share = np.minimum(left + 1, length - 1), at - left
    weights = np.zeros((new, length))
    np.add.at(weights, (np.arange(new), left), 1 - share)
    np.add.at(weights, (np.arange(new), right), share)
    return weights


# Sequences --------------------------------------------------------------------------------


def rnn(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    nonlinearity: str = "tanh",
    lengths: Any = None,
) -> tuple[Tensor, Tensor]:
    """One recurrent layer in one direction over sequences (T,N,I).

    Args:
        h0: the first state (N,H).
        w_ih, w_hh, b_ih, b_hh: (H,I), (H,H), (H,), (H,).
        nonlinearity: "tanh" or "relu".
        lengths: (N,) numbers of steps, if sequences end before T: after its end a sequence's
            output is 0, its state stays, and what x holds there is no matter.

    Returns:
        All states (T,N,H), and each sequence's last (N,H).

    Raises:
        ValueError: shapes, lengths or the nonlinearity do not fit.
        TypeError: dtypes or devices differ.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"rnn: nonlinearity is 'tanh' or 'relu', got {nonlinearity!r}")
    x, lengths, running = sequences("rnn", 1, x, lengths, w_ih, w_hh, b_ih, b_hh, h0=h0)
    states = rnn_op.rnn(x, h0, w_ih, w_hh, b_ih, b_hh, lengths, nonlinearity=nonlinearity)
    return (states if lengths is None else where(running, states, 0)), states[-1]


def lstm(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    lengths: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One LSTM layer in one direction over sequences (T,N,I); see `rnn`.

    Weights hold the gates i, f, g, o one after the other: (4H,I), (4H,H), (4H,), (4H,).

    Returns:
        All hidden states (T,N,H), and each sequence's last hidden and cell state (N,H).
    """
    x, lengths, running = sequences("lstm", 4, x, lengths, w_ih, w_hh, b_ih, b_hh, h0=h0, c0=c0)
    states = rnn_op.lstm(x, h0, c0, w_ih, w_hh, b_ih, b_hh, lengths)
    out, last = states[0], states[:, -1]
    return (out if lengths is None else where(running, out, 0)), last[0], last[1]


def gru(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    lengths: Any = None,
) -> tuple[Tensor, Tensor]:
    """One GRU layer in one direction over sequences (T,N,I); see `rnn`.

    Weights hold the gates r, z, n one after the other: (3H,I), (3H,H), (3H,), (3H,).

    Returns:
        All states (T,N,H), and each sequence's last (N,H).
    """
    x, lengths, running = sequences("gru", 3, x, lengths, w_ih, w_hh, b_ih, b_hh, h0=h0)
    states = rnn_op.gru(x, h0, w_ih, w_hh, b_ih, b_hh, lengths)
    return (states if lengths is None else where(running, states, 0)), states[-1]


def sequences(
    name: str,
    gates: int,
    x: Tensor,
    lengths: Any,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    **states: Tensor,
) -> tuple[Tensor, Any, Any]:
    """Check a recurrent layer's arguments.

    Returns:
        x, with zeros after the sequences' ends; their lengths as an array, or None if none ends
        before T; and a mask (T,N,1) of the steps that are there.
    """
    if x.ndim != 3 or x.shape[0] == 0:
        raise ValueError(
            f"{name}: sequences are (T, N, I) with at least one step, got {tuple(x.shape)}"
        )
    steps, n, features = x.shape
    hidden = states["h0"].shape[-1]
    check_alike(name, x, **states, w_ih=w_ih, w_hh=w_hh, b_ih=b_ih, b_hh=b_hh)
    for what, state in states.items():
        check_shape(name, what, state, (n, hidden))
    check_shape(name, "w_ih", w_ih, (gates * hidden, features))
    check_shape(name, "w_hh", w_hh, (gates * hidden, hidden))
    check_shape(name, "b_ih", b_ih, (gates * hidden,))
    check_shape(name, "b_hh", b_hh, (gates * hidden,))
    if lengths is None:
        return x, None, None
    lengths = np.asarray(backend.to_device(raw(lengths), "cpu") if hasattr(lengths, "dtype")
                         else lengths)  # fmt: skip
    if lengths.shape != (n,) or (n and lengths.dtype.kind not in "iu"):
        raise ValueError(
            f"{name}: lengths are {n} integers, one a sequence; got {lengths.dtype} of shape "
            f"{lengths.shape}"
        )
    if n and (lengths.min() < 0 or lengths.max() > steps):
        raise ValueError(
            f"{name}: lengths lie in [0, {steps}], got {lengths.min()} to {lengths.max()}"
        )
    if n == 0 or lengths.min() == steps:
        return x, None, None
    running = backend.to_device((np.arange(steps)[:, None] < lengths)[..., None], x.device)
    return where(running, x, 0), backend.to_device(lengths, x.device), running
