"""What is said of a model folder that cannot be opened."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest

from benchmarks.architecture_configs import config_of
from mlxflow.messages.errors import ArtifactError
from mlxflow.models import model_folder

LLAMA = config_of("llama") | {"model_type": "llama", "tie_word_embeddings": False}
ADVICE = "Fix the file, or name another model."


def problem(folder: Path) -> str:
    """Return why a folder cannot be opened, without the folder's name."""
    with pytest.raises(ArtifactError) as caught:
        model_folder.load(folder, lazy=True)
    return str(caught.value).replace(str(folder), "model")


NORM = "model.norm.weight"


def write_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of a folder's weights; it stays as long as it is, or the file's length follows."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    changed = change(header)
    text = changed.encode() if isinstance(changed, str) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def spoil(folder: Path, name: str, value: mx.array) -> str:
    """Put another tensor into a model and return why the folder cannot be opened."""
    path = folder / "model.safetensors"
    weights = cast("dict[str, mx.array]", mx.load(str(path)))
    mx.eval(weights)
    weights[name] = value
    mx.save_safetensors(str(path), weights, {"format": "mlx"})
    return problem(folder)
