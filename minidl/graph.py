"""Drawing the tape: what a tensor was made of, as a self-contained SVG (no Graphviz needed).

The layout is Sugiyama's (Sugiyama, Tagawa & Toda 1981), in its simplest form: a layer for each
step of the longest path to the output, the order inside a layer by barycentres, and then places
as near to the neighbours' mean as the order allows (a weighted isotonic regression).
"""

from __future__ import annotations

import html
import inspect
import itertools
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from os import PathLike
from pathlib import Path
from types import FrameType
from typing import Any

from minidl.autograd import Node
from minidl.tensor import Tensor

OUT = -1  # "the output", where an input would have its position (as in minidl.op)


def draw(
    tensor: Tensor,
    names: Any = None,
    *,
    fold: int = 12,
    rows: int = 40,
    max_nodes: int = 600,
) -> Drawing:
    """Draw the tape behind a tensor: data flows down, gradients flow back up.

    Leaves that collect a gradient are green, constants that the tape keeps grey, ops blue, the
    tensor itself orange; beside each op stands the shape that leaves it.

    Args:
        tensor: usually the loss.
        names: a dict of names and tensors, or a module (its parameters' names); in addition the
            caller's variables are searched.
        fold: of a longer chain of ops that use nothing else, only both ends are drawn.
        rows: more layers than this are wrapped into columns.
        max_nodes: of more ops than this, only the last ones are drawn.

    Returns:
        The SVG, a string that notebooks show as a picture, with a method ``save(path)``.

    Raises:
        RuntimeError: the tape was freed by an earlier backward().
    """
    graph = Graph(tensor, find_names(names), fold, max_nodes)
    return Drawing(graph.svg(rows))


class Drawing(str):
    """An SVG picture."""

    def _repr_svg_(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return f"<Drawing, {len(self):,} characters of SVG: .save('graph.svg') to look at it>"

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the picture to a file; returns its path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self, encoding="utf-8")
        return path


# Names ------------------------------------------------------------------------------------

MACHINERY = tuple(
    str(Path(__file__).with_name(f"{name}.py")) for name in ("graph", "explain", "lines", "tensor")
)


def caller() -> FrameType | None:
    """The innermost frame that is not the machinery for drawing and explaining."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename in MACHINERY:
        frame = frame.f_back
    return frame


def variables(frame: FrameType) -> dict[str, Any]:
    """A frame's local variables, without a trace left behind."""
    found = frame.f_locals
    if frame.f_code.co_flags & inspect.CO_OPTIMIZED:  # a function's: `found` is a copy, which
        copy = dict(found)  # until Python 3.13 the frame holds on to, with all the tensors in it
        unheld = sys.version_info < (3, 13) and sys.getrefcount(found) <= 3
        if unheld and sys.gettrace() is None:  # not locals() of the user's, nor a debugger's
            found.clear()
        return copy
    return dict(found)


class Names(dict[int, str]):
    """Names of leaves, nodes and arrays by their id; `arrays`: what nodes with names computed."""

    def __init__(self) -> None:
        self.arrays: dict[int, Any] = {}


def find_names(given: Any = None, frame: FrameType | None = None) -> Names:
    """The names of tensors: the given ones, then the caller's variables.

    Args:
        given: a mapping of names to tensors, or a module.
        frame: where to begin; its callers are searched after it.
    """
    names = Names()

    def note(name: str, tensor: Any) -> None:
        if isinstance(tensor, Tensor):
            names.setdefault(id(tensor.node or tensor), name)
            names.setdefault(id(tensor.array), name)
            names.arrays[id(tensor.node)] = tensor.array

    if given is not None:
        parameters = given if isinstance(given, Mapping) else dict(given.named_parameters())
        for name, tensor in parameters.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"names[{name!r}] is a {type(tensor).__name__}, not a Tensor")
            note(name, tensor)

    frame = frame or caller()
    for _ in range(30):
        if frame is None:
            break
        found = [
            (name, value) for name, value in variables(frame).items() if not name.startswith("_")
        ]
        for name, value in found:
            note(name, value)
        modules = [(n, v) for n, v in found if hasattr(type(v), "named_parameters")]
        for _name, module in modules:
            for parameter, tensor in module.named_parameters():
                note(parameter if len(modules) == 1 else f"{_name}.{parameter}", tensor)
        for name, value in found:
            if type(value) in (list, tuple) and len(value) <= 1000:
                for i, tensor in enumerate(tuple(value)):  # a tracer may grow it
                    note(f"{name}[{i}]", tensor)
            elif type(value) is dict and len(value) <= 1000:
                for key, tensor in list(value.items()):
                    note(f"{name}[{key!r}]", tensor)
        frame = frame.f_back
    return names


def kept(node: Node) -> dict[int, Any]:
    """What the tape kept of a call: arrays and numbers by the input's position, `OUT` the output.

    Empty for a node of `checkpoint`, which computes them again.
    """
    if type(node.saved) is not list:
        return {}
    sources = range(len(node.edges)) if node.op.sources is None else node.op.sources
    return {s: value for s, value in zip(sources, node.saved, strict=True) if s is not None}


def input_names(node: Node) -> list[str]:
    """The names of a node's inputs in its op's formula (x0, x1, ... for f(*xs))."""
    parameters = inspect.signature(node.op.formula).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        (name,) = (p.name for p in parameters if p.kind is p.VAR_POSITIONAL)
        return [f"{name}[{i}]" for i in range(len(node.edges))]
    return [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY][: len(node.edges)]


def settings(node: Node) -> str:
    """The settings of a call that are not the defaults: "stride=2, padding=1"."""
    missing = object()
    changed = []
    for name, value in node.kwargs.items():
        default = node.op.defaults.get(name, missing)
        if value is not default and repr(value) != repr(default):
            text = f"array{value.shape}" if hasattr(value, "shape") else repr(value)
            changed.append(f"{name}={text}")
    return ", ".join(changed)


def tape(tensor: Tensor) -> list[Node]:
    """All nodes behind a tensor, the latest first.

    Raises:
        RuntimeError: the tape was freed by an earlier backward().
    """
    seen = dict.fromkeys([tensor.node] if tensor.node is not None else [])
    nodes = list(seen)
    for node in nodes:  # grows as we go
        if node.saved is None:
            raise RuntimeError(
                f"the tape behind {node.op.name!r} was freed by backward(): look at it before, "
                "or pass retain_graph=True to backward()"
            )
        for edge in node.edges:
            if isinstance(edge, Node) and edge not in seen:
                seen[edge] = None
                nodes.append(edge)
    return sorted(nodes, key=attrgetter("number"), reverse=True)


# The graph --------------------------------------------------------------------------------

CHAR, LINE, GAP_X, GAP_Y = 7.3, 15, 22, 34  # of 12-pixel monospace; pixels between boxes


@dataclass(eq=False)
class Box:
    """Something to place: an op, a leaf, a constant, a fold of many ops, or a bend of an edge."""

    kind: str
    lines: list[str] = field(default_factory=list)
    key: str = ""  # equal for all boxes of one leaf
    flow: str = ""  # the shape that leaves it
    layer: int = 0
    x: float = 0.0  # of its middle
    y: float = 0.0  # of its top
    column: int = 0
    gutter: float = 0.0  # where a link leaves its column for the next
    above: list[Box] = field(default_factory=list)
    below: list[Box] = field(default_factory=list)

    @property
    def width(self) -> float:
        if not self.lines:
            return 8
        inside = max(map(len, self.lines)) * CHAR + 20
        return max(inside, 2 * len(self.flow) * CHAR + 20) if self.flow else inside

    @property
    def height(self) -> float:
        return len(self.lines) * LINE + 11 if self.lines else 0


class Graph:
    """The boxes and links of a drawing; `key_of` finds the box of a node or leaf by its id."""

    def __init__(self, tensor: Tensor, names: Names, fold: int = 12, max_nodes: int = 600) -> None:
        self.names = names
        self.key_of: dict[int, str] = {}
        self.links: list[tuple[Box, Box]] = []
        self.boxes: list[Box] = []
        nodes = tape(tensor)
        self.title = f"the tape behind {names.get(id(tensor.node or tensor), 'a tensor')}"
        if not nodes:
            self.leaf(tensor)
            return

        groups = self.group(nodes, fold, max_nodes)
        boxes: dict[int, Box] = {}  # id of a node -> its box
        for node in nodes:
            members = groups.get(id(node))
            if members is None:
                boxes[id(node)] = self.op(node, node is nodes[0])
            elif id(members) not in boxes:
                boxes[id(node)] = boxes[id(members)] = self.folded(members)
            else:
                boxes[id(node)] = boxes[id(members)]
            self.key_of[id(node)] = boxes[id(node)].key

        linked: set[tuple[int, int]] = set()
        outside: list[tuple[Any, Box]] = []  # leaves and constants with their users
        for node in nodes:
            box = boxes[id(node)]
            for edge in node.edges:
                if isinstance(edge, Node):
                    above = boxes[id(edge)]
                    if above is not box and (id(above), id(box)) not in linked:
                        linked.add((id(above), id(box)))
                        self.links.append((above, box))
                elif edge is not None and (id(edge), id(box)) not in linked:
                    linked.add((id(edge), id(box)))
                    outside.append((edge, box))
            for at, array in kept(node).items():
                if at != OUT and node.edges[at] is None and is_data(array) and box.kind != "fold":
                    outside.append((array, box))
        self.layer_ops()
        self.place_leaves(outside)

    def group(self, nodes: list[Node], fold: int, max_nodes: int) -> dict[int, list[Node]]:
        """Which nodes share one box: the middle of a long chain, and what is too far away."""
        users = Counter(id(e) for node in nodes for e in set(node.edges) if isinstance(e, Node))

        def plain(node: Node) -> bool:  # one op in, nothing else; one op out
            data = any(
                at != OUT and node.edges[at] is None and is_data(a) for at, a in kept(node).items()
            )
            inside = {id(e) for e in node.edges if e is not None}
            return (
                len(inside) == 1
                and not data
                and users[id(node)] == 1
                and id(node) not in self.names
                and any(isinstance(e, Node) for e in node.edges)
            )

        groups: dict[int, list[Node]] = {}
        done: set[int] = set()
        for node in nodes:
            chain: list[Node] = []
            at: Any = node
            while id(at) not in done and plain(at):
                done.add(id(at))
                chain.append(at)
                at = next(e for e in at.edges if e is not None)
            if len(chain) > fold:
                middle = chain[fold // 4 : -(fold // 4) or None]
                groups.update((id(n), middle) for n in middle)
        drawn, boxes = set(), 0
        far = []
        for node in nodes:
            box = id(groups.get(id(node), node))
            boxes += box not in drawn
            drawn.add(box)
            if boxes > max_nodes:
                far.append(node)
        groups.update((id(n), far) for n in far)
        return groups

    def add(self, kind: str, lines: Iterable[str], flow: str = "", key: str = "") -> Box:
        key = key or f"b{len(self.boxes)}"
        box = Box(kind, [shorten(line) for line in lines if line], key, flow)
        self.boxes.append(box)
        return box

    def op(self, node: Node, is_root: bool) -> Box:
        name = self.names.get(id(node))
        lines = [f"{name} = {node.op.name}" if name else node.op.name, settings(node)]
        saved = kept(node)
        for at, name in enumerate(input_names(node)):  # x * 2.0: show the 2.0
            value = saved.get(at)
            if at < len(node.edges) and node.edges[at] is None and value is not None:
                if not hasattr(value, "shape"):
                    lines.append(f"{name} = {value!r}")
                elif value.size == 1:
                    lines.append(f"{name} = {value.item():.4g}")
        return self.add("root" if is_root else "op", lines, str(node.shape))

    def folded(self, members: list[Node]) -> Box:
        counted = Counter(node.op.name for node in members)
        what = [f"{n:,} × {name}" for name, n in counted.most_common(4)]
        rest = len(counted) - len(what)
        return self.add(
            "fold",
            [f"⋮ {len(members):,} ops", *what, f"and {rest} other kinds" * (rest > 0)],
            str(members[0].shape),
        )

    def leaf(self, thing: Any, copy: bool = False) -> Box:
        """A box for a leaf, or for a constant array that the tape keeps."""
        wanted = isinstance(thing, Tensor) and thing.requires_grad
        name = self.names.get(id(thing), "leaf" if wanted else "constant")
        key = self.key_of.setdefault(id(thing), f"b{len(self.boxes)}")
        kind = "leaf" if wanted else "constant"
        return self.add(f"{kind} again" if copy else kind, [name, str(tuple(thing.shape))], key=key)

    # Layers -------------------------------------------------------------------------------

    def layer_ops(self) -> None:
        """Layer 0 is the output's; each op is as near to it as its longest path allows.

        (Boxes were made with the latest op first, so users come before what they use.)
        """
        users: dict[Box, list[Box]] = {box: [] for box in self.boxes}
        for above, below in self.links:
            users[above].append(below)
        pending = {box: 0 for box in self.boxes}
        inputs: dict[Box, list[Box]] = {box: [] for box in self.boxes}
        for above, below in self.links:
            pending[above] += 1
            inputs[below].append(above)
        ready = [box for box, n in pending.items() if n == 0]
        for box in ready:
            for above in inputs[box]:
                above.layer = max(above.layer, box.layer + 1)
                pending[above] -= 1
                if pending[above] == 0:
                    ready.append(above)

    def place_leaves(self, outside: list[tuple[Any, Box]]) -> None:
        """Leaves stand just above their first user; far users get a copy of the box."""
        made: dict[int, Box] = {}
        linked = set()
        for thing, user in sorted(outside, key=lambda pair: -pair[1].layer):
            box = made.get(id(thing))
            if box is None or box.layer - user.layer > 4:
                box = made[id(thing)] = self.leaf(thing, copy=box is not None)
                box.layer = user.layer + 1
            if (box, user) not in linked:
                linked.add((box, user))
                self.links.append((box, user))

    # Layout -------------------------------------------------------------------------------

    def layout(self, rows: int) -> tuple[list[list[Box]], float, float]:
        """Give every box its place; returns the paths of the links, the width and the height."""
        depth = max(box.layer for box in self.boxes)
        layers: list[list[Box]] = [[] for _ in range(depth + 1)]  # top to bottom
        for box in self.boxes:
            layers[depth - box.layer].append(box)
        paths = []
        for above, below in self.links:
            path = [above]
            for at in range(above.layer - 1, below.layer, -1):  # a bend in each layer between
                bend = Box("leaf's bend" if is_leaf(above) else "bend", layer=at)
                layers[depth - at].append(bend)
                path.append(bend)
            path.append(below)
            paths.append(path)
            for a, b in itertools.pairwise(path):
                a.below.append(b)
                b.above.append(a)

        for layer in layers:
            for i, box in enumerate(layer):
                box.x = i
        for sweep in range(8):
            down = sweep % 2 == 0
            for layer in layers if down else reversed(layers):
                near = attrgetter("above" if down else "below")
                middle = {box: mean((b.x for b in near(box)), box.x) for box in layer}
                layer.sort(key=middle.__getitem__)
                for i, box in enumerate(layer):
                    box.x = i
        for layer in layers:
            spread(layer, [0.0] * len(layer))
        for sweep in range(7):  # ops in line with what they use, or with what uses them
            down = sweep % 2 == 0
            for layer in layers if down else reversed(layers):
                near = attrgetter("above" if down else "below")
                spread(layer, [mean((b.x for b in ops(near(box))), box.x) for box in layer])
        for layer in reversed(layers):  # at last, leaves over their users
            wish = [
                mean((b.x for b in box.below), box.x) if is_leaf(box) else box.x for box in layer
            ]
            spread(layer, wish)

        left = bottom = 0.0
        for number, column in enumerate(wrap(layers, rows)):
            shift = left - min(box.x - box.width / 2 for layer in column for box in layer)
            right = shift + max(box.x + box.width / 2 for layer in column for box in layer)
            y = 0.0
            for layer in column:
                height = max(box.height for box in layer)
                for box in layer:
                    box.x += shift
                    box.y = y + (height - box.height)
                    box.column, box.gutter = number, right + GAP_X
                y += height + GAP_Y
            left = right + 2.5 * GAP_X
            bottom = max(bottom, y)
        return paths, right, bottom - GAP_Y / 2

    def svg(self, rows: int = 40) -> str:
        """The drawing as SVG."""
        paths, width, height = self.layout(rows)
        pad, top = 12, 40 if any(box.column for box in self.boxes) else 12
        self.width = width
        w, h = f"{width + 2 * pad:.0f}", f"{height + pad + top:.0f}"
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="minidl-graph" viewBox="{-pad} {-top} '
            f'{w} {h}" width="{w}" height="{h}" role="img">'
            f"<title>{html.escape(self.title)}</title>",
            STYLE,
        ]
        for path in paths:
            parts.append(
                f'<g class="link" data-from="{path[0].key}" data-to="{path[-1].key}">'
                f'<path d="{curve(path)}"/><path class="tip" d="{tip(path[-1])}"/>'
                f'<path class="up" d="{up(path[0])}"/></g>'
            )
        for box in self.boxes:
            parts.append(f'<g class="box {box.kind}" data-key="{box.key}">')
            parts.append(
                f'<rect x="{box.x - (inner := box_width(box)) / 2:.1f}" y="{box.y:.1f}" '
                f'width="{inner:.1f}" height="{box.height:.1f}" rx="6"/>'
            )
            for i, line in enumerate(box.lines):
                first = ' class="name"' if i == 0 else ""
                parts.append(
                    f'<text{first} x="{box.x:.1f}" y="{box.y + 18 + i * LINE:.1f}">'
                    f"{html.escape(line)}</text>"
                )
            if box.flow:  # on the side that the links turn away from
                left = sum(b.x - box.x for b in box.below) > 1
                side, x = (" left", box.x - 5) if left else ("", box.x + 5)
                parts.append(
                    f'<text class="shape{side}" x="{x:.1f}" y="{box.y + box.height + 14:.1f}">'
                    f"{html.escape(box.flow)}</text>"
                )
            parts.append("</g>")
        return "".join([*parts, "</svg>"])


STYLE = """<style>
.minidl-graph{font:12px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.minidl-graph .box text{fill:#fff;text-anchor:middle}
.minidl-graph .box .name{font-weight:bold}
.minidl-graph .box .shape{fill:#7d8590;text-anchor:start}
.minidl-graph .box .left{text-anchor:end}
.minidl-graph .op rect{fill:#3b6fc4}
.minidl-graph .root rect{fill:#b8560f}
.minidl-graph .leaf rect{fill:#2c8048}
.minidl-graph .constant rect{fill:#69727d}
.minidl-graph .again rect{stroke:#9aa3ad;stroke-width:1.5;stroke-dasharray:4 3}
.minidl-graph .fold rect{fill:#6f5aa8;stroke:#a895dc;stroke-width:1.5;stroke-dasharray:2 3}
.minidl-graph .link path{fill:none;stroke:#8b949e;stroke-width:1.4}
.minidl-graph .link .tip{fill:#8b949e;stroke:none}
.minidl-graph .link .up{display:none}
</style>"""  # colours that read on white and on black: a notebook does not say which it is


def is_data(value: Any) -> bool:
    """Whether a constant is worth a box of its own."""
    return hasattr(value, "shape") and getattr(value, "size", 0) > 1


def shorten(text: str, length: int = 34) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def is_leaf(box: Box) -> bool:
    return box.kind.startswith(("leaf", "constant"))


def ops(boxes: list[Box]) -> list[Box]:
    """Without the leaves, if there are others: leaves follow the ops, not ops the leaves."""
    return [box for box in boxes if not is_leaf(box)] or boxes


def mean(values: Iterator[float], default: float) -> float:
    found = list(values)
    return sum(found) / len(found) if found else default


def box_width(box: Box) -> float:
    return max(map(len, box.lines)) * CHAR + 20


def spread(layer: list[Box], wish: list[float]) -> None:
    """Put a layer's boxes as near to where they wish as their order and widths allow.

    Least squares under x[i+1] - x[i] >= gap[i]: an isotonic regression, solved by pooling
    adjacent violators (Ayer et al. 1955). Bends weigh more, so that long links are straight.
    """
    pools: list[list[float]] = []  # [weight, mean, number of boxes]
    offsets, offset = [], 0.0
    for i, box in enumerate(layer):
        if i:
            offset += (layer[i - 1].width + box.width) / 2 + GAP_X
        offsets.append(offset)
        weight = 4.0 if box.kind == "bend" else 0.05 if is_leaf(box) else 1.0
        pools.append([weight, wish[i] - offset, 1])
        while len(pools) > 1 and pools[-2][1] > pools[-1][1]:
            w, m, n = pools.pop()
            total = pools[-1][0] + w
            pools[-1] = [total, (pools[-1][0] * pools[-1][1] + w * m) / total, pools[-1][2] + n]
    placed = [m for _, m, n in pools for _ in range(int(n))]
    for box, m, offset in zip(layer, placed, offsets, strict=True):
        box.x = m + offset


def wrap(layers: list[list[Box]], rows: int) -> list[list[list[Box]]]:
    """Cut the layers into columns of about equal height, where few links are cut."""
    columns = -(-len(layers) // max(rows, 1))
    ideal = len(layers) / columns
    cuts = [0]
    for k in range(1, columns):
        slack = max(1, int(ideal / 5))
        near = range(max(cuts[-1] + 1, int(ideal * k) - slack), int(ideal * k) + 1)
        links = {i: sum(len(box.above) for box in layers[i]) for i in near}
        fewest = min(links.values())
        cuts.append(max(i for i in near if links[i] == fewest))
    return [layers[a:b] for a, b in zip(cuts, [*cuts[1:], len(layers)])]


def curve(path: list[Box]) -> str:
    """A smooth line from the bottom of the first box through the bends to the top of the last."""
    x, y = path[0].x, path[0].y + path[0].height
    d, before = [f"M{x:.1f} {y:.1f}"], path[0]
    for box in path[1:]:
        end = box.y - (3 if box is path[-1] else 0)
        if box.column == before.column:
            middle = (y + end) / 2
            d.append(f"C{x:.1f} {middle:.1f} {box.x:.1f} {middle:.1f} {box.x:.1f} {end:.1f}")
        else:  # into the next column: down, aside, up, and in from above
            g = before.gutter
            d.append(
                f"C{x:.1f} {y + 40:.1f} {g:.1f} {y + 40:.1f} {g:.1f} {y:.1f}V{end:.1f}"
                f"C{g:.1f} {end - 40:.1f} {box.x:.1f} {end - 40:.1f} {box.x:.1f} {end:.1f}"
            )
        before = box
        x, y = box.x, end
    return "".join(d)


def tip(box: Box) -> str:
    """An arrowhead that ends at the top of a box."""
    return f"M{box.x - 4:.1f} {box.y - 8:.1f}h8l-4 8z"


def up(box: Box) -> str:
    """An arrowhead the other way, into the bottom of a box; `explain` shows it for gradients."""
    return f"M{box.x - 5:.1f} {box.y + box.height + 9:.1f}h10l-5 -9z"
