from pathlib import Path
from typing import Any

import pytest

from mlxflow.benchmarking import model_measurement
from mlxflow.benchmarking.model_measurement import ComparedModels
from mlxflow.training import model_artifact
from tests.benchmarking.report_rows import model_row
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

    def loads(folder: Path, **options: Any) -> Any:
        if folder.name == "q4":
            raise RuntimeError("[malloc] Unable to allocate 777777 bytes.")
        return load(folder, **options)

    monkeypatch.setattr(model_measurement, "_load", loads)
    dense, q4 = _models(built).measure(FREE)
    assert dense.measured is not None
    assert dense.measured.perplexity is not None
    assert dense.measured.perplexity > 1
    assert dense.measured.decode_speed.low > 0
    assert q4.error == "out of memory: 777.8 kB more needed, memory limit 1 bytes"


def test_a_model_whose_perplexity_is_not_a_number_has_an_error(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = model_artifact.measure_model

    def measured(model: Any, rows: Any, **how: Any) -> Any:
        return measure(model, rows, **how)._replace(perplexity=float("nan"))

    monkeypatch.setattr(model_measurement, "measure_model", measured)
    (row,) = _models(built).only({"quantize:q4"}).measure(FREE)
    assert row.error == "its perplexity is not a number. Look for weights that are not finite"
    assert row.measured is None
    assert row.model_bytes is not None


def test_only_the_named_models_are_measured_again(built: Path) -> None:
    models = _models(built)
    (row,) = models.only({"quantize:q4", "training"}).measure_speeds(FREE)
    assert row.model == "quantize:q4"
    assert row.decode_speed is not None
    assert row.decode_speed.low > 0
    assert row.perplexity is None
    assert models.only(set()).measure_speeds(FREE) == ()


def test_the_dense_row_is_that_of_the_dense_model(built: Path) -> None:
    rows = [model_row("quantize:q4"), model_row("train")]
    assert _models(built).dense_row(rows) == rows[1]
    assert _models(built).dense_row(rows[:1]) is None
