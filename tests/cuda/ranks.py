"""What the tests run as ranks with a GPU; apart, since each rank imports it."""

from __future__ import annotations

from typing import Any

import numpy as np

import minidl
from minidl import distributed as dist
from minidl import nn, optim
from minidl.distributed.communicator import on_gpu
from minidl.tensor import Tensor


def all_calls(kind: str, same_bits: bool = True) -> None:
    """Every call on arrays of a GPU, with its result known in advance."""
    import cupy

    c = dist.init()
    assert getattr(c, "kind", "threads") == kind
    r, n = c.rank, c.world_size
    total = n * (n + 1) // 2
    for dtype in ("f8", "f4", "f2", "i8", "i4", "u1", "i2"):  # (NCCL and MPI do not add up all)
        x = cupy.full((2, 3), r + 1, dtype)
        assert c.allreduce(x) is x and x.dtype == dtype
        assert (x == total).all()
        part = c.reduce_scatter(cupy.full((n, 2), r + 1, dtype))
        assert on_gpu(part) and part.tolist() == [[total, total]]
    x = cupy.array([r, np.nan if r == 0 else 1.0])
    c.allreduce(x, "max")
    assert x.tolist()[0] == n - 1 and np.isnan(x.tolist()[1])
    assert c.allreduce(cupy.array([r, -r]), "min").tolist() == [0, 1 - n]
    assert c.reduce_scatter(cupy.arange(n) * (r + 1), "max").tolist() == [r * n]
    tensor = minidl.tensor([1.0, 2.0]).to("cuda")
    assert c.allreduce(tensor) is tensor and tensor.tolist() == [n, 2 * n]
    assert c.all_gather(cupy.full((1, 2), r)).tolist() == [[[i, i]] for i in range(n)]
    assert c.all_gather(cupy.array(r)).tolist() == list(range(n))
    for root in range(n):
        assert c.broadcast(cupy.array([r, -1]), root).tolist() == [root, -1]
    several = [cupy.full(3, r), cupy.full((2, 2), float(r), "f4"), cupy.zeros(0)]
    c.broadcast_all(several, n - 1)
    assert all((x == n - 1).all() for x in several)
    assert c.allreduce(cupy.empty(0)).shape == (0,)
    assert c.allreduce(np.ones(3)).tolist() == [n] * 3  # the host's, in between

    arrays = [np.random.default_rng(i).normal(size=1001).astype("f4") for i in range(n)]
    x = c.allreduce(cupy.asarray(arrays[r])).get()
    np.testing.assert_allclose(x, np.sum(arrays, axis=0), rtol=1e-5, atol=1e-6)

    big = [cupy.zeros(1000, "f4") for _ in range(4)]
    for i, x in enumerate(big):
        x += i + r  # computed while the last one is on its way
        big[i] = c.allreduce(x, async_op=True)
    c.barrier()
    assert all(work.is_completed() for work in big)
    for i, work in enumerate(big):
        assert (work.wait() == i * n + total - n).all()
        assert (work.wait() == i * n + total - n).all()

    left, right = (r - 1) % n, (r + 1) % n
    for size in (3, 100_000):
        sent = [c.send(cupy.full(size, 10 * r + t), right, t, async_op=True) for t in (0, 1, 0)]
        got = [c.recv(cupy.empty(size, int), left, t, async_op=True) for t in (0, 0, 1)]
        for i in (2, 1, 0):
            assert (got[i].wait() == 10 * left + (i == 2)).all()
        for work in sent:
            work.wait()
    onto_host = c.send(cupy.full(5, r), right, async_op=True)  # from a GPU to the host
    assert c.recv(np.empty(5, int), left).tolist() == [left] * 5
    onto_host.wait()

    evens = c.split(r % 2, key=-r)
    assert evens.all_gather(cupy.array(r)).tolist() == sorted(range(r % 2, n, 2), reverse=True)
    assert evens.split(0).allreduce(cupy.ones(1)).tolist() == [evens.world_size]


def learn(device: str, steps: int = 3) -> list[Any]:
    """Data parallel, with synchronised batch norm and sharded optimizer state."""
    ranks = dist.init()
    minidl.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).to(device)
    model = dist.DataParallel(dist.SyncBatchNorm.convert_sync_batchnorm(net), bucket_cap_mb=1e-4)
    optimizer = dist.ZeroRedundancyOptimizer(model.parameters(), optim.SGD, lr=0.1, momentum=0.9)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        x = Tensor(rng.normal(size=(5, 6)).astype(np.float32)[ranks.rank :: ranks.world_size])
        optimizer.zero_grad()
        with model.no_sync():
            (model(x.to(device)) ** 2).mean().backward()
        (model(x.to(device)) ** 2).mean().backward()
        optimizer.step()
    return [t.cpu().array for t in net.state_dict().values()]
