"""Samples and optimizer state cut over the ranks."""

import numpy as np
import pytest

import minidl
from minidl import distributed as dist
from minidl import nn, optim
from minidl.data import BatchSampler, DataLoader, Digits, RandomSampler, Subset, TensorDataset
from minidl.data.augment import RandomCrop
from tests.test_distributed_data_parallel import batches, build, digest, loss_of, mlp

# Samplers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [0, 1, 2, 12, 13])
@pytest.mark.parametrize("drop_last", [False, True])
def test_distributed_sampler(length, ranks, drop_last):
    """As PyTorch's: equally many for each; all samples and a few twice, or not quite all."""
    if length == 0 and not drop_last:
        assert list(dist.DistributedSampler(range(0), ranks, 0)) == []
        return
    orders = []
    for epoch in (0, 1):
        samplers = [
            dist.DistributedSampler(range(length), ranks, r, seed=3, drop_last=drop_last)
            for r in range(ranks)
        ]
        for s in samplers:
            s.set_epoch(epoch)
        parts = [list(s) for s in samplers]
        each = length // ranks if drop_last else -(-length // ranks)
        assert [len(s) for s in samplers] == [len(part) for part in parts] == [each] * ranks
        seen = [i for turn in zip(*parts) for i in turn]  # in the order of one process
        one = RandomSampler(range(length), seed=3)
        one.set_epoch(epoch)
        order = list(one)
        assert (
            seen[:length] == order[: len(seen)]
            and seen[length:] == (order * 4)[: len(seen[length:])]
        )
        orders.append(seen)
    assert length < 12 or orders[0] != orders[1]
    assert list(dist.DistributedSampler(range(5), 2, 1, shuffle=False)) == [1, 3, 0]


def test_ranks_deliver_the_batches_of_one_process_together():
    """With the same augmentation, in every epoch, and where the run is resumed."""
    images = Subset(Digits(transform=RandomCrop(8, padding=1)), range(45))

    def loader(ranks, rank):
        whole = BatchSampler(RandomSampler(images), 4)
        return DataLoader(images, batch_sampler=dist.DistributedBatchSampler(whole, ranks, rank))

    minidl.manual_seed(7)
    one = DataLoader(images, 4, shuffle=True)
    parts = [loader(3, r) for r in range(3)]
    assert [len(part) for part in parts] == [len(one)] * 3 == [12] * 3
    for _ in range(2):
        for (x, y), *shares in zip(one, *parts, strict=True):
            assert [len(labels) for _, labels in shares] in ([2, 1, 1], [1, 0, 0])
            for r, (images_, labels) in enumerate(shares):
                np.testing.assert_array_equal(images_, x.array[r::3])
                np.testing.assert_array_equal(labels, y.array[r::3])
                assert images_.dtype == x.dtype and labels.dtype == y.dtype

    iterator = iter(parts[1])
    next(iterator)
    again = loader(3, 1)
    again.load_state_dict(parts[1].state_dict())
    for (a, _), (b, _) in zip(iterator, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_ranks_of_samplers():
    with pytest.raises(ValueError, match="from 0 to num_replicas - 1 = 1, got 2"):
        dist.DistributedSampler(range(4), 2, 2)
    parts = dist.simulate(lambda: list(dist.DistributedSampler(range(6), shuffle=False)), 3)
    assert parts == [[0, 3], [1, 4], [2, 5]]


def test_a_batch_of_no_samples():
    data = TensorDataset(np.ones((3, 2), np.float32), np.arange(3))
    (x, y), (z, _) = DataLoader(data, batch_sampler=[[], [1, 2]])
    assert x.shape == (0, 2) and y.shape == (0,) and y.dtype == np.int64 and z.shape == (2, 2)


# Optimizer state ----------------------------------------------------------------------------------


OPTIMIZERS = {
    "SGD": (optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "Adam": (optim.Adam, {"lr": 3e-3, "amsgrad": True}),
    "AdamW": (optim.AdamW, {"lr": 3e-3}),
    "RMSprop": (optim.RMSprop, {"lr": 1e-3, "momentum": 0.5}),
    "Adagrad": (optim.Adagrad, {}),
}


def train_sharded(kind, make, state=None, steps=6):
    """The network's digest after each step, and the optimizer's state at the end."""
    optimizer_class, settings = OPTIMIZERS[kind]
    ranks = dist.init()
    net = dist.DataParallel(build(mlp))
    weights = [p for p in net.parameters() if p.ndim > 1]
    groups = [{"params": weights, "weight_decay": 0.01},
              {"params": [p for p in net.parameters() if p.ndim == 1]}]  # fmt: skip
    optimizer = make(groups, optimizer_class, settings)
    if state is not None:
        optimizer.load_state_dict(state)
    scheduler = optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    digests = []
    for x, y in batches([8] * steps):
        x, y = (a[ranks.rank :: ranks.world_size] for a in (x, y))
        optimizer.zero_grad()
        loss_of(net(minidl.tensor(x)), y).backward()
        optimizer.step()
        scheduler.step()
        digests.append(digest(net.module))
    if isinstance(optimizer, dist.ZeroRedundancyOptimizer):
        held = sum(v.numel() for s in optimizer.local.state.values() for v in s.values()
                   if isinstance(v, minidl.Tensor))  # fmt: skip
        with pytest.raises(RuntimeError, match="consolidate_state_dict"):
            optimizer.state_dict()
        optimizer.consolidate_state_dict()
        return digests, optimizer.state_dict(), held
    return digests, optimizer.state_dict(), 0


def sharded(groups, optimizer_class, settings):
    return dist.ZeroRedundancyOptimizer(groups, optimizer_class, **settings)


def whole(groups, optimizer_class, settings):
    return optimizer_class(groups, **settings)


def as_lists(state):
    if isinstance(state, minidl.Tensor):
        return state.tolist()
    if isinstance(state, dict):
        return {key: as_lists(value) for key, value in state.items()}
    return state


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_sharded_state_gives_the_same_bits(kind, ranks):
    expected = dist.simulate(lambda: train_sharded(kind, whole), ranks)
    found = dist.simulate(lambda: train_sharded(kind, sharded), ranks)
    for (digests, state, _), (sharded_digests, sharded_state, _) in zip(expected, found):
        assert digests == sharded_digests
        assert as_lists(state) == as_lists(sharded_state)
    parameters = sum(p.numel() for p in build(mlp).parameters())
    each = [held for *_, held in found]
    states = sum(each) // parameters
    assert sum(each) == states * parameters and max(each) < sum(each)  # cut, and all there
    if ranks == 2:  # a state can go from one process to many ranks, and back
        state = expected[0][1]
        a = dist.simulate(lambda: train_sharded(kind, whole, state, 2), 2)
        b = dist.simulate(lambda: train_sharded(kind, sharded, state, 2), 2)
        assert a[0][0] == b[0][0] == b[1][0] and as_lists(a[0][1]) == as_lists(b[1][1])


def test_a_sharded_optimizer_refuses():
    def work():
        net = build(mlp)
        with pytest.raises(ValueError, match="momentum must not be negative"):
            dist.ZeroRedundancyOptimizer(net.parameters(), optim.SGD, momentum=-1)
        optimizer = dist.ZeroRedundancyOptimizer(net.parameters(), optim.SGD, lr=0.1)
        with pytest.raises(RuntimeError, match="dealt out already"):
            optimizer.add_param_group({"params": list(nn.Linear(2, 2).parameters())})
        with pytest.raises(ValueError, match="groups"):
            optimizer.load_state_dict({"state": {}, "param_groups": []})

    dist.simulate(work, 2)
