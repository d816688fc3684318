"""The settings of mlx-lm's architectures, from the source of their `ModelArgs`: names, types, defaults. Imports no MLX.

A table of a workflow is checked against them when it is read; mlx-lm's own class checks the values again at run.
"""

import ast
import dataclasses
import difflib
import importlib.util
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from mlxflow.models import config_fields, model_code
from mlxflow.storage.toml_tables import Problem

_CLASS = "ModelArgs"

# Names of the same setting in different architectures, by the key of `[train.model]`
ALIASES: dict[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size", "d_model", "n_embd", "dim"),
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "num_kv_heads": ("num_key_value_heads", "n_kv_heads", "num_kv_heads"),
    "intermediate_size": ("intermediate_size",),
    "tie_word_embeddings": ("tie_word_embeddings",),
    "rope_theta": ("rope_theta",),
    "vocab_size": ("vocab_size",),
    "context_length": ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length"),
    "head_dim": ("head_dim",),
    "eps": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "layernorm_epsilon"),
}


@cache
def args_class(architecture: str) -> Any:
    """Return a dataclass with the fields of an architecture's settings; None if its source does not list them.

    Args:
        architecture: the name of a module of mlx-lm's architectures.
    """
    package = importlib.util.find_spec("mlx_lm.models")
    folders = package.submodule_search_locations if package else None
    files = [Path(folder, f"{architecture}.py") for folder in folders or ()]
    tree = next((ast.parse(file.read_bytes()) for file in files if file.is_file()), ast.Module([], []))
    found = next((one for one in tree.body if isinstance(one, ast.ClassDef) and one.name == _CLASS), None)
    if found is None or [ast.unparse(base) for base in found.bases] not in (["BaseModelArgs"], []):
        return None
    fields = [_field(one) for one in found.body if isinstance(one, ast.AnnAssign)]
    fields.sort(key=len)  # those with a default last; the sort is stable
    return dataclasses.make_dataclass(_CLASS, fields, namespace={"__module__": "typing"})  # resolves Optional and such


def _field(declared: ast.AnnAssign) -> Any:
    """Return name and annotation of a field, and a default if it has one."""
    name, annotation = ast.unparse(declared.target), ast.unparse(declared.annotation)
    return (name, annotation, dataclasses.field(default=None)) if declared.value else (name, annotation)


def given(architecture: str, shape: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a shape gives, under the names of an architecture.

    Args:
        architecture: see `args_class`.
        shape: values by the keys of `ALIASES`.
    """
    known = _names(architecture)
    settings: dict[str, Any] = {}
    for key, value in shape.items():
        settings |= {name: value for name in ALIASES[key] if name in known}
    return settings


def _names(architecture: str) -> set[str]:
    cls = args_class(architecture)
    return {one.name for one in dataclasses.fields(cls)} if cls else {name for one in ALIASES.values() for name in one}


def problems(architecture: str, args: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield an architecture that mlx-lm does not have, and unknown, wrong or missing settings.

    Args:
        architecture: of a new model.
        args: the settings of its table.
    """
    if not model_code.is_architecture(architecture):
        yield Problem(
            "architecture", architecture, "mlx-lm has no such architecture", _advise_architecture(architecture)
        )
        return
    cls = args_class(architecture)
    if cls is None:
        return  # checked at run
    fields = {one.name: one.default is dataclasses.MISSING for one in dataclasses.fields(cls)}
    for name, value in args.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            advice = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(sorted(fields))}."
            yield Problem(f"args.{name}", value, f"{architecture} has no such setting", advice)
    for line in config_fields.mistakes(cls, args):
        name, _, rest = line.partition(" = ")
        yield Problem(f"args.{name}", args[name], rest.rpartition(": ")[2], "Change it.")
    filled = {"model_type", *args, *(name for names in ALIASES.values() for name in names)}
    if missing := [name for name, is_required in fields.items() if is_required and name not in filled]:
        expected = f"{architecture} also needs {', '.join(missing)}"
        yield Problem("args", dict(args), expected, "Add them to model.args.")


def _advise_architecture(name: str) -> str:
    """Return the names of architectures that resemble one."""
    package = importlib.util.find_spec("mlx_lm.models")
    folders = (package.submodule_search_locations if package else None) or ()
    names = [file.stem for folder in folders for file in Path(folder).glob("*.py")]
    near = difflib.get_close_matches(name, [one for one in names if model_code.is_architecture(one)], 3, 0.5)
    return f"Did you mean {' or '.join(near)}?" if near else 'Use "llama" (the default).'
