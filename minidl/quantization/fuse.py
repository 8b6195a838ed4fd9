"""Layers that follow each other as one, for inference: convolution, batch norm, ReLU.

In eval mode a batch norm is a scale and a shift of each channel, and both fit into the convolution
before it (Jacob et al. 2018, equation 14; Krishnamoorthi 2018, section 3.2.2):

    w' = w · γ / √(σ² + ε),    b' = β + (b - μ) · γ / √(σ² + ε)

ReLU is computed where the sum still is in a register. So a network reads and writes each image once
in place of three times, and what is quantized is what is computed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import numpy as np

from minidl import nn
from minidl.nn import functional as F
from minidl.tensor import Tensor

FOLLOWERS = (nn.BatchNorm2d, nn.ReLU)  # what a convolution takes in, in this order


class ConvReLU2d(nn.Conv2d):
    """max(0, `nn.Conv2d`), in one pass: (N, C, H, W) -> (N, O, H', W')."""

    def forward(self, input: Tensor) -> Tensor:
        x, had_batch = F.with_batch("ConvReLU2d", input, 4, "(N, C, H, W) or (C, H, W)")
        y = F.convolve(
            "ConvReLU2d", x, self.weight, self.bias, self.stride, self.padding, self.dilation,
            self.groups, relu=True,
        )  # fmt: skip
        return y if had_batch else y.squeeze(0)


def fuse(model: nn.Module, groups: Sequence[Sequence[str]] | None = None) -> nn.Module:
    """A copy of a model, in eval mode, that computes the same with fewer passes over memory.

    The first layer of a group becomes the fused one, the others `nn.Identity`, so all names stay.

    Args:
        groups: dotted names of the layers of each group, in the order in which they run: a Conv2d,
            then a BatchNorm2d or a ReLU or both, ``[["conv1", "bn1"], ...]``. By default all such
            neighbours in the model's `nn.Sequential`s: elsewhere only its forward knows the order.

    Raises:
        ValueError: no such layer; other layers, or in another order; a batch norm of other channels
            or without running statistics; a layer that is in two groups or used twice.
    """
    model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    uses: dict[int, int] = {}
    for module in modules.values():
        for child in vars(module).values():
            if isinstance(child, nn.Module):
                uses[id(child)] = uses.get(id(child), 0) + 1
    found = list(neighbours(model)) if groups is None else [list(group) for group in groups]
    for group in found:
        layers = []
        for name in group:
            if name not in modules:
                raise ValueError(f"{type(model).__name__} has no layer {name!r}")
            layers.append(modules[name])
        kinds = [type(layer) for layer in layers]
        wanted = [kind for kind in FOLLOWERS if kind in kinds[1:]]
        if not kinds or kinds[0] is not nn.Conv2d or kinds[1:] != wanted or not wanted:
            raise ValueError(
                f"{group} is {', '.join(k.__name__ for k in kinds)}: a group is a Conv2d, then a "
                "BatchNorm2d or a ReLU or both"
            )
        if any(uses.get(id(layer), 0) > 1 for layer in layers if not isinstance(layer, nn.ReLU)):
            if groups is None:
                continue
            raise ValueError(f"{group} has a layer that is used twice, where it is to stay")
        put(model, group[0], fused(group, layers))
        for name in group[1:]:
            put(model, name, nn.Identity())
        modules.update(dict.fromkeys(group, nn.Identity()))
    return model.eval()


def neighbours(model: nn.Module) -> Iterator[list[str]]:
    """The groups that can be fused in a model's Sequentials."""
    for path, module in model.named_modules():
        if not isinstance(module, nn.Sequential):
            continue
        layers = [(f"{path}.{name}".lstrip("."), layer) for name, layer in module.named_children()]
        for i, (name, layer) in enumerate(layers):
            if type(layer) is not nn.Conv2d:
                continue
            group, following = [name], layers[i + 1 :]
            for kind in FOLLOWERS:
                if following and type(following[0][1]) is kind:
                    group.append(following.pop(0)[0])
            if len(group) > 1:
                yield group


def fused(names: Sequence[str], layers: Sequence[nn.Module]) -> nn.Conv2d:
    conv = layers[0]
    assert isinstance(conv, nn.Conv2d)
    for layer in layers[1:]:
        if isinstance(layer, nn.BatchNorm2d):
            conv = folded(names, conv, layer)
    if isinstance(layers[-1], nn.ReLU):
        fused = ConvReLU2d.__new__(ConvReLU2d)
        vars(fused).update(vars(conv))
        return fused
    return conv


def folded(names: Sequence[str], conv: nn.Conv2d, bn: nn.BatchNorm2d) -> nn.Conv2d:
    """The convolution with the batch norm in it."""
    if bn.num_features != conv.out_channels or bn.running_mean is None or bn.running_var is None:
        raise ValueError(
            f"{names[1]} has {bn.num_features} channels"
            f"{' and no running statistics' * (bn.running_mean is None)}, {names[0]} gives "
            f"{conv.out_channels}: it cannot be folded"
        )
    dtype, device = conv.weight.dtype, conv.weight.device

    def of(x: Tensor | None, default: float) -> np.ndarray:
        """In float64: the result is rounded once."""
        whole = np.full(conv.out_channels, default) if x is None else x.numpy()
        return whole.astype(np.float64)

    scale = of(bn.weight, 1) / np.sqrt(of(bn.running_var, 1) + bn.eps)
    bias = of(bn.bias, 0) + (of(conv.bias, 0) - of(bn.running_mean, 0)) * scale
    weight = conv.weight.numpy().astype(np.float64) * scale[:, None, None, None]
    conv.weight = nn.Parameter(Tensor(weight.astype(dtype)).to(device))
    conv.bias = nn.Parameter(Tensor(bias.astype(dtype)).to(device))
    if grid := getattr(conv, "weight_grid", None):  # of `convert`: the same integers
        steps = (grid.scale * scale).astype(np.float32)
        conv.weight_grid = grid._replace(scale=steps, zero_point=np.zeros(len(steps), np.int8))
    return conv


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    path, _, last = name.rpartition(".")
    setattr(model.get_submodule(path), last, layer)
