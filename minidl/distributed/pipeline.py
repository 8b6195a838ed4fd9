"""Pipeline: the layers of one network, cut into stages, one a rank (Huang et al. 2019, "GPipe").

    model = models.get("cnn")
    stages = dist.split_sequential(model, dist.world_size())
    pipeline = dist.Pipeline(stages, schedule="1f1b", micro_batches=8)
    optimizer = optim.SGD(pipeline.parameters(), lr=0.1)    # of this rank's stage
    for x, y in loader:
        optimizer.zero_grad()
        loss = pipeline.step(x, y, F.cross_entropy)         # there and back: what .backward() does
        optimizer.step()

Activations go to the next rank, their gradients come back. So that not one stage works while the
others wait, a batch is cut into micro-batches; `schedules.py` says who takes which when.

What is as in the whole network, and what is not:

- Loss and gradients are those of the whole batch (the mean over all its samples).
- *Batch norm* sees micro-batches: its statistics are of batch / M samples, and its running averages
  move M times a step, as in GPipe. Layer and group norm are not touched.
- *Dropout* draws for each micro-batch from one stream of random numbers, which travels with the
  activations: the masks are the same for any number of stages, and any schedule.
- A norm of all gradients (`clip_grad_norm_`) is a stage's own: sum the squares over ranks first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from minidl import backend
from minidl import distributed as dist
from minidl.autograd import no_grad
from minidl.backend.random import default_generator
from minidl.distributed.communicator import Communicator, Work
from minidl.distributed.data_parallel import own_random_numbers
from minidl.distributed.schedules import SCHEDULES, Forward
from minidl.distributed.tensor_parallel import full_state_dict
from minidl.distributed.timeline import Event, check_schedule
from minidl.nn import Module, Sequential
from minidl.tensor import Tensor

DTYPES = ("float32", "float64", "float16")  # of activations
STREAM = 1 << 24  # so many draws of random numbers a micro-batch may make


class Kept(NamedTuple):
    """What a stage keeps of a micro-batch between its forward and its backward pass."""

    input: Tensor
    output: Tensor


class Pipeline(Module):
    """A stage of a network, and the ranks that have the others.

    Args:
        stages: K modules, for K ranks; each takes the output of the one before, a single Tensor.
            Only this rank's is kept: None will do in the place of the others.
        schedule: "1f1b" (at most K micro-batches are kept at once), "gpipe" (all are), "naive"
            (one, and one stage works at a time).
        micro_batches: M, into how many a batch is cut (fewer if it has fewer samples). Their sizes
            differ by one sample at most. The stages are idle (K - 1) / (M + K - 1) of the time.
        communicator: of the K ranks; None: all ranks there are.
        data: of the ranks that have this stage too, from the same seed, for other samples (`Mesh`).
            Loss and gradients are then those of all their samples together, and from here on each
            draws random numbers of its own, as in `DataParallel`. None: there are no such ranks.

    Attributes:
        stage: this rank's module.
        index: its number.
        most_held: of how many micro-batches this stage kept the activations at once, in the last
            step.

    Raises:
        ValueError: not as many stages as ranks; a parameter that is in two stages; an unknown
            schedule; no micro-batch.
        TypeError: this rank's stage is no Module.
    """

    def __init__(
        self,
        stages: Sequence[Module | None],
        schedule: str = "1f1b",
        micro_batches: int = 4,
        communicator: Communicator | None = None,
        data: Communicator | None = None,
    ) -> None:
        super().__init__()
        self.communicator = c = communicator or dist.communicator()
        self.data = data
        if data is not None:
            own_random_numbers(data)
        check_schedule(schedule)
        if len(stages) != c.world_size:
            raise ValueError(
                f"a pipeline has one stage a rank: {len(stages)} stages were given on rank "
                f"{c.rank}, there are {c.world_size} ranks"
            )
        if micro_batches < 1:
            raise ValueError(f"micro_batches is at least 1, got {micro_batches}")
        owner: dict[Tensor, int] = {}
        for i, module in enumerate(stages):
            for name, p in module.named_parameters() if module is not None else ():
                if owner.setdefault(p, i) != i:
                    raise ValueError(
                        f"parameter {name!r} of stage {i} is in stage {owner[p]} too: on two "
                        "ranks they would drift apart. Put the layers that share it in one stage"
                    )
        stage = stages[c.rank]
        if not isinstance(stage, Module):
            raise TypeError(f"stage {c.rank} is a Module on rank {c.rank}, got {stage!r}")
        self.stage, self.index, self.stages = stage, c.rank, c.world_size
        self.schedule, self.micro_batches = schedule, micro_batches
        self.most_held = 0
        self._events: list[Event] = []
        self._sent: dict[int, Work] = {}

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.stages - 1

    def step(
        self, input: Tensor | None, target: Any, loss_function: Callable[[Any, Any], Tensor]
    ) -> float:
        """Take a batch forward and backward; gradients are added to each parameter's `.grad`.

        All ranks call it. Only the first looks at the input and only the last at the target (the
        others may give None); they must have equally many samples.

        Args:
            input: (N, ...).
            target: (N, ...).
            loss_function: ``(output, target) -> the mean over their samples``, as F.cross_entropy.
                (A mean by other weights, such as `ignore_index`, is taken within a micro-batch.)

        Returns:
            The mean of the loss over the N samples (of all `data` ranks), on every rank.

        Raises:
            ValueError: ranks have different numbers of samples, or none.
            TypeError: a stage's output is no floating Tensor.
            Exception: what a stage raised, with a note where.
        """
        n, bounds = self._cut(input, target, needs_target=True)
        before = self._set_aside()
        if self.data is not None:
            n = int(self.data.allreduce(np.array(n)))
        kept: dict[int, Kept] = {}
        total, self.most_held, self._events = np.zeros(1), 0, []
        began = time.perf_counter()
        random = default_generator.state_dict()
        for instruction in SCHEDULES[self.schedule](self.index, self.stages, len(bounds)):
            kind, m = type(instruction).__name__.lower(), instruction.micro_batch
            a, b = bounds[m]
            try:
                if isinstance(instruction, Forward):
                    x, state = self._input(input, m, a, b, random)
                    start = time.perf_counter()
                    y, state = self._run(x, state)
                    if self.is_last:
                        y = loss_function(y, target[a:b]) * ((b - a) / n)
                        total += y.item()
                    kept[m] = Kept(x, y)
                    self.most_held = max(self.most_held, len(kept))
                else:
                    x, y = kept.pop(m)
                    g = None if self.is_last else self._received(y, self.index + 1)
                    start = time.perf_counter()
                    if y.requires_grad:  # it does not where all of the stages so far are frozen
                        y.backward(g)
                end = time.perf_counter()
                self._events.append(Event(self.index, kind, m, start - began, end - began))
                if isinstance(instruction, Forward):
                    if not self.is_last:
                        self._send_activation(y, state)
                elif not self.is_first:
                    zeros = backend.array_module(x.array).zeros_like
                    self._send(zeros(x.array) if x.grad is None else x.grad.array, self.index - 1)
                del x, y
            except Exception as error:
                error.add_note(
                    f"(in stage {self.index} of {self.stages}: {kind} of micro-batch {m})"
                )
                raise
        self._finish(random, len(bounds))
        self.communicator.broadcast(total, root=self.stages - 1)
        self._add_up(before, total)
        return float(total[0])

    def forward(self, input: Tensor | None) -> Tensor:
        """The whole network's output, on every rank: (N, ...). For evaluation: nothing is recorded.

        Args:
            input: (N, ...); only the first rank looks at it.
        """
        _, bounds = self._cut(input, None, needs_target=False)
        random = default_generator.state_dict()
        outputs = []
        with no_grad():
            for m, (a, b) in enumerate(bounds):
                x, state = self._input(input, m, a, b, random)
                y, state = self._run(x, state)
                if self.is_last:
                    outputs.append(backend.to_device(y.array, "cpu"))
                else:
                    self._send_activation(y, state)
        self._finish(random, len(bounds))
        header = np.zeros(HEADER, np.int64)
        whole = np.concatenate(outputs) if outputs else None
        if whole is not None:
            header = described(whole, random)
        last = self.stages - 1
        array, _ = empty_like_described(self.communicator.broadcast(header, root=last), "cpu")
        if whole is not None:
            array[...] = whole
        self.communicator.broadcast(array, root=last)
        return Tensor(backend.to_device(array, self._device()))

    def timeline(self) -> list[Event]:
        """What all stages did in the last step (all ranks call it). See `timeline.draw`."""
        return [e for events in self.communicator.all_gather_object(self._events) for e in events]

    def full_state_dict(self) -> dict[str, np.ndarray]:
        """The whole network's state, on every rank (all call it): the union of the stages'.

        Stages of `split_sequential` have the names of the network that was split, which loads it.

        Raises:
            ValueError: two stages have the same name.
        """
        whole: dict[str, np.ndarray] = {}
        own = full_state_dict(self.stage)
        shapes = [(name, a.shape, a.dtype.str) for name, a in own.items()]
        for root, entries in enumerate(self.communicator.all_gather_object(shapes)):
            for name, shape, dtype in entries:
                if name in whole:
                    raise ValueError(f"stage {root} and one before it both have a {name!r}")
                mine = own[name] if root == self.index else np.empty(shape, dtype)
                whole[name] = self.communicator.broadcast(mine, root)
        return whole

    # Pieces of a step ---------------------------------------------------------------------------

    def _cut(
        self, input: Any, target: Any, needs_target: bool
    ) -> tuple[int, list[tuple[int, int]]]:
        """The batch size, agreed on by all ranks, and where each micro-batch begins and ends."""
        mine = [-1 if x is None else len(x) for x in (input, target)]
        sizes = self.communicator.all_gather(np.array(mine)).tolist()
        if sizes[0][0] < 0 or (needs_target and sizes[-1][1] < 0):
            raise ValueError(
                f"rank 0 must have the input, and rank {self.stages - 1} the target of a step"
            )
        if len({n for pair in sizes for n in pair if n >= 0}) > 1 or sizes[0][0] == 0:
            raise ValueError(
                "all ranks must have the same number of samples, at least one: "
                + "; ".join(f"rank {r}: {a} inputs, {b} targets" for r, (a, b) in enumerate(sizes))
                + " (-1: None)"
            )
        n = sizes[0][0]
        m = min(self.micro_batches, n)
        return n, [(n * i // m, n * (i + 1) // m) for i in range(m)]

    def _input(
        self, input: Any, m: int, a: int, b: int, random: dict[str, int]
    ) -> tuple[Tensor, dict[str, int]]:
        """A micro-batch as this stage gets it, and the state of its random numbers."""
        if self.is_first:
            return input[a:b], {**random, "calls": random["calls"] + m * STREAM}
        header = self.communicator.recv(np.zeros(HEADER, np.int64), self.index - 1)
        array, state = empty_like_described(header, self._device())
        x = Tensor(self.communicator.recv(array, self.index - 1))
        return x.requires_grad_(), state

    def _run(self, x: Tensor, state: dict[str, int]) -> tuple[Tensor, dict[str, int]]:
        """The stage's output, with random numbers from where the stage before stopped."""
        before = default_generator.state_dict()
        default_generator.load_state_dict(state)
        try:
            y = self.stage(x)
            state = default_generator.state_dict()
        finally:
            default_generator.load_state_dict(before)
        if not isinstance(y, Tensor) or y.dtype.name not in DTYPES:
            found = f"{y.dtype} numbers" if isinstance(y, Tensor) else f"a {type(y).__name__}"
            raise TypeError(
                f"stage {self.index} (rank {self.index}) must make a Tensor of one of "
                f"{', '.join(DTYPES)}, which the next stage takes; it made {found}"
            )
        return y, state

    def _finish(self, random: dict[str, int], micro_batches: int) -> None:
        """Wait for what is under way, and go on to random numbers that nobody has drawn."""
        for work in self._sent.values():
            work.wait()
        self._sent.clear()
        calls = random["calls"] + micro_batches * STREAM
        default_generator.load_state_dict({**random, "calls": calls})

    def _set_aside(self) -> list[tuple[Tensor, Tensor | None]]:
        """The gradients of before, apart from those that will be summed over `data`."""
        if self.data is None:
            return []
        before: list[tuple[Tensor, Tensor | None]] = []
        before += [(p, p.grad) for p in self.stage.parameters() if p.requires_grad]
        for p, _ in before:
            p.grad = None
        return before

    def _add_up(self, before: list[tuple[Tensor, Tensor | None]], total: Any) -> None:
        """Sum over `data`: each rank has weighted its losses by 1 / the number of all samples."""
        if self.data is None:
            return
        sums = [total]
        for p, _ in before:
            xp = backend.array_module(p.array)
            g = xp.zeros_like(p.array) if p.grad is None else p.grad.array
            sums.append(xp.array(g, order="C"))
        works = [self.data.allreduce(array, async_op=True) for array in sums]
        for work in works:
            work.wait()
        for (p, old), array in zip(before, sums[1:]):
            g = Tensor(array)
            p.grad = g if old is None else old + g

    # Between ranks ------------------------------------------------------------------------------

    def _send_activation(self, y: Tensor, state: dict[str, int]) -> None:
        self._send(described(y.array, state), self.index + 1)
        self._send(y.array, self.index + 1)

    def _send(self, array: Any, dest: int) -> None:
        """Send without waiting; one message to each neighbour may be under way."""
        if dest in self._sent:
            self._sent[dest].wait()
        self._sent[dest] = self.communicator.send(array, dest, async_op=True)

    def _received(self, like: Tensor, source: int) -> Tensor:
        array = backend.empty(like.shape, like.dtype, like.device)
        return Tensor(self.communicator.recv(array, source))

    def _device(self) -> str:
        """Where this stage's parameters are, and what comes shall be."""
        return next((p.device for p in self.stage.parameters()), "cpu")


# An activation's shape and dtype go ahead of it, since the last micro-batches may be smaller, with
# the state of the random numbers: [seed, calls, dtype, ndim, shape ...].
HEADER = 4 + 8


def described(array: Any, random: dict[str, int]) -> np.ndarray:
    header = np.zeros(HEADER, np.int64)
    header[:4] = random["seed"], random["calls"], DTYPES.index(array.dtype.name), array.ndim
    header[4 : 4 + array.ndim] = array.shape
    return header


def empty_like_described(header: np.ndarray, device: str) -> tuple[Any, dict[str, int]]:
    seed, calls, dtype, ndim, *shape = header.tolist()
    array = backend.empty(shape[:ndim], DTYPES[dtype], device)
    return array, {"seed": seed, "calls": calls}


# Cutting a network ------------------------------------------------------------------------------


def split_sequential(
    model: Sequential, stages: int, costs: Sequence[float] | None = None
) -> list[Sequential]:
    """Cut a Sequential into stages so that the dearest of them is as cheap as it can be.

    Args:
        model: its layers keep their names, so that the stages' state_dicts together are its own.
        stages: K.
        costs: of each layer, in any unit (`layer_costs` counts operations); None: its number of
            parameters.

    Raises:
        ValueError: fewer layers than stages, or not a cost for each layer.
    """
    layers = list(model)
    if costs is None:
        costs = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    if len(costs) != len(layers):
        raise ValueError(f"{len(layers)} layers need {len(layers)} costs, got {len(costs)}")
    ends = balance(costs, stages)
    return [model[a:b] for a, b in zip([0, *ends], ends)]


def balance(costs: Sequence[float], parts: int) -> list[int]:
    """Where each part ends, if a row of costs is cut so that the largest sum is the smallest.

    best[k][i], the largest sum if the first i are cut into k, is the minimum over j < i of
    max(best[k - 1][j], costs j to i). Of equal cuts it is the first.

    Raises:
        ValueError: fewer costs than parts.
    """
    n = len(costs)
    if not 1 <= parts <= n:
        raise ValueError(f"{n} layers can be cut into 1 to {n} stages, not {parts}")
    sums = np.concatenate([[0.0], np.cumsum(costs)])
    best = np.full((parts + 1, n + 1), np.inf)
    cut = np.zeros((parts + 1, n + 1), int)
    best[0, 0] = 0.0
    for k in range(1, parts + 1):
        for i in range(k, n + 1):
            largest = np.maximum(best[k - 1, :i], sums[i] - sums[:i])
            cut[k, i] = np.argmin(largest)
            best[k, i] = largest[cut[k, i]]
    ends = [n]
    for k in range(parts, 1, -1):
        ends.insert(0, int(cut[k, ends[0]]))
    return ends
