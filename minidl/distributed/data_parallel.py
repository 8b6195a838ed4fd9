"""DataParallel: every rank has the whole network and a part of the batch.

A batch of N samples is cut over R ranks, n_r for rank r. Each computes the gradient g_r of the mean
loss over its own samples, and all need the gradient of the mean over the N:

    ∇ = (1/N) Σ_r n_r g_r                                                  (not (1/R) Σ_r g_r)

*Sums* are added up over the ranks, of gradients and of samples alike, and divided once. So parts of
different sizes come out right, empty ones too, and several passes for one step (`no_sync`).

Adding up takes time, and so does the backward pass; they go on side by side. The gradients lie in
*buckets* of some megabytes, last layers first, as the backward pass makes them. As soon as a bucket
is full its sum is on its way, while the pass goes on (Li et al. 2020, "PyTorch Distributed:
experiences on accelerating data parallel training").
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

import minidl.distributed as dist
from minidl import backend
from minidl.autograd import add_to_grad, after_backward, is_grad_enabled, written
from minidl.backend.random import default_generator
from minidl.distributed.communicator import CommunicationError, Communicator, Work
from minidl.nn.module import Module
from minidl.tensor import Handle, Tensor


class Bucket:
    """Gradients side by side in one array, that are added up over the ranks together.

    Attributes:
        numbers: which parameters' they are.
        flat: all of them, in their order; of float16 in float32, in which sums do not overflow.
        views: a view of `flat` for each, with its parameter's shape.
        missing: how many of them the backward pass under way has not made yet.
        work: the sum, when it is on its way.
    """

    def __init__(self, numbers: list[int], parameters: Sequence[Tensor]) -> None:
        first = parameters[numbers[0]]
        dtype = np.float32 if first.dtype == np.float16 else first.dtype
        sizes = [parameters[i].numel() for i in numbers]
        self.numbers = numbers
        self.flat = backend.to_device(np.zeros(sum(sizes), dtype), first.device)
        self.views = [
            self.flat[end - size : end].reshape(parameters[i].shape)
            for i, size, end in zip(numbers, sizes, np.cumsum(sizes))
        ]
        self.missing = len(numbers)
        self.work: Work | None = None

    def send(self, communicator: Communicator) -> None:
        self.work = communicator.allreduce(self.flat, async_op=True)

    def receive(self) -> None:
        assert self.work is not None
        self.work.wait()


class DataParallel(Module):
    """A network whose gradients are those of all ranks' samples together.

        dist.init()
        net = dist.DataParallel(net)
        for x, y in loader:                         # each rank its own: `DistributedSampler`
            loss = F.cross_entropy(net(x), y)       # the mean over these, as always
            optimizer.zero_grad(); loss.backward(); optimizer.step()

    After each `backward()`, `.grad` is the same on all ranks: that of the mean over all samples, as
    if one process had had the whole batch. (For 2 and 4 ranks it has the bits of one process that
    adds the parts' n_r g_r up pairwise; but NCCL has an order of its own.) How many samples a rank
    had is the first dimension of the network's first input. All ranks must call it and `backward()`
    equally often; which of the parameters they use is their affair, and what none has used has no
    gradient. (`minidl.grad` adds nothing up: it gives this rank's own.)

    At the start all ranks get rank 0's parameters and buffers, and from then on random numbers of
    their own: calls of rank r count from r · 2⁴⁰ on (`minidl.backend.random`). Alone, with one
    rank, this is the network and nothing else.

    Args:
        module: the network, on its device; the same on all ranks but for its values.
        communicator: of the ranks (default: all).
        bucket_cap_mb: megabytes (2²⁰ bytes) from which on a bucket is full; of the first bucket a
            quarter, that sending begins early.
        broadcast_buffers: give all ranks rank 0's buffers (the running statistics of batch norm)
            before each forward pass in training.
        check_finite: refuse gradients with infinities or NaNs. (False where something else deals
            with them, such as a loss scaler.)

    Raises:
        CommunicationError: the networks differ: which rank's, and in what.
        ValueError: no parameter requires a gradient, or one is in another DataParallel already, or
            bucket_cap_mb is not positive.
        FloatingPointError: of `backward()`: a gradient is not finite, and on which rank. No `.grad`
            is changed then, on any rank.
    """

    def __init__(
        self,
        module: Module,
        communicator: Communicator | None = None,
        *,
        bucket_cap_mb: float = 4.0,
        broadcast_buffers: bool = True,
        check_finite: bool = True,
    ) -> None:
        super().__init__()
        if bucket_cap_mb <= 0:
            raise ValueError(f"bucket_cap_mb is positive, got {bucket_cap_mb}")
        self.module = module
        # Its own, so that nothing else that ranks say to one another comes between the buckets.
        self.communicator = (communicator or dist.communicator()).split(0)
        self.broadcast_buffers, self.check_finite = broadcast_buffers, check_finite
        self.names = [name for name, p in module.named_parameters() if p.requires_grad]
        self.learned = [p for p in module.parameters() if p.requires_grad]
        if not self.learned:
            raise ValueError("DataParallel adds up gradients, and no parameter requires one")
        self.buckets: list[Bucket] = []
        self.syncing = True  # outside no_sync
        if self.communicator.world_size == 1:
            return

        check_alike(module, self.communicator)
        share([*module.parameters(), *module.buffers()], self.communicator)
        own_random_numbers(self.communicator)

        self.buckets = [Bucket(n, self.learned) for n in cut(self.learned, bucket_cap_mb)]
        self.place = {i: (b, v) for b in self.buckets for i, v in zip(b.numbers, b.views)}
        for i, (name, p) in enumerate(zip(self.names, self.learned)):
            if p.hooks and p.hooks.get("claim"):
                raise ValueError(f"{name} is in another DataParallel already: use that one")
            Handle(p, "claim", partial(self._take, i))

        # Of the passes since gradients were last added up: see `no_sync`.
        self.used = [False] * len(self.learned)  # which parameters have a gradient
        self.sums = [Tensor(self.place[i][1]) for i in range(len(self.learned))]  # Σ n_r g_r
        self.before: list[Tensor | None] = [None] * len(self.learned)  # their `.grad` until then
        self.samples = self.passes = 0
        # Of the pass under way:
        self.walking = False  # backward
        self.calls = 0  # forward passes so far
        self.sync = True
        self.batch = 0  # samples
        self.sent = 0  # buckets

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.buckets and is_grad_enabled():
            self.batch = batch_size(args, kwargs)
            self.calls += 1
            self.sync = self.syncing
            if self.walking:  # the last backward pass has failed
                for bucket in self.buckets[: self.sent]:
                    bucket.receive()
                self.walking = False
                self._close()
            if self.training and self.sync and self.broadcast_buffers:
                share(list(self.module.buffers()), self.communicator)
        return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within it, passes only add to this rank's sums; the first one outside adds up all.

            with net.no_sync():
                for x, y in parts[:-1]:
                    (loss(net(x), y) / len(parts)).backward()
            (loss(net(parts[-1]...)...) / len(parts)).backward()

        After K passes the gradient is K times the mean over all their samples, on whatever rank
        and in whichever pass they came. (Divide the loss by K, as always.) Until then `.grad`
        holds this rank's sum Σ n_r g_r: good for nothing but `zero_grad`, which starts anew.
        """
        before, self.syncing = self.syncing, False
        try:
            yield
        finally:
            self.syncing = before

    # The backward pass: gradients come one by one, the last layers' first -----------------------

    def _take(self, i: int, g: Any) -> None:
        """Add n_r g to parameter i's place in its bucket."""
        if isinstance(g, Tensor):
            raise RuntimeError(
                "DataParallel adds up numbers, not what they were computed from: for the gradient "
                "of a gradient use minidl.grad(..., create_graph=True) and backward() without it"
            )
        if not self.walking:
            self._begin()
        bucket, total = self.place[i]
        n = self.batch
        if self.used[i]:
            term = np.multiply(g, n, dtype=total.dtype)
        else:
            self.used[i], self.before[i] = True, self.learned[i].grad
            term = np.multiply(g, n, out=total, dtype=total.dtype)
        if n == 0:  # the mean over no samples may be NaN: it has no part in the sum
            term[...] = 0
        if term is not total:
            total += term
        bucket.missing -= 1
        self._send(full=True)

    def _begin(self) -> None:
        self.walking = True
        for i, p in enumerate(self.learned):  # `zero_grad` since the last pass: forget it
            self.used[i] = self.used[i] and p.grad is self.sums[i]
        if not any(self.used):
            self.samples = self.passes = 0
        self.samples += self.batch
        self.passes += 1
        for bucket in self.buckets:
            bucket.missing = len(bucket.numbers)
        self.sent = 0
        self.finite: list[Any] = []  # of each bucket; a GPU's answers are waited for at the end
        after_backward(self._finish)

    def _send(self, full: bool) -> None:
        """Send the buckets whose turn it is: all ranks send them in one order."""
        while self.sync and self.sent < len(self.buckets):
            bucket = self.buckets[self.sent]
            if full and bucket.missing:
                return
            for i, view in zip(bucket.numbers, bucket.views):
                if not self.used[i]:
                    view[...] = 0
            if self.check_finite:
                self.finite.append(finite(bucket.flat))
            bucket.send(self.communicator)
            self.sent += 1

    def _finish(self) -> None:
        """After the pass: wait for the sums, and divide."""
        self.walking = False
        if not self.sync:
            for i, p in enumerate(self.learned):
                if self.used[i]:
                    p.grad = self.sums[i]
            return
        self._send(full=False)

        # The last message: a row of numbers from each rank, and who has used which parameter.
        ranks, rank = self.communicator.world_size, self.communicator.rank
        word = np.zeros(4 * ranks + len(self.learned))
        rows = word[: 4 * ranks].reshape(ranks, 4)
        rows[rank] = self.samples, self.passes, self.calls, not all(self.finite)
        word[4 * ranks :] = self.used
        self.communicator.allreduce(word)
        for bucket in self.buckets:
            bucket.receive()
        self._close()

        samples, passes, calls, bad = rows.T
        if (passes != passes[0]).any() or (calls != calls[0]).any():
            raise CommunicationError(
                "ranks disagree: these gradients are of a different number of passes. Since the "
                f"start they called the network {in_words(calls)} times, and since gradients were "
                f"last added up backward() {in_words(passes)} times"
            )
        if bad.any():
            raise FloatingPointError(
                f"the gradient is not finite on rank {in_words(np.flatnonzero(bad))}"
                f"{self._where_not_finite()}. No .grad was changed"
            )
        n = float(samples.sum() / passes[0]) or 1.0
        for i, p in enumerate(self.learned):
            if word[4 * ranks + i]:
                mean = np.divide(self.place[i][1], n)
                add_to_grad(p, mean.astype(p.dtype, copy=False))

    def _close(self) -> None:
        """The sums are done with: parameters get back the `.grad` that they had before."""
        for i, p in enumerate(self.learned):
            if self.used[i] and p.grad is self.sums[i]:
                p.grad = self.before[i]
        self.used = [False] * len(self.learned)

    def _where_not_finite(self) -> str:
        """The sum has the NaNs of all ranks."""
        names = [name for i, name in enumerate(self.names) if not finite(self.place[i][1])]
        return f", of {', '.join(names[:5])}{', ...' * (len(names) > 5)}"


def own_random_numbers(communicator: Communicator) -> None:
    """Have each rank draw other random numbers than the others, though all have one seed."""
    default_generator.calls += communicator.rank << 40


def cut(parameters: Sequence[Tensor], cap_mb: float) -> list[list[int]]:
    """The numbers of the parameters of each bucket, from the last parameter to the first.

    A bucket is full when it has come to its size: so a layer's bias, small as it is, does not make
    a message of its own before a weight that is larger.
    """
    buckets: list[list[int]] = []
    room, kind = 0.0, None
    for i, p in reversed(list(enumerate(parameters))):
        if room <= 0 or (p.dtype, p.device) != kind:
            room = cap_mb if buckets else cap_mb / 4
            kind = p.dtype, p.device
            buckets.append([])
        buckets[-1].append(i)
        room -= p.numel() * p.element_size() / 2**20
    return buckets


def batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The first dimension of the first input."""
    for first in (*args, *kwargs.values()):
        if getattr(first, "shape", ()):
            return int(first.shape[0])
        if isinstance(first, list | tuple):
            return len(first)
        break
    raise TypeError(
        "DataParallel counts the samples of a batch by the first dimension of the network's first "
        "input: call it with a Tensor (N, ...)"
    )


def check_alike(module: Module, communicator: Communicator) -> None:
    """Refuse networks that differ between the ranks."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    mine = [f"{name}: {t.dtype} {t.shape}{', learned' * t.requires_grad}" for name, t in tensors]
    first, *others = communicator.all_gather_object(mine)
    for rank, theirs in enumerate(others, 1):
        if theirs != first:
            pairs = zip([*first, "nothing"], [*theirs, "nothing"])
            here, there = next(pair for pair in pairs if pair[0] != pair[1])
            raise CommunicationError(
                f"ranks disagree: the network of rank {rank} is another one than that of rank 0, "
                f"which has {here} where rank {rank} has {there}. All ranks must build the same"
            )


def share(tensors: Iterable[Tensor], communicator: Communicator, root: int = 0) -> None:
    """Give all ranks the values of rank `root`, in one message for each device."""
    devices: dict[str, list[Tensor]] = {}
    for t in tensors:
        devices.setdefault(t.device, []).append(t)
    for together in devices.values():
        xp = backend.array_module(together[0].array)
        arrays = [xp.asarray(t.array, order="C") for t in together]
        communicator.broadcast_all(arrays, root)
        for t, array in zip(together, arrays):
            if array is not t.array:  # a copy, in one piece
                t.array[...] = array
                written(t.array)


def finite(x: Any) -> Any:
    """Whether all numbers are finite: a bool; of a GPU's array one there, that is still computed.

    (The sum of squares says so in one pass, if it is.)
    """
    if not isinstance(x, np.ndarray):
        return np.isfinite(x).all()
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(np.vdot(x, x))) or bool(np.isfinite(x).all())


def in_words(numbers: Any) -> str:
    return ", ".join(f"{n:g}" for n in numbers)
