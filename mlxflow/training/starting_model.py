"""The model that a training starts from: a new one, or that of a model folder, with its adapters beside it."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlxflow.data.token_file import TokenFile
from mlxflow.messages.errors import ArtifactError
from mlxflow.models import (
    adapter_files,
    gguf_reading,
    model_folder,
    quantized_layers,
    tokenizer_files,
    trial_calls,
)
from mlxflow.models.new_model import ModelConfig, new_config
from mlxflow.models.vocabulary_growth import grow_vocabulary
from mlxflow.storage import config_json
from mlxflow.training import adapters
from mlxflow.training.settings import SettingNames, TrainingSettings
from mlxflow.training.weight_dtypes import cast_weights, dtype_of


class ModelSource(NamedTuple):
    """The origin of the model to train.

    Attributes:
        shape: of a new model.
        folder: a model folder to start from instead; None for a new model.
        fuse: how trained adapters are saved: "auto", "never", "requantize" or "dense".
        tokenizer: the `tokenizer.json` that the tokens were made with.
    """

    shape: ModelConfig
    folder: Path | None
    fuse: str
    tokenizer: Path


class StartingModel(NamedTuple):
    """A model before its first step, with its configurations.

    Attributes:
        model: in training mode, its weights evaluated.
        config_json: its `config.json`.
        adapter_config: the `adapter_config.json` of the adapters to train; None if all weights are trained.
    """

    model: nn.Module
    config_json: dict[str, Any]
    adapter_config: dict[str, Any] | None


def find_folder(name: str, files: tuple[Path, ...], names: SettingNames) -> Path | None:
    """Return the folder of the base model, downloaded from the hub if necessary.

    Args:
        name: of a folder, a GGUF file or a model on the hub; empty for a new model.
        files: of the folder, or the GGUF file; empty for a model on the hub.
        names: of the settings, for messages.

    Raises:
        ArtifactError: it is no model folder, or needs code that is not trusted.
        SourceError: it cannot be downloaded.
    """
    if not name:
        return None
    if files:
        return gguf_reading.folder_of(files, key=f'{names.of("model.from")} = "{name}"')
    return model_folder.fetch(name, key=names.of("model.from"), trust_key=names.of("model.trust_remote_code"))


def make_model(
    source: ModelSource,
    settings: TrainingSettings,
    tokens: TokenFile,
    *,
    seed: int,
    memory_limit_bytes: int,
    names: SettingNames,
) -> StartingModel:
    """Return the model to train, with new or existing adapters if the settings have adapters.

    Args:
        source: its origin.
        settings: precision and adapters are used.
        tokens: to train on.
        seed: of the initial weights of a new model or of new adapters; the global random state is set by it.
        memory_limit_bytes: MLX's memory limit.
        names: of the settings, for messages.

    Raises:
        ArtifactError: a new model does not fit into the memory; the folder holds no model, its model or tokenizer does
            not fit the tokens, or it does not fit the method or `fuse`; the model cannot be called or derived.
        WorkflowError: a pattern of `lora.keys` names no layer.
    """
    if source.folder is not None:
        model, config = _open(source.folder, source, settings, tokens, names)
    else:
        config = new_config(
            source.shape,
            vocab_size=tokens.vocab_size,
            context_length=tokens.context_length,
            end_of_text=tokens.end_of_text,
        )
        model_folder.require_room(config, memory_limit_bytes, names.of("model"), limit_key=names.memory_limit)
        model = model_folder.build(config, seed=seed)
    cast_weights(model, settings)
    if not quantized_layers.is_quantized(model):
        adapter_files.fuse(model)  # adapters of an earlier training are fused
    adapter_config = _add_adapters(model, source.folder, settings, seed=seed, names=names)
    cast_weights(model, settings)
    model.train()
    mx.eval(model.parameters())
    described = str(source.folder / "config.json") if source.folder else names.of("model")
    trial_calls.require_gradient(model, config, described, vocab_size=tokens.vocab_size)
    config = config_json.with_ends(config, tokens.end_tokens)
    dtype = str(dtype_of(settings)).rpartition(".")[2]
    return StartingModel(model, config_json.with_dtype(config, dtype), adapter_config)


def _open(
    folder: Path, source: ModelSource, settings: TrainingSettings, tokens: TokenFile, names: SettingNames
) -> tuple[nn.Module, Mapping[str, Any]]:
    """Return the model of a folder and its `config.json`.

    Raises:
        ArtifactError: it is no model folder, its vocabulary lacks tokens, or it does not fit the method or `fuse`.
    """
    key = names.of("model.from")
    with ThreadPoolExecutor(1) as beside:  # both take seconds, and MLX reads weights without Python's lock
        added = beside.submit(_added_tokens, folder, source, tokens, names)
        model, own_config = model_folder.load(folder)
        config = _fit_vocabulary(model, own_config, folder, added.result(), settings, tokens, names)
    positions = config_json.num_positions(config)
    if tokens.context_length > positions:
        raise ArtifactError(
            f"{key}: {folder} is made for {positions:,} positions, the rows have {tokens.context_length:,}. "
            f"Lower {names.context_length}."
        )
    is_quantized = quantized_layers.is_quantized(model)
    if is_quantized and settings.adapter_shape is None:
        raise ArtifactError(f'{key}: {folder} is quantized. Set {names.of("method")} = "lora", or name a dense model.')
    if source.fuse == "requantize" and not is_quantized:
        fuse = names.of("fuse")
        raise ArtifactError(f'{fuse} = "requantize": {folder} is dense. Set {fuse} = "dense".')
    if source.fuse == "dense":
        quantized_layers.require_unpackable(model)
    return model, config


def _added_tokens(folder: Path, source: ModelSource, tokens: TokenFile, names: SettingNames) -> list[str]:
    """Return the tokens that the tokenizer of the tokens has beside those of a model folder.

    Raises:
        ArtifactError: the tokens are of another tokenizer.
    """
    key, own = names.of("model.from"), folder / "tokenizer.json"
    if not own.is_file():
        tokens.require_vocabulary(model_folder.vocab_size(folder), key)
    return tokenizer_files.require_tokenizer(folder, source.tokenizer, key, tokens_key=names.tokenizer)


def _fit_vocabulary(
    model: nn.Module,
    config: Mapping[str, Any],
    folder: Path,
    added: list[str],
    settings: TrainingSettings,
    tokens: TokenFile,
    names: SettingNames,
) -> Mapping[str, Any]:
    """Give a model rows for tokens that were added to its tokenizer, and return its `config.json`.

    Raises:
        ArtifactError: the rows of added tokens cannot be made or trained.
    """
    key, num_known = names.of("model.from"), model_folder.vocab_size(folder)
    if added and settings.adapter_shape is not None:
        listed = ", ".join(json.dumps(text) for text in added[:4]) + (" ..." if len(added) > 4 else "")
        raise ArtifactError(
            f'{names.of("method")} = "{settings.adapter_shape.method}": the tokens {listed} are new to {folder}, and '
            f'adapters do not train their embeddings. Set {names.of("method")} = "full", or use a template whose '
            "tokens the model has."
        )
    if tokens.vocab_size <= num_known:
        return config
    try:
        return grow_vocabulary(model, config, tokens.vocab_size, ends=tokens.end_tokens)
    except ValueError as error:
        raise ArtifactError(f"{key}: {folder} cannot get added tokens ({error}). Name another model.") from error


def _add_adapters(
    model: nn.Module, folder: Path | None, settings: TrainingSettings, *, seed: int, names: SettingNames
) -> dict[str, Any] | None:
    """Freeze the model except for its existing or new adapters; return their `adapter_config.json`."""
    shape = settings.adapter_shape
    if shape is None:
        return None
    if folder is not None and adapter_files.layers_of(model):
        return adapters.continue_adapters(model, shape, folder=folder, task=names.table)
    return adapters.add_adapters(model, shape, seed=seed, key=names.of("lora.keys"))


def open_for_steps(folder: Path, settings: TrainingSettings, *, key: str) -> nn.Module:
    """Return the model of a folder for training steps whose result is not kept; see `model_folder.load_for_steps`.

    Args:
        folder: the model folder.
        settings: of the training.
        key: the setting that names the folder, for messages.

    Raises:
        ArtifactError: the files cannot be opened as a model, or cannot be trained that way.
    """
    return model_folder.load_for_steps(folder, key, trains_adapters=settings.adapter_shape is not None)


def num_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's weights."""
    return model_folder.num_bytes(model)
