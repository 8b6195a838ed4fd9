"""Which line of your program made which step of the tape.

Two ways. `record_source` notes the line of every op while the program runs, which costs a little.
Without it, `infer` finds the lines afterwards and for nothing: it reads the program text of the
frames that are still on the stack, looks which variable holds which tensor, and matches each
variable's assignment (``h = F.relu(x @ w)``) with the steps behind the tensor, from the outermost
op inwards. Where an expression calls something that is no op, all steps up to the next tensor
with a name are counted to its line. That is a reconstruction, and it is marked as one.
"""

from __future__ import annotations

import ast
import importlib
import linecache
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NamedTuple

from minidl.autograd import Node
from minidl.graph import input_names, variables
from minidl.tensor import Tensor


class Line(NamedTuple):
    """A line of the user's program; ``inferred``: found afterwards."""

    file: str
    number: int
    code: str
    inferred: bool


PACKAGE = Path(__file__).parent
PROGRAMS = tuple(str(PACKAGE / name) for name in ("cli", "train.py", "report.py"))


def is_library(frame: FrameType) -> bool:
    """Whether a frame runs minidl's own code (its programs count as the user's), or Python's."""
    file = frame.f_code.co_filename
    return file.startswith((f"{PACKAGE}/", "<frozen")) and not file.startswith(PROGRAMS)


# Noted while the program runs -------------------------------------------------------------


class record_source:
    """Note for every op which line of the program called it: ``with minidl.record_source():``.

    `Tensor.explain` then shows these lines instead of inferring them.
    """

    def __init__(self) -> None:
        self.before: list[Any] = []

    def __enter__(self) -> None:
        module = importlib.import_module("minidl.op")
        self.before.append(module.on_record)
        module.on_record = note_source  # type: ignore[attr-defined]

    def __exit__(self, *_: object) -> None:
        importlib.import_module("minidl.op").on_record = self.before.pop()  # type: ignore[attr-defined]


def note_source(node: Node) -> None:
    """Set a node's `source` to the innermost line outside minidl."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and is_library(frame):
        frame = frame.f_back
    if frame is not None:
        file, number = frame.f_code.co_filename, frame.f_lineno
        code = linecache.getline(file, number, frame.f_globals).strip()
        node.source = (file, number, code)


# Inferred afterwards ----------------------------------------------------------------------

OPERATORS: dict[type, str] = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Div: "div",
    ast.Pow: "pow",
    ast.MatMult: "matmul",
    ast.USub: "neg",
}


@dataclass(eq=False)
class Statement:
    """A simple statement, or the head of a compound one; ``values``: what it binds to names."""

    tree: ast.stmt
    line: Line
    last: int  # the number of its last line
    position: int
    loops: tuple[ast.stmt, ...]
    values: dict[str, ast.expr]


class Scope:
    """The program text of one frame: of its function, or of its module or notebook cells."""

    def __init__(self, frame: FrameType) -> None:
        self.frame = frame
        self.variables = variables(frame)
        code = frame.f_code
        self.name = code.co_name
        self.parameters = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        self.statements: list[Statement] = []
        self.now: Statement | None = None  # the one that runs

    def load(self) -> None:
        """Read the program text."""
        frame, code, namespace = self.frame, self.frame.f_code, self.frame.f_globals
        file = code.co_filename
        text = "".join(linecache.getlines(code.co_filename, namespace))
        cells = namespace.get("In")  # IPython's list of what was run
        if (
            code.co_name == "<module>"
            and isinstance(cells, list)
            and cells
            and cells[-1].strip() == text.strip()
        ):
            for number, cell in enumerate(cells[:-1]):
                self.read(cell, f"In [{number}]")
            file = f"In [{len(cells) - 1}]"
        self.read(text, file)
        number = frame.f_lineno
        for s in self.statements:
            if s.line.file == file and s.line.number <= number <= s.last:
                self.now = s

    def read(self, text: str, file: str) -> None:
        """Append a text's statements (of this frame's function only, if it runs one)."""
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            return
        body = tree.body
        if self.name != "<module>":
            first = self.frame.f_code.co_firstlineno
            body = []
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    start = min(n.lineno for n in (node, *node.decorator_list))
                    if node.name == self.name and start == first:
                        body = node.body
        lines = text.splitlines()
        self.collect(body, (), lines, file)

    def collect(
        self, body: Sequence[ast.stmt], loops: tuple[ast.stmt, ...], lines: list[str], file: str
    ) -> None:
        for tree in body:
            if isinstance(tree, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            inner = getattr(tree, "body", None)
            last = inner[0].lineno - 1 if inner else tree.end_lineno or tree.lineno
            last = max(last, tree.lineno)
            code = " ".join(line.strip() for line in lines[tree.lineno - 1 : last])
            self.statements.append(
                Statement(
                    tree,
                    Line(file, tree.lineno, code, True),
                    last,
                    len(self.statements),
                    loops,
                    bindings(tree),
                )
            )
            within = loops + (tree,) if isinstance(tree, ast.For | ast.While) else loops
            for part in ("body", "orelse", "finalbody"):
                self.collect(getattr(tree, part, ()), within, lines, file)
            for part in ("handlers", "cases"):
                for branch in getattr(tree, part, ()):
                    self.collect(branch.body, within, lines, file)

    def assignments(self, name: str, before: Statement) -> Iterator[Statement]:
        """The statements that may have bound a name before a statement ran, the likeliest first:
        above it in the same loop, then below it (an iteration ago), then above the loop."""
        binding = [s for s in reversed(self.statements) if name in s.values]
        above = [s for s in binding if s.position < before.position]
        around = [
            s for s in binding if s.position >= before.position and set(s.loops) & set(before.loops)
        ]
        same = [s for s in above if set(s.loops) & set(before.loops)]
        yield from same
        yield from around
        yield from (s for s in above if s not in same)

    def origin(
        self, name: str, node: Node, before: Statement, exactly: bool = False
    ) -> tuple[ast.expr, Statement] | None:
        """The expression that made the node which a name held when a statement ran."""
        possible = []
        for statement in self.assignments(name, before):
            value = statement.values[name]
            if isinstance(value, ast.Name):  # an alias: where the other name comes from
                if value.id != name and (found := self.origin(value.id, node, statement, exactly)):
                    return found
                continue
            operation = self.operation(value)
            if operation is None:
                possible.append((value, statement))
                if not exactly:
                    break
            elif operation[0] == node.op.name:
                return value, statement
        return possible[0] if possible and not exactly else None

    def operation(self, expr: ast.expr) -> tuple[str, list[ast.expr], dict[str, ast.expr]] | None:
        """The op that an expression ends with, and its operands; None: not known."""
        from minidl.op import registry

        operands: list[ast.expr]
        if isinstance(expr, ast.BinOp | ast.UnaryOp) and type(expr.op) in OPERATORS:
            operands = [expr.left, expr.right] if isinstance(expr, ast.BinOp) else [expr.operand]
            return OPERATORS[type(expr.op)], operands, {}
        if isinstance(expr, ast.Subscript):
            return "getitem", [expr.value], {}
        if not isinstance(expr, ast.Call):
            return None
        function = expr.func
        operands = []
        for argument in expr.args:
            operands += argument.elts if isinstance(argument, ast.List | ast.Tuple) else [argument]
        keywords = {k.arg: k.value for k in expr.keywords if k.arg}
        if isinstance(function, ast.Name):
            name = function.id
        elif isinstance(function, ast.Attribute):
            name, root = function.attr, function.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if not isinstance(root, ast.Name) or not isinstance(self.look_up(root.id), ModuleType):
                operands = [function.value, *operands]  # a method
        else:
            return None
        name = name.rstrip("_")
        return (name, operands, keywords) if name in registry else None

    def look_up(self, name: str) -> Any:
        return self.variables.get(name, self.frame.f_globals.get(name))


def bindings(tree: ast.stmt) -> dict[str, ast.expr]:
    """What a statement binds to plain names: name -> expression."""
    values: dict[str, ast.expr] = {}

    def bind(target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Name):
            values[target.id] = value
        elif isinstance(target, ast.Tuple | ast.List):
            pairs = isinstance(value, ast.Tuple | ast.List) and len(value.elts) == len(target.elts)
            for i, part in enumerate(target.elts):
                bind(part, value.elts[i] if pairs else ast.Tuple([value]))  # type: ignore[attr-defined]

    if isinstance(tree, ast.Assign):
        for target in tree.targets:
            bind(target, tree.value)
    elif isinstance(tree, ast.AnnAssign) and tree.value is not None:
        bind(tree.target, tree.value)
    elif isinstance(tree, ast.AugAssign) and isinstance(tree.target, ast.Name):
        before = ast.Name(tree.target.id, ast.Load())
        values[tree.target.id] = ast.BinOp(before, tree.op, tree.value)
    for part in ast.iter_child_nodes(tree):
        if isinstance(part, ast.expr):
            for expr in ast.walk(part):
                if isinstance(expr, ast.NamedExpr):
                    bind(expr.target, expr.value)
    return values


class Inference:
    """Finds the lines of nodes; `lines` has them by the node's id."""

    def __init__(self, root: Node, nodes: list[Node], frame: FrameType | None) -> None:
        self.lines: dict[int, Line] = {}
        wanted = {id(node) for node in nodes}
        scopes: list[Scope] = []
        while frame is not None and len(scopes) < 30:
            if not is_library(frame):
                scopes.append(Scope(frame))
            frame = frame.f_back

        held: list[list[tuple[str, Node]]] = []  # for each scope: variables that hold a node
        for scope in scopes:
            found = [(n, v.node) for n, v in scope.variables.items() if isinstance(v, Tensor)]
            held.append([(n, node) for n, node in found if node and id(node) in wanted])
        self.named = {id(node) for pairs in held for _, node in pairs}

        parameters: list[tuple[str, Node]] = []  # nodes that came into a scope from its caller
        callee: Scope | None = None
        for scope, pairs in zip(scopes, held, strict=True):
            if callee is None or pairs or parameters:  # else nothing of interest came from there
                scope.load()
            if scope.now is None:
                callee, parameters = scope, []
                continue
            parameters = self.passed(scope, callee, parameters) if callee else []
            for name, node in sorted(pairs, key=lambda pair: pair[1].number):
                if id(node) in self.lines:
                    continue
                found_at = scope.origin(name, node, scope.now)
                if found_at is not None:
                    parameters += self.match(scope, node, *found_at)
                elif name in scope.parameters:
                    parameters.append((name, node))
            if callee is None and (expr := explained(scope)) is not None:
                parameters += self.match(scope, root, expr, scope.now)
            callee = scope

        for node in nodes:  # what is left over belongs to whatever used it; latest first
            line = self.lines.get(id(node))
            for edge in node.edges:
                if line is not None and isinstance(edge, Node):
                    self.lines.setdefault(id(edge), line)

    def passed(
        self, scope: Scope, callee: Scope, parameters: list[tuple[str, Node]]
    ) -> list[tuple[str, Node]]:
        """Follow nodes that came in as parameters to the call in the caller's current statement."""
        further: list[tuple[str, Node]] = []
        if scope.now is None:
            return further
        for tree in ast.walk(scope.now.tree):
            if not isinstance(tree, ast.Call):
                continue
            name = getattr(tree.func, "attr", None) or getattr(tree.func, "id", None)
            if name != callee.name:
                continue
            names = list(callee.parameters)
            if names[:1] == ["self"]:
                names = names[1:]
            given = dict(zip(names, tree.args)) | {k.arg: k.value for k in tree.keywords if k.arg}
            for parameter, node in parameters:
                if parameter in given:
                    further += self.match(scope, node, given[parameter], scope.now)
            break
        return further

    def match(
        self, scope: Scope, node: Node, expr: ast.expr, statement: Statement
    ) -> list[tuple[str, Node]]:
        """Give an expression's line to the nodes that it made; returns what came in by parameters.

        Names inside the expression lead on to the statements that bound them earlier.
        """
        parameters: list[tuple[str, Node]] = []
        stack: list[tuple[Any, ast.expr, Statement]] = [(node, expr, statement)]
        while stack:
            node, expr, statement = stack.pop()
            if not isinstance(node, Node) or id(node) in self.lines:
                continue
            if isinstance(expr, ast.NamedExpr):
                expr = expr.value
            if isinstance(expr, ast.Name):
                if id(node) in self.named:
                    continue  # has its own turn
                origin = scope.origin(expr.id, node, statement)
                if origin is not None:
                    stack.append((node, *origin))
                    continue
                if expr.id in scope.parameters:
                    parameters.append((expr.id, node))
                    continue
            self.lines[id(node)] = statement.line
            operation = scope.operation(expr)
            if operation is not None and operation[0] == node.op.name:
                _, operands, keywords = operation
                by_name = dict(zip(input_names(node), node.edges))
                stack += [(edge, e, statement) for edge, e in zip(node.edges, operands)]
                stack += [(by_name.get(name), e, statement) for name, e in keywords.items()]
                if len(operands) + len(keywords) >= sum(e is not None for e in node.edges):
                    continue
            # Something unknown made it: take all behind it up to what has a name, or what is
            # plainly the work of an earlier assignment to a name in this expression.
            names = {e.id for e in ast.walk(expr) if isinstance(e, ast.Name)}
            inside = [edge for edge in node.edges if isinstance(edge, Node)]
            while inside:
                edge = inside.pop()
                if id(edge) in self.named or id(edge) in self.lines:
                    continue
                origins = (scope.origin(name, edge, statement, exactly=True) for name in names)
                origin = next((o for o in origins if o is not None), None)
                if origin is not None:
                    stack.append((edge, *origin))
                else:
                    self.lines[id(edge)] = statement.line
                    inside += [e for e in edge.edges if isinstance(e, Node)]
        return parameters


def explained(scope: Scope) -> ast.expr | None:
    """The expression that `explain` is called on, in the scope's current statement."""
    assert scope.now is not None
    for tree in ast.walk(scope.now.tree):
        if isinstance(tree, ast.Call):
            if isinstance(tree.func, ast.Attribute) and tree.func.attr == "explain":
                value = tree.func.value
                name = value.id if isinstance(value, ast.Name) else ""
                if not isinstance(scope.look_up(name), ModuleType):  # not minidl.explain.explain(x)
                    return value
            if getattr(tree.func, "attr", getattr(tree.func, "id", "")) == "explain" and tree.args:
                return tree.args[0]
    return None


def infer(root: Node, nodes: list[Node], frame: FrameType | None) -> dict[int, Line]:
    """The lines of nodes, by their id: the noted ones, and for the others what can be inferred.

    Args:
        root: the node that `explain` is called on.
        nodes: all nodes behind it, the latest first.
        frame: where it is called.
    """
    noted = {id(node): Line(*node.source, False) for node in nodes if getattr(node, "source", None)}
    if len(noted) == len(nodes):
        return noted
    return {**Inference(root, nodes, frame).lines, **noted}
