"""No message names a key of a workflow literally: the names of settings come from the caller, a stage's from its task.

A stage may be a variant: what the user wrote is "train:a".
"""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.conftest import REPOSITORY

#: The stages and the packages below them. `workflow` reads the file; a verb or doit's task knows its own table.
PACKAGES = (
    *("benchmarking", "data", "device", "evaluation", "kernels", "messages", "models", "ops"),
    *("profiling", "quantization", "report", "stages", "storage", "training"),
)

_KEY = re.compile(
    r"(?<![\w./])\[?(?:pretokenize|train|quantize|evaluate|profile|benchmark|workflow)\.(?P<name>[a-z_]\w*)"
)

#: Endings of file names, such as workflow.toml.
_ENDINGS = ("toml", "md", "html", "log", "py", "safetensors")

#: Calls whose arguments are no messages: names of seeds, and descriptions of the keys of a table.
_KNOWING = ("derive_seed", "Meta")


def keys_in(text: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of every literal of a module that names a key; docstrings are none."""
    tree = ast.parse(text)
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr):
                skipped.add(id(first.value))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in _KNOWING:
            skipped |= {id(one) for one in ast.walk(node)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or id(node) in skipped:
            continue
        if any(found["name"] not in _ENDINGS for found in _KEY.finditer(node.value)):
            yield node.lineno, node.value


@pytest.mark.parametrize("package", PACKAGES)
def test_no_message_of_a_stage_or_below_names_a_key_of_the_workflow(package: str) -> None:
    modules = sorted((REPOSITORY / "mlxflow" / package).rglob("*.py"))
    assert modules
    found = [
        f"{module.relative_to(REPOSITORY)}:{line}: {value!r}"
        for module in modules
        for line, value in keys_in(module.read_text(encoding="utf-8"))
    ]
    assert not found, "let the caller give the setting's name"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ('raise E("Raise pretokenize.context_length.")', 1),
        ('raise E(f"train.batch_size = {n}: too many")', 1),
        ('key = "workflow.threads"', 1),
        ('"""Of the key train.batch_size."""', 0),
        ('def f():\n    """See train.batch_size."""\n    return "artifacts/train.safetensors"', 0),
        ('name = "workflow.toml"', 0),
        ('import mlxflow.training.settings\nlogger("mlxflow.profile.x")', 0),
        ('text: Annotated[str, Meta(description="as pretokenize.format")]', 0),
        ('seed = derive_seed(0, "train.batches")', 0),
    ],
)
def test_the_scan_finds_keys_only(text: str, number: int) -> None:
    assert len(list(keys_in(text))) == number
