"""Python code in model folders: whether it is trusted, and which configurations name it.

No code of a folder is imported unless the workflow sets `trust_remote_code = true`. A configuration that names code
makes every program run it that opens the folder later, so configurations written without trust name none.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Longer files are truncated, so they are no valid JSON
_MAX_BYTES = 16 * 2**20

_CONFIG, _TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"

#: Keys of a configuration that name Python code: mlx-lm reads the first, transformers the others.
CODE_KEYS = ("model_file", "auto_map", "custom_pipelines")

_trusts_code = False


@contextmanager
def trusting_code(trusts: bool) -> Iterator[None]:
    """Allow or forbid Python code of model folders in this block, for the whole process.

    Args:
        trusts: the workflow's `trust_remote_code`.
    """
    global _trusts_code
    before, _trusts_code = _trusts_code, trusts
    try:
        yield
    finally:
        _trusts_code = before


def trusts_code() -> bool:
    """Return whether Python code of model folders may be run; False outside of `trusting_code`."""
    return _trusts_code


def names_code(folder: Path) -> bool:
    """Return whether a configuration in a folder names Python code of the folder."""
    configs = [read_table(folder / name) for name in (_CONFIG, _TOKENIZER_CONFIG)]
    return any(config.get(key) for config in configs for key in CODE_KEYS)


def model_code(folder: Path) -> str:
    """Return the Python file that a folder's configuration names for its architecture; empty without one."""
    return str(read_table(folder / _CONFIG).get("model_file") or "")


def tokenizer_code(folder: Path) -> tuple[str, str]:
    """Return the configuration file that names Python code for a folder's tokenizer, and the code.

    Both are empty if the folder has a `tokenizer.json`, which needs no code, or names no code.
    transformers reads the tokenizer's configuration first, then the model's, whose class it also builds.
    """
    if not (folder / "tokenizer.json").is_file():
        for name in (_TOKENIZER_CONFIG, _CONFIG):
            if code := _named_class(read_table(folder / name).get("auto_map")):
                return name, code
    return "", ""


def _named_class(auto_map: object) -> str:
    """Return the class that an `auto_map` names for a tokenizer or for a model's configuration."""
    named = [auto_map.get(key) for key in ("AutoTokenizer", "AutoConfig")] if isinstance(auto_map, dict) else [auto_map]
    classes = [one for value in named for one in (value if isinstance(value, list) else [value])]
    return str(next(filter(None, classes), ""))


def without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration that names no Python code, neither itself nor in a table within it."""
    return {
        key: without_code(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in CODE_KEYS
    }


def copied(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration for another folder: without code unless code is trusted."""
    return dict(config) if _trusts_code else without_code(config)


def read_table(path: Path) -> dict[str, Any]:
    """Return a JSON file's table; empty if it is missing or invalid, which its actual reader reports."""
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(_MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
