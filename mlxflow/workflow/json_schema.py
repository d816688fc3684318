"""JSON schema of `workflow.toml`, by which an editor completes, explains and checks its keys.

The tables come from the structs that the loader reads them into; this module adds `name`, `matrix` and `exclude`, and
that a stage is one table or an array of them. The schema is of draft 7, which the TOML language server taplo supports.
It knows no rule that spans several keys or files: `mlxflow check` finds those mistakes.
"""

import importlib
from collections.abc import Iterator
from typing import Any

import msgspec

from mlxflow.storage.toml_tables import UNLIMITED_MARK
from mlxflow.workflow import stage
from mlxflow.workflow.loader import STAGES, TABLES

# Where a schema has the ones that it refers to
_DEFINITIONS = "#/definitions/"


def workflow_schema() -> dict[str, Any]:
    """Return the JSON schema of a workflow file."""
    modules = {name: importlib.import_module(f"mlxflow.stages.{name}") for name in STAGES}
    types = [*TABLES.values(), *(module.Config for module in modules.values())]
    references, made = msgspec.json.schema_components(types, ref_template=_DEFINITIONS + "{name}")
    tables = dict(zip([*TABLES, *STAGES], (_key(reference) for reference in references), strict=True))
    definitions = {key: table for key, table in made.items() if key not in tables.values()}
    for name, key in tables.items():
        definitions[name] = made[key] | {"title": name}
    for name, module in modules.items():
        table = definitions[name] | {"description": stage.summary(module)}
        table["properties"] = table["properties"] | _variant_properties(name, definitions)
        definitions[name] = table
    stages = {name: _stage_schema(name, definitions[name]) for name in STAGES}
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "workflow.toml of mlxflow",
        "type": "object",
        "properties": {name: _reference(name) for name in TABLES} | stages,
        "additionalProperties": False,
        "definitions": definitions,
    }
    return {key: _for_draft_7(value) for key, value in schema.items()}


def schema_text() -> str:
    """Return the schema as the text of a JSON file."""
    return msgspec.json.format(msgspec.json.encode(workflow_schema()), indent=1).decode() + "\n"


def _reference(key: str) -> dict[str, Any]:
    return {"$ref": _DEFINITIONS + key}


def _key(reference: dict[str, Any]) -> str:
    return str(reference["$ref"]).removeprefix(_DEFINITIONS)


def _stage_schema(name: str, table: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a stage's key: a table, or an array of tables that have a name or a matrix of names.

    Keywords for tables and for arrays stand side by side, and not under `anyOf`, by which an editor would mark the
    whole table for one mistake in it.
    """
    named = {"allOf": [_reference(name)], "if": {"required": ["matrix"]}, "else": {"required": ["name"]}}
    return table | {
        "type": ["object", "array"],
        "properties": {key: _reference(f"{name}/properties/{key}") for key in table["properties"]},
        "minItems": 1,
        "items": named,
    }


def _variant_properties(name: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of the keys that make variants of a stage's table."""
    scalars = dict(_scalars(name, definitions))
    lists = {key: {"type": "array", "minItems": 1, "items": one} for key, one in scalars.items()}
    return {
        "name": {
            "description": f"name of the variant: it is built by mlxflow build {name}:NAME",
            "type": "string",
            "pattern": stage.NAME_PATTERN,
        },
        "matrix": {
            "description": "lists of values by key; each combination is a variant",
            "type": "object",
            "minProperties": 1,
            "properties": lists,
            "additionalProperties": False,
        },
        "exclude": {
            "description": "combinations of the matrix that are left out",
            "type": "array",
            "items": {"type": "object", "minProperties": 1, "properties": scalars, "additionalProperties": False},
        },
    }


def _scalars(table: str, definitions: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the schema of each key, nested ones included, that is neither a list nor a table."""
    for key, schema in definitions[table]["properties"].items():
        if "$ref" in schema:
            yield from _scalars(_key(schema), definitions, f"{prefix}{key}.")
        elif schema.get("type") != "array":
            yield f"{prefix}{key}", _reference(f"{table}/properties/{key}")


def _for_draft_7(node: Any) -> Any:
    """Return a schema with references that stand alone, and with numbers that may be `inf`.

    Draft 7 ignores what is written beside a reference. JSON has no `inf`: taplo checks it as null.
    """
    if isinstance(node, list):
        return [_for_draft_7(one) for one in node]
    if not isinstance(node, dict):
        return node
    beside = {key: _for_draft_7(value) for key, value in node.items() if key not in ("$ref", UNLIMITED_MARK)}
    if UNLIMITED_MARK in node:
        beside["type"] = [node["type"], "null"]
    if "$ref" not in node:
        return beside
    reference = {"$ref": node["$ref"]}
    return beside | {"allOf": [reference]} if beside else reference
