"""Inputs of a quantization: a dense model from a folder or the hub, and tokens for calibration and validation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.nn as nn

from mlxflow.data.token_file import TokenFile
from mlxflow.messages.errors import ArtifactError
from mlxflow.models import gguf_reading, model_folder, quantized_layers, tokenizer_files
from mlxflow.quantization.rotations import Rotation
from mlxflow.storage import config_json, model_files
from mlxflow.storage.run_context import Context
from mlxflow.storage.tensor_reading import StoredRows


class DenseModel(NamedTuple):
    """A dense model of a folder.

    Attributes:
        folder: of its files.
        model: in eval mode, with lazy weights.
        config_json: its `config.json`.
        stored: matrices that can be read from the files row by row, by the model's names.
        dtype: as requested for its weights; see `open_dense`.
        rotation: of the model, whose outputs it does not change; None without.
    """

    folder: Path
    model: nn.Module
    config_json: dict[str, Any]
    stored: dict[str, StoredRows]
    dtype: str
    rotation: Rotation | None = None

    def reopened(self) -> nn.Module:
        """Return the model once more, with lazy weights that can be freed one by one."""
        model = quantized_layers.made_dense(*model_folder.load(self.folder, lazy=True))
        opened = model_folder.cast(*model, self.dtype)[0]
        if self.rotation is not None:
            self.rotation.apply(opened)
        return opened

    def rotated(self, rotation: Rotation) -> "DenseModel":
        """Return the model with a rotation; its weights are no longer those of the files."""
        changed = self._replace(rotation=rotation, stored={})
        return changed._replace(model=changed.reopened())


def identity_of(folder: Path, context: Context) -> dict[str, str]:
    """Return the digest of each file of a model folder that is read, by its name.

    Args:
        folder: of the model.
        context: of the stage.
    """
    files = [folder / name for name in model_files.find(folder).read]
    return {file.relative_to(folder).as_posix(): context.digests.digests(file).identity for file in files}


class TokenPair(NamedTuple):
    """The token files of a pretokenize stage."""

    train: TokenFile
    validation: TokenFile


def find_folder(name: str, files: tuple[Path, ...], *, task: str) -> Path:
    """Return the folder of a model, downloaded from the hub if there are no files.

    Args:
        name: of a model on the hub.
        files: of a folder, or a GGUF file; empty for a model on the hub.
        task: the stage that names it, for messages.

    Raises:
        ArtifactError: it is no model folder, or needs code that is not trusted.
        SourceError: it cannot be downloaded.
    """
    if files:
        return gguf_reading.folder_of(files, key=f'{task}.model = "{name}"')
    trust_key = f"{task}.trust_remote_code"
    folder = model_folder.fetch(name, key=f"{task}.model", trust_key=trust_key)
    tokenizer_files.require_tokenizer_trust(folder, trust_key)
    return folder


def open_dense(folder: Path, *, dtype: str, refusal: str) -> DenseModel:
    """Return the model of a folder with dense weights and fused adapters.

    Args:
        folder: a model folder.
        dtype: of the weights: "fp32", "fp16", "bf16", or "keep" or "auto" for that of the config.
        refusal: the message for an already quantized model; empty to dequantize it.

    Raises:
        ArtifactError: the model cannot be opened, or is quantized and refused.
    """
    model, config = model_folder.load(folder, lazy=True)
    is_quantized = quantized_layers.is_quantized(model)
    if is_quantized and refusal:
        raise ArtifactError(refusal)
    stored = {} if is_quantized else model_folder.stored_matrices(folder, model)
    return DenseModel(folder, *model_folder.cast(*quantized_layers.made_dense(model, config), dtype), stored, dtype)


def open_tokens(
    files: tuple[Path, ...], folder: Path, config: Mapping[str, Any], *, key: str, stage: str
) -> TokenPair | None:
    """Return training and validation tokens; None without files.

    Args:
        files: of both; empty for none.
        folder: of the model.
        config: its `config.json`.
        key: the setting that names the tokens, for messages.
        stage: the pretokenize stage that it names.

    Raises:
        ArtifactError: they have another vocabulary, or rows longer than the model's context.
    """
    if not files:
        return None
    tokens = TokenPair(*(TokenFile.open(path) for path in files))
    tokens.train.require_vocabulary(model_folder.vocab_size(folder), key)
    positions, length = config_json.num_positions(config), tokens.train.context_length
    if length > positions:
        raise ArtifactError(
            f'{key} = "{stage}": its rows have {length:,} tokens, {folder} is made for {positions:,} positions. '
            f"Lower {stage}.context_length."
        )
    return tokens
