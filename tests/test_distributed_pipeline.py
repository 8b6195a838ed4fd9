"""Layers split over ranks: the loss and every gradient are those of the whole network."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import minidl
import minidl.nn.functional as F
from minidl import distributed as dist
from minidl import nn, optim
from minidl.distributed import schedules
from minidl.distributed.pipeline import balance
from minidl.distributed.timeline import Event, draw, idle, play, plot
from tests.test_distributed import matches, mpirun, needs_mpi
from tests.test_distributed_schedules import carry_out

N = 8  # samples in a batch


def network(dropout: float = 0.0, norm: bool = False) -> nn.Sequential:
    minidl.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4) if norm else nn.Tanh(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(36, 10), nn.Dropout(dropout), nn.LayerNorm(10), nn.Tanh(),
        nn.Linear(10, 7), nn.Dropout(dropout), nn.Tanh(), nn.Linear(7, 3),
    ).double()  # fmt: skip


def batch(n: int = N) -> tuple[minidl.Tensor, minidl.Tensor]:
    rng = np.random.default_rng(0)
    return minidl.tensor(rng.normal(size=(n, 1, 6, 6))), minidl.tensor(np.arange(n) * 7 % 3)


def whole(model: nn.Sequential, n: int = N) -> tuple[float, dict[str, np.ndarray]]:
    """The loss and the gradients of an undivided network on an undivided batch."""
    x, y = batch(n)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss.item(), gradients(model)


def gradients(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: p.grad.numpy() for name, p in model.named_parameters()}


def piped(stages: int, schedule: str, micro_batches: int, n: int = N, model=network):
    """One step of a pipeline: the losses, all gradients by name, and what each stage held."""

    def run():
        dist.init()
        parts = dist.split_sequential(model(), stages)
        pipeline = dist.Pipeline(parts, schedule, micro_batches)
        x, y = batch(n)
        first, last = pipeline.is_first, pipeline.is_last
        loss = pipeline.step(x if first else None, y if last else None, F.cross_entropy)
        return loss, gradients(pipeline.stage), pipeline.most_held

    results = dist.simulate(run, stages)
    merged = {name: g for _, own, _ in results for name, g in own.items()}
    assert len(merged) == sum(len(own) for _, own, _ in results)
    return [loss for loss, _, _ in results], merged, [held for _, _, held in results]


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert sorted(found) == sorted(expected)
    for name, g in expected.items():
        np.testing.assert_allclose(found[name], g, rtol=0, atol=1e-13, err_msg=name)


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("micro_batches", [1, 3, 8])
@pytest.mark.parametrize("schedule", schedules.SCHEDULES)
def test_loss_and_gradients_are_the_whole_networks(schedule, stages, micro_batches):
    losses, found, held = piped(stages, schedule, micro_batches)
    loss, expected = whole(network())
    assert losses == pytest.approx([loss] * stages, abs=1e-13)
    assert_equal(found, expected)
    assert held == carry_out(schedule, stages, micro_batches)[1]
    if schedule == "1f1b":
        assert max(held) <= stages


def test_more_micro_batches_than_samples():
    _, found, held = piped(2, "gpipe", 8, n=3)
    assert_equal(found, whole(network(), 3)[1])
    assert held == [3, 3]


def test_what_is_wrong_is_noticed(monkeypatch):
    """A micro-batch left out, one weighted wrongly, a gradient lost between two stages."""

    def short(stage, stages, micro_batches):
        return schedules.gpipe(stage, stages, micro_batches - 1)

    def scaled(self, *args, **kwargs):
        _, bounds = cut(self, *args, **kwargs)
        return len(bounds) * (bounds[0][1] - bounds[0][0]), bounds  # as if all were of one size

    def lost(self, array, dest):
        send(self, array * 0 if dest < self.index else array, dest)

    cut, send = dist.Pipeline._cut, dist.Pipeline._send
    expected = whole(network())[1]
    for target, name, wrong in [
        (schedules.SCHEDULES, "gpipe", short), (dist.Pipeline, "_cut", scaled),
        (dist.Pipeline, "_send", lost),
    ]:  # fmt: skip
        with monkeypatch.context() as patch:
            change = patch.setitem if isinstance(target, dict) else patch.setattr
            change(target, name, wrong)
            with pytest.raises(AssertionError):
                assert_equal(piped(2, "gpipe", 3)[1], expected)


def test_gradients_add_up_and_training_is_the_whole_networks():
    x, y = batch()

    def run():
        dist.init()
        pipeline = dist.Pipeline(dist.split_sequential(network(), dist.world_size()), "1f1b", 3)
        optimizer = optim.SGD(pipeline.parameters(), lr=0.1, momentum=0.9)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            losses += [pipeline.step(x, y, F.cross_entropy) for _ in range(2)]
            optimizer.step()
        return losses, pipeline.full_state_dict(), pipeline.eval()(x).numpy()

    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    expected = []
    for _ in range(4):
        optimizer.zero_grad()
        for _ in range(2):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            expected.append(loss.item())
        optimizer.step()
    for losses, state, output in dist.simulate(run, 3):
        assert losses == pytest.approx(expected, abs=1e-12)
        np.testing.assert_allclose(output, model(x).numpy(), atol=1e-12)
        assert_equal(state, {k: v.numpy() for k, v in model.state_dict().items()})
        network().load_state_dict(state)


def test_dropout_does_not_depend_on_stages_or_schedule():
    def model():
        return network(dropout=0.5)

    results = {}
    for stages, schedule in itertools.product([1, 2, 4], schedules.SCHEDULES):
        minidl.manual_seed(0)
        results[stages, schedule] = piped(stages, schedule, 3, model=model)
    losses, expected, _ = results[1, "naive"]
    assert abs(losses[0] - whole(network())[0]) > 1e-3  # something is dropped
    for found in results.values():
        assert found[0][0] == losses[0]
        for name, g in expected.items():
            np.testing.assert_array_equal(found[1][name], g)


def test_dropout_is_new_in_every_step_and_micro_batch():
    def run():
        dist.init()
        pipeline = dist.Pipeline([nn.Sequential(nn.Dropout(0.5)), nn.Dropout(0.5)], "1f1b", 2)
        x = minidl.ones(4, 64)
        return [pipeline(x).numpy() for _ in range(2)]

    outputs, _ = dist.simulate(run, 2)
    seen = {np.packbits(half != 0).tobytes() for y in outputs for half in (y[:2], y[2:])}
    assert len(seen) == 4
    kept = np.mean([y != 0 for y in outputs])
    assert 0.15 < kept < 0.35  # 1/4: the two stages do not draw the same mask (1/2)


def test_batch_norm_sees_micro_batches():
    """As one process that takes the micro-batches one after the other."""

    def model():
        return network(norm=True)

    alone = model()
    x, y = batch()
    for a, b in [(0, 2), (2, 5), (5, 8)]:
        (F.cross_entropy(alone(x[a:b]), y[a:b]) * ((b - a) / N)).backward()
    assert_equal(piped(4, "1f1b", 3, model=model)[1], gradients(alone))

    def run():
        dist.init()
        pipeline = dist.Pipeline(dist.split_sequential(model(), 2), "gpipe", 3)
        pipeline.step(x, y, F.cross_entropy)
        return pipeline.full_state_dict()

    state = dist.simulate(run, 2)[0]
    np.testing.assert_allclose(state["1.running_var"], alone[1].running_var.numpy(), atol=1e-13)


def test_frozen_stages_and_inputs_that_learn():
    x, y = batch()

    def run():
        dist.init()
        model = network()
        for layer in list(model)[:5]:
            layer.requires_grad_(False)
        pipeline = dist.Pipeline(dist.split_sequential(model, dist.world_size()), "1f1b", 3)
        pipeline.step(x, y, F.cross_entropy)
        return {k: p.grad for k, p in pipeline.stage.named_parameters() if p.grad is not None}

    expected = whole(network())[1]
    found = {k: g.numpy() for part in dist.simulate(run, 3) for k, g in part.items()}
    assert_equal(found, {k: g for k, g in expected.items() if not k.startswith(("0.", "4."))})

    def attacked():
        dist.init()
        image = x.detach().requires_grad_()
        dist.Pipeline(dist.split_sequential(network(), 2), "1f1b", 3).step(
            image, y, F.cross_entropy
        )
        return image.grad

    image = x.detach().requires_grad_()
    F.cross_entropy(network()(image), y).backward()
    found = dist.simulate(attacked, 2)
    np.testing.assert_allclose(found[0].numpy(), image.grad.numpy(), atol=1e-13)
    assert found[1] is None


# What is refused --------------------------------------------------------------------------------


def test_bad_arguments():
    model = network()
    shared = nn.Linear(3, 3)

    def make(stages, *args):
        def run():
            dist.init()
            dist.Pipeline(stages, *args)

        return dist.simulate(run, 2)

    halves = dist.split_sequential(model, 2)
    make([halves[0], halves[1]])
    for error, message, call in [
        (ValueError, "3 stages were given on rank 0, there are 2 ranks", lambda: make([None] * 3)),
        (ValueError, "no schedule is called '1b1f'.*naive, gpipe, 1f1b",
         lambda: make(halves, "1b1f")),
        (ValueError, "micro_batches is at least 1, got 0", lambda: make(halves, "1f1b", 0)),
        (ValueError, "'weight' of stage 1 is in stage 0 too", lambda: make([shared, shared])),
        (TypeError, "stage 1 is a Module on rank 1, got None", lambda: make([halves[0], None])),
        (ValueError, "12 layers can be cut into 1 to 12 stages, not 13",
         lambda: dist.split_sequential(model, 13)),
        (ValueError, "12 layers need 12 costs, got 2",
         lambda: dist.split_sequential(model, 2, [1, 2])),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            call()


class Raises(nn.Module):
    def forward(self, x):
        raise ZeroDivisionError("on purpose")


class MakesIntegers(nn.Module):
    def forward(self, x):
        return x.argmax(dim=1)


WRONG = {
    "an exception": (
        "[nn.Linear(4, 4), Raises(), nn.Linear(4, 4)]", "x", "y",
        ["ZeroDivisionError.*on purpose", r"in stage 1 of 3: forward of micro-batch 0",
         "rank 1 of 3"],
    ),
    "shapes that do not fit": (
        "[nn.Linear(4, 4), nn.Linear(4, 5), nn.Linear(6, 4)]", "x", "y",
        ["stage 2 of 3: forward of micro-batch 0", "rank 2 of 3"],
    ),
    "integers": (
        "[nn.Linear(4, 4), MakesIntegers(), nn.Linear(6, 4)]", "x", "y",
        [r"stage 1 \(rank 1\) must make a Tensor of one of .*; it made int64 numbers"],
    ),
    "another number of targets": (
        "[nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)]", "x", "y[:5]",
        ["same number of samples", "rank 0: 6 inputs, 5 targets"],
    ),
    "no input": (
        "[nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)]", "None", "y",
        ["rank 0 must have the input, and rank 2 the target"],
    ),
    "a loss that raises": (
        "[nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)]", "x", "y",
        ["stage 2 of 3: forward of micro-batch"],
    ),
}  # fmt: skip

SCRIPT = """
import numpy as np, minidl
from minidl import distributed as dist, nn
from tests.test_distributed_pipeline import Raises, MakesIntegers
import minidl.nn.functional as F
dist.init()
x, y = minidl.ones(6, 4), minidl.tensor(np.arange(6) % 4)
dist.Pipeline({}, "1f1b", 3).step({}, {}, F.cross_entropy)
"""


@pytest.mark.parametrize("case", WRONG)
def test_an_error_names_the_rank_and_ends_all(case):
    stages, x, y, patterns = WRONG[case]
    code = compile(SCRIPT.format(stages, x, y), "script.py", "exec")
    with pytest.raises(Exception) as caught:
        dist.simulate(lambda: exec(code, {}), 3)
    notes = " ".join(getattr(caught.value, "__notes__", []))
    matches(f"{type(caught.value).__name__} {caught.value} {notes}", patterns)


# Under mpirun -----------------------------------------------------------------------------------


def large() -> None:
    """Three schedules and two directions, with messages that MPI cannot put by (rank 0 and 1), and
    the loss of the whole network."""
    dist.init()
    rng = np.random.default_rng(0)
    x, y = minidl.tensor(rng.normal(size=(10, 300))), minidl.tensor(np.arange(10) % 3)

    def model():
        minidl.manual_seed(1)
        return nn.Sequential(nn.Linear(300, 8_000), nn.Tanh(), nn.Linear(8_000, 3)).double()

    alone = model()
    loss = F.cross_entropy(alone(x), y)
    loss.backward()
    for schedule in schedules.SCHEDULES:
        parts = dist.split_sequential(model(), 2, [1, 1, 2])
        pipeline = dist.Pipeline(parts, schedule, 4)
        assert abs(pipeline.step(x, y, F.cross_entropy) - loss.item()) < 1e-12
        for name, g in gradients(pipeline.stage).items():
            np.testing.assert_allclose(g, gradients(alone)[name], atol=1e-12, err_msg=name)
        assert len(pipeline.timeline()) == 16
    print("done")


def test_large_messages_simulated():
    dist.simulate(large, 2)


@needs_mpi
@pytest.mark.mpi
def test_under_mpirun():
    done = mpirun(2, "from tests.test_distributed_pipeline import large; large()", timeout=90)
    assert done.returncode == 0 and done.stdout.count("done") == 2, done.stderr


@needs_mpi
@pytest.mark.mpi
def test_an_exception_under_mpirun():
    stages, x, y, patterns = WRONG["an exception"]
    done = mpirun(3, SCRIPT.format(stages, x, y), timeout=60)
    assert done.returncode != 0
    matches(done.stderr, ["rank 1 of 3", *patterns[:2]])


# Cutting, and timelines -------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_balance_is_the_best_cut(parts):
    rng = np.random.default_rng(parts)
    for _ in range(20):
        costs = rng.integers(0, 10, 7).tolist()
        ends = balance(costs, parts)
        sums = [sum(costs[a:b]) for a, b in zip([0, *ends], ends)]
        assert len(ends) == parts and ends[-1] == 7 and sorted(set(ends)) == ends
        cuts = itertools.combinations(range(1, 7), parts - 1)
        best = min(max(sum(costs[a:b]) for a, b in zip([0, *c], [*c, 7])) for c in cuts)
        assert max(sums) == best


def test_split_keeps_layers_and_names():
    model = network()
    parts = dist.split_sequential(model, 3)
    assert [layer for part in parts for layer in part] == list(model)
    assert sorted(k for part in parts for k in part.state_dict()) == sorted(model.state_dict())


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("micro_batches", [1, 3, 8])
@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_play_agrees_with_a_clock_of_unit_steps(name, stages, micro_batches):
    events = play(name, stages, micro_batches, forward=1, backward=1)
    assert max(e.end for e in events) == carry_out(name, stages, micro_batches)[0]
    if name != "naive":
        for backward in (1.0, 2.0):
            events = play(name, stages, micro_batches, 1.0, backward)
            bubble = (stages - 1) / (micro_batches + stages - 1)
            assert idle(events) == pytest.approx(bubble)


def test_play_keeps_the_order_of_things():
    forward, backward, transfer = [1.0, 3.0, 2.0], [2.5, 5.0, 4.0], 0.25
    events = play("1f1b", 3, 5, forward, backward, transfer)
    at = {(e.kind, e.stage, e.micro_batch): e for e in events}
    assert len(at) == len(events) == 30
    for (kind, s, m), e in at.items():
        assert e.end - e.start == pytest.approx((forward if kind == "forward" else backward)[s])
        before = at.get((kind, s - 1 if kind == "forward" else s + 1, m))
        assert before is None or e.start >= before.end + transfer
    for s in range(3):
        own = sorted((e for e in events if e.stage == s), key=lambda e: e.start)
        assert all(a.end <= b.start for a, b in itertools.pairwise(own))
    with pytest.raises(ValueError, match="3 stages need 3 times, got 2"):
        play("1f1b", 3, 5, [1.0, 2.0])


def test_draw_and_plot(tmp_path):
    assert draw(play("gpipe", 2, 2, 1, 2)) == (
        "stage 0  F0 F1          B0=== B1===\nstage 1     F0 F1 B0=== B1==="
    )
    wide = draw(play("1f1b", 4, 40))
    assert all(len(line) <= 112 for line in wide.splitlines())
    with pytest.raises(ValueError, match="without events"):
        draw([])
    assert draw([Event(0, "forward", 0, 1.0, 1.0)]).startswith("stage 0  F")
    plot({"GPipe": play("gpipe", 4, 8), "1F1B": play("1f1b", 4, 8)}, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
