"""Who said what to whom, drawn: a row for each trace of `simulate`, a panel for each step.

trace = []
dist.simulate(lambda: ring(dist.communicator(), np.ones(8)), 4, trace)
draw_messages({"ring": trace}, Path("ring.png"))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import cos, pi, sin
from pathlib import Path

from minidl.distributed.simulation import Message


def steps(trace: Sequence[Message]) -> list[list[Message]]:
    """The messages from rank to rank, by the step in which they can be sent at the earliest."""
    sent = [m for m in trace if m.dest is not None]
    return [[m for m in sent if m.step == i] for i in sorted({m.step for m in sent})]


def numbers(message: Message) -> str:
    return f"{message.array.size:,}"


def draw_messages(
    traces: Mapping[str, Sequence[Message]],
    path: Path,
    label: Callable[[Message], str] = numbers,
    columns: int = 6,
) -> None:
    """A picture: ranks in a circle, an arrow for each message.

    Args:
        traces: by title, of `simulate`. (Collective calls are from all to all, and left out.)
        path: the file to write.
        label: what an arrow says; by default how many numbers are sent.
        columns: panels side by side.

    Raises:
        ValueError: a trace has no message from one rank to another.
    """
    from matplotlib.figure import Figure

    panels: list[tuple[str, int, list[Message]]] = []
    for title, trace in traces.items():
        if not (found := steps(trace)):
            raise ValueError(f"{title}: no rank sent another one anything, so there is no picture")
        p = 1 + max(max(m.source, m.dest or 0) for step in found for m in step)
        panels += [(f"{title}, step {i}", p, step) for i, step in enumerate(found, 1)]
        panels += [("", 0, [])] * (-len(panels) % columns if len(traces) > 1 else 0)
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(2.3 * columns, 2.5 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal")
        axes.axis("off")
    for axes, (title, p, messages) in zip(grid.flat, panels):
        places = [(sin(2 * pi * r / p), cos(2 * pi * r / p)) for r in range(p)]
        for rank, place in enumerate(places):
            axes.text(*place, str(rank), ha="center", va="center", fontsize=10,
                      bbox={"boxstyle": "circle", "fc": "#4c9be8", "ec": "none"})  # fmt: skip
        for m in messages:
            (x, y), (u, v) = places[m.source], places[m.dest or 0]
            bend = {"arrowstyle": "-|>", "connectionstyle": "arc3,rad=0.15", "shrinkA": 9,
                    "shrinkB": 9, "color": "#d1495b", "lw": 1.2}  # fmt: skip
            axes.annotate("", (u, v), (x, y), arrowprops=bend)
            # on the arrow's middle, which lies on the side to which it bends
            axes.text((x + u) / 2 + 0.1 * (v - y), (y + v) / 2 - 0.1 * (u - x), label(m),
                      ha="center", va="center", fontsize=7,
                      bbox={"fc": "white", "ec": "none", "pad": 0.5})  # fmt: skip
        axes.set_title(title, fontsize=9)
    figure.savefig(path, dpi=130)
