import time
from itertools import count
from pathlib import Path
from typing import Literal

import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlxflow.training import build
from mlxflow.training.settings import AdapterShape, TrainingSettings
from mlxflow.training.writing_forecast import writing_seconds, written_bytes
from tests.small_models import llama


@pytest.mark.parametrize(
    ("steps", "every", "keep", "checkpoints", "best"),
    [(10, 4, "last", 2, 0), (8, 4, "last", 1, 0), (10, 0, "last", 0, 0), (10, 4, "best", 2, 3)],
)
def test_checkpoints_best_weights_and_the_model_are_counted(
    steps: int, every: int, keep: Literal["last", "best"], checkpoints: int, best: int
) -> None:
    model, _ = llama(vocab_size=64, hidden_size=32, num_layers=2, intermediate_size=64, seed=0)
    settings = TrainingSettings(num_steps=steps, save_every=every, keep=keep, warmup_steps=0)
    size = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
    found = written_bytes(model, settings, fuse="", state_bytes=1000, validations=3)
    assert found == checkpoints * 1000 + best * size + size


def test_only_adapters_are_kept_as_best_weights_and_a_model_made_dense_has_all_weights() -> None:
    model, _ = llama(vocab_size=64, hidden_size=32, num_layers=2, intermediate_size=64, seed=0)
    dense = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
    nn.quantize(model, group_size=32, bits=4)
    settings = TrainingSettings(
        keep="best", warmup_steps=0, num_steps=10, adapters=AdapterShape("lora", 2, 20.0, 0.0, 0, ("*",))
    )
    build.prepare_model(model, settings, adapter_seed=0)
    trained = sum(value.nbytes for _, value in tree_flatten(model.trainable_parameters()))
    written = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
    assert written < dense
    assert written_bytes(model, settings, fuse="never", state_bytes=0, validations=2) == written + 2 * trained
    assert written_bytes(model, settings, fuse="dense", state_bytes=0, validations=2) == dense + 2 * trained


def test_a_sample_is_written_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))  # a sample takes a second
    assert writing_seconds(10 * 64 * 2**20, tmp_path / "not" / "made") == pytest.approx(10.0)
    assert writing_seconds(1000, tmp_path) == pytest.approx(1.0)
    assert writing_seconds(0, tmp_path) == 0.0
    assert list(tmp_path.iterdir()) == []
