"""The classes of a model's architecture: mlx-lm's, or Python code of a model folder if the workflow trusts it."""

import ast
import importlib.util
import re
import sys
import types
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from mlxflow.messages.errors import ArtifactError
from mlxflow.ops import mlx_lm_import
from mlxflow.storage import model_files, remote_code

# A module name in mlx-lm's folder of architectures, such as "lfm2-vl"; a dot would name a submodule
_NAME = re.compile(r"[A-Za-z0-9][\w-]{0,99}", re.ASCII)


def classes(config: Mapping[str, Any], code: Path | None) -> Any:
    """Return the classes of a model and of its settings, from mlx-lm or from the file that a config names.

    Args:
        config: a `config.json`.
        code: the model folder with the Python file that the config names; None if it names none.

    Raises:
        ArtifactError: the code is not trusted, or fails.
        ValueError: mlx-lm does not know the architecture.
    """
    file = str(config.get("model_file") or "")
    if not file:
        return _known_classes(config)
    if code is None or not remote_code.trusts_code():
        raise ArtifactError(f"{code or 'the model'}: {untrusted_code_message(model_files.CONFIG, file)}")
    mlx_lm_import.prepare()  # what it imports of mlx-lm
    try:
        module = _run_code(code / file)
        return module.Model, module.ModelArgs
    except Exception as error:  # third-party code may raise anything
        raise ArtifactError(f"{code / file}: cannot be run ({type(error).__name__}: {error}). Fix it.") from error


def _known_classes(config: Mapping[str, Any]) -> Any:
    """Return the classes of one of mlx-lm's own architectures.

    Raises:
        KeyError: the config has no `model_type`.
        ValueError: it names no architecture; mlx-lm itself would import any of its modules of that name.
    """
    utils = mlx_lm_import.mlx_lm_utils()
    name = config["model_type"]
    if not isinstance(name, str) or not (name in utils.MODEL_REMAPPING or is_architecture(name)):
        raise ValueError(f"Model type {str(name)[:100]} not supported.")
    try:
        return utils._get_classes(dict(config))
    except SystemExit as error:  # mlx-lm's olmo exits if a package that it needs is missing
        raise ValueError(f"Model type {name} needs a package that is not installed.") from error


def is_architecture(name: str) -> bool:
    """Return whether mlx-lm has an architecture of this name; "base" and "cache" are helpers. Imports no model."""
    mlx_lm_import.prepare()
    package = importlib.util.find_spec("mlx_lm.models")
    folders = package.submodule_search_locations if package else None
    candidates = [Path(folder, f"{name}.py") for folder in folders or ()] if _NAME.fullmatch(name) else []
    return any(file.is_file() and _defines_model(file) for file in candidates)


@cache
def _defines_model(file: Path) -> bool:
    """Return whether a Python file defines or imports `Model` and `ModelArgs`, by its syntax tree."""
    names: set[str] = set()
    for statement in ast.parse(file.read_bytes()).body:
        if isinstance(statement, ast.ClassDef):
            names.add(statement.name)
        elif isinstance(statement, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in statement.names}
        elif isinstance(statement, ast.Assign):
            names |= {target.id for target in statement.targets if isinstance(target, ast.Name)}
    return names >= {"Model", "ModelArgs"}


def _run_code(file: Path) -> types.ModuleType:
    """Import a model folder's Python file as mlx-lm does; no bytecode is written beside it."""
    spec = importlib.util.spec_from_file_location("custom_model", file)
    if spec is None or spec.loader is None:
        raise ImportError("no Python file")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


def untrusted_code_message(file: str, code: str, key: str = "") -> str:
    """Return the message for a model or tokenizer that is refused because it needs code that is not trusted.

    Args:
        file: the file that names the code.
        code: the code's name in it.
        key: the setting that allows it to run; empty if it may be one of several.
    """
    anywhere = "set trust_remote_code = true where the workflow names the folder, or pass --trust-remote-code"
    advice = f"set {key} = true to run it" if key else anywhere
    return f"its {file} names Python code of its own, {code}. Read it, then {advice}."
