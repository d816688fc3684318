"""Architectures that a model folder brings as Python code, run only where the workflow trusts it."""

import ast
import importlib.util
import re
import sys
import types
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from mlxflow.errors import ArtifactError
from mlxflow.ops import mlx_lm_import
from mlxflow.storage import model_files, remote_code

# A module's name in mlx-lm's folder of architectures, such as "lfm2-vl"; a dot would name a module within another
_NAME = re.compile(r"[A-Za-z0-9][\w-]{0,99}", re.ASCII)


def classes(config: Mapping[str, Any], code: Path | None) -> Any:
    """Return the classes of a model and of its settings, from mlx-lm or from the file that a config names.

    Args:
        config: a `config.json`.
        code: the model folder in which the Python file lies that the config names, where it names one.

    Raises:
        ArtifactError: the code is not trusted, or fails.
        ValueError: mlx-lm does not know the architecture.
    """
    file = str(config.get("model_file") or "")
    if not file:
        return _known_classes(config)
    if code is None or not remote_code.trusts_code():
        raise ArtifactError(f"{code or 'the model'}: {word_untrusted(model_files.CONFIG, file)}")
    mlx_lm_import.prepare()  # what it imports of mlx-lm
    try:
        module = _run_code(code / file)
        return module.Model, module.ModelArgs
    except Exception as error:  # code of others: anything
        raise ArtifactError(f"{code / file}: cannot be run ({type(error).__name__}: {error}). Mend it.") from error


def _known_classes(config: Mapping[str, Any]) -> Any:
    """Return the classes of one of mlx-lm's own architectures.

    Raises:
        KeyError: the config has no `model_type`.
        ValueError: it names no architecture: mlx-lm would import any module of its own that has the name.
    """
    utils = mlx_lm_import.mlx_lm_utils()
    name = config["model_type"]
    if not isinstance(name, str) or not (name in utils.MODEL_REMAPPING or is_architecture(name)):
        raise ValueError(f"Model type {str(name)[:100]} not supported.")
    try:
        return utils._get_classes(dict(config))
    except SystemExit as error:  # how mlx-lm's olmo ends where a package of its own is not there
        raise ValueError(f"Model type {name} needs a package that is not installed.") from error


def is_architecture(name: str) -> bool:
    """Return whether mlx-lm has a model of this name, not a helper such as "base" or "cache"; nothing is imported."""
    mlx_lm_import.prepare()
    package = importlib.util.find_spec("mlx_lm.models")
    folders = package.submodule_search_locations if package else None
    found = [Path(folder, f"{name}.py") for folder in folders or ()] if _NAME.fullmatch(name) else []
    return any(file.is_file() and _defines_model(file) for file in found)


@cache
def _defines_model(file: Path) -> bool:
    """Return whether a Python file defines or imports both classes of a model, by its syntax tree."""
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
    """Run a model folder's Python file as a module, as mlx-lm does; nothing is written beside it."""
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


def word_untrusted(file: str, code: str, key: str = "") -> str:
    """Return why what brings its own code is not opened, and what to do.

    Args:
        file: that names the code.
        code: as named there.
        key: the setting by which it may be run; empty where several may be meant.
    """
    anywhere = "set trust_remote_code = true where the workflow names the folder, or pass --trust-remote-code"
    advice = f"set {key} = true to run it" if key else anywhere
    return f"its {file} names Python code of its own, {code}. Read it, then {advice}."
