"""`Tensor.explain`: the backward walk, one step at a time.

The walk here is the one of `minidl.autograd.walk` in slow motion: the same order, the same rules
on the same arrays, but it stops at each node to note what came in and what goes out, it runs no
hooks, writes to no `.grad`, and leaves the tape as it found it. (A test holds the two together.)
"""

from __future__ import annotations

import base64
import inspect
import io
import textwrap
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np

from minidl import backend
from minidl.autograd import Node, explore, first_gradient, no_grad, unbroadcast
from minidl.graph import OUT, Graph, Names, caller, find_names, input_names, kept, settings
from minidl.lines import Line, infer, record_source
from minidl.recompute import Forgotten
from minidl.tensor import Tensor

__all__ = ["Explanation", "explain", "record_source", "source"]

NOT_KEPT = "not kept: no gradient rule needs it"


def explain(
    tensor: Tensor,
    path: str | PathLike[str] | None = None,
    *,
    gradient: Tensor | None = None,
    names: Any = None,
    steps: int | None = 200,
) -> None:
    """Show the backward walk from a tensor step by step, without taking it.

    Args:
        tensor: usually the loss.
        path: where to write a page of HTML (self-contained, with a slider and the drawn graph);
            None: print text.
        gradient: the gradient to start with; may be left out for a tensor of one element.
        names: names for leaves, as in `minidl.draw`; the caller's variables are found anyway.
        steps: show no more than this many; None: all.

    Raises:
        RuntimeError: as `Tensor.backward`.
    """
    explanation = Explanation(tensor, gradient, names, steps)
    if path is None:
        print(explanation.text())
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(explanation.html(), encoding="utf-8")


def source(thing: Any) -> str:
    """The live source of an op, a gradient rule, a function or a class, as text.

    Raises:
        TypeError, OSError: there is none (built in, or typed into a session without files).
    """
    if hasattr(thing, "op"):
        thing = thing.op.formula
    return textwrap.dedent(inspect.getsource(thing)).rstrip()


# What is shown ----------------------------------------------------------------------------


@dataclass
class Value:
    """An array, short enough to read."""

    shape: tuple[int, ...]
    text: str
    image: str = ""  # a picture of it, as a data: address
    part: str = ""  # what of it the picture shows, if not all


@dataclass
class Flow:
    """One input of a step: what it was, and the gradient that goes back to it."""

    name: str
    to: str = ""  # a leaf's name, or what made it
    key: str = ""  # of its box in the drawing
    node: Node | None = None
    value: Value | None = None
    gradient: Value | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Step:
    """One node of the walk."""

    number: int
    op: str
    name: str
    settings: str
    shape: tuple[int, ...]
    line: Line | None
    key: str
    out: Value | None
    gradient: Value | None
    formula: str
    rule: str
    where: str  # the rule's file and line
    flows: list[Flow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Explanation:
    """The walk back from a tensor, as data; `text` and `html` present it."""

    def __init__(
        self,
        tensor: Tensor,
        gradient: Tensor | None = None,
        names: Any = None,
        limit: int | None = 200,
    ) -> None:
        frame = caller()
        self.names = find_names(names, frame)
        total = (
            {tensor.node or tensor: first_gradient(tensor, gradient, False)}
            if (tensor.requires_grad)
            else {}
        )
        if not total:
            raise RuntimeError(
                "nothing to explain: this tensor does not require a gradient, so nothing that it "
                "was computed from was recorded"
            )
        nodes, uses = explore(total)
        self.count = len(nodes)
        self.name = self.names.get(id(tensor.node or tensor), "the result")
        self.lines = infer(tensor.node, nodes, frame) if tensor.node is not None else {}
        self.graph = Graph(tensor, self.names)
        self.values = known_values(nodes, self.names)
        self.values[id(tensor.node or tensor)] = tensor.array
        self.sent: dict[int, list[int]] = {}  # id of a leaf -> the steps that sent it something
        self.steps: list[Step] = []
        self.leaves: list[tuple[str, str, Value, list[int]]] = []  # name, key, gradient, from
        segments = {s.segment for n in nodes if type(s := n.saved) is Forgotten}
        before = {segment: segment.saved for segment in segments}
        try:
            with no_grad():
                self.walk(total, nodes, uses, limit)
        finally:
            for segment, saved in before.items():
                segment.saved = saved
        del self.values

    def walk(
        self, total: dict[Any, Any], nodes: list[Node], uses: dict[Tensor, int], limit: int | None
    ) -> None:
        """See `minidl.autograd.walk`."""
        number_of: dict[int, int] = {}
        for leaf in [leaf for leaf, n in uses.items() if n == 0]:
            self.complete(leaf, total)
        for at in nodes[:limit]:
            g = total.pop(at, None)
            step = self.step(at, g)
            self.steps.append(step)
            number_of[id(at)] = step.number
            arrived: Any = [None] * len(at.edges)
            if g is not None and at.op.rule is not None:
                arrived = at.op.rule(g, *at.saved, **at.kwargs)
            for flow, edge, gx in zip(step.flows, at.edges, arrived):
                if edge is None:  # a constant
                    lazy = type(gx) is FunctionType
                    flow.notes.append(
                        "a constant: "
                        + ("its part of the rule is never called" if lazy else "needs no gradient")
                    )
                    continue
                if type(gx) is FunctionType:
                    gx = gx()
                if gx is None:
                    flow.notes.append("the rule sends it nothing")
                else:
                    if gx.shape != edge.shape:
                        flow.notes.append(
                            f"it was broadcast from {edge.shape} to {gx.shape}: "
                            "its gradient is summed back"
                        )
                        gx = unbroadcast(gx, edge.shape)
                    flow.gradient = short(gx)
                    senders = self.sent.setdefault(id(edge), [])
                    senders.append(step.number)
                    if edge in total:
                        total[edge] = total[edge] + gx
                        again = senders[-2] == step.number
                        flow.notes.append(
                            "it is used twice here: both shares are added"
                            if again
                            else f"added to what step {senders[-2]} sent: its gradient is the sum "
                            "over all uses"
                        )
                    else:
                        total[edge] = gx
                if type(edge) is not Node:
                    uses[edge] -= 1
                    if not uses[edge]:
                        self.complete(edge, total)
        for step in self.steps:
            for flow in step.flows:
                if flow.node is not None:
                    n = number_of.get(id(flow.node))
                    flow.to += f", step {n}" if n else ", a later step"

    def complete(self, leaf: Tensor, total: dict[Any, Any]) -> None:
        if leaf in total:
            from_ = self.sent.get(id(leaf), [])
            self.leaves.append((self.call(leaf), self.key(leaf), short(total.pop(leaf)), from_))

    def step(self, node: Node, g: Any) -> Step:
        """What can be said of a node before its rule runs."""
        step = Step(
            number=len(self.steps) + 1,
            op=node.op.name,
            name=self.names.get(id(node), ""),
            settings=settings(node),
            shape=tuple(node.shape),
            line=self.lines.get(id(node)),
            key=self.key(node),
            out=self.value(node),
            gradient=None if g is None else short(g),
            formula=text_of(node.op.formula),
            rule=text_of(node.op.rule),
            where=place_of(node.op.rule),
        )
        if node.hooks:
            step.notes.append("hooks hang here, which explain() does not run")
        if type(node.saved) is Forgotten:
            step.notes.append("checkpoint: what the rule needs is computed again")
        saved = kept(node)
        for at, (name, edge) in enumerate(zip(input_names(node), node.edges)):
            flow = Flow(name)
            if edge is None:
                constant = saved.get(at)
                flow.to = self.names.get(id(constant), "")
                flow.key = self.graph.key_of.get(id(constant), "")
                flow.value = None if constant is None else short(constant)
            else:
                flow.to, flow.key, flow.value = self.call(edge), self.key(edge), self.value(edge)
                flow.node = edge if type(edge) is Node else None
            step.flows.append(flow)
        return step

    def key(self, edge: Any) -> str:
        return self.graph.key_of.get(id(edge), "")

    def call(self, edge: Any) -> str:
        """What to call a node or leaf."""
        name = self.names.get(id(edge), "")
        if type(edge) is Node:
            return f"{name} ({edge.op.name})" if name else edge.op.name
        return name or "a leaf without a name"

    def value(self, edge: Any) -> Value | None:
        array = edge.array if isinstance(edge, Tensor) else self.values.get(id(edge))
        return None if array is None else short(array)

    @property
    def inferred(self) -> bool:
        return any(line.inferred for line in self.lines.values())

    @property
    def rest(self) -> int:
        """How many steps are not shown."""
        return self.count - len(self.steps)

    # Presented ----------------------------------------------------------------------------

    def text(self) -> str:
        """The walk as text for a terminal."""
        shown: dict[str, int] = {}
        rows = [f"The walk back from {self.name}: {self.count} steps.", ""]
        for step in self.steps:
            name = f"{step.name} = {step.op}" if step.name else step.op
            rows.append(f"step {step.number}: {name}({step.settings}) -> {step.shape}")
            if step.line:
                mark = "   (inferred)" if step.line.inferred else ""
                rows.append(f"  line        {where(step.line)}: {step.line.code}{mark}")
            rows.append(f"  value       {said(step.out)}")
            rows.append(f"  gradient in {said(step.gradient, 'none arrived')}")
            if step.where in shown:
                rows.append(f"  rule        {step.where}, as in step {shown[step.where]}")
            else:
                shown[step.where] = step.number
                rows.append(f"  rule        {step.where}")
                rows += [f"    | {line}" for line in step.rule.splitlines()]
            for flow in step.flows:
                rows.append(f"  {flow.name}: {flow.to or 'constant'}")
                rows.append(f"    value     {said(flow.value)}")
                if flow.gradient:
                    rows.append(f"    gradient  {said(flow.gradient)}")
                rows += [f"    {note}" for note in flow.notes]
            rows += [f"  ({note})" for note in step.notes] + [""]
        if self.rest:
            rows += [f"... and {self.rest} more steps: explain(steps=None) shows all", ""]
        if self.leaves:
            rows.append("The leaves, where backward() would add these to .grad:")
        for name, _, gradient, steps in self.leaves:
            sent = f"   from step {', '.join(map(str, steps))}" if steps else ""
            rows.append(f"  {name}  {said(gradient)}{sent}")
        if self.inferred:
            rows += ["", INFERRED]
        return "\n".join(rows)

    def html(self) -> str:
        """The walk as a page that needs nothing else."""
        import jinja2

        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        program: dict[tuple[str, int], Line] = {}
        for line in sorted(self.lines.values(), key=lambda line: (line.file, line.number)):
            program.setdefault((line.file, line.number), line)
        template = environment.get_template("explain.html")
        return template.render(
            e=self,
            svg=self.graph.svg(rows=60),
            least=round(0.7 * self.graph.width),
            program=list(program.values()),
            nice=nice,
            INFERRED=INFERRED,
            NOT_KEPT=NOT_KEPT,
        )


INFERRED = (
    "(inferred): these lines were found afterwards, from the variables and the program text; "
    "`with minidl.record_source():` around the forward pass notes them exactly."
)


def known_values(nodes: list[Node], names: Names) -> dict[int, Any]:
    """What nodes computed, as far as it is still there: kept for a rule, or held by a variable."""
    values = dict(names.arrays)
    for node in nodes:
        for at, array in kept(node).items():
            edge = node if at == OUT else node.edges[at]
            if isinstance(edge, Node):
                values[id(edge)] = array
    return values


def short(array: Any) -> Value:
    """An array in one line: all of it if it is small, else its beginning and its range."""
    if not hasattr(array, "shape"):
        return Value((), repr(array))
    array = np.asarray(backend.to_device(array, "cpu"))
    if array.size <= 8:
        text = np.array2string(array, precision=4, separator=", ").replace("\n", "")
        return Value(array.shape, " ".join(text.split()), *picture(array))
    first = ", ".join(f"{v:.4g}" for v in array.ravel()[:4])
    text = f"[{first}, …]"
    if array.dtype.kind == "f":
        finite = array[np.isfinite(array)]
        if finite.size:
            text += f" from {finite.min():.3g} to {finite.max():.3g}, mean {finite.mean():.3g}"
        if finite.size < array.size:
            text += f", {array.size - finite.size} not finite"
    else:
        text += f" from {array.min()} to {array.max()}"
    return Value(array.shape, text, *picture(array))


def picture(array: np.ndarray) -> tuple[str, str]:
    """A small array as a picture: blue below zero, orange above, grey at zero; and which part."""
    if array.size < 2 or array.dtype.kind not in "fiu":
        return "", ""
    part = ""
    array = array.squeeze()
    if array.ndim > 2:
        part = f"the first of {' × '.join(map(str, array.shape[:-2]))} planes"
        array = array[(0,) * (array.ndim - 2)]
    array = np.atleast_2d(array)
    if max(array.shape) > 32:
        part = f"the first 32 × 32 of {part or ' × '.join(map(str, array.shape))}"
    array = array[:32, :32].astype(np.float64)
    finite = np.abs(array[np.isfinite(array)])
    x = np.nan_to_num(array / (finite.max(initial=0) or 1.0), posinf=1, neginf=-1)[..., None]
    grey, orange, blue = (np.array(c) for c in ((128, 132, 138), (255, 150, 20), (40, 120, 255)))
    pixels = (grey + np.where(x > 0, x * (orange - grey), -x * (blue - grey))).astype(np.uint8)
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode(), part


def text_of(function: Any) -> str:
    try:
        return source(function)
    except (TypeError, OSError):
        return "(no source text)"


def place_of(function: Any) -> str:
    """Where a function is defined: "minidl/ops/reduce.py:33"."""
    code = inspect.unwrap(function).__code__
    return f"{nice(code.co_filename)}:{code.co_firstlineno}"


def where(line: Line) -> str:
    return f"{nice(line.file)}:{line.number}"


def nice(file: str) -> str:
    """A path as short as it can be told."""
    for base in (Path(__file__).parent.parent, Path.cwd()):
        if file.startswith(f"{base}/"):
            return file[len(f"{base}/") :]
    if "/ipykernel_" in file or file.startswith("<ipython"):
        return "a cell"
    return Path(file).name if file.startswith("/") else file


def said(value: Value | None, otherwise: str = NOT_KEPT) -> str:
    return otherwise if value is None else f"{value.shape} {value.text}"
