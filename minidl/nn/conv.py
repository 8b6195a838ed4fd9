"""Convolution layers."""

from __future__ import annotations

from typing import Any

import minidl.nn.functional as F
from minidl.nn import init
from minidl.nn.module import Module
from minidl.nn.parameter import Parameter, empty
from minidl.tensor import Tensor

Sizes = int | tuple[int, ...]


def sizes(value: Any, dims: int) -> Any:
    """One number for each dimension; names such as "same" stay."""
    if isinstance(value, str):
        return value
    return (value,) * dims if isinstance(value, int) else tuple(value)


class ConvNd(Module):
    """What the convolution layers share; a subclass sets `dims`."""

    dims: int
    transposed = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes,
        padding: Sizes | str,
        output_padding: Sizes,
        dilation: Sizes,
        groups: int,
        bias: bool,
        padding_mode: str,
        device: str | None,
        dtype: Any,
    ) -> None:
        super().__init__()
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups must divide in_channels and out_channels: got groups={groups}, "
                f"in_channels={in_channels}, out_channels={out_channels}"
            )
        if isinstance(padding, str):
            if padding not in ("same", "valid"):
                raise ValueError(f"padding is a size, 'same' or 'valid', got {padding!r}")
            if padding == "same" and any(s != 1 for s in sizes(stride, self.dims)):
                raise ValueError("padding='same' is not defined for a stride other than 1")
        if padding_mode != "zeros":
            raise ValueError(f"padding_mode {padding_mode!r}: only 'zeros' is there")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size = sizes(kernel_size, self.dims)
        self.stride, self.padding = sizes(stride, self.dims), sizes(padding, self.dims)
        self.output_padding = sizes(output_padding, self.dims)
        self.dilation = sizes(dilation, self.dims)
        self.groups, self.padding_mode = groups, padding_mode
        channels = (out_channels, in_channels // groups)
        if self.transposed:
            channels = (in_channels, out_channels // groups)
        self.weight = Parameter(empty(*channels, *self.kernel_size, device=device, dtype=dtype))
        self.bias = Parameter(empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.default_(self.weight, self.bias)

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}"]
        parts += [f"kernel_size={self.kernel_size}, stride={self.stride}"]
        zero, one = (0,) * self.dims, (1,) * self.dims
        padding = repr(self.padding) if not isinstance(self.padding, str) else self.padding
        parts += [f"padding={padding}"] if self.padding != zero else []
        parts += [f"dilation={self.dilation}"] if self.dilation != one else []
        parts += [f"output_padding={self.output_padding}"] if self.output_padding != zero else []
        parts += [f"groups={self.groups}"] if self.groups != 1 else []
        parts += ["bias=False"] if self.bias is None else []
        return ", ".join(parts)


class Conv1d(ConvNd):
    """(N, C, L) -> (N, O, L'); see `Conv2d`."""

    dims = 1

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: str | None = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, 0, dilation, groups, bias,
            padding_mode, device, dtype,
        )  # fmt: skip

    def forward(self, input: Tensor) -> Tensor:
        return F.conv1d(
            input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class Conv2d(ConvNd):
    """Slide `out_channels` filters over an image: (N, C, H, W) -> (N, O, H', W').

    H' = (H + 2 · padding - dilation · (kernel_size - 1) - 1) // stride + 1.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: the filters' size, one number or (height, width); so are the next three.
        stride: how far a filter moves from one output to the next.
        padding: zeros around the image; "valid": none; "same": as many as keep the size.
        dilation: the distance between a filter's taps.
        groups: the channels are cut into so many groups, each with filters of its own.
        bias: whether to add a number per output channel.
    """

    dims = 2

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: str | None = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, 0, dilation, groups, bias,
            padding_mode, device, dtype,
        )  # fmt: skip

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(
            input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class ConvTranspose2d(ConvNd):
    """The gradient of a `Conv2d` with respect to its input, as a layer: it enlarges images.

    H' = (H - 1) · stride - 2 · padding + dilation · (kernel_size - 1) + output_padding + 1.
    """

    dims = 2
    transposed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes = 0,
        output_padding: Sizes = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Sizes = 1,
        padding_mode: str = "zeros",
        device: str | None = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, output_padding, dilation,
            groups, bias, padding_mode, device, dtype,
        )  # fmt: skip

    def forward(self, input: Tensor, output_size: tuple[int, ...] | None = None) -> Tensor:
        """
        Args:
            input: (N, C, H, W).
            output_size: (H', W'), where the stride leaves several possible; instead of
                `output_padding`.

        Raises:
            ValueError: no output padding gives that size.
        """
        output_padding = self.output_padding
        if output_size is not None:
            smallest = [
                (n - 1) * s - 2 * p + d * (k - 1) + 1
                for n, s, p, d, k in zip(
                    input.shape[-2:], self.stride, self.padding, self.dilation, self.kernel_size
                )
            ]
            output_padding = tuple(n - m for n, m in zip(output_size[-2:], smallest))
            if not all(0 <= p < s for p, s in zip(output_padding, self.stride)):
                raise ValueError(
                    f"output_size {tuple(output_size[-2:])}: possible are {smallest} and up to "
                    f"stride - 1 = {[s - 1 for s in self.stride]} more"
                )
        return F.conv_transpose2d(
            input, self.weight, self.bias, self.stride, self.padding, output_padding, self.groups,
            self.dilation,
        )  # fmt: skip
