"""Pipeline schedules, carried out without ranks: complete, without deadlock, as idle as said."""

from __future__ import annotations

import pytest

from minidl.distributed.schedules import SCHEDULES, Backward, Forward


def carry_out(name: str, stages: int, micro_batches: int) -> tuple[int, list[int]]:
    """Every instruction takes one unit of time. Returns when all is over, and the most that each
    stage kept. Fails where stages wait for one another for ever."""
    todo = [list(SCHEDULES[name](s, stages, micro_batches)) for s in range(stages)]
    for instructions in todo:
        everything = [kind(m) for kind in (Forward, Backward) for m in range(micro_batches)]
        key = lambda i: (type(i).__name__, i.micro_batch)  # noqa: E731
        assert sorted(instructions, key=key) == sorted(everything, key=key)
    done: dict[tuple[int, type, int], int] = {}
    kept, most, time = [0] * stages, [0] * stages, 0
    while any(todo):
        ready = []
        for s, instructions in enumerate(todo):
            if instructions:
                kind, m = type(instructions[0]), instructions[0].micro_batch
                needs = [(s - 1, kind, m)] if kind is Forward and s else []
                if kind is Backward:
                    needs = [(s, Forward, m)]
                    needs += [(s + 1, Backward, m)] if s + 1 < stages else []
                if all(need in done for need in needs):
                    ready.append((s, kind, m))
        assert ready, "no stage can go on"
        time += 1
        for s, kind, m in ready:
            del todo[s][0]
            done[s, kind, m] = time
            kept[s] += 1 if kind is Forward else -1
            most[s] = max(most[s], kept[s])
    assert kept == [0] * stages
    return time, most


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 8])
def test_schedules(stages, micro_batches):
    results = {name: carry_out(name, stages, micro_batches) for name in SCHEDULES}
    # idle: (K - 1) / (M + K - 1) of the time
    shortest = 2 * (micro_batches + stages - 1)
    assert results["naive"] == (2 * stages * micro_batches, [1] * stages)
    assert results["gpipe"] == (shortest, [micro_batches] * stages)
    assert results["1f1b"] == (
        shortest,
        [min(stages - s, micro_batches) for s in range(stages)],
    )
