"""One layer split over ranks; and data × pipeline × tensor parallel together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import minidl
import minidl.nn.functional as F
from minidl import autograd, nn, optim
from minidl import distributed as dist
from minidl.distributed import tensor_parallel as tp
from tests.test_distributed import mpirun, needs_mpi
from tests.test_distributed_pipeline import assert_equal

# Each with the layer that it is a part of, and an input for it.
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], Any]] = {
    "column linear": (
        lambda: nn.Linear(6, 8), lambda: dist.ColumnParallelLinear(6, 8), (2, 3, 6),
    ),
    "row linear": (lambda: nn.Linear(8, 6), lambda: dist.RowParallelLinear(8, 6), (3, 8)),
    "row linear, no bias": (
        lambda: nn.Linear(8, 6, bias=False),
        lambda: dist.RowParallelLinear(8, 6, bias=False), (3, 8),
    ),
    "column and row": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)),
        lambda: nn.Sequential(
            dist.ColumnParallelLinear(6, 8, gather_output=False), nn.Tanh(),
            dist.RowParallelLinear(8, 5, input_is_parallel=True),
        ), (3, 6),
    ),
    "column conv": (
        lambda: nn.Conv2d(3, 8, 3, padding=1, stride=2),
        lambda: dist.ColumnParallelConv2d(3, 8, 3, padding=1, stride=2), (2, 3, 5, 5),
    ),
    "row conv": (
        lambda: nn.Conv2d(4, 3, 3, padding="same"),
        lambda: dist.RowParallelConv2d(4, 3, 3, padding="same"), (2, 4, 5, 5),
    ),
    "column and row conv": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 3, 2)),
        lambda: nn.Sequential(
            dist.ColumnParallelConv2d(2, 4, 3, gather_output=False), nn.Tanh(),
            dist.RowParallelConv2d(4, 3, 2, input_is_parallel=True),
        ), (2, 2, 5, 5),
    ),
    "embedding": (
        lambda: nn.Embedding(12, 5), lambda: dist.VocabParallelEmbedding(12, 5),
        np.array([[0, 11, 3], [5, 6, 3]], np.uint8),
    ),
    "embedding with padding": (
        lambda: nn.Embedding(12, 5, padding_idx=-2),
        lambda: dist.VocabParallelEmbedding(12, 5, padding_idx=-2), np.array([10, 0, 10, 7]),
    ),
}  # fmt: skip


def computed(make: Callable[[], nn.Module], x: Any) -> dict[str, np.ndarray]:
    """The output of a layer, the gradients of its input and parameters, and what they are."""
    minidl.manual_seed(4)
    layer = make().double()
    integers = not isinstance(x, tuple)
    values = x if integers else np.random.default_rng(0).normal(size=x)
    input = minidl.tensor(values)
    if not integers:
        input.requires_grad_()
    y = layer(input)
    weights = np.random.default_rng(1).normal(size=y.shape)
    (y * minidl.tensor(weights)).sum().backward()
    found = {"output": y.numpy()}
    if not integers:
        found["input"] = input.grad.numpy()
    split = {name: (dim, c) for name, dim, c in tp.parts(layer)}
    for name, p in layer.named_parameters():
        for kind, array in (("value", p.numpy()), ("gradient", p.grad.numpy())):
            if name in split:
                dim, c = split[name]
                array = np.concatenate(c.all_gather(np.ascontiguousarray(array)), axis=dim)
            found[f"{kind} of {name}"] = array
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_the_undivided_one(name, ranks):
    undivided, divided, x = LAYERS[name]
    expected = computed(undivided, x)

    def run():
        dist.init()
        return computed(divided, x)

    for found in dist.simulate(run, ranks):
        assert_equal(found, expected)
        for key in expected:
            if key.startswith("value"):  # to the bit
                np.testing.assert_array_equal(found[key], expected[key])


@pytest.mark.parametrize("op", [tp.copy_to_ranks, tp.reduce_from_ranks])
def test_a_wrong_conjugate_is_noticed(op, monkeypatch):
    """f without its sum, g with one too many: what people get wrong."""
    other = tp.reduce_from_ranks if op is tp.reduce_from_ranks else tp.copy_to_ranks
    monkeypatch.setattr(
        op.op, "rule", lambda g, *, communicator: (other(g, communicator=communicator),)
    )
    undivided, divided, x = LAYERS["column and row"]
    expected = computed(undivided, x)

    def run():
        dist.init()
        return computed(divided, x)

    with pytest.raises(AssertionError):
        assert_equal(dist.simulate(run, 2)[0], expected)


@pytest.mark.parametrize("ranks", [2, 3])
def test_conjugate_ops(ranks):
    """What each rank gets, and what comes back; the second derivative as well."""
    rng = np.random.default_rng(0)
    x, own = rng.normal(size=(2, 6)), rng.normal(size=(ranks, 2, 6))
    p = 6 // ranks

    def run():
        c = dist.init()
        r = c.rank
        forward = [
            tp.copy_to_ranks(x, communicator=c),
            tp.reduce_from_ranks(own[r], communicator=c),
            tp.scatter_to_ranks(x, dim=1, communicator=c),
            tp.gather_from_ranks(own[r][:, :p], dim=1, communicator=c),
        ]
        backward = []
        for op, at, kwargs in [
            (tp.copy_to_ranks, x, {}),
            (tp.reduce_from_ranks, own[r], {}),
            (tp.scatter_to_ranks, x, {"dim": -1}),
            (tp.gather_from_ranks, own[r][:, :p], {"dim": 1}),
        ]:  # fmt: skip
            a = minidl.tensor(at).requires_grad_()
            y = op(a, communicator=c, **kwargs)
            g = minidl.tensor(own[r][:, : y.shape[1]]).requires_grad_()
            (ga,) = autograd.grad(y, a, g, create_graph=True)
            (gg,) = autograd.grad(ga, g, minidl.ones(*ga.shape, dtype=np.float64))
            backward.append((ga.numpy(), gg.shape == g.shape))
        return forward, backward

    for r, (forward, backward) in enumerate(dist.simulate(run, ranks)):
        np.testing.assert_allclose(forward[0], x)
        np.testing.assert_allclose(forward[1], own.sum(axis=0))
        np.testing.assert_allclose(forward[2], x[:, r * p : (r + 1) * p])
        np.testing.assert_allclose(forward[3], np.concatenate(own[:, :, :p], axis=1))
        np.testing.assert_allclose(backward[0][0], own.sum(axis=0))
        np.testing.assert_allclose(backward[1][0], own[r])
        np.testing.assert_allclose(backward[2][0], np.concatenate(own[:, :, :p], axis=1))
        np.testing.assert_allclose(backward[3][0], own[r][:, r * p : (r + 1) * p])
        assert all(shapes for _, shapes in backward)


def test_state_of_the_undivided_network():
    def network(parallel: bool) -> nn.Sequential:
        minidl.manual_seed(9)
        if not parallel:
            return nn.Sequential(nn.Embedding(8, 6), nn.Linear(6, 8), nn.Linear(8, 4))
        return nn.Sequential(
            dist.VocabParallelEmbedding(8, 6), dist.ColumnParallelLinear(6, 8),
            dist.RowParallelLinear(8, 4),
        )  # fmt: skip

    whole = network(False).state_dict()
    other = {name: t * 2 for name, t in whole.items()}

    def run():
        dist.init()
        model = network(True)
        before = dist.full_state_dict(model)
        dist.load_full_state_dict(model, other)
        assert model[1].weight.shape == (4, 6) and model[2].weight.shape == (4, 4)
        with pytest.raises(RuntimeError, match=r"size mismatch for 2\.weight"):
            dist.load_full_state_dict(model, {**other, "2.weight": np.zeros((4, 6))})
        with pytest.raises(
            ValueError, match=r"dimension 0 of '1.bias' must be a multiple of the 2"
        ):
            dist.load_full_state_dict(model, {**other, "1.bias": np.zeros(5)})
        return before, dist.full_state_dict(model)

    for before, after in dist.simulate(run, 2):
        assert_equal(before, {k: v.numpy() for k, v in whole.items()})
        assert_equal(after, {k: v.numpy() for k, v in other.items()})


def test_bad_arguments():
    def run():
        dist.init()
        for make, what in [
            (
                lambda: dist.ColumnParallelLinear(4, 5),
                r"dimension 0 of ColumnParallelLinear.weight",
            ),
            (lambda: dist.RowParallelLinear(5, 4), r"dimension 1 of RowParallelLinear.weight"),
            (lambda: dist.RowParallelConv2d(3, 4, 1), r"dimension 1 of RowParallelConv2d.weight"),
            (lambda: dist.VocabParallelEmbedding(7, 2), r"VocabParallelEmbedding.weight"),
        ]:
            with pytest.raises(ValueError, match=what + r".*multiple of the 2 ranks.*rank [01]"):
                make()
        with pytest.raises(IndexError, match=r"index 8 at \[1\] is outside \[0, 8\)"):
            dist.VocabParallelEmbedding(8, 2)(minidl.tensor([0, 8]))
        with pytest.raises(RuntimeError, match="load_full_state_dict"):
            dist.VocabParallelEmbedding.from_pretrained(minidl.ones(8, 2))
        text = f"in_features=4, out_features=6, bias=True, rank {dist.rank()} of 2"
        assert repr(dist.ColumnParallelLinear(4, 6)) == f"ColumnParallelLinear({text})"

    dist.simulate(run, 2)


# A mesh -----------------------------------------------------------------------------------------


def test_mesh():
    def run():
        c = dist.init()
        mesh = dist.init_mesh(pipeline=2, data=-1, tensor=3)
        assert mesh.shape == {"pipeline": 2, "data": 2, "tensor": 3}
        place = [mesh[axis].rank for axis in mesh.shape]
        lines = {axis: mesh[axis].all_gather(np.array(c.rank)).tolist() for axis in mesh.shape}
        return place, lines, repr(mesh)

    ranks = np.arange(12).reshape(2, 2, 3)
    for rank, (place, lines, text) in enumerate(dist.simulate(run, 12)):
        assert ranks[tuple(place)] == rank
        i, j, k = place
        assert lines == {
            "pipeline": ranks[:, j, k].tolist(), "data": ranks[i, :, k].tolist(),
            "tensor": ranks[i, j, :].tolist(),
        }  # fmt: skip
        assert text == f"Mesh(pipeline={i} of 2, data={j} of 2, tensor={k} of 3)"

    def wrong(**shape):
        return dist.simulate(lambda: (dist.init(), dist.init_mesh(**shape)), 4)

    for shape in ({"data": 3}, {"data": -1, "tensor": 3}, {"data": -1, "tensor": -1}, {}):
        with pytest.raises(ValueError, match="has not 4 ranks"):
            wrong(**shape)
    with pytest.raises(KeyError, match="no axis 'model': it has data"):
        dist.simulate(lambda: (dist.init(), dist.init_mesh(data=2)["model"]), 2)


def network(c: dist.Communicator | None) -> nn.Sequential:
    """Whole, or cut over the ranks of c; four layers either way, to be cut into stages."""
    minidl.manual_seed(6)
    if c is None:
        pair: list[nn.Module] = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)]
    else:
        pair = [
            dist.ColumnParallelLinear(6, 8, gather_output=False, communicator=c), nn.Tanh(),
            dist.RowParallelLinear(8, 6, input_is_parallel=True, communicator=c),
        ]  # fmt: skip
    return nn.Sequential(
        nn.Linear(5, 6), nn.LayerNorm(6), nn.Sequential(*pair), nn.Linear(6, 3)
    ).double()


def three_ways(data: int, pipeline: int, tensor: int, schedule: str) -> list[Any]:
    """Three steps of SGD on a mesh, samples unevenly divided; the whole network afterwards."""
    dist.init()
    mesh = dist.init_mesh(pipeline=pipeline, data=data, tensor=tensor)
    stages = dist.split_sequential(network(mesh["tensor"]), pipeline, [1, 1, 2, 1])
    d = mesh["data"]
    model = dist.Pipeline(stages, schedule, 3, mesh["pipeline"], data=d)
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = samples()
    ends = [11 * (i * i + i) // (d.world_size**2 + d.world_size) for i in range(d.world_size + 1)]
    mine = slice(ends[d.rank], ends[d.rank + 1])
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses += [model.step(x[mine], y[mine], F.cross_entropy) for _ in range(2)]  # they add up
        optimizer.step()
    return [losses, model.full_state_dict()]


def samples() -> tuple[minidl.Tensor, minidl.Tensor]:
    rng = np.random.default_rng(0)
    return minidl.tensor(rng.normal(size=(11, 5))), minidl.tensor(np.arange(11) % 3)


def alone() -> tuple[list[float], dict[str, np.ndarray]]:
    model, (x, y) = network(None), samples()
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        for _ in range(2):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
    return losses, {name: t.numpy() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("schedule", ["naive", "gpipe", "1f1b"])
@pytest.mark.parametrize(
    ("data", "pipeline", "tensor"),
    [(1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 2), (3, 2, 2), (1, 4, 4)],
)
def test_data_pipeline_and_tensor_parallel_together(data, pipeline, tensor, schedule):
    losses, expected = alone()
    ranks = data * pipeline * tensor
    for found, state in dist.simulate(lambda: three_ways(data, pipeline, tensor, schedule), ranks):
        assert found == pytest.approx(losses, abs=1e-13)
        assert_equal(state, expected)


def test_dropout_is_other_for_other_samples_and_one_for_all_parts():
    def run():
        dist.init()
        mesh = dist.init_mesh(data=2, pipeline=1, tensor=2)
        model = dist.Pipeline([nn.Dropout(0.5)], "1f1b", 1, mesh["pipeline"], data=mesh["data"])
        return model(minidl.ones(2, 64)).numpy()

    a, b, c, d = dist.simulate(run, 4)
    assert (a == b).all() and (c == d).all() and (a != c).any()


@needs_mpi
@pytest.mark.mpi
def test_together_under_mpirun():
    code = """
        from tests.test_distributed_tensor import alone, assert_equal, three_ways
        losses, state = three_ways(1, 2, 2, "1f1b")
        expected, whole = alone()
        assert_equal(state, whole)
        assert max(abs(a - b) for a, b in zip(losses, expected)) < 1e-13
        print("done")
        """
    done = mpirun(4, code, timeout=90)
    assert done.returncode == 0 and done.stdout.count("done") == 4, done.stderr
