"""Architectures that a model folder brings as Python code, run only where the workflow trusts it."""

import importlib.util
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxflow import bare, model_files
from mlxflow.errors import ArtifactError


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
        return bare.mlx_lm_utils()._get_classes(dict(config))
    if code is None or not model_files.trusts_code():
        raise ArtifactError(f"{code or 'the model'}: {word_untrusted(model_files.CONFIG, file)}")
    bare.prepare()  # what it imports of mlx-lm
    try:
        module = _run_code(code / file)
        return module.Model, module.ModelArgs
    except Exception as error:  # code of others: anything
        raise ArtifactError(f"{code / file}: cannot be run ({type(error).__name__}: {error}). Mend it.") from error


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
