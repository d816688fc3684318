"""Whether Python code that a model folder brings may be run, and where its configurations name such code.

Nothing of a folder is imported unless `trust_remote_code = true` stands in the workflow. A configuration that names
code runs it in every program that opens the folder later, so what is written without trust names none.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# A longer file is cut, and so no JSON
_MAX_BYTES = 16 * 2**20

_CONFIG, _TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"

#: Keys of a configuration that name Python code: mlx-lm reads the first, transformers the others.
CODE_KEYS = ("model_file", "auto_map", "custom_pipelines")

_trusts_code = False


@contextmanager
def trusting_code(trusts: bool) -> Iterator[None]:
    """Let Python code of model folders be run in this block, or not; it holds for the whole process.

    Args:
        trusts: what the workflow's `trust_remote_code` says.
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
    """Return whether a configuration in a folder names Python code of its own."""
    configs = [read_table(folder / name) for name in (_CONFIG, _TOKENIZER_CONFIG)]
    return any(config.get(key) for config in configs for key in CODE_KEYS)


def model_code(folder: Path) -> str:
    """Return the Python file that a folder's configuration names for its architecture; empty where it names none."""
    return str(read_table(folder / _CONFIG).get("model_file") or "")


def tokenizer_code(folder: Path) -> tuple[str, str]:
    """Return which configuration names the Python code that a folder's tokenizer needs, and the code.

    Both are empty where the folder has a `tokenizer.json`, which is opened without code, or names no code.
    transformers looks at the tokenizer's configuration first, then at the model's, whose own class it builds too.
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
    """Return a configuration as it may be written into another folder: without code unless code is trusted."""
    return dict(config) if _trusts_code else without_code(config)


def read_table(path: Path) -> dict[str, Any]:
    """Return a JSON file's table; an empty one where it is missing or something else, which its reader will say."""
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(_MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
