"""Transfer learning: a network that has learned one task begins the next (Yosinski et al. 2014).

The first layers of a network see edges and textures, which most images have; only the last ones
are about its task. So load what was learned elsewhere, replace the last layer (the *head*), and

    freeze everything else   learn the head alone, on features that never change. They can be
                             computed once (`cache_features`), and an epoch then costs the head
    fine-tune                learn everything, earlier layers more slowly (`discriminative_lr`),
                             or the last ones first (`gradual_unfreeze`)

    model = models.resnet18()
    transfer.load_weights(model, "resnet18.pth")
    transfer.replace_head(model, num_classes=2)
    transfer.freeze(model, depth=-1)                  # all but the head
    features, head = transfer.cache_features(model, dataset)

A frozen layer costs no backward pass and no gradient memory: nothing below the first trainable
parameter is even recorded (see `Tensor.requires_grad`).
"""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import minidl
from minidl import nn
from minidl.attack import deployed
from minidl.data import DataLoader, TensorDataset
from minidl.data.augment import RandomTransform
from minidl.nn.dropout import DropConnectLinear, DropoutNd
from minidl.nn.norm import BatchNorm
from minidl.tensor import Tensor

# Weights from elsewhere -------------------------------------------------------------------


def load_weights(
    model: nn.Module, path: str | os.PathLike[str], skip: str | Sequence[str] = ()
) -> list[str]:
    """Copy a published checkpoint into a model: safetensors, or .pth by `torch.save`.

    Runs no code from the file. A state_dict is found at the top, or under "state_dict" or
    "model". Old checkpoints lack "num_batches_tracked", which is then left as it is.

    Args:
        model: filled in place; its parameters' names decide.
        path: the file.
        skip: patterns of names that are left alone ("fc.*": the head, of another size).

    Returns:
        The names that were copied.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: neither kind of file, or no names with tensors in it; a pattern fits nothing.
        RuntimeError: lists all names that are missing or unexpected, and shapes that do not fit;
            the model is as it was.
    """
    content = minidl.load(path)
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not any(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path}: holds no state_dict (names and tensors)")
    patterns = [skip] if isinstance(skip, str) else list(skip)
    own = model.state_dict()
    for pattern in patterns:
        if not fnmatch.filter([*own, *content], pattern):
            raise ValueError(f"skip={pattern!r} fits no name: {some_of(list(own), pattern)}")

    def wanted(name: str) -> bool:
        return not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    given = {name: value for name, value in content.items() if wanted(name)}
    kept = {
        name: value
        for name, value in own.items()
        if not wanted(name) or (name.endswith("num_batches_tracked") and name not in given)
    }
    try:
        model.load_state_dict({**kept, **given})
    except RuntimeError as error:
        raise RuntimeError(f"{Path(path)}: {error}") from None
    return [name for name in own if name in given]


def replace_head(model: nn.Module, num_classes: int) -> nn.Linear:
    """Put a new last linear layer, with random weights, in the place of the last one.

    Returns:
        The new layer. It learns, whatever was frozen.

    Raises:
        ValueError: there is no linear layer; num_classes < 1.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes is at least 1, got {num_classes}")
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not linears or not linears[-1][0]:
        raise ValueError(f"{type(model).__name__} has no linear layer to replace")
    name, old = linears[-1]
    head = nn.Linear(
        old.in_features, num_classes, old.bias is not None, old.weight.device, old.weight.dtype
    )
    path, _, last = name.rpartition(".")
    setattr(model.get_submodule(path), last, head)
    return head.train(model.training)


# Freezing ---------------------------------------------------------------------------------


def freeze(model: nn.Module, *names: str, depth: int | None = None) -> list[str]:
    """Stop learning: parameters get no gradient, batch-norm statistics no longer move.

    A frozen module stays in eval mode, also when ``model.train()`` is called later. A batch norm is
    frozen with its last parameter, whichever way that was named.

    Args:
        names: of modules (and all in them) or parameters: "layer1", "layer4.1.bn2",
            "fc.weight"; or patterns, "layer[12]*", "*.bn?". None at all: everything.
        depth: the first so many layer groups (see `layer_groups`); negative: all but the last.

    Returns:
        The names of the parameters that it froze.

    Raises:
        ValueError: a name that fits nothing, says what would; a depth out of range.
    """
    return set_frozen(model, names, depth, True)


def unfreeze(model: nn.Module, *names: str, depth: int | None = None) -> list[str]:
    """Learn again; arguments as `freeze`'s, which it undoes. (depth: still from the input on.)"""
    return set_frozen(model, names, depth, False)


def set_frozen(
    model: nn.Module, names: Sequence[str], depth: int | None, frozen: bool
) -> list[str]:
    if depth is not None:
        if names:
            raise ValueError("give names or a depth, not both")
        names = within_depth(model, depth)
    elif not names:
        names = ("",)  # the path of the model itself
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    chosen: set[str] = set()
    for pattern in names:
        found = [name for name in (*modules, *parameters) if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            raise ValueError(
                f"{type(model).__name__} has nothing called {pattern!r}: "
                + some_of([*modules, *parameters], pattern)
            )
        chosen.update(found)

    def is_chosen(name: str) -> bool:
        """It, or what it is in, was named."""
        return "" in chosen or any(name == c or name.startswith(c + ".") for c in chosen)

    touched = [name for name in parameters if is_chosen(name)]
    for name in touched:
        parameters[name].requires_grad_(not frozen)
    for name, module in modules.items():
        own = list(module.parameters(recurse=False))
        all_alike = bool(own) and all(p.requires_grad is not frozen for p in own)
        is_norm = isinstance(module, BatchNorm)
        # (The model's own flag is not touched: it says which mode the others return to.)
        if (is_norm and all_alike) or (is_chosen(name) and module is not model):
            module.frozen = frozen
            module.training = model.training and not frozen
    return touched


def layer_groups(model: nn.Module) -> list[list[str]]:
    """The model's children in the order in which the input meets them, by their names.

    One group for each child with parameters, together with those before it that have none. (A
    model must hold its children in the order of its forward pass, as usual.)
    """
    groups: list[list[str]] = [[]]
    for name, module in model.named_children():
        groups[-1].append(name)
        if any(True for _ in module.parameters()):
            groups.append([])
    return groups[:-1]


def within_depth(model: nn.Module, depth: int) -> list[str]:
    groups = layer_groups(model)
    if not -len(groups) <= depth <= len(groups):
        raise ValueError(
            f"depth is from {-len(groups)} to {len(groups)}, the layer groups of "
            f"{type(model).__name__} ({', '.join(g[-1] for g in groups)}), got {depth}"
        )
    return [name for group in groups[:depth] for name in group]


def some_of(names: Sequence[str], wanted: str) -> str:
    close = difflib.get_close_matches(wanted, names, 1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    top = list(dict.fromkeys(name.split(".")[0] for name in names if name))
    return f"{hint}its layers are {', '.join(top)}"


# Fine-tuning ------------------------------------------------------------------------------


def gradual_unfreeze(model: nn.Module, epoch: int, every: int = 1) -> list[str]:
    """Freeze all but the last 1 + epoch // every layer groups (Howard & Ruder 2018, section 3.3).

    Call it at the start of each epoch (from 0). The new head, which is still random, thus cannot
    spoil the layers below it. Give the optimizer all parameters: it passes over frozen ones.

    Returns:
        The names of the groups that learn now.
    """
    groups = layer_groups(model)
    learning = min(1 + epoch // every, len(groups))
    unfreeze(model)
    freeze(model, depth=len(groups) - learning)
    return [group[-1] for group in groups[len(groups) - learning :]]


def discriminative_lr(model: nn.Module, lr: float, factor: float = 2.6) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: each layer group learns `factor` times more slowly than
    the one after it (Howard & Ruder 2018, section 3.1: η of layer l - 1 is η of layer l / 2.6)::

        optim.SGD(transfer.discriminative_lr(model, lr=0.1), momentum=0.9)

    Raises:
        ValueError: lr or factor is not above 0.
    """
    if not (lr > 0 and factor > 0):
        raise ValueError(f"lr and factor are above 0, got {lr} and {factor}")
    groups = layer_groups(model)
    return [
        {
            "params": [p for name in group for p in model.get_submodule(name).parameters()],
            "lr": lr / factor ** (len(groups) - 1 - i),
        }
        for i, group in enumerate(groups)
    ]


# Features, computed once ------------------------------------------------------------------


def cache_features(
    model: nn.Module, dataset: Any, head: str | None = None, batch_size: int = 256
) -> tuple[TensorDataset, nn.Module]:
    """Compute the frozen part's features once, so that an epoch costs only the head::

        features, head = cache_features(model, train_set)
        for x, y in DataLoader(features, 64, shuffle=True):
            F.cross_entropy(head(x), y).backward()  # trains the layers of `model` itself

    Args:
        dataset: of (image, label), the same every epoch.
        head: the dotted name of the layer that the features go into; None: the first that learns
            (or drops). In a `Sequential` all after it belong to the head.
        batch_size: images at a time.

    Returns:
        A dataset of (features, label), and the head: the model's own layers, not copies.

    Raises:
        ValueError: features would change: the dataset is augmented, or what comes before the head
            learns, drops, or is a batch norm in training; or `head` is not the model's end.
    """
    if not len(dataset):
        raise ValueError("no features of nothing: the dataset is empty")
    if (culprit := augmentation(dataset)) is not None:
        raise ValueError(
            f"the dataset is augmented ({culprit!r}): its features change from epoch to epoch. "
            "Cache those of the plain images, or train without a cache"
        )
    name = first_that_changes(model) if head is None else head
    path, _, last = name.rpartition(".")
    try:
        parent, entry = model.get_submodule(path), model.get_submodule(name)
    except AttributeError:
        names = [n for n, _ in model.named_modules()]
        raise ValueError(f"head={name!r} is no layer: {some_of(names, name)}") from None
    tail = entry
    if isinstance(parent, nn.Sequential):
        tail = parent[[n for n, _ in parent.named_children()].index(last) :]
    for before, module in itertools.takewhile(lambda m: m[1] is not entry, model.named_modules()):
        if reason := why_it_changes(module):
            raise ValueError(
                f"{before or type(model).__name__} comes before the head {name!r} and {reason}: "
                f"freeze it first, transfer.freeze(model, {before!r})"
            )

    device = next(model.parameters()).device
    features, labels = [], []
    with minidl.no_grad(), deployed(model):
        model.train()  # as in an epoch; what is frozen stays as it is
        for x, y in DataLoader(dataset, batch_size, seed=0):
            features.append(input_of(entry, model, x.to(device)).cpu().numpy())
            labels.append(y.numpy())
        x, _ = next(iter(DataLoader(dataset, batch_size, seed=1)))
        again = input_of(entry, model, x.to(device))
        if not np.array_equal(again.cpu().numpy(), features[0]):
            raise ValueError(
                "the features differ from one time to the next: the dataset is augmented, or a "
                "layer before the head is random"
            )
        model.eval()
        if not np.array_equal(model(x.to(device)).cpu().numpy(), tail(again).cpu().numpy()):
            raise ValueError(
                f"{name!r} is not the end of {type(model).__name__}: what it makes of the features "
                "is not the model's output"
            )
    return TensorDataset(Tensor(np.concatenate(features)), Tensor(np.concatenate(labels))), tail


def first_that_changes(model: nn.Module) -> str:
    """The dotted name of the first layer that learns or drops; in a last `Sequential`, within."""
    path, module = "", model
    while True:
        children = list(module.named_children())
        changing = [n for n, child in children if any(map(why_it_changes, child.modules()))]
        if not changing:
            if module is model:
                raise ValueError(
                    f"nothing in {type(model).__name__} learns, so there is no head: "
                    "transfer.replace_head(model, num_classes), or unfreeze its last layers"
                )
            return path
        path = f"{path}.{changing[0]}" if path else changing[0]
        module = dict(children)[changing[0]]
        if changing[0] != children[-1][0] or not isinstance(module, nn.Sequential):
            return path


def why_it_changes(module: nn.Module) -> str | None:
    """Why this layer alone may answer differently tomorrow; None: it is a fixed function."""
    if any(p.requires_grad for p in module.parameters(recurse=False)):
        return "learns"
    drops = isinstance(module, DropoutNd | DropConnectLinear) and module.p > 0
    if drops and not module.frozen:
        return "drops numbers at random"
    if isinstance(module, BatchNorm) and not isinstance(module, nn.InstanceNorm2d):
        if module.running_mean is None:
            return "normalises by each batch's own statistics"
        if not module.frozen:
            return "is a batch norm in training, whose statistics move"
    return None


def augmentation(dataset: Any) -> RandomTransform | None:
    """The random transform in a dataset, in the datasets it is made of, in a `Compose`."""
    if isinstance(dataset, RandomTransform):
        return dataset
    inside: list[Any] = [*getattr(dataset, "datasets", ()), *getattr(dataset, "transforms", ())]
    inside += [getattr(dataset, "dataset", None), getattr(dataset, "transform", None)]
    found = (augmentation(part) for part in inside if part is not None)
    return next((transform for transform in found if transform is not None), None)


class _Reached(Exception):
    """Carries a layer's input out of the forward pass, which need not go on."""


def input_of(layer: nn.Module, model: nn.Module, x: Tensor) -> Tensor:
    """What `layer` is given when the model sees x."""

    def stop(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        raise _Reached(arguments[0])

    hook = layer.register_forward_pre_hook(stop)
    try:
        model(x)
    except _Reached as reached:
        return reached.args[0]
    finally:
        hook.remove()
    raise ValueError("the head is never reached in the model's forward pass")
