"""Every message that the program ends with, read from the code: raised errors, and problems of a workflow file.

A value that the program fills in is shown as its name in capitals; `[...]` is a part that is not always there.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

#: Classes of errors with what they are about, and the exit code.
KINDS = {
    "WorkflowError": ("The workflow file", 2),
    "Problem": ("The workflow file", 2),
    "_note": ("The workflow file", 2),
    "_note_missing": ("The workflow file", 2),
    "Mistake": ("The workflow file", 2),
    "SourceError": ("Sources and data", 2),
    "ArtifactError": ("Artifacts and model folders", 2),
    "CallError": ("The command line, and calls from Python", 2),
    "refuse": ("`doit` with stages", 2),
    "StageError": ("A stage that failed", 1),
}

# Of these, the ones called with key, value, what was expected and what to do
_PROBLEMS = ("Problem", "_note", "_note_missing", "Mistake")

# Functions that return a message
_MAKERS = dict.fromkeys(
    ("unknown_key", "_variant_line", "_toml_error_message", "word_unplanned"), KINDS["WorkflowError"]
)

# How often a name is replaced by what was assigned to it
_MAX_DEPTH = 3


class Part(NamedTuple):
    """A part of a message.

    Attributes:
        text: as shown.
        is_literal: whether the program prints exactly this text.
    """

    text: str
    is_literal: bool = True


class KnownMessage(NamedTuple):
    """A message in the code.

    Attributes:
        about: what kind of mistake it is about.
        exit_code: of the program.
        parts: of the message.
    """

    about: str
    exit_code: int
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The message as shown on the page."""
        return re.sub(r"\s+", " ", "".join(part.text for part in self.parts)).strip()

    @property
    def has_words(self) -> bool:
        """Whether enough of it is literal to be recognized; others pass on a message from elsewhere."""
        return len(re.findall(r"[A-Za-z]{4,}", "".join(part.text for part in self.parts if part.is_literal))) >= 1

    def matches(self, line: str) -> bool:
        """Return whether a printed line is this message."""
        pattern = "".join(re.escape(part.text) if part.is_literal else ".*" for part in self.parts)
        return re.fullmatch(pattern, line, re.DOTALL) is not None


def messages(files: Iterable[Path]) -> list[KnownMessage]:
    """Return the messages in source files, each once, by kind and text.

    Args:
        files: Python modules.
    """
    found: dict[tuple[int, str, str], KnownMessage] = {}
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        scopes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        constants = _assigned(ast.iter_child_nodes(tree))
        for scope in (*scopes, tree):
            for message in _in_scope(scope, constants):
                if message.has_words:
                    found.setdefault((-message.exit_code, message.about, message.text), message)
    return [found[key] for key in sorted(found)]


def _in_scope(scope: ast.AST, constants: dict[str, list[ast.expr]]) -> Iterator[KnownMessage]:
    """Yield the messages of a function, without those of functions in it."""
    nodes = list(_own_nodes(scope))
    assigned = constants | _assigned(nodes)
    if isinstance(scope, ast.FunctionDef) and scope.name in _MAKERS:
        for node in nodes:
            if isinstance(node, ast.Return) and node.value is not None:
                yield KnownMessage(*_MAKERS[scope.name], tuple(_parts(node.value, assigned)))
    for node in nodes:
        name = _called(node)
        if isinstance(node, ast.Call) and name in KINDS and node.args:
            about, code = KINDS[name]
            if name == "refuse" and len(node.args) > 1:
                if not isinstance(node.args[1], ast.Constant) or not isinstance(node.args[1].value, int):
                    continue  # another function of this name
                code = node.args[1].value
            for parts in _variants(name, node, assigned):
                yield KnownMessage(about, code, tuple(parts))


def _variants(name: str, call: ast.Call, assigned: dict[str, list[ast.expr]]) -> Iterator[Sequence[Part]]:
    """Yield the parts of a message; of several, if a name in it has several values."""
    if name not in _PROBLEMS:
        for argument in call.args:
            for value in _values(argument, assigned):
                yield _parts(value, assigned)
        return
    if len(call.args) < 4:
        return
    key, value, _, advice = call.args[:4]
    shown = [Part("FILE", False), Part(": "), Part("TABLE", False)]
    if not isinstance(key, ast.Constant) or key.value:
        shown += [Part("."), *_parts(key, assigned)]
    if not (isinstance(value, ast.Constant) and value.value is None) and _last_name(value) != "UNSET":
        shown += [Part(" = "), Part("VALUE", False)]
    for expected in _values(call.args[2], assigned):
        ending = [Part("ADVICE", False)] if name == "Mistake" else _parts(advice, assigned)
        yield [*shown, Part(": "), *_parts(expected, assigned), Part(". "), *ending]


def _values(node: ast.expr, assigned: dict[str, list[ast.expr]]) -> list[ast.expr]:
    """Return the values that an expression may have: alternatives, or what is assigned to a local name."""
    if isinstance(node, ast.Name) and node.id in assigned:
        return [value for one in assigned[node.id] for value in _values(one, {})]
    if isinstance(node, ast.IfExp):
        return [node.body, node.orelse]
    return [node]


def _assigned(nodes: Iterable[ast.AST]) -> dict[str, list[ast.expr]]:
    """Return what is assigned to each name; a sum for one that is added to."""
    assigned: dict[str, list[ast.expr]] = {}
    for node in nodes:
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name) and assigned.get(node.target.id):
            last = assigned[node.target.id][-1]
            assigned[node.target.id][-1] = ast.BinOp(last, ast.Add(), node.value)
        elif isinstance(node, ast.Assign):
            for target, value in _pairs(node.targets[0], node.value):
                if isinstance(target, ast.Name):
                    assigned.setdefault(target.id, []).append(value)
    return assigned


def _pairs(target: ast.expr, value: ast.expr) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Yield each target of an assignment with its value."""
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        yield from zip(target.elts, value.elts, strict=False)
    else:
        yield target, value


def _own_nodes(scope: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(scope):
        if not isinstance(child, ast.FunctionDef):
            yield child
            yield from _own_nodes(child)


def _called(node: ast.AST) -> str:
    return _last_name(node.func) if isinstance(node, ast.Call) else ""


def _last_name(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id
    return node.attr if isinstance(node, ast.Attribute) else ""


def _parts(node: ast.expr, assigned: dict[str, list[ast.expr]], depth: int = 0) -> list[Part]:
    """Return the parts of an expression that makes a text."""
    match node:
        case ast.Constant(value=str(text)):
            return [Part(text)]
        case ast.JoinedStr(values=values):
            return [part for value in values for part in _parts(value, assigned, depth)]
        case ast.FormattedValue(value=value):
            return _parts(value, assigned, depth + 1)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return [*_parts(left, assigned, depth), *_parts(right, assigned, depth)]
        case ast.IfExp(body=body, orelse=orelse):
            texts = ["".join(part.text for part in _parts(one, assigned, depth)) for one in (body, orelse)]
            shown = f"[{texts[0] or texts[1]}]" if "" in texts else f"({' or '.join(texts)})"
            return [Part(shown, False)]
        case ast.Name(id=name) if name in assigned and len(assigned[name]) == 1 and depth < _MAX_DEPTH:
            return _parts(assigned[name][0], {k: v for k, v in assigned.items() if k != name}, depth + 1)
        case ast.Call(func=ast.Attribute(attr="join"), args=[ast.GeneratorExp(elt=element)]) if depth == 0:
            return _parts(element, assigned, depth)
    return [Part(_placeholder(node), False)]


def _placeholder(node: ast.AST) -> str:
    """Return a name in capitals for an expression."""
    if isinstance(node, ast.Call):
        function = _last_name(node.func)
        if function == "advise_build":
            return "COMMAND"
        if function.startswith("advise"):
            return "ADVICE"
        arguments = [name for argument in node.args if (name := _placeholder(argument)) != "..."]
        return arguments[0] if arguments else _placeholder(getattr(node.func, "value", node.func))
    if isinstance(node, ast.Subscript | ast.Starred | ast.Attribute) and not _last_name(node):
        return _placeholder(node.value)
    return _last_name(node).strip("_").upper() or "..."
