"""A model's `config.json`: what it says is made to agree with the weights that are written beside it.

mlx-lm opens more than it keeps: of a model of images and text it drops what sees images, and fp8 weights become dense
while they are loaded. A config that still names them sends its reader the wrong way: mlx-engine, for example, takes a
model for one of images as soon as there is a `vision_config`.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlxflow.errors import ArtifactError

# Tables that describe a part of a model, and what the names of that part's weights contain
_PARTS = {"vision_config": ("vision", "visual"), "audio_config": ("audio",)}

_QUANTIZATION = ("quantization", "quantization_config", "quantize_activations", "compression_config")
_DTYPES = ("torch_dtype", "dtype")

# Tables of the text model within that of a larger one
_TEXT = ("text_config", "language_config", "llm_config")

# Where architectures say how many positions they are made for; the first two in nearly all, the rest in GPT-2's kin
_POSITIONS = ("max_position_embeddings", "max_sequence_length", "n_positions", "n_ctx")

_UNLIMITED = 2**62


def read(folder: Path) -> dict[str, Any]:
    """Return the `config.json` of a model folder as it is written.

    Raises:
        ArtifactError: there is none that can be read.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder}: no model folder (its config.json: {error}). Build it again.") from error
    if not isinstance(config, dict):
        raise ArtifactError(f"{folder}: no model folder (its config.json is no table). Build it again.")
    return config


def write(path: Path, config: Mapping[str, Any]) -> None:
    """Write a `config.json` with its keys in order; numbers that JSON does not have are marked as transformers does."""
    path.write_text(json.dumps(_marked(dict(sorted(config.items()))), indent=4, allow_nan=False) + "\n")


def _marked(value: Any) -> Any:
    """Return a value with its infinite numbers in the form that `mlx_lm.utils.load_config` reads."""
    if (isinstance(value, float) and value in (float("inf"), float("-inf"))) or value != value:
        return {"__float__": "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, dict):
        return {key: _marked(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(one) for one in value]
    return value


def vocab_size(config: Mapping[str, Any]) -> int:
    """Return how many ids a model knows; without limit where its config does not say."""
    return int(_of_text(config, ("vocab_size",)) or _UNLIMITED)


def num_positions(config: Mapping[str, Any]) -> int:
    """Return how many tokens a model is made for; without limit where its config does not say."""
    return int(_of_text(config, _POSITIONS) or _UNLIMITED)


def end_of_text(config: Mapping[str, Any]) -> set[int]:
    """Return the ids that end a text."""
    ends = _of_text(config, ("eos_token_id",))
    return set(ends) if isinstance(ends, list) else {ends} - {None}


def with_ends(config: Mapping[str, Any], ids: Iterable[int]) -> dict[str, Any]:
    """Return a config, or defaults of generation, by which some ids end a text beside those that do already.

    Args:
        config: the table.
        ids: tokens that the model learned to end with.
    """
    ends = sorted(end_of_text(config) | set(ids))
    return {**config, "eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else dict(config)


def write_generation(folder: Path, ends: Iterable[int]) -> None:
    """Make a model folder's defaults of generation end a text at some ids; where it has none, they are made.

    Raises:
        ArtifactError: they are no JSON.
    """
    path = folder / "generation_config.json"
    try:
        said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ArtifactError(f"{path}: not valid JSON ({error}). Fix the file.") from error
    write(path, with_ends(said, ends))


def dtype(config: Mapping[str, Any]) -> str | None:
    """Return the type of the weights as mlx-lm's converter reads it, such as "bfloat16"; None where it finds none."""
    said = config.get("torch_dtype") or config.get("text_config", {}).get("dtype")
    return said if isinstance(said, str) else None


def with_dtype(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a config that names a type of the weights wherever it named one."""

    def changed(table: Mapping[str, Any]) -> dict[str, Any]:
        return {key: name if key in _DTYPES else value for key, value in table.items()}

    return {key: changed(value) if key in _TEXT else value for key, value in changed(config).items()}


def describing(config: Mapping[str, Any], *, weights: Iterable[str], is_quantized: bool) -> dict[str, Any]:
    """Return a config that says nothing of what a model does not have.

    Args:
        config: as mlx-lm's `load_model` returns it.
        weights: names of the model's weights.
        is_quantized: whether some of them are codes.
    """
    names = list(weights)
    absent = {part for part, words in _PARTS.items() if not any(word in name for name in names for word in words)}
    absent |= {"_name_or_path"}  # a path of whoever wrote it, which mlx-lm's converter drops, too
    if not is_quantized:
        absent |= set(_QUANTIZATION)
    kept = {key: value for key, value in config.items() if key not in absent}
    for table in set(kept) & set(_TEXT):
        kept[table] = {key: value for key, value in kept[table].items() if key not in _QUANTIZATION}
    if is_quantized and "quantization" in kept:
        kept["quantization_config"] = kept["quantization"]
    return kept


def keeps_codes(config: Mapping[str, Any]) -> bool:
    """Return whether a config says that weights are codes, and mlx-lm leaves them so while it loads them."""
    if isinstance(config.get("quantization"), dict):
        return True
    said = _of_text(config, ("quantization_config",))
    if not isinstance(said, dict):
        return False
    is_packed_fp8 = said.get("scale_fmt") == "ue8m0" and list(said.get("weight_block_size") or ()) == [32, 32]
    return said.get("quant_method") != "fp8" or is_packed_fp8


def _of_text(config: Mapping[str, Any], names: Iterable[str]) -> Any:
    """Return the first of some settings that a config has, itself or in the table of its text model."""
    tables = [config, *(config[table] for table in _TEXT if isinstance(config.get(table), dict))]
    return next((table[name] for table in tables for name in names if table.get(name) is not None), None)
