"""Sums over ranks, written out: equal to allreduce, and sending what their formulas say."""

from __future__ import annotations

import numpy as np
import pytest

from minidl import distributed as dist
from minidl.distributed import drawing
from minidl.distributed.aggregation import ALGORITHMS, FP16, TopK
from minidl.distributed.communicator import tree_sum
from tests.test_distributed import mpirun, needs_mpi

SHAPES = [(), (1,), (2,), (7,), (16,), (3, 5), (0,)]


def values(rank: int, shape: tuple[int, ...], dtype: type = np.float64) -> np.ndarray:
    return np.asarray(np.random.default_rng(rank).normal(size=shape) * 100).astype(dtype)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 8, 11])
def test_equal_to_allreduce(name, n):
    def sums():
        c = dist.init()
        for shape in SHAPES:
            for dtype in (np.int64, np.float64):
                x, y = values(c.rank, shape, dtype), values(c.rank, shape, dtype)
                ALGORITHMS[name](c, x)
                c.allreduce(y)
                # int64: exactly; float64: the order of adding differs
                np.testing.assert_allclose(x, y, rtol=0 if dtype == np.int64 else 1e-12, atol=1e-10)
                assert len({row.tobytes() for row in c.all_gather(x)}) == 1  # all ranks agree

    dist.simulate(sums, n)


@pytest.mark.parametrize("n", [2, 3, 4, 7])
def test_the_trees_order(n):
    """The tree adds in the order of `tree_sum`, bit for bit."""

    def total():
        x = values(dist.rank(), (50,))
        ALGORITHMS["tree"](dist.communicator(), x)
        return x

    expected = tree_sum([values(r, (50,)) for r in range(n)])
    assert all((x == expected).all() for x in dist.simulate(total, n))


@pytest.mark.parametrize(("n", "size"), [(2, 64), (4, 64), (8, 64)])
def test_what_is_sent(n, size):
    """The most that any rank sends, in numbers and in messages: the formulas' terms in β and α."""
    lg = n.bit_length() - 1
    expected = {
        "parameter_server": (size * (n - 1), n - 1),
        "tree": (size * lg, lg),
        "ring": (2 * (n - 1) * size // n, 2 * (n - 1)),
        "halving_doubling": (2 * (n - 1) * size // n, 2 * lg),
    }
    assert expected.keys() == ALGORITHMS.keys()
    for name, function in ALGORITHMS.items():
        trace: list[dist.Message] = []
        dist.simulate(lambda f=function: f(dist.communicator(), np.ones(size)), n, trace)
        by_rank = [[m.array.size for m in trace if m.source == r] for r in range(n)]
        assert (max(map(sum, by_rank)), max(map(len, by_rank))) == expected[name], name
        in_a_row = {"parameter_server": 2, "tree": 2 * lg}.get(name, expected[name][1])
        assert len(drawing.steps(trace)) == in_a_row, name


def test_the_ring_step_by_step():
    """On three ranks: who sends which piece to whom, and what it says."""
    trace: list[dist.Message] = []

    def run():
        c = dist.communicator()
        ALGORITHMS["ring"](c, np.full(3, 10.0**c.rank))

    dist.simulate(run, 3, trace)
    steps = sorted((m.source, i) for i, m in enumerate(trace))
    said = {r: [trace[i].array.item() for s, i in steps if s == r] for r in range(3)}
    assert said == {0: [1, 101, 111, 111], 1: [10, 11, 111, 111], 2: [100, 110, 111, 111]}
    assert all(m.dest == (m.source + 1) % 3 for m in trace)
    by_step = [{m.source: m.array.item() for m in step} for step in drawing.steps(trace)]
    assert by_step == [{r: said[r][i] for r in range(3)} for i in range(4)]


def test_collective_calls_are_steps_too():
    trace: list[dist.Message] = []

    def run():
        c = dist.init()
        if c.rank == 0:
            c.send(np.ones(3), 1)
        if c.rank == 1:
            c.recv(np.empty(3), 0)
        c.allreduce(np.ones(2))  # after what rank 1 has heard
        c.barrier()
        c.send(np.ones(1), (c.rank + 1) % 3)
        c.recv(np.empty(1), (c.rank - 1) % 3)

    dist.simulate(run, 3, trace)
    told = [(m.call, m.source, m.dest, m.step, m.array.size) for m in trace]
    assert told[0] == ("send", 0, 1, 0, 3)
    assert {t for t in told if t[0] == "allreduce"} == {
        ("allreduce", 0, None, 0, 2), ("allreduce", 1, None, 1, 2), ("allreduce", 2, None, 0, 2)
    }  # fmt: skip
    assert {t[3:] for t in told if t[0] == "barrier"} == {(2, 0)}
    (first, *_), last = drawing.steps(trace)
    assert first.step == 0 and sorted((m.source, m.step) for m in last) == [(0, 3), (1, 3), (2, 3)]


def test_a_drawing_has_an_arrow_for_each_message(tmp_path, monkeypatch):
    import matplotlib.axes

    drawn: dict[str, list] = {"annotate": [], "text": []}
    for name, calls in drawn.items():
        real = getattr(matplotlib.axes.Axes, name)

        def note(self, *args, real=real, calls=calls, **settings):
            calls.append(args[-1])
            return real(self, *args, **settings)

        monkeypatch.setattr(matplotlib.axes.Axes, name, note)
    traces: dict[str, list[dist.Message]] = {}
    for name, function in ALGORITHMS.items():
        traces[name] = []
        dist.simulate(lambda f=function: f(dist.communicator(), np.ones(6)), 3, traces[name])
    drawing.draw_messages(traces, tmp_path / "all.png", label=lambda m: f"{m.source}>{m.dest}")
    sent = [f"{m.source}>{m.dest}" for trace in traces.values() for m in trace]
    assert sorted(word for word in drawn["text"] if ">" in word) == sorted(sent)
    assert len(drawn["annotate"]) == len(sent)
    assert (tmp_path / "all.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="quiet: no rank sent another one anything"):
        drawing.draw_messages({"quiet": []}, tmp_path / "none.png")


@needs_mpi
@pytest.mark.mpi
def test_equal_to_mpis():
    code = """
        import numpy as np
        from minidl import distributed as dist
        from minidl.distributed.aggregation import ALGORITHMS, FP16, TopK
        c = dist.init()
        for size in (1, 10, 100_000):  # beyond what MPI puts by, too
            for dtype in (np.int64, np.float32):
                mine = (np.random.default_rng(c.rank).normal(size=size) * 100).astype(dtype)
                expected = c.allreduce(mine.copy())
                for f in ALGORITHMS.values():
                    x = mine.copy()
                    f(c, x)
                    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-4)
            half = mine.copy()
            FP16()(c, half)
            np.testing.assert_allclose(half, expected, rtol=2e-3, atol=0.5)
            TopK(1.0)(c, mine)
            np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-4)
        print("done")
        """
    done = mpirun(3, code)
    assert done.stdout.count("done") == 3, done.stderr


# Compression ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("compress", [lambda: FP16(), lambda: TopK(0.1)], ids=["fp16", "top-k"])
def test_what_was_not_said_is_said_later(n, compress):
    """Summed over many steps, error feedback loses nothing but the last error."""

    def run():
        c = dist.communicator()
        f, said, true = compress(), np.zeros(40), np.zeros(40)
        for step in range(60):
            x = values(100 * step + c.rank, (40,))
            true += c.allreduce(x.copy())
            f(c, x)
            said += x
            assert len({row.tobytes() for row in c.all_gather(x)}) == 1
        left = c.allreduce(f.error + np.zeros(40))
        if isinstance(f, FP16):  # ... and what the ring rounds, once for each rank and step
            np.testing.assert_allclose(said + left, true, atol=60 * n * 500 * 2.0**-11)
            assert np.abs(left).max() < n * n * 500 * 2.0**-11
        else:
            np.testing.assert_allclose(said + left, true, rtol=1e-12, atol=1e-9)

    dist.simulate(run, n)


def test_top_k_says_the_largest():
    def run():
        x = np.array([1.0, -9.0, 2.0, 5.0]) if dist.rank() else np.array([8.0, 0.0, 3.0, 4.0])
        TopK(0.25)(dist.communicator(), x)
        return x.tolist()

    assert dist.simulate(run, 2) == [[8.0, -9.0, 0.0, 0.0]] * 2
    for wrong in (0, 1.5, -1):
        with pytest.raises(ValueError, match=r"in \(0, 1\]"):
            TopK(wrong)


def descend(compress, steps: int = 400) -> float:
    """How far gradient descent ends from the minimum of the mean of all ranks' |x - a|² / 2."""

    def run():
        c = dist.communicator()
        target, x = values(c.rank, (20,)), np.zeros(20)
        for _ in range(steps):
            g = x - target
            compress[c.rank](c, g)
            x -= 0.05 * g / c.world_size
        return np.abs(x - c.allreduce(target) / c.world_size).max()

    return max(dist.simulate(run, 3))


def test_error_feedback_reaches_the_minimum_and_without_it_not():
    with_feedback = descend([TopK(0.1) for _ in range(3)], 2000)
    assert with_feedback < 15
    assert descend([TopK(0.1, error_feedback=False) for _ in range(3)], 2000) > 3 * with_feedback
    assert descend([FP16() for _ in range(3)]) < 0.2


def test_fp16_sums_do_not_overflow_where_one_number_fits():
    def run():
        x = np.full(4, 60_000.0, np.float32)
        FP16()(dist.communicator(), x)
        return x

    assert all((x == 240_000).all() for x in dist.simulate(run, 4))
