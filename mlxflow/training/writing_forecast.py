"""How long a training writes, before it begins: checkpoints, the best weights, and the model folder."""

import os
import tempfile
import time
from pathlib import Path

import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxflow.models import model_folder, quantized_layers
from mlxflow.training.settings import TrainingSettings

# Bytes that are written to know the speed
_SAMPLE_BYTES = 64 * 2**20


def written_bytes(
    model: nn.Module, settings: TrainingSettings, *, fuse: str, state_bytes: int, validations: int
) -> int:
    """Return the bytes that a training writes if every validation is the best so far.

    Args:
        model: prepared for training.
        settings: of the training.
        fuse: how adapters are saved, resolved; see `lora_config.decide_fuse`.
        state_bytes: of a checkpoint.
        validations: number of validations in training.
    """
    checkpoints = (settings.num_steps - 1) // settings.save_every if settings.save_every else 0
    trained = sum(value.nbytes for _, value in tree_flatten(model.trainable_parameters()))
    best = validations * trained if settings.keep == "best" else 0
    return checkpoints * state_bytes + best + _model_bytes(model, fuse)


def _model_bytes(model: nn.Module, fuse: str) -> int:
    """Return the bytes of the written model; one made dense has the dtype of its scales."""
    if fuse != "dense" or not quantized_layers.is_quantized(model):
        return model_folder.num_bytes(model)
    sizes = (value.dtype.size for name, value in tree_flatten(model.parameters()) if name.endswith(".scales"))
    return model_folder.num_parameters(model) * max(2, next(sizes, 2))  # scales of one byte give bf16


def writing_seconds(num_bytes: int, folder: Path) -> float:
    """Return the seconds to write bytes to a folder's disk; some are written to a file without a name.

    Args:
        num_bytes: to write.
        folder: on the disk; if it does not exist, the closest one above it that does.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    sample = min(num_bytes, _SAMPLE_BYTES)
    if not sample:
        return 0.0
    block = os.urandom(min(sample, 2**20))  # a disk that compresses would write zeros in no time
    with tempfile.TemporaryFile(dir=place) as file:
        begin, done = time.perf_counter(), 0
        while done < sample:
            done += file.write(block)
        file.flush()
        os.fsync(file.fileno())
        seconds = time.perf_counter() - begin
    return seconds * num_bytes / done
