"""A small model whose steps are profiled."""

from pathlib import Path

import pytest

from mlxflow.models import model_folder
from mlxflow.profiling.step_memory import ProfiledModel
from tests.small_models import llama


def save_job(folder: Path, *, vocab_size: int, hidden_size: int) -> ProfiledModel:
    model, config = llama(vocab_size=vocab_size, context_length=32, hidden_size=hidden_size, intermediate_size=64)
    files = {"config_file": folder / "config.json", "model_file": folder / "model.safetensors"}
    model_folder.save(model=model, config=config, provenance={}, **files)
    return ProfiledModel(folder, "profile.input", vocab_size, 32, 0)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> ProfiledModel:
    return save_job(tmp_path_factory.mktemp("model"), vocab_size=1000, hidden_size=32)
