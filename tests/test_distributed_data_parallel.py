"""Data parallelism: many ranks learn what one process learns, to the bit."""

from __future__ import annotations

import textwrap
import zlib
from pathlib import Path

import numpy as np
import pytest

import minidl
import minidl.nn.functional as F
from minidl import distributed as dist
from minidl import nn, optim
from minidl.backend.random import default_generator
from minidl.distributed import data_parallel
from minidl.distributed.communicator import tree_sum
from tests.test_distributed import (
    mpirun,
    needs_mpi,
    refused_simulated,
    refused_under_mpirun,
    script,
)

STEPS = 20
EVEN = [16] * STEPS
UNEVEN = [13, 7, 16, 1, 2] * (STEPS // 5)  # a part of one sample may be empty


def mlp():
    return [nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 5)]


def cnn():
    return [
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 16), nn.BatchNorm1d(16), nn.Linear(16, 5),
    ]  # fmt: skip


def dropping():
    return [nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 5)]


def sgd(p):
    return optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3)


def adam(p):
    return optim.Adam(p, 3e-3)


CASES = {
    "SGD": (mlp, sgd, EVEN),
    "Adam": (mlp, adam, EVEN),
    "dropout": (dropping, sgd, EVEN),
    "batch norm": (cnn, adam, EVEN),
    "uneven": (mlp, adam, UNEVEN),
}


def batches(sizes, dtype=np.float32):
    rng = np.random.default_rng(0)
    for n in sizes:
        yield rng.normal(size=(n, 64)).astype(dtype), rng.integers(0, 5, n)


def build(layers):
    minidl.manual_seed(1)
    return nn.Sequential(*layers())


def digest(net):
    return zlib.crc32(b"".join(t.array.tobytes() for t in net.state_dict().values()))


def loss_of(logits, y):
    with np.errstate(invalid="ignore"):  # of no samples the mean is NaN
        return F.cross_entropy(logits, minidl.tensor(y))


def train_as_a_rank(case, sync_batch_norm=True):
    """The digest of the network after each step."""
    layers, optimizer_of, sizes = CASES[case]
    ranks = dist.init()
    net = build(layers)
    if sync_batch_norm:
        net = dist.SyncBatchNorm.convert_sync_batchnorm(net)
    net = dist.DataParallel(net, bucket_cap_mb=0.01)
    optimizer = optimizer_of(net.parameters())
    digests = []
    for x, y in batches(sizes):
        x, y = (a[ranks.rank :: ranks.world_size] for a in (x, y))
        optimizer.zero_grad()
        loss_of(net(minidl.tensor(x)), y).backward()
        optimizer.step()
        digests.append(digest(net.module))
    return digests


# One process that goes through the same parts, one after the other -----------------------------
#
# Layer by layer, with a copy of the network for each part. Sums are made in a tree's order. Where
# batch norm needs them, on the way back as well: whoever uses the sum has a leaf of a tree.


def add_up(xs):
    """Tensors added pairwise, for each a copy of the sum."""
    level = list(xs)
    while len(level) > 1:
        pairs = [a + b for a, b in zip(level[::2], level[1::2])]
        level = pairs + level[2 * len(pairs) :]

    def copies(total, n):
        if n == 1:
            return [total.clone()]
        half = 1 << (n - 1).bit_length() - 1
        return copies(total.clone(), half) + copies(total.clone(), n - half)

    return copies(level[0], len(xs))


def batch_norm(layers, xs):
    """Over all parts."""
    dims = (0, *range(2, xs[0].ndim))
    along = (1, -1) + (1,) * (xs[0].ndim - 2)
    m = sum(x.numel() for x in xs) / xs[0].shape[1]
    means = [s / m for s in add_up([x.sum(dims) for x in xs])]
    away = [x - mean.reshape(along) for x, mean in zip(xs, means)]
    vars_ = [s / m for s in add_up([(a * a).sum(dims) for a in away])]
    out = []
    for layer, x, mean, var in zip(layers, xs, means, vars_):
        layer.num_batches_tracked.array += 1
        F.follow(layer.running_mean, mean.array, layer.momentum)
        F.follow(layer.running_var, var.array * (m / (m - 1)), layer.momentum)
        out.append(F.rescale(x, mean, var, layer.weight, layer.bias, layer.eps))
    return out


def train_in_one_process(case, n):
    """The digest after each step, with every batch cut into n parts."""
    layers, optimizer_of, sizes = CASES[case]
    nets = [build(layers) for _ in range(n)]
    calls = [default_generator.calls + (r << 40) for r in range(n)]
    optimizer = optimizer_of(nets[0].parameters())
    digests = []
    for x, y in batches(sizes):
        for net in nets[1:]:
            net.load_state_dict(nets[0].state_dict())
        parts = [(x[r::n], y[r::n]) for r in range(n) if r < len(x)]
        xs = [minidl.tensor(part) for part, _ in parts]
        for row in zip(*(list(net.children()) for net in nets[: len(parts)])):
            if isinstance(row[0], nn.BatchNorm1d | nn.BatchNorm2d):
                xs = batch_norm(row, xs)
                continue
            for r, layer in enumerate(row):
                default_generator.calls = calls[r]
                xs[r] = layer(xs[r])
                calls[r] = default_generator.calls
        losses = [loss_of(logits, part) for logits, (_, part) in zip(xs, parts)]
        sum(losses[1:], losses[0]).backward()
        for ps in zip(*(net.parameters() for net in nets)):
            sums = [p.grad.array * len(part) for p, (part, _) in zip(ps, parts)]
            sums += [np.zeros(ps[0].shape, ps[0].dtype)] * (n - len(parts))
            for p in ps:
                p.grad = None
            ps[0].grad = minidl.Tensor(tree_sum(sums) / len(x))
        optimizer.step()
        optimizer.zero_grad()
        digests.append(digest(nets[0]))
    return digests


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_the_bits_of_one_process(case, n):
    digests = dist.simulate(lambda: train_as_a_rank(case), n)
    assert all(d == digests[0] for d in digests)  # all ranks are equal after each step
    assert digests[0] == train_in_one_process(case, n)


@pytest.mark.parametrize("case", CASES)
def test_three_ranks(case):
    """On MPI the order of three terms varies; here it is that of the one process again."""
    digests = dist.simulate(lambda: train_as_a_rank(case), 3)
    assert all(d == digests[0] for d in digests)
    if case != "batch norm":  # whose sums over ranks are divided by parts of 5 and 6 samples
        assert digests[0] == train_in_one_process(case, 3)


@pytest.mark.parametrize("case", ["SGD", "batch norm", "uneven"])
@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_the_numbers_of_one_process_with_the_whole_batch(case, n):
    """In float64, to 1e-12: gradients and running statistics, whatever the parts."""
    layers, _, sizes = CASES[case]
    sizes = [13, 16, 2, 6] if case == "batch norm" else sizes[:5]  # with 2, ranks are empty

    def gradients():
        ranks = dist.init()
        net = dist.SyncBatchNorm.convert_sync_batchnorm(build(layers).double())
        net = dist.DataParallel(net, bucket_cap_mb=0.01)
        for x, y in batches(sizes, np.float64):
            x, y = (a[ranks.rank :: ranks.world_size] for a in (x, y))
            loss_of(net(minidl.tensor(x)), y).backward()
        return [t.array for t in (*(p.grad for p in net.parameters()), *net.buffers())]

    (alone,) = dist.simulate(gradients, 1)
    for found in dist.simulate(gradients, n):
        for a, b in zip(alone, found, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


# What is often got wrong must not go unnoticed.


def average_for_sum(monkeypatch):
    monkeypatch.setattr(data_parallel, "batch_size", lambda args, kwargs: 1)


def dropped_bucket(monkeypatch):
    send = data_parallel.Bucket.send

    def send_some(self, communicator):
        send(self, communicator)
        if 0 in self.numbers:  # the last one
            self.host = self.flat.copy()
            self.receive = lambda: None
            self.flat = self.host

    monkeypatch.setattr(data_parallel.Bucket, "send", send_some)


def double_scaling(monkeypatch):
    receive = data_parallel.Bucket.receive

    def receive_and_divide(self):
        receive(self)
        self.flat /= 2

    monkeypatch.setattr(data_parallel.Bucket, "receive", receive_and_divide)


def local_batch_norm(monkeypatch):
    monkeypatch.setattr(dist.SyncBatchNorm, "convert_sync_batchnorm", lambda net: net)


@pytest.mark.parametrize(
    ("mutation", "case"),
    [(average_for_sum, "uneven"), (dropped_bucket, "SGD"), (double_scaling, "SGD"),
     (local_batch_norm, "batch norm")],
)  # fmt: skip
def test_mutations_are_noticed(monkeypatch, mutation, case):
    right = train_in_one_process(case, 2)
    mutation(monkeypatch)
    assert all(d != right for d in dist.simulate(lambda: train_as_a_rank(case), 2))


# Several passes, and parameters that are not used ------------------------------------------------


def test_no_sync_adds_passes_up():
    """K passes of any sizes on any rank: K times the mean over all their samples."""
    sizes = [[5, 0, 3], [2, 4, 1]]  # of rank 0's and rank 1's passes
    xs = np.random.default_rng(0).normal(size=(2, 3, 5, 64)).astype(np.float32)
    y = np.arange(5)

    def work():
        net = dist.DataParallel(build(mlp), bucket_cap_mb=0.01)
        rank, sent = dist.rank(), net.communicator.calls
        parts = [(xs[rank, k, :n], y[:n]) for k, n in enumerate(sizes[rank])]
        with net.no_sync():
            for part, labels in parts[:2]:
                loss_of(net(minidl.tensor(part)), labels).backward()
        assert net.communicator.calls == sent
        part, labels = parts[2]
        loss_of(net(minidl.tensor(part)), labels).backward()
        return [p.grad.array for p in net.parameters()]

    net = build(mlp)
    whole = [(xs[r, k, :n], y[:n]) for r in range(2) for k, n in enumerate(sizes[r])]
    x, labels = (np.concatenate(a) for a in zip(*whole))
    (3 * loss_of(net(minidl.tensor(x)), labels)).backward()
    for found in dist.simulate(work, 2):
        for p, g in zip(net.parameters(), found, strict=True):
            np.testing.assert_allclose(g, p.grad.array, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_fewer_samples_than_passes():
    """One sample in three passes: K times the mean is 3 times its gradient."""

    def work():
        net = dist.DataParallel(nn.Linear(2, 1))
        with np.errstate(invalid="ignore", divide="ignore"):
            for n in (0, 1 - dist.rank()):
                with net.no_sync():
                    net(minidl.ones(n, 2)).mean().backward()
            net(minidl.ones(0, 2)).mean().backward()
        return net.module.bias.grad.tolist()

    assert dist.simulate(work, 2) == [[3.0]] * 2


def test_a_pass_that_failed_drops_those_before_it():
    def work():
        net = dist.DataParallel(build(mlp))
        x = minidl.ones(3, 64)
        net(x).mean().backward()
        right = [p.grad for p in net.parameters()]
        with net.no_sync():
            net(x).mean().backward()
            handle = net.module[0].bias.register_hook(lambda g: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                net(x).mean().backward()
            handle.remove()
        net(x)
        assert all(p.grad is g for p, g in zip(net.parameters(), right))
        net.zero_grad()
        net(x).mean().backward()
        return all((p.grad == g).all() for p, g in zip(net.parameters(), right))

    assert dist.simulate(work, 2) == [True, True]


def test_zero_grad_forgets_passes_that_were_not_added_up():
    x = np.ones((4, 64), np.float32)

    def gradients(before):
        net = dist.DataParallel(build(mlp))
        if before:
            with net.no_sync():
                (100 * net(minidl.tensor(x[:3])).sum()).backward()
            assert all(p.grad is not None for p in net.parameters())
            net.zero_grad()
        net(minidl.tensor(x)).mean().backward()
        return [p.grad.array.tobytes() for p in net.parameters()]

    assert dist.simulate(lambda: gradients(True), 2) == dist.simulate(lambda: gradients(False), 2)


def test_gradients_accumulate_as_ever():
    """Without zero_grad, each pass adds its mean to what was there; a hook sees what is added."""
    x = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)

    def work():
        net = dist.DataParallel(build(mlp))
        bias = net.module[0].bias
        seen = []
        bias.register_hook(lambda g: g * 2)
        bias.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.array.copy()))
        for _ in range(2):
            net(minidl.tensor(x[dist.rank() :: 2])).mean().backward()
        np.testing.assert_array_equal(2 * seen[0], seen[1])
        return seen[0]

    first, second = dist.simulate(work, 2)
    np.testing.assert_array_equal(first, second)
    net = build(mlp)
    net(minidl.tensor(x)).mean().backward()
    np.testing.assert_allclose(first, 2 * net[0].bias.grad.array, rtol=1e-5, atol=1e-7)


class Branches(nn.Module):
    """Each rank goes another way; nobody goes the last one."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList([nn.Linear(2, 1) for _ in range(3)])
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, x, way):
        return self.branches[way](self.frozen(x))


def test_unused_and_frozen_parameters():
    def work():
        minidl.manual_seed(0)
        net = dist.DataParallel(Branches(), bucket_cap_mb=1e-6)
        assert len(net.buckets) == 6
        for _ in range(2):
            net.zero_grad()
            net(minidl.ones(3, 2), dist.rank()).mean().backward()
        return [p.grad if p.grad is None else p.grad.tolist() for p in net.parameters()]

    first, second = dist.simulate(work, 2)
    assert first == second
    assert first[1] == first[3] == [0.5]  # half of the samples
    assert first[4:] == [None] * 4


def test_buckets_are_sent_while_the_pass_goes_on():
    def work():
        net = dist.DataParallel(build(mlp), bucket_cap_mb=0.002)
        order = []
        for i, p in enumerate(net.parameters()):
            p.register_hook(lambda g, i=i: order.append(i))
        allreduce = net.communicator.allreduce

        def noting(x, **how):
            order.append(f"sum of {x.size}")
            return allreduce(x, **how)

        net.communicator.allreduce = noting
        net(minidl.ones(3, 64)).mean().backward()
        return order

    # The last layer and the bias before it; a weight of 0.0022 MB; the bias and the larger weight.
    buckets = data_parallel.cut(list(build(mlp).parameters()), 0.002)
    assert buckets == [[5, 4, 3], [2], [1, 0]]
    order = dist.simulate(work, 2)[0]
    assert order.index("sum of 149") < order.index(0)
    assert len(order) == 6 + 3 + 1


def test_float16_sums_do_not_overflow():
    def work():
        net = dist.DataParallel(nn.Linear(2, 1, bias=False).half())
        out = net(minidl.ones(1000, 2, dtype=minidl.float16))
        (out * 300).mean(0).sum().backward()  # in float16 1000 times 300 is infinite
        assert net.module.weight.grad.dtype == np.float16
        return net.module.weight.grad.tolist()

    assert dist.simulate(work, 2) == [[[300, 300]]] * 2


# Alone, and what is refused -----------------------------------------------------------------


def test_alone_it_is_the_network():
    dist.init()
    net, same = build(dropping), build(dropping)
    parallel = dist.DataParallel(net)
    x = minidl.ones(4, 64)
    minidl.manual_seed(0)
    parallel(x).mean().backward()
    minidl.manual_seed(0)
    same(x).mean().backward()
    assert all((p.grad == q.grad).all() for p, q in zip(net.parameters(), same.parameters()))
    assert list(parallel.state_dict()) == [f"module.{name}" for name in net.state_dict()]
    with parallel.no_sync():
        pass


def test_the_start():
    """All ranks get rank 0's parameters and buffers, and random numbers of their own."""

    def work():
        minidl.manual_seed(dist.rank())
        net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        net[1].running_mean.array += dist.rank()
        net = dist.DataParallel(net)
        minidl.manual_seed(0)
        state = digest(net)
        net(minidl.randn(4, 2) + dist.rank())  # running statistics go different ways ...
        net(minidl.zeros(4, 2))  # ... and are rank 0's again, and changed in the same way
        return state, digest(net), net.module[1].num_batches_tracked.item()

    def draw():
        minidl.manual_seed(3)
        dist.DataParallel(nn.Linear(1, 1))
        return minidl.rand(1).item(), default_generator.seed

    assert len(set(dist.simulate(work, 3))) == 1
    drawn = dist.simulate(draw, 3)
    assert len(set(drawn)) == 3 and {seed for _, seed in drawn} == {3}


def test_bad_arguments():
    dist.init()
    net = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="no parameter requires"):
        dist.DataParallel(nn.ReLU())
    with pytest.raises(ValueError, match="positive"):
        dist.DataParallel(net, bucket_cap_mb=0)

    def twice():
        dist.DataParallel(dist.DataParallel(nn.Linear(2, 1)))

    def of_no_tensor():
        dist.DataParallel(nn.Linear(2, 1))(3.0)

    def gradient_of_a_gradient():
        net = dist.DataParallel(nn.Linear(2, 1))
        (net(minidl.ones(3, 2)) ** 2).mean().backward(create_graph=True)

    for function, error, message in [
        (twice, ValueError, "module.weight is in another DataParallel"),
        (of_no_tensor, TypeError, "Tensor \\(N, ...\\)"),
        (gradient_of_a_gradient, RuntimeError, "minidl.grad"),
    ]:
        with pytest.raises(error, match=message):
            dist.simulate(function, 2)


def test_a_gradient_that_was_refused_changes_nothing():
    def work():
        net = dist.DataParallel(nn.Linear(2, 1))
        x = minidl.ones(3, 2)
        net(x).mean().backward()
        before = net.module.weight.grad

        @np.errstate(invalid="ignore")
        def infinite():
            (net(x) * (np.inf if dist.rank() else 1)).mean().backward()

        with pytest.raises(FloatingPointError, match="on rank 1, of weight, bias"):
            infinite()
        assert net.module.weight.grad is before
        net.zero_grad()
        net(x).mean().backward()  # and life goes on
        assert (net.module.weight.grad == before).all()
        net.check_finite = False
        infinite()
        return np.isinf(net.module.weight.grad.array).all()

    assert dist.simulate(work, 2) == [True, True]


def test_after_a_backward_pass_that_failed():
    def work():
        net = dist.DataParallel(build(mlp), bucket_cap_mb=0.01)
        x, right = minidl.ones(3, 64), []
        for fails in (False, True, False):
            net.zero_grad()
            out = net(x)
            if fails:
                out.register_hook(lambda g: None)
                handle = net.module[0].weight.register_hook(lambda g: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    out.mean().backward()
                handle.remove()
            else:
                out.mean().backward()
                right.append([p.grad.array.tobytes() for p in net.parameters()])
        return right[0] == right[1]

    assert dist.simulate(work, 2) == [True, True]


WRONG = {
    "NaN on one rank": (
        """
        if c.rank == 1:
            x.array[0, 0] = np.nan
        net(x).mean().backward()
        """,
        ["FloatingPointError", "not finite on rank 1, of 0.weight, 1.weight"],
    ),
    "another network on one rank": (
        "dist.DataParallel(nn.Sequential(nn.Linear(2, 3 + c.rank), nn.Linear(3 + c.rank, 1)))",
        ["network of rank 1.*rank 0, which has 0.weight: float32 .3, 2., learned where rank 1 has "
         "0.weight: float32 .4, 2."],
    ),
    "a layer more on one rank": (
        "dist.DataParallel(nn.Sequential(*[nn.Linear(2, 2) for _ in range(1 + c.rank)]))",
        ["which has nothing where rank 1 has 1.weight"],
    ),
    "an exception on one rank": (
        """
        if c.rank == 1:
            x = minidl.ones(4, 3)
        net(x).mean().backward()
        """,
        ["expected|shape|\\(4, 3\\)", "rank 1 of 2"],
    ),
    "a pass without backward on one rank": (
        """
        for step in range(3):
            loss = net(x).mean()
            if (step, c.rank) != (1, 0):
                loss.backward()
        """,
        ["called the network 3, 2 times, and .* backward\\(\\) 1, 1 times"],
    ),
    "a pass more in no_sync on one rank": (
        """
        for step in range(c.rank):
            with net.no_sync():
                net(x).mean().backward()
        net(x).mean().backward()
        """,
        ["called the network 1, 2 times, and .* backward\\(\\) 1, 2 times"],
    ),
    "a step less on one rank": (
        """
        for step in range(3 - c.rank):
            net(x).mean().backward()
        """,
        ["no rank can go on", "rank 0 waits in allreduce.*:7", "rank 1 has ended"],
    ),
    "one goes on to something else": (
        """
        for step in range(3 - c.rank):
            net(x).mean().backward()
        c.barrier()
        """,
        ["no rank can go on", "rank 0 waits in allreduce.*:7", "rank 1 waits in barrier.*:8"],
    ),
}  # fmt: skip

HEAD = """
import minidl; from minidl import nn
minidl.manual_seed(0)
net = dist.DataParallel(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))); x = minidl.ones(4, 2)
"""


def whole(body):
    return script(HEAD) + textwrap.dedent(body).lstrip("\n")


@pytest.mark.parametrize("case", WRONG)
def test_refused_simulated(case):
    body, patterns = WRONG[case]
    refused_simulated(whole(body), patterns)


@needs_mpi
@pytest.mark.mpi
@pytest.mark.parametrize("case", WRONG)
def test_refused_under_mpirun(case):
    body, patterns = WRONG[case]
    refused_under_mpirun(whole(body), patterns)


@needs_mpi
@pytest.mark.mpi
@pytest.mark.parametrize("n", [2, 4])
def test_the_bits_of_one_process_under_mpirun(n):
    code = """
        from tests.test_distributed_data_parallel import CASES, train_as_a_rank
        for case in CASES:
            print(case, *train_as_a_rank(case), sep=",")
        """
    done = mpirun(n, code, timeout=120, PYTHONPATH=str(Path(__file__).parents[1]))
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stdout.split("\n"))[1:]
    expected = [",".join(map(str, [case, *train_in_one_process(case, n)])) for case in CASES]
    assert lines == sorted(expected * n)


@needs_mpi
@pytest.mark.mpi
def test_three_ranks_under_mpirun():
    code = """
        import numpy as np
        from tests.test_distributed_data_parallel import *
        for case in CASES:
            digests = train_as_a_rank(case)
            for rank, other in enumerate(dist.communicator().all_gather_object(digests)):
                assert other == digests, (case, rank)
        ranks = dist.init()
        net = dist.DataParallel(build(mlp))
        x, y = next(batches([16]))
        loss_of(net(minidl.tensor(x[ranks.rank :: 3])), y[ranks.rank :: 3]).backward()
        alone = build(mlp)
        loss_of(alone(minidl.tensor(x)), y).backward()
        for p, q in zip(net.parameters(), alone.parameters()):
            np.testing.assert_allclose(p.grad.array, q.grad.array, rtol=1e-4, atol=1e-6)
        print("done")
        """
    done = mpirun(3, code, timeout=120, PYTHONPATH=str(Path(__file__).parents[1]))
    assert done.returncode == 0 and done.stdout.count("done") == 3, done.stderr


def test_sync_batch_norm_takes_a_batch_norms_place():
    shared = nn.BatchNorm1d(3, momentum=None, bias=False)
    net = nn.Sequential(nn.Sequential(shared, nn.ReLU()), shared, nn.BatchNorm2d(2, affine=False))
    net.eval()
    state = net.state_dict()
    same = dist.SyncBatchNorm.convert_sync_batchnorm(net)
    assert same is net and isinstance(net[1], dist.SyncBatchNorm) and net[0][0] is net[1]
    assert not net[1].training and net[1].weight is shared.weight and net[1].momentum is None
    assert list(state) == list(net.state_dict())
    dist.init()
    x = minidl.randn(4, 3)
    assert (net[1](x) == shared(x)).all()
    assert (net[1].train()(x) == shared.train()(x)).all()
    alone = dist.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm1d(3))
    assert isinstance(alone, dist.SyncBatchNorm)

    def one_value():
        dist.SyncBatchNorm(3)(minidl.ones(1 - dist.rank(), 3))

    with pytest.raises(ValueError, match="1 values a channel on all ranks"):
        dist.simulate(one_value, 2)


def test_the_average_over_all_batches_is_synchronised_too():
    def work():
        layer = dist.SyncBatchNorm(2, momentum=None)
        for k in range(3):
            layer(minidl.tensor(np.array([[dist.rank() + k, 0.0], [4 * k, 1]], np.float32)))
        return layer.running_mean.tolist()

    assert dist.simulate(work, 2) == [[pytest.approx((1 + 11 + 21) / 12), 0.5]] * 2
