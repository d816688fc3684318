"""Predictions of the memory are remembered, and computed again whenever they may differ."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np
import pytest

from mlxflow.data.token_file import Rows
from mlxflow.kernels import model_kernels
from mlxflow.storage.locks import device_lock
from mlxflow.training import build, remembered_forecast
from mlxflow.training.memory_forecast import MemoryForecast, forecast_memory
from mlxflow.training.settings import AdapterShape, TrainingSettings
from tests.small_models import llama

NONE = model_kernels.no_kernels()
Count = Callable[[], int]


@pytest.fixture
def traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Count:
    """Return a function that returns the number of predictions that were computed, in an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    computed: list[MemoryForecast] = []

    def forecast(*arguments: Any) -> MemoryForecast:
        computed.append(forecast_memory(*arguments))
        return computed[-1]

    monkeypatch.setattr(remembered_forecast, "forecast_memory", forecast)
    return lambda: len(computed)


def _foreseen(*, rows: int = 2, rank: int = 4, heads: int = 2, bits: int = 0, **settings: Any) -> MemoryForecast:
    model, _ = llama(
        vocab_size=64, context_length=16, hidden_size=64, intermediate_size=64, num_heads=heads, num_kv_heads=1, seed=0
    )
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
    keys = ("self_attn.*", "mlp.*")
    adapters = AdapterShape(method="lora", rank=rank, scale=20.0, dropout=0.0, num_layers=0, keys=keys)
    chosen = TrainingSettings(batch_size=rows, warmup_steps=0, adapters=adapters, **settings)
    build.prepare_model(model, chosen, adapter_seed=0)
    return _of(build.Subject(model, chosen, 64, 16), rows)


def _of(subject: build.Subject, rows: int = 2) -> MemoryForecast:
    tokens = np.zeros((rows, 17), np.int32)
    return remembered_forecast.remembered_forecast(subject, NONE, Rows(tokens, np.full(tokens.shape, 3, np.uint8)))


def test_a_prediction_is_computed_once(traces: Count) -> None:
    first = _foreseen()
    assert first.peak_bytes > 0
    assert _foreseen() == first
    assert _foreseen(learning_rate=1e-4, num_steps=3, save_every=1) == first
    assert traces() == 1


def test_it_is_computed_again_for_whatever_changes_a_step(traces: Count, monkeypatch: pytest.MonkeyPatch) -> None:
    different: list[dict[str, Any]] = [
        {"rows": 3},
        {"rank": 8},
        {"heads": 4},
        {"bits": 4},
        {"checkpoint_every": 1},
        {"precision": "bf16"},
    ]
    found = [_foreseen(**one) for one in ({}, *different)]
    assert traces() == len(found)
    monkeypatch.setenv("MLX_MAX_OPS_PER_BUFFER", "7")
    _foreseen()
    assert traces() == len(found) + 1
    monkeypatch.setattr(remembered_forecast, "code_digest", lambda: "another version")
    _foreseen()
    assert traces() == len(found) + 2


class _Strange(nn.Module):  # type: ignore[misc]
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def __call__(self, tokens: Any) -> Any:
        return self.inner(tokens)


def test_a_model_of_other_code_is_traced_each_time(traces: Count) -> None:
    model, _ = llama(vocab_size=64, context_length=16, hidden_size=64, num_heads=2, num_kv_heads=1, seed=0)
    subject = build.Subject(_Strange(model), TrainingSettings(batch_size=2, warmup_steps=0), 64, 16)
    assert _of(subject) == _of(subject)
    assert traces() == 2


def test_a_damaged_file_counts_as_empty(traces: Count) -> None:
    first, file = _foreseen(), device_lock().with_name("forecasts.json")
    file.write_bytes(file.read_bytes()[:-3])
    assert _foreseen() == first
    assert traces() == 2
    assert _foreseen() == first
    assert traces() == 2
