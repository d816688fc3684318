"""Every key of a workflow file, a page for each table, from the structs that read it."""

import importlib
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import msgspec

from mlxflow.storage.toml_tables import default_of, describe, struct_in, toml_value
from mlxflow.workflow.loader import STAGES, TABLES
from tools.docs import markdown

_HEADING = ("key", "default", "takes", "is")

#: What a table is for, and the pages that explain it.
_ABOUT = {
    "workflow": "Settings of the whole workflow: name, seed, device, threads and memory limits.",
    "store": "Shares artifacts between machines: `doit` takes them from a bucket or a folder instead of building "
    "them. Guide: [a shared store](../../guides/store.md).",
    "pretokenize": "Reads sources, applies chat templates, tokenizes, and packs documents into rows. Guides: "
    "[notes](../../guides/notes.md), [chat](../../guides/chat.md), [packing and masks]"
    "(../../explanations/packing-and-masks.md).",
    "train": "Trains a new model, or fine-tunes an existing one. Guides: [notes](../../guides/notes.md), "
    "[chat](../../guides/chat.md), [memory](../../guides/memory.md). How it works: "
    "[training](../../explanations/training.md).",
    "quantize": "Quantizes the trained model, or any model folder. Guide: [quantizing](../../guides/quantizing.md).",
    "export": "Writes a model in the format of another program. Guide: [other programs](../../guides/exporting.md).",
    "evaluate": "Measures the accuracy of models on tasks. Guide: [evaluating](../../guides/evaluating.md).",
    "profile": "Runs a few training steps and reports their memory. Guide: [memory](../../guides/memory.md).",
    "benchmark": "Times training and generation and measures quality. Guide: [benchmarks](../../guides/benchmarks.md).",
    "report": "Writes the HTML page of the whole run.",
    "tracking": "Reports every stage to experiment trackers. No stage: it makes nothing stale. Guide: "
    "[trackers](../../guides/tracking.md).",
}


def workflow_pages() -> dict[str, str]:
    """Return a page for each table of a workflow file, by the table's name."""
    structs = dict(TABLES)
    for name in STAGES:
        structs[name] = importlib.import_module(f"mlxflow.stages.{name}").Config
    return {name: _page(name, struct) for name, struct in structs.items()}


def _page(name: str, struct: type[msgspec.Struct]) -> str:
    parts = []
    for heading, rows in _sections(name, struct):
        title = [] if heading == name else [f"## `{heading}`"]
        parts += [*title, markdown.table(_HEADING, rows) if rows else "This table has no keys."]
    return markdown.page(f"`[{name}]`", _ABOUT[name], *parts)


def _sections(prefix: str, struct: type[msgspec.Struct]) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """Yield the rows of a struct, then those of each struct inside it, with its dotted key."""
    types = get_type_hints(struct, include_extras=True)
    rows, inner = [], []
    for field in msgspec.structs.fields(struct):
        type_ = types[field.name]
        key = f"{prefix}.{field.encode_name}"
        bare = (get_args(type_) or (type_,))[0]
        if isinstance(bare, type) and issubclass(bare, msgspec.Struct):
            inner.append((key, bare))
            continue
        if (item := struct_in(bare)) is not None:
            inner.append((f"{key}[]", item))
        rows.append(_row(key, field, type_))
    yield prefix, rows
    for key, one in inner:
        yield from _sections(key, one)


def _row(key: str, field: Any, type_: Any) -> tuple[str, ...]:
    about = next(meta.description for meta in get_args(type_) if isinstance(meta, msgspec.Meta))
    default = "required" if field.required else f"`{toml_value(default_of(field))}`"
    return f"`{key}`", default, describe(type_), about or ""
