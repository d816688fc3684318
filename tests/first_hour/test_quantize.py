"""The first hour of a user who wants a model folder smaller, and nothing else."""

import json
from pathlib import Path

import pytest

from tests.first_hour.conftest import Newcomer

pytestmark = pytest.mark.first_hour


def test_a_model_folder_is_quantized_and_nothing_else_is_planned(newcomer: Newcomer, chat_model: Path) -> None:
    newcomer.types("mlxflow init small --template quantize")
    workflow = newcomer.folder / "small/workflow.toml"
    workflow.write_text(workflow.read_text().replace('"model"', json.dumps(str(chat_model))))
    assert "train" not in newcomer.types("cd small && mlxflow build --plan")
    newcomer.types("cd small && mlxflow build")
    folders = sorted(path.name for path in (newcomer.folder / "small/artifacts").iterdir() if path.is_dir())
    assert folders == [".mlxflow", "logs", "quantize"]
    dense = (chat_model / "model.safetensors").stat().st_size
    sizes = {
        bits: (newcomer.folder / f"small/artifacts/quantize/q{bits}/model.safetensors").stat().st_size
        for bits in (4, 8)
    }
    assert sizes[4] < sizes[8] < dense / 2
    program = "import mlx_lm; mlx_lm.load('artifacts/quantize/q4'); print('opened')"
    assert "opened" in newcomer.types(f'cd small && python -c "{program}"')
