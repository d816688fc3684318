from typing import Any

import pytest

from mlxflow.benchmarking.bottleneck import advise

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
def test_the_advice_is_the_change_with_the_largest_measured_gain(
    shares: dict[str, float], rows: list[dict[str, Any]], begin: str
) -> None:
    assert advise(shares, rows, 8, training_table="train", tokens_table="pretokenize").startswith(begin)
