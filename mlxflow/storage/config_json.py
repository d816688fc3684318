"""A model's `config.json`: reading, type checks, and a version that describes the weights as they are saved.

mlx-lm changes a model while loading it: it drops vision towers, and fp8 weights become dense. A saved config that still
describes these misleads readers: mlx-engine, for example, treats a model with a `vision_config` as a vision model.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mlxflow.messages.errors import ArtifactError
from mlxflow.messages.os_errors import advise_on

# Tables that describe a part of a model, and what the names of that part's weights contain
_PARTS = {"vision_config": ("vision", "visual"), "audio_config": ("audio",)}

_QUANTIZATION = ("quantization", "quantization_config", "quantize_activations", "compression_config")
_DTYPES = ("torch_dtype", "dtype")

# Tables of the text model within that of a larger one
_TEXT = ("text_config", "language_config", "llm_config")

# Keys for the number of positions; nearly all architectures use one of the first two, GPT-2 and similar the rest
_POSITIONS = ("max_position_embeddings", "max_sequence_length", "n_positions", "n_ctx")

_UNLIMITED = 2**62

# The largest config.json that is read; a mixture of experts with settings for each layer has about a megabyte
_MAX_BYTES = 16 * 2**20


def read(folder: Path) -> dict[str, Any]:
    """Return the `config.json` of a model folder unchanged.

    Raises:
        ArtifactError: it cannot be read, or a value that every model has is of a wrong type.
    """
    try:
        config = load(folder / "config.json")
    except (OSError, ValueError) as error:
        advice = advise_on(error, "Build it again")
        raise ArtifactError(f"{folder}: no model folder (its config.json: {error}). {advice}.") from error
    require_types(config, str(folder / "config.json"))
    return config


def load(path: Path) -> dict[str, Any]:
    """Return the table in a JSON file of a model folder, in bounded time and memory.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, no table, longer than 16 MiB, nested too deeply, or contains NaN.
    """
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"it has more than {_MAX_BYTES:,} bytes")
    try:
        table = json.loads(data.decode(), parse_constant=_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(table, dict):
        raise ValueError("it is no table")
    return table


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN is no number for a setting")
    return float(name)


def require_types(config: Mapping[str, Any], file: str) -> None:
    """Check the types of the keys that are read from every model's config, whatever its architecture.

    Args:
        config: the table.
        file: its name, for the messages.

    Raises:
        ArtifactError: one line for each value of a wrong type.
    """
    tables = {"": config} | {f"{key}.": config[key] for key in _TEXT if isinstance(config.get(key), Mapping)}
    lines = [
        f"{file}: {prefix}{key} = {_shown(table[key])}: expected {expected}. Fix the file, or name another model."
        for prefix, table in tables.items()
        for key, (is_valid, expected) in _EXPECTED.items()
        if table.get(key) is not None and not is_valid(table[key])
    ]
    if lines:
        raise ArtifactError(*lines)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _is_whole(value: Any, least: int = 0, most: int = 2**31 - 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_count(value: Any) -> bool:
    return _is_whole(value, least=1)


def _are_ids(value: Any) -> bool:
    ids = value if isinstance(value, list) else [value]
    return len(ids) <= 1000 and all(_is_whole(one, least=-1) for one in ids)


def _are_names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))


def _are_codes(value: Any) -> bool:
    return isinstance(value, dict) and _is_whole(value.get("group_size"), 1) and _is_whole(value.get("bits"), 1, 16)


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


# The checked keys of every architecture: check and expected type; null counts as missing
_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model_type": (_is_text, "text"),
    "model_file": (_is_text, "text"),
    "architectures": (_are_names, "a list, each text"),
    "vocab_size": (_is_count, "a whole number from 1 to 2147483647"),
    **dict.fromkeys(_POSITIONS, (_is_count, "a whole number from 1 to 2147483647")),
    "eos_token_id": (_are_ids, "an id or a list of ids"),
    **dict.fromkeys(_DTYPES, (_is_text, "text")),
    **dict.fromkeys((*_TEXT, "quantization_config"), (_is_table, "a table")),
    "quantization": (_are_codes, "a table with group_size and bits from 1 to 16"),
}


def write(path: Path, config: Mapping[str, Any]) -> None:
    """Write a `config.json` with sorted keys; infinities and NaN are written as transformers does."""
    path.write_text(json.dumps(_marked(dict(sorted(config.items()))), indent=4, allow_nan=False) + "\n")


def _marked(value: Any) -> Any:
    """Return a value with infinities and NaN in the form that `mlx_lm.utils.load_config` reads."""
    if (isinstance(value, float) and value in (float("inf"), float("-inf"))) or value != value:
        return {"__float__": "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, dict):
        return {key: _marked(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(one) for one in value]
    return value


def vocab_size(config: Mapping[str, Any]) -> int:
    """Return the vocabulary size of a config, V; 2**62 if it has none."""
    return int(_of_text(config, ("vocab_size",)) or _UNLIMITED)


def with_vocab_size(config: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Return a config with another vocabulary size, where it names one."""
    changed = {**config, "vocab_size": vocab_size} if "vocab_size" in config else dict(config)
    text = config.get("text_config")
    if isinstance(text, dict) and "vocab_size" in text:
        changed["text_config"] = {**text, "vocab_size": vocab_size}
    return changed


def num_positions(config: Mapping[str, Any]) -> int:
    """Return the context length that a model is made for, in tokens; 2**62 if its config has none."""
    return int(_of_text(config, _POSITIONS) or _UNLIMITED)


def end_of_text(config: Mapping[str, Any]) -> set[int]:
    """Return the ids that end a text."""
    ends = _of_text(config, ("eos_token_id",))
    return set(ends) if isinstance(ends, list) else {ends} - {None}


def with_ends(config: Mapping[str, Any], ids: Iterable[int]) -> dict[str, Any]:
    """Return a config, or generation defaults, with more end-of-text ids.

    Args:
        config: the table; its own end-of-text ids are kept.
        ids: tokens that the model learned to end with.
    """
    ends = sorted(end_of_text(config) | set(ids))
    return {**config, "eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else dict(config)


def write_generation(folder: Path, ends: Iterable[int]) -> None:
    """Add end-of-text ids to a model folder's `generation_config.json`, which is created if it is missing.

    Raises:
        ArtifactError: the file is no JSON.
    """
    path = folder / "generation_config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ArtifactError(f"{path}: not valid JSON ({error}). Fix the file.") from error
    write(path, with_ends(settings, ends))


def dtype(config: Mapping[str, Any]) -> str | None:
    """Return the dtype of the weights, such as "bfloat16", by the rule of mlx-lm's converter; None if it finds none."""
    name = config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype")
    return name if isinstance(name, str) else None


def with_dtype(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a config with the dtype of the weights replaced wherever it is given."""

    def changed(table: Mapping[str, Any]) -> dict[str, Any]:
        return {key: name if key in _DTYPES else value for key, value in table.items()}

    return {key: changed(value) if key in _TEXT else value for key, value in changed(config).items()}


def describing(config: Mapping[str, Any], *, weights: Iterable[str], is_quantized: bool) -> dict[str, Any]:
    """Return a config without the parts and the quantization that a loaded model does not have.

    Args:
        config: from mlx-lm's `load_model`.
        weights: names of the model's weights.
        is_quantized: whether some of them are quantized.
    """
    names = list(weights)
    absent = {part for part, words in _PARTS.items() if not any(word in name for name in names for word in words)}
    absent |= {"_name_or_path"}  # a path on its author's machine; mlx-lm's converter drops it, too
    if not is_quantized:
        absent |= set(_QUANTIZATION)
    described = {key: value for key, value in config.items() if key not in absent}
    for table in set(described) & set(_TEXT):
        described[table] = {key: value for key, value in described[table].items() if key not in _QUANTIZATION}
    if is_quantized and "quantization" in described:
        described["quantization_config"] = described["quantization"]
    return described


def keeps_codes(config: Mapping[str, Any]) -> bool:
    """Return whether a config describes quantized weights that mlx-lm keeps quantized when it loads them."""
    if isinstance(config.get("quantization"), dict):
        return True
    quantization = _of_text(config, ("quantization_config",))
    if not isinstance(quantization, dict):
        return False
    blocks = list(quantization.get("weight_block_size") or ())
    is_packed_fp8 = quantization.get("scale_fmt") == "ue8m0" and blocks == [32, 32]
    return quantization.get("quant_method") != "fp8" or is_packed_fp8


def _of_text(config: Mapping[str, Any], names: Iterable[str]) -> Any:
    """Return the first of some keys that a config has, at its top level or in the table of its text model."""
    tables = [config, *(config[table] for table in _TEXT if isinstance(config.get(table), dict))]
    return next((table[name] for table in tables for name in names if table.get(name) is not None), None)
