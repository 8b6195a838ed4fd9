"""Data, pipeline and tensor parallel and MapReduce with CuPy arrays (their double, without a GPU):
what is exchanged goes through the host."""

from __future__ import annotations

import numpy as np
import pytest

import minidl
import minidl.nn.functional as F
from minidl import distributed as dist
from minidl import nn, optim
from minidl.distributed import mapreduce
from tests.cuda.ranks import learn
from tests.cuda.test_cupy import cupy  # noqa: F401  (a fixture)


def one_step(device: str, schedule: str) -> list:
    dist.init()
    mesh = dist.init_mesh(pipeline=2, tensor=2)
    minidl.manual_seed(1)
    c = mesh["tensor"]
    model = nn.Sequential(
        dist.VocabParallelEmbedding(8, 6, communicator=c),
        dist.ColumnParallelLinear(6, 8, gather_output=False, communicator=c),
        nn.Tanh(),
        dist.RowParallelLinear(8, 3, input_is_parallel=True, communicator=c),
    ).to(device)
    pipeline = dist.Pipeline(dist.split_sequential(model, 2), schedule, 2, mesh["pipeline"])
    x, y = minidl.tensor(np.arange(5)).to(device), minidl.tensor(np.arange(5) % 3).to(device)
    loss = pipeline.step(x, y, F.cross_entropy)
    grads = [p.grad for p in pipeline.parameters()]
    assert all(str(g.device).startswith(device) for g in grads)
    assert str(pipeline(x).device).startswith(device)
    state = pipeline.full_state_dict()
    assert all(isinstance(a, np.ndarray) for a in state.values())
    return [loss, *(g.cpu().numpy() for g in grads), *state.values()]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_a_step_on_a_gpu_is_the_cpus(schedule):
    expected = dist.simulate(lambda: one_step("cpu", schedule), 4)
    for ours, theirs in zip(dist.simulate(lambda: one_step("cuda", schedule), 4), expected):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def mapped(device: str) -> list[mapreduce.Partial]:
    minidl.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).to(device)
    rng = np.random.default_rng(0)
    batches = [(rng.normal(size=(n, 6)).astype("f"), rng.integers(0, 3, n)) for n in (5, 8)]
    optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9)
    found = [
        mapreduce.sum_gradients(model, F.cross_entropy, batches),
        mapreduce.train_locally(model, F.cross_entropy, optimizer, 3, batches),
    ]
    mapreduce.assign_means(found[1], mapreduce.state(model))
    assert all(p.device.startswith(device) for p in model.parameters())
    found.append(mapreduce.Partial(mapreduce.times(1, mapreduce.state(model))))
    return found


def test_map_tasks_on_a_gpu_give_the_sums_of_the_cpu():
    for ours, theirs in zip(mapped("cuda"), mapped("cpu"), strict=True):
        assert ours.sums.keys() == theirs.sums.keys() and ours.samples == theirs.samples
        assert all(type(s) is np.ndarray for s in ours.sums.values())
        for name, s in theirs.sums.items():
            np.testing.assert_allclose(ours.sums[name], s, rtol=1e-5, atol=1e-5)


def test_data_parallel() -> None:
    cpu, _ = dist.simulate(lambda: learn("cpu"), 2)
    for gpu in dist.simulate(lambda: learn("cuda"), 2):
        for a, b in zip(cpu, gpu, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
