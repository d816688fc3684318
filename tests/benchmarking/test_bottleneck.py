from typing import Any

import pytest

from mlxflow.benchmarking.bottleneck import advise
from mlxflow.benchmarking.step_runner import Parts
from mlxflow.report.stage_reports.benchmark_rows import TrainingRow
from tests.benchmarking.report_rows import training_row

BUSY = Parts(data=0.0, graph=0.02, compute=0.98, synchronize=0.0)


def _row(size: int, speed: float) -> TrainingRow:
    return training_row(speed, batch_size=size)


def _switched_off(high: float) -> TrainingRow:
    """Return a row without an optimization over which the workflow's speedup is at most this."""
    speedup: Any = {"workflow_speedup": 0.8, "low_workflow_speedup": 0.7, "high_workflow_speedup": high}
    return training_row(125, name="without fused_loss", **speedup)


@pytest.mark.parametrize(
    ("shares", "rows", "begin"),
    [
        (BUSY._replace(data=0.3), [_row(8, 100)], "raise train.workers and train.prefetch_batches: 30% of a step"),
        (BUSY._replace(graph=0.4), [_row(8, 100)], "raise train.batch_size: the host takes 40% of a step"),
        (BUSY, [_row(8, 100), _row(16, 120)], "set train.batch_size = 16: 1.20 times the tokens a second of 8 rows"),
        (BUSY, [_row(8, 100), _row(16, 101)], "98% of a step is computing"),
        (
            BUSY,
            [_row(8, 100), _switched_off(0.9)],
            "set train.fused_loss = false: steps without fused_loss were 1.25 times as fast",
        ),
        (
            BUSY,
            [_row(8, 100), _switched_off(1.1)],
            "98% of a step is computing",
        ),
        (BUSY._replace(data=0.03), [_row(8, 100), _row(16, 150)], "set train.batch_size = 16"),
    ],
)
def test_the_advice_is_the_change_with_the_largest_measured_gain(
    shares: Parts, rows: list[TrainingRow], begin: str
) -> None:
    assert advise(shares, rows, 8, training_table="train", tokens_table="pretokenize").startswith(begin)
