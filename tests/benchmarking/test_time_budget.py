"""Work that is bounded by time says so, before and meanwhile."""

import msgspec

from mlxflow.benchmarking.throughput import FEWEST_ROUNDS, interleave
from mlxflow.benchmarking.time_budget import AskedAmounts, Budget, lowered
from mlxflow.report.stage_reports.benchmark import ConvergenceCurve
from mlxflow.report.stage_reports.benchmark_rows import ModelRow, TrainingRow
from tests.benchmarking.report_rows import failed_row, model_row, training_row


class _Clocked:
    def __init__(self, seconds: float) -> None:
        self.now = 0.0
        self.lines: list[str] = []
        self.budget = Budget(seconds, task="benchmark", clock=lambda: self.now, say=self.lines.append)


def test_unused_time_passes_to_the_next_part_within_the_total() -> None:
    clocked = _Clocked(100)
    clocked.budget.begin(0.5)
    assert clocked.budget.left == 50
    clocked.now = 10
    clocked.budget.begin(0.6)
    assert clocked.budget.left == 50
    clocked.now = 70
    assert clocked.budget.is_over
    clocked.budget.begin(1.0)
    assert clocked.budget.left == 30
    clocked.now = 200
    clocked.budget.begin(1.0)
    assert clocked.budget.is_over


def test_without_a_limit_the_budget_is_never_over() -> None:
    clocked = _Clocked(0)
    clocked.now = 1e9
    clocked.budget.begin(0.5)
    assert not clocked.budget.is_over
    clocked.budget.announce("steps", 100)
    assert clocked.lines == ["benchmark: steps: about 100 s"]


def test_the_expected_duration_and_the_progress_are_printed() -> None:
    clocked = _Clocked(60)
    clocked.budget.announce("short", 1)
    clocked.budget.announce("steps", 50)
    clocked.budget.announce("more steps", 500)
    clocked.budget.progress("round", 1, 20, 5)
    clocked.now = 20
    clocked.budget.progress("round", 4, 20, 20)
    clocked.now = 21
    clocked.budget.progress("round", 5, 20, 21)
    assert clocked.lines == [
        "benchmark: steps: about 50 s",
        "benchmark: more steps: about 500 s, but max_seconds = 60 leaves 60 s",
        "benchmark: round 4 of 20, 40 s left",
    ]


def test_rounds_stop_when_the_budget_is_over() -> None:
    counted = [0]

    def step() -> None:
        counted[0] += 1

    (timing,) = interleave([step], num_rounds=20, goes_on=lambda done: done < 7)
    assert len(timing.seconds) == counted[0] == 7
    (timing,) = interleave([step], num_rounds=20, goes_on=lambda done: False)
    assert len(timing.seconds) == FEWEST_ROUNDS


def _timed(num_steps: int) -> TrainingRow:
    return msgspec.structs.replace(training_row(100), num_steps=num_steps)


def _curve(last_step: int) -> ConvergenceCurve:
    return ConvergenceCurve(
        name="workflow",
        steps=(1, last_step),
        tokens=(1, 2),
        seconds=(0.0, 1.0),
        loss=(3.0, 2.0),
        same_loss=2.0,
        tokens_to_loss=2,
        seconds_to_loss=1.0,
    )


def test_parts_skipped_for_lack_of_time_are_named() -> None:
    asked = AskedAmounts(num_steps=100, convergence_steps=50, max_validation_rows=64, max_seconds=60)
    whole = model_row(validation_rows=64, has_fewer_rows=False)
    assert list(lowered(asked, training=[_timed(100)], convergence=[_curve(50)], models=[whole])) == []
    left_out = failed_row("without compile", "not measured: max_seconds = 60 did not suffice")
    less = model_row(validation_rows=8, has_fewer_rows=True)
    failed = ModelRow(model="train", model_bytes=5, error="out of memory")
    because = "max_seconds = 60 did not suffice for more"
    lines = lowered(
        asked, training=[_timed(15), left_out], convergence=[_curve(5), _curve(5)], models=[less, failed, whole]
    )
    assert list(lines) == [
        f"15 of 100 training steps timed: {because}",
        f"1 ways of training left out: {because}",
        f"5 of 50 steps of convergence: {because}",
        f"perplexity of 8 of 64 validation rows: {because}",
    ]
