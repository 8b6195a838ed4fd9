"""Every layer that minidl.nn exports: how to make one, and what to feed it.

The same line makes PyTorch's twin, ``case.torch(torch.nn)``. A layer without a case fails the
suite.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Draw = Callable[[np.random.Generator], Any]


class Case(NamedTuple):
    """A layer, its inputs (arrays; tuples of arrays are states), and how to call it."""

    name: str
    make: Callable[[Any], Any]
    inputs: tuple[Any, ...]
    random: bool = False  # draws random numbers while training
    twin: Callable[[Any], Any] | None = None  # where PyTorch has no such layer: its like in eval

    def torch(self, nn: Any) -> Any:
        """PyTorch's layer that computes the same."""
        return (self.twin or self.make)(nn)


def normal(*shape: int) -> Draw:
    return lambda rng: rng.normal(size=shape)


def uniform(*shape: int) -> Draw:
    return lambda rng: rng.uniform(0.05, 0.95, size=shape)


def below(n: int, *shape: int) -> Draw:
    return lambda rng: rng.integers(0, n, size=shape)


def simplex(*shape: int) -> Draw:
    return lambda rng: rng.dirichlet(np.ones(shape[-1]), size=shape[:-1])


def log_simplex(*shape: int) -> Draw:
    return lambda rng: np.log(simplex(*shape)(rng) + 1e-2)


CASES: list[Case] = []


def case(
    make: Callable[[Any], Any],
    *inputs: Any,
    random: bool = False,
    twin: Callable[[Any], Any] | None = None,
) -> None:
    names = make.__code__.co_names
    same = sum(c.name.split("-")[0] == names[0] for c in CASES)
    CASES.append(Case(f"{names[0]}-{same}", make, inputs, random, twin))


case(lambda nn: nn.Linear(4, 3), normal(5, 4))
case(lambda nn: nn.Linear(4, 3, bias=False), normal(2, 5, 4))
case(lambda nn: nn.Identity(3, x=4), normal(2, 3))
case(lambda nn: nn.Flatten(), normal(2, 3, 4, 5))
case(lambda nn: nn.Flatten(0, 1), normal(2, 3, 4))
case(lambda nn: nn.Unflatten(1, (2, 3)), normal(4, 6, 5))

case(lambda nn: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), normal(2, 4, 9))
case(lambda nn: nn.Conv1d(2, 3, 3, dilation=2, bias=False), normal(2, 2, 9))
case(lambda nn: nn.Conv2d(3, 4, 3), normal(2, 3, 7, 6))
case(
    lambda nn: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), groups=2, bias=False),
    normal(2, 4, 7, 6),
)
case(lambda nn: nn.Conv2d(3, 4, 3, padding="same", dilation=2), normal(2, 3, 7, 6))
case(lambda nn: nn.Conv2d(3, 4, 3, padding="valid"), normal(2, 3, 7, 6))
case(lambda nn: nn.ConvTranspose2d(3, 4, 3), normal(2, 3, 5, 4))
case(
    lambda nn: nn.ConvTranspose2d(4, 6, (3, 2), 2, 1, (1, 0), groups=2, bias=False),
    normal(2, 4, 5, 4),
)

case(lambda nn: nn.BatchNorm1d(4), normal(6, 4))
case(lambda nn: nn.BatchNorm1d(4, momentum=None), normal(6, 4, 3))
case(lambda nn: nn.BatchNorm2d(3), normal(4, 3, 5, 4))
case(lambda nn: nn.BatchNorm2d(3, eps=1e-2, momentum=0.3, affine=False), normal(4, 3, 5, 4))
case(lambda nn: nn.BatchNorm2d(3, track_running_stats=False), normal(4, 3, 5, 4))
case(lambda nn: nn.BatchNorm2d(3, bias=False), normal(4, 3, 5, 4))
case(lambda nn: nn.InstanceNorm2d(3), normal(4, 3, 5, 4))
case(lambda nn: nn.InstanceNorm2d(3, affine=True, track_running_stats=True), normal(4, 3, 5, 4))
case(lambda nn: nn.LayerNorm(6), normal(2, 5, 6))
case(lambda nn: nn.LayerNorm((4, 6), eps=1e-2, bias=False), normal(2, 4, 6))
case(lambda nn: nn.LayerNorm(6, elementwise_affine=False), normal(2, 6))
case(lambda nn: nn.GroupNorm(2, 6), normal(3, 6, 4, 5))
case(lambda nn: nn.GroupNorm(3, 6, affine=False), normal(3, 6, 4))
case(lambda nn: nn.GroupNorm(3, 6, bias=False), normal(3, 6, 4))

case(lambda nn: nn.Dropout(0.5), normal(4, 5), random=True)
case(lambda nn: nn.Dropout2d(0.5), normal(4, 5, 3, 3), random=True)
case(
    lambda nn: nn.LockedDropout(0.5), normal(4, 2, 5), random=True, twin=lambda nn: nn.Dropout(0.5)
)
case(
    lambda nn: nn.DropConnectLinear(4, 3), normal(5, 4), random=True,
    twin=lambda nn: nn.Linear(4, 3),
)  # fmt: skip

case(lambda nn: nn.Embedding(7, 3), below(7, 4, 5))
case(lambda nn: nn.Embedding(7, 3, padding_idx=-2), below(7, 4, 5))

case(lambda nn: nn.RNN(3, 4), normal(5, 2, 3))
case(lambda nn: nn.RNN(3, 4, 2, "relu", bidirectional=True), normal(5, 2, 3), normal(4, 2, 4))
case(lambda nn: nn.LSTM(3, 4), normal(5, 2, 3))
case(lambda nn: nn.LSTM(3, 4), normal(5, 3))
case(
    lambda nn: nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True),
    normal(2, 5, 3),
    (normal(4, 2, 4), normal(4, 2, 4)),
)
case(lambda nn: nn.LSTM(3, 4, 2, bias=False, dropout=0.5), normal(5, 2, 3), random=True)
case(lambda nn: nn.GRU(3, 4), normal(5, 2, 3))
case(lambda nn: nn.GRU(3, 4, 2, bidirectional=True, batch_first=True), normal(2, 5, 3))
case(lambda nn: nn.RNNCell(3, 4), normal(2, 3))
case(lambda nn: nn.RNNCell(3, 4, nonlinearity="relu", bias=False), normal(2, 3), normal(2, 4))
case(lambda nn: nn.LSTMCell(3, 4), normal(2, 3))
case(lambda nn: nn.LSTMCell(3, 4), normal(2, 3), (normal(2, 4), normal(2, 4)))
case(lambda nn: nn.GRUCell(3, 4), normal(2, 3), normal(2, 4))
case(lambda nn: nn.GRUCell(3, 4, bias=False), normal(3))

case(lambda nn: nn.ReLU(), normal(3, 4))
case(lambda nn: nn.ReLU(inplace=True), normal(3, 4))
case(lambda nn: nn.ReLU6(), normal(30))
case(lambda nn: nn.Hardtanh(-0.5, 0.25), normal(30))
case(lambda nn: nn.LeakyReLU(), normal(3, 4))
case(lambda nn: nn.LeakyReLU(0.2), normal(3, 4))
case(lambda nn: nn.ELU(0.7), normal(3, 4))
case(lambda nn: nn.GELU(), normal(3, 4))
case(lambda nn: nn.GELU("tanh"), normal(3, 4))
case(lambda nn: nn.SiLU(), normal(3, 4))
case(lambda nn: nn.Tanh(), normal(3, 4))
case(lambda nn: nn.Sigmoid(), normal(3, 4))
case(lambda nn: nn.Softplus(), normal(3, 4))
case(lambda nn: nn.Softplus(2.0, 1.0), normal(3, 4))
case(lambda nn: nn.Softmax(dim=1), normal(3, 4))
case(lambda nn: nn.LogSoftmax(dim=-1), normal(3, 4))

case(lambda nn: nn.MaxPool2d(2), normal(2, 3, 6, 7))
case(lambda nn: nn.MaxPool2d(3, 2, 1, ceil_mode=True), normal(2, 3, 6, 7))
case(lambda nn: nn.AvgPool2d((2, 3)), normal(2, 3, 6, 7))
case(lambda nn: nn.AvgPool2d(3, 2, 1, count_include_pad=False), normal(2, 3, 6, 7))
case(lambda nn: nn.AdaptiveAvgPool2d((3, 2)), normal(2, 3, 7, 5))
case(lambda nn: nn.AdaptiveAvgPool2d((None, 2)), normal(2, 3, 7, 5))
case(lambda nn: nn.AdaptiveMaxPool2d(3), normal(2, 3, 7, 5))

case(lambda nn: nn.CrossEntropyLoss(), normal(5, 4), below(4, 5))
case(lambda nn: nn.CrossEntropyLoss(ignore_index=1, reduction="sum"), normal(5, 4), below(4, 5))
case(lambda nn: nn.CrossEntropyLoss(label_smoothing=0.1), normal(5, 4, 3), below(4, 5, 3))
case(lambda nn: nn.CrossEntropyLoss(), normal(5, 4), simplex(5, 4))
case(lambda nn: nn.NLLLoss(), log_simplex(5, 4), below(4, 5))
case(lambda nn: nn.NLLLoss(reduction="none"), log_simplex(5, 4), below(4, 5))
case(lambda nn: nn.MSELoss(), normal(3, 4), normal(3, 4))
case(lambda nn: nn.MSELoss(reduction="sum"), normal(3, 4), normal(3, 4))
case(lambda nn: nn.L1Loss(), normal(3, 4), normal(3, 4))
case(lambda nn: nn.SmoothL1Loss(), normal(3, 4), normal(3, 4))
case(lambda nn: nn.SmoothL1Loss(beta=0.3, reduction="none"), normal(3, 4), normal(3, 4))
case(lambda nn: nn.HuberLoss(), normal(3, 4), normal(3, 4))
case(lambda nn: nn.HuberLoss("sum", 0.3), normal(3, 4), normal(3, 4))
case(lambda nn: nn.BCELoss(), uniform(3, 4), uniform(3, 4))
case(lambda nn: nn.BCEWithLogitsLoss(), normal(3, 4), uniform(3, 4))
case(lambda nn: nn.KLDivLoss(reduction="batchmean"), log_simplex(3, 4), simplex(3, 4))
case(lambda nn: nn.KLDivLoss(log_target=True), log_simplex(3, 4), log_simplex(3, 4))

case(lambda nn: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), normal(5, 4))

# Containers that are no functions: made here, used in tests/test_nn.py.
CONTAINERS = {"ModuleList", "ModuleDict", "ParameterList"}


def draw(inputs: Any, rng: np.random.Generator) -> list[Any]:
    """The inputs as float64 or int64 arrays."""
    return [tuple(draw(x, rng)) if isinstance(x, tuple) else x(rng) for x in inputs]


def convert(inputs: Any, tensor: Callable[[np.ndarray], Any]) -> list[Any]:
    """The inputs as tensors."""
    return [
        tuple(convert(x, tensor)) if isinstance(x, tuple) else tensor(x) for x in inputs
    ]  # fmt: skip


def flat(outputs: Any) -> list[Any]:
    """What a layer returns, as a flat list of tensors."""
    if isinstance(outputs, tuple | list):
        return [t for output in outputs for t in flat(output)]
    return [outputs]
