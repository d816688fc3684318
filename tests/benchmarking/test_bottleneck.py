from typing import Any

import mlx.core as mx
import pytest

from mlxflow.benchmarking import roofline
from mlxflow.benchmarking.bottleneck import advise
from mlxflow.models.model_folder import num_parameters
from tests.small_models import llama

BUSY = {"data": 0.0, "graph": 0.02, "compute": 0.98, "synchronize": 0.0}


def _row(size: int, rate: float, name: str = "workflow", **more: Any) -> dict[str, Any]:
    bounds = {"low_tokens_per_second": rate * 0.98, "high_tokens_per_second": rate * 1.02}
    return {"name": name, "batch_size": size, "tokens_per_second": rate, "peak_memory_bytes": 10**9, **bounds, **more}


@pytest.mark.parametrize(
    ("shares", "rows", "begin"),
    [
        (BUSY | {"data": 0.3}, [_row(8, 100)], "raise train.workers and train.prefetch_batches: 30% of a step"),
        (BUSY | {"graph": 0.4}, [_row(8, 100)], "raise train.batch_size: the host takes 40% of a step"),
        (BUSY, [_row(8, 100), _row(16, 120)], "set train.batch_size = 16: 1.20 times the tokens a second of 8 rows"),
        (BUSY, [_row(8, 100), _row(16, 101)], "98% of a step is computing"),
        (
            BUSY,
            [_row(8, 100), _row(8, 125, "without fused_loss", workflow_speedup=0.8, high_workflow_speedup=0.9)],
            "set train.fused_loss = false: steps without fused_loss were 1.25 times as fast",
        ),
        (
            BUSY,
            [_row(8, 100), _row(8, 125, "without fused_loss", workflow_speedup=0.8, high_workflow_speedup=1.1)],
            "98% of a step is computing",
        ),
        (BUSY | {"data": 0.03}, [_row(8, 100), _row(16, 150)], "set train.batch_size = 16"),
    ],
)
def test_the_change_with_the_largest_measured_gain_is_advised(
    shares: dict[str, float], rows: list[dict[str, Any]], begin: str
) -> None:
    assert advise(shares, rows, 8, training_table="train", tokens_table="pretokenize").startswith(begin)


def test_a_step_computes_six_operations_for_every_weight_and_those_of_attention() -> None:
    model, _ = llama(hidden_size=16, num_layers=2)
    matrices = num_parameters(model) - 5 * 16  # norms
    found = roofline.flops_per_token(model.parameters(), hidden_size=16, num_layers=2, context_length=8)
    assert found == 6 * matrices + 12 * 2 * 16 * 8
    untied, _ = llama(hidden_size=16, num_layers=2, tie_word_embeddings=False)
    again = roofline.flops_per_token(untied.parameters(), hidden_size=16, num_layers=2, context_length=8)
    assert again == found  # an embedding that is only looked up computes nothing


def test_ceilings_count_what_is_computed_and_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_PRODUCT", {"cpu": 64, "gpu": 64})
    monkeypatch.setattr(roofline, "_READ", {"cpu": 64, "gpu": 64})
    monkeypatch.setattr(roofline, "_fastest", lambda compute: 2.0 if mx.isfinite(compute()).all() else 0.0)
    assert roofline.flops_ceiling(mx.float32) == 64**3
    assert roofline.bytes_ceiling(mx.bfloat16) == 64 * 64 * 2 / 2
