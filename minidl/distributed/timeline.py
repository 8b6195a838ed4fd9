"""Timelines: when which stage of a pipeline worked on what; on paper, and as measured.

print(draw(play("1f1b", stages=4, micro_batches=8)))   # on paper
print(draw(pipeline.timeline()))                       # what a `Pipeline` did in its last step
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from minidl.distributed.schedules import SCHEDULES, Backward, Forward


class Event(NamedTuple):
    """A stage's work on one micro-batch.

    Attributes:
        stage: which, from 0.
        kind: "forward" or "backward".
        micro_batch: which, from 0.
        start, end: seconds (or units of whatever the costs were given in).
    """

    stage: int
    kind: str
    micro_batch: int
    start: float
    end: float


def play(
    schedule: str,
    stages: int,
    micro_batches: int,
    forward: float | Sequence[float] = 1.0,
    backward: float | Sequence[float] = 2.0,
    transfer: float = 0.0,
) -> list[Event]:
    """Carry a schedule out on paper: each stage begins an instruction as soon as it can.

    Args:
        schedule: one of `SCHEDULES`.
        stages: K.
        micro_batches: M.
        forward, backward: time that a micro-batch takes, in every stage or one for each. (Backward
            computes two gradients, of the input and of the weights: about twice forward.)
        transfer: time from one stage to the next, during which both may work.

    Returns:
        The events, in the order in which they were found to begin.

    Raises:
        ValueError: no such schedule, or not as many times as stages.
    """
    check_schedule(schedule)
    times = {}
    for kind, cost in ((Forward, forward), (Backward, backward)):
        times[kind] = [float(cost)] * stages if isinstance(cost, int | float) else list(cost)
        if len(times[kind]) != stages:
            raise ValueError(f"{stages} stages need {stages} times, got {len(times[kind])}")
    todo = [deque(SCHEDULES[schedule](s, stages, micro_batches)) for s in range(stages)]
    free = [0.0] * stages  # when each stage is done with all that it did so far
    ends: dict[tuple[type, int, int], float] = {}
    events = []
    while any(todo):
        for s, instructions in enumerate(todo):
            while instructions:
                kind, m = type(instructions[0]), instructions[0].micro_batch
                before = s - 1 if kind is Forward else s + 1
                arrives = 0.0
                if 0 <= before < stages:
                    if (kind, before, m) not in ends:
                        break  # its input is not on its way yet
                    arrives = ends[kind, before, m] + transfer
                start = max(free[s], arrives)
                free[s] = ends[kind, s, m] = start + times[kind][s]
                events.append(Event(s, kind.__name__.lower(), m, start, free[s]))
                instructions.popleft()
    return events


def check_schedule(name: str) -> None:
    if name not in SCHEDULES:
        raise ValueError(f"no schedule is called {name!r}: choose one of {', '.join(SCHEDULES)}")


def idle(events: Sequence[Event]) -> float:
    """The share of all stages' time that is spent waiting, from the first start to the last end.

    For equal stages GPipe and 1F1B have (K - 1) / (M + K - 1), the "bubble" (Huang et al. 2019).
    """
    start, end, stages = span(events)
    return 1 - sum(e.end - e.start for e in events) / (stages * (end - start))


def span(events: Sequence[Event]) -> tuple[float, float, int]:
    """The first start, the last end, and how many stages there are."""
    if not events:
        raise ValueError("a timeline without events: has the pipeline run a step?")
    start, end = min(e.start for e in events), max(e.end for e in events)
    return start, end, 1 + max(e.stage for e in events)


def draw(events: Sequence[Event], width: int = 100) -> str:
    """A line of text a stage: ``F2`` is the forward pass of micro-batch 2, ``B2`` its backward.

    Args:
        events: of `play` or `Pipeline.timeline`.
        width: columns at most; fewer where the shortest event has three.
    """
    start, end, stages = span(events)
    shortest = min(e.end - e.start for e in events)
    scale = min(3 / shortest if shortest > 0 else width, width / max(end - start, 1e-12))
    rows = [[" "] * (round((end - start) * scale) + 1) for _ in range(stages)]
    for e in events:
        a, b = round((e.start - start) * scale), round((e.end - start) * scale)
        letter, line = ("F", "-") if e.kind == "forward" else ("B", "=")
        label = f"{letter}{e.micro_batch}"
        cell = label.ljust(b - a - 1, line) + " " if b - a > len(label) else letter * max(b - a, 1)
        rows[e.stage][a : a + len(cell)] = cell
    return "\n".join(f"stage {s}  {''.join(row).rstrip()}" for s, row in enumerate(rows))


def plot(timelines: dict[str, Sequence[Event]], path: Path, unit: str = "s") -> None:
    """A picture: a panel for each timeline, a row for each stage, all on one axis of time.

    Args:
        timelines: by title.
        path: the file to write.
        unit: of the events' times.
    """
    from matplotlib.figure import Figure

    heights = [span(events)[2] + 1 for events in timelines.values()]
    figure = Figure(figsize=(10, 0.9 + 0.4 * sum(heights)), layout="constrained")
    grid = figure.subplots(len(timelines), 1, sharex=True, squeeze=False, height_ratios=heights)
    colors = {"forward": "#4c9be8", "backward": "#f2a65a"}
    for axes, (title, events) in zip(grid[:, 0], timelines.items()):
        start, end, stages = span(events)
        for e in events:
            box = (e.start - start, e.end - e.start)
            axes.broken_barh([box], (e.stage - 0.42, 0.84), color=colors[e.kind], ec="white", lw=1)
            if box[1] > 0.015 * (end - start):
                axes.text(box[0] + box[1] / 2, e.stage, str(e.micro_batch), ha="center",
                          va="center", fontsize=7)  # fmt: skip
        axes.set(yticks=range(stages), ylim=(stages - 0.5, -0.5), ylabel="stage")
        axes.set_title(f"{title}: idle {100 * idle(events):.0f} %", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    grid[-1, 0].set_xlabel(f"time ({unit}); blue: forward, orange: backward")
    figure.savefig(path, dpi=150)
