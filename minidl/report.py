"""The page that `minidl demo` writes: one file, no requests, light and dark.

Every picture is SVG drawn here, so that its colours follow the page's theme. The words and the
looks are in ``templates/demo.html``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["chart", "pixels", "render"]


def pixels(image: np.ndarray, signed: bool = False, limit: float | None = None) -> str:
    """A grey image (H, W) as SVG squares; opacity is magnitude.

    Args:
        image: values of any scale.
        signed: draw positive and negative values in two colours (a filter, a gradient).
        limit: the value that is drawn opaque; by default the largest magnitude.
    """
    height, width = image.shape
    limit = limit or float(np.abs(image).max()) or 1.0
    squares = []
    for (y, x), value in np.ndenumerate(image):
        alpha = round(min(abs(float(value)) / limit, 1.0), 2)
        if alpha > 0:
            kind = "ink" if not signed else "warm" if value > 0 else "cool"
            square = f'x="{x}" y="{y}" width="1" height="1" fill-opacity="{alpha:g}"'
            squares.append(f'<rect class="{kind}" {square}/>')
    return (
        f'<svg class="pixels" viewBox="0 0 {width} {height}" shape-rendering="crispEdges" '
        f'aria-hidden="true">{"".join(squares)}</svg>'
    )


def chart(
    lines: Mapping[str, Sequence[float]],
    *,
    log: bool = False,
    percent: bool = False,
    goal: float | None = None,
) -> str:
    """Curves over the epochs as SVG: "train" dotted, "test" drawn through, their last values named.

    Args:
        lines: "train" and "test", or one of them: a value for each epoch.
        log: a logarithmic axis (a loss), else a linear one (an accuracy).
        percent: label the axis in per cent.
        goal: a value to mark by a dashed line.
    """
    width, height, left, right, top, bottom = 480, 270, 44, 62, 10, 34
    values = [v for line in lines.values() for v in line if not log or v > 0]
    values += [] if goal is None else [goal]
    count = max(len(line) for line in lines.values())
    scale = math.log10 if log else float
    ticks = log_ticks(min(values), max(values)) if log else linear_ticks(min(values), max(values))
    low, high = scale(ticks[0]), scale(ticks[-1])

    def at(epoch: int, value: float) -> tuple[float, float]:
        share = (scale(max(value, ticks[0])) - low) / (high - low)
        across = (epoch - 1) / max(count - 1, 1)
        return (
            round(left + across * (width - left - right), 1),
            round(height - bottom - share * (height - top - bottom), 1),
        )

    def text(value: float) -> str:
        return f"{100 * value:.4g} %" if percent else f"{value:.3g}"

    parts = []
    for tick in ticks:
        y = at(1, tick)[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{text(tick)}</text>')
    step = max(1, math.ceil(count / 8))
    for epoch in [*range(1, count + 1 - step, step), count]:
        x = at(epoch, ticks[0])[0]
        parts.append(f'<text x="{x}" y="{height - 14}" text-anchor="middle">{epoch}</text>')
    middle = (left + width - right) / 2
    parts.append(f'<text x="{middle}" y="{height + 2}" text-anchor="middle">epoch</text>')
    if goal is not None:
        y = at(1, goal)[1]
        parts.append(f'<path class="goal" d="M{left} {y}H{width - right}"/>')
        parts.append(
            f'<text class="goal-label" x="{width - right}" y="{y + 15}" text-anchor="end">'
            f"goal {text(goal)}</text>"
        )
    ends: list[float] = []
    for name in sorted(lines):  # "test" first: its label has its place, "train" makes way
        points = [at(i, v) for i, v in enumerate(lines[name], 1)]
        path = "M" + "L".join(f"{x} {y}" for x, y in points)
        parts.append(f'<path class="{name}" d="{path}"/>')
        x, y = points[-1]
        label = y + 4
        if ends and abs(label - ends[0]) < 30:
            label = ends[0] + (30 if label >= ends[0] else -30)
        ends.append(label)
        for line, what in enumerate((name, text(lines[name][-1]))):
            place = f'class="{name}-label" x="{x + 9}" y="{label + 14 * line}"'
            parts.append(f"<text {place}>{what}</text>")
        for i, (x, y) in enumerate(points, 1):
            dot = f'<circle cx="{x}" cy="{y}" r="2.6"/>' if name == "test" else ""
            title = f"<title>epoch {i}: {name} {text(lines[name][i - 1])}</title>"
            parts.append(f'<g>{dot}<circle class="hit" cx="{x}" cy="{y}" r="9"/>{title}</g>')
    box = f'viewBox="0 0 {width} {height + 6}"'
    return f'<svg class="chart" {box} role="img">{"".join(parts)}</svg>'


def linear_ticks(low: float, high: float) -> list[float]:
    """About five round numbers that enclose [low, high]."""
    rough = max(high - low, 1e-9) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """The numbers 1, 2, 5 × 10^k (or only the powers of ten) that enclose [low, high]."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1.0, 2.0, 5.0) if last - first <= 2 else (1.0,)
    ticks = [m * 10.0**k for k in range(first, last + 1) for m in factors]
    below = max(i for i, t in enumerate(ticks) if t <= low)
    above = min(i for i, t in enumerate(ticks) if t >= high)
    return ticks[below : max(above, below + 1) + 1]


def confusion_cells(confusion: np.ndarray) -> list[list[dict[str, Any]]]:
    """The confusion matrix (true, predicted) as the template draws it."""
    rows = []
    for i, row in enumerate(confusion.tolist()):
        total = sum(row) or 1
        rows.append(
            [
                {
                    "count": n or "·",
                    "kind": "right" if i == j else "off" if n else "zero",
                    "share": round(100 * n / total),
                    "title": f"{n} of {total} images of {i} read as {j}",
                }
                for j, n in enumerate(row)
            ]
        )
    return rows


def confused_most(confusion: np.ndarray) -> str:
    """A sentence about the largest entry off the diagonal."""
    wrong = confusion - np.diag(np.diag(confusion))
    if not wrong.any():
        return "This one is perfect."
    true, predicted = np.unravel_index(wrong.argmax(), wrong.shape)
    times = int(wrong.max())
    if times == 1:
        return "No two digits were confused more than once."
    return f"Most often it took a {true} for a {predicted}: {times} times."


def mistake(image: np.ndarray, probabilities: np.ndarray, true: int) -> dict[str, Any]:
    """A misread digit (H, W) with the probabilities (classes,) of its three likeliest answers."""
    predicted = int(probabilities.argmax())
    shown = np.argsort(-probabilities)[:3].tolist()
    if true not in shown:
        shown[-1] = true
    kinds = {true: "true", predicted: "wrong"}
    bars = [{"digit": d, "p": float(probabilities[d]), "kind": kinds.get(d, "")} for d in shown]
    return {"image": pixels(image, limit=1.0), "true": true, "predicted": predicted, "bars": bars}


def render(path: Path, **content: Any) -> None:
    """Fill in ``templates/demo.html`` and write it; see `minidl.demo` for the content."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    def markup(x: Any) -> Any:
        """SVG goes into the page as it is; all other text is escaped."""
        if isinstance(x, str):
            return Markup(x) if x.lstrip().startswith("<svg") else x
        if isinstance(x, dict):
            return {key: markup(value) for key, value in x.items()}
        return [markup(value) for value in x] if isinstance(x, list) else x

    source = resources.files("minidl").joinpath("templates/demo.html").read_text(encoding="utf-8")
    template = Environment(undefined=StrictUndefined, autoescape=True).from_string(source)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(template.render(markup(content)), encoding="utf-8")
