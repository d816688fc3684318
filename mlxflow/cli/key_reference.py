"""Every key of a workflow file as a Markdown table, generated from the structs that read it.

    python -m mlxflow.cli.key_reference

The documentation contains this table; a test compares them.
"""

import importlib
from collections.abc import Iterator
from typing import get_args, get_type_hints

import msgspec

from mlxflow.system import terminal
from mlxflow.workflow.config import default_of, describe, struct_in, toml_value
from mlxflow.workflow.loader import STAGES
from mlxflow.workflow.model import Settings


def reference() -> str:
    """Return the table of every key with its default, its type and its purpose."""
    lines = ["| key | default | takes | is |", "|---|---|---|---|"]
    lines += _rows("workflow", Settings)
    for name in STAGES:
        lines += _rows(name, importlib.import_module(f"mlxflow.stages.{name}").Config)
    return "\n".join(lines) + "\n"


def _rows(table: str, struct: type[msgspec.Struct]) -> Iterator[str]:
    types = get_type_hints(struct, include_extras=True)
    for field in msgspec.structs.fields(struct):
        type_ = types[field.name]
        key = f"{table}.{field.encode_name}"
        bare = (get_args(type_) or (type_,))[0]
        if isinstance(bare, type) and issubclass(bare, msgspec.Struct):
            yield from _rows(key, bare)
            continue
        item = struct_in(bare)
        nested = list(_rows(f"{key}[]", item)) if item is not None else []
        help_ = next(meta.description for meta in get_args(type_) if isinstance(meta, msgspec.Meta))
        cells = (
            f"`{key}`",
            f"`{toml_value(default_of(field))}`" if not field.required else "required",
            describe(type_),
            help_ or "",
        )
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        yield from nested


if __name__ == "__main__":
    terminal.write(reference())
