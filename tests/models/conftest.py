"""A small model folder, to be spoilt."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlxflow.models import model_folder
from tests.models.spoilt_folders import LLAMA


@pytest.fixture(scope="module")
def good_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model folder; tests copy it."""
    folder = tmp_path_factory.mktemp("good")
    weights: dict[str, mx.array] = dict(tree_flatten(model_folder.build(LLAMA, seed=0).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


@pytest.fixture
def llama_folder(good_llama: Path, tmp_path: Path) -> Path:
    """A copy of the model folder, to be spoilt."""
    return Path(shutil.copytree(good_llama, tmp_path / "model"))
