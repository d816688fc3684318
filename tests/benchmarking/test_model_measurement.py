from pathlib import Path
from typing import Any

import pytest

from mlxflow.benchmarking import model_measurement
from mlxflow.benchmarking.model_measurement import ComparedModels
from tests.small_models import FREE


def _models(built: Path) -> ComparedModels:
    folders = {"train": built / "artifacts/train", "quantize:q4": built / "artifacts/quantize/q4"}
    weights = {name: folder / "model.safetensors" for name, folder in folders.items()}
    tokens = built / "artifacts/pretokenize/validation.safetensors"
    return ComparedModels(weights, weights["train"], tokens, (), 8, 1, key="benchmark.models")


def test_a_model_that_does_not_fit_has_an_error_and_the_others_are_measured(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = model_measurement._load

    def loads(folder: Path) -> Any:
        if folder.name == "q4":
            raise RuntimeError("[malloc] Unable to allocate 777777 bytes.")
        return load(folder)

    monkeypatch.setattr(model_measurement, "_load", loads)
    dense, q4 = _models(built).measure(FREE)
    assert dense["perplexity"] > 1
    assert dense["decode_tokens_per_second"] > 0
    assert q4["error"] == "out of memory: 777,777 more bytes needed, memory limit 1"


def test_only_the_named_models_are_measured_again(built: Path) -> None:
    models = _models(built)
    (row,) = models.only({"quantize:q4", "training"}).measure_speeds(FREE)
    assert row["model"] == "quantize:q4"
    assert row["decode_tokens_per_second"] > 0
    assert "perplexity" not in row
    assert models.only(set()).measure_speeds(FREE) == []


def test_the_dense_row_is_that_of_the_dense_model(built: Path) -> None:
    rows: list[dict[str, Any]] = [{"model": "quantize:q4"}, {"model": "train"}]
    assert _models(built).dense_row(rows) == {"model": "train"}
    assert _models(built).dense_row(rows[:1]) == {}
