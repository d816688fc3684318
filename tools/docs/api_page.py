"""The public names of the package with signature and docstring, read from the source without importing it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import mlxflow
from tools.docs import markdown

_INTRODUCTION = """\
`from mlxflow import NAME` gives the names below; `mlxflow.__version__` is the installed version. `import mlxflow` alone
loads no MLX. The package is typed (`py.typed`). Names that are not listed here may change in any version.

[examples/train.py](../../examples/train.py) trains a small Llama with them in under 25 lines;
[examples/profile-any-model.py](../../examples/profile-any-model.py) measures the memory of any MLX program. Tests run
both."""

_SECTION = re.compile(r"^(Args|Returns|Yields|Raises|Attributes):$")
_ENTRY = re.compile(r"^([\w*, ]+): (.*)$")


def api_page(repository: Path) -> str:
    """Return the page of all public names.

    Args:
        repository: the folder that has the sources.
    """
    names = [name for name in mlxflow.__all__ if name != "__version__"]
    definitions = {name: _definition(repository, *mlxflow._HOMES[name]) for name in names}
    summaries = ((f"[`{name}`](#{name.lower()})", _summary(node)) for name, node in definitions.items())
    parts = (part for name, node in definitions.items() for part in _describe(name, node))
    return markdown.page("Python API", _INTRODUCTION, markdown.table(("name", "is"), summaries), *parts)


def _definition(repository: Path, module: str, name: str) -> ast.ClassDef | ast.FunctionDef:
    base = repository / module.replace(".", "/")
    path = base.with_suffix(".py") if base.with_suffix(".py").is_file() else base / "__init__.py"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node
    raise LookupError(f"{path}: {name}: no such class or function")


def _summary(node: ast.ClassDef | ast.FunctionDef) -> str:
    return (ast.get_docstring(node) or "").partition("\n\n")[0]


def _describe(name: str, node: ast.ClassDef | ast.FunctionDef) -> Iterator[str]:
    yield f"## {name}"
    yield f"```python\n{_call(name, node)}\n```"
    yield _docstring(node)
    if isinstance(node, ast.ClassDef):
        yield from _members(name, node)


def _members(name: str, node: ast.ClassDef) -> Iterator[str]:
    for method in node.body:
        if not isinstance(method, ast.FunctionDef) or method.name.startswith("_") or not ast.get_docstring(method):
            continue
        decorators = [ast.unparse(one) for one in method.decorator_list]
        is_property = any(one in ("property", "cached_property", "functools.cached_property") for one in decorators)
        call = f"{name}.{method.name}" if is_property else _signature(f"{name}.{method.name}", method, bound=True)
        yield f"```python\n{call}\n```"
        yield _docstring(method)


def _call(name: str, node: ast.ClassDef | ast.FunctionDef) -> str:
    if isinstance(node, ast.FunctionDef):
        return _signature(name, node, bound=False)
    for one in node.body:
        if isinstance(one, ast.FunctionDef) and one.name == "__init__":
            return _signature(name, one, bound=True).partition(" -> ")[0]
    fields = [one for one in node.body if isinstance(one, ast.AnnAssign) and _is_field(one)]
    written = [f"    {ast.unparse(one)}," for one in fields]
    return "\n".join([f"{name}(", *written, ")"]) if written else f"class {name}"


def _is_field(node: ast.AnnAssign) -> bool:
    return isinstance(node.target, ast.Name) and not node.target.id.startswith("_")


def _signature(name: str, node: ast.FunctionDef, *, bound: bool) -> str:
    arguments = ast.unparse(node.args)
    if bound:
        arguments = re.sub(r"^(self|cls)(, )?", "", arguments)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    one_line = f"{name}({arguments}){returns}"
    if len(one_line) <= 100:
        return one_line
    parts = [f"    {part}," for part in _split_arguments(arguments)]
    return "\n".join([f"{name}(", *parts, f"){returns}"])


def _split_arguments(arguments: str) -> Iterator[str]:
    """Yield the arguments of a call; commas inside brackets and quotes do not split."""
    depth, part = 0, ""
    for character in arguments:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            yield part.strip()
            part = ""
        else:
            part += character
    if part.strip():
        yield part.strip()


def _docstring(node: ast.ClassDef | ast.FunctionDef) -> str:
    """Return a docstring as Markdown: its sections become lists."""
    lines: list[str] = []
    in_section = False
    for line in (ast.get_docstring(node) or "").splitlines():
        if _SECTION.match(line):
            lines += ["", f"*{line.rstrip(':')}*", ""]
            in_section = True
        elif in_section and line.startswith("    ") and not line.startswith("     "):
            entry = _ENTRY.match(line.strip())
            lines.append(f"- `{entry[1]}`: {entry[2]}" if entry else f"- {line.strip()}")
        elif in_section and line.strip():
            lines.append(f"  {line.strip()}")
        else:
            lines.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
