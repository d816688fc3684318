"""Comparison with a baseline: what is measured again, when it is an error, and what the report holds."""

from collections.abc import Callable, Set

import msgspec
import pytest

from mlxflow.benchmarking.baseline import REPETITIONS, compare_with_baseline
from mlxflow.benchmarking.report_comparison import HasRows
from mlxflow.messages.errors import StageError
from mlxflow.report.stage_reports.benchmark import BenchmarkReport, BottleneckFigures, ComparisonFigures, DeviceFacts
from tests.benchmarking.report_rows import model_row, training_row

_NAMES = ("baseline", "workflow")


def _report(speed: float, *, device: str = "One") -> BenchmarkReport:
    """Return a report in which training runs at this speed, without noise."""
    return BenchmarkReport(
        version=1,
        device=DeviceFacts(kind="cpu", name=device, processor="one"),
        training=tuple(training_row(speed, name=name, spread=0.0) for name in _NAMES),
        models=(model_row(),),
        bottleneck=BottleneckFigures(),
        promises={},
    )


class _Again:
    """Measures again, always the same, and notes what was asked for."""

    def __init__(self, report: BenchmarkReport) -> None:
        self.asked: list[set[str]] = []
        self._report = report

    def __call__(self, names: Set[str]) -> HasRows:
        self.asked.append({*names})
        return self._report


def _hold(
    before: BenchmarkReport,
    after: BenchmarkReport,
    again: Callable[[Set[str]], HasRows],
    *,
    max_regression: float = 0.05,
) -> ComparisonFigures:
    return compare_with_baseline(
        before, after, again, name="before.toml", max_regression=max_regression, task="benchmark"
    )


def test_a_regression_that_every_repetition_confirms_fails_the_stage() -> None:
    again = _Again(_report(50))
    with pytest.raises(StageError) as raised:
        _hold(_report(100), _report(50), again)
    assert again.asked == [{"baseline, 8 rows", "workflow, 8 rows"}] * REPETITIONS, "no more than so often"
    assert str(raised.value).splitlines() == [
        "benchmark: worse than before.toml beyond the noise and benchmark.max_regression = 0.05, in 4 runs:",
        "baseline, 8 rows: tokens_per_second -50.0% (100 -> 50)",
        "workflow, 8 rows: tokens_per_second -50.0% (100 -> 50)",
    ]


@pytest.mark.parametrize(
    ("after", "max_regression"),
    [pytest.param(200, 0.05, id="faster"), pytest.param(50, 0.6, id="within what is allowed")],
)
def test_no_regression_is_not_measured_again(after: float, max_regression: float) -> None:
    again = _Again(_report(after))
    found = _hold(_report(100), _report(after), again, max_regression=max_regression)
    assert found == ComparisonFigures(
        baseline="before.toml", compared=True, figures=9, repetitions=0, noise_between_runs=()
    )
    assert not again.asked


def test_a_regression_that_a_repetition_does_not_confirm_is_noise_between_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    again = _Again(_report(100))
    found = _hold(_report(100), _report(50), again)
    assert len(again.asked) == found.repetitions == 1
    assert found.noise_between_runs == tuple(
        f"{name}, 8 rows: tokens_per_second -50.0%, which was not there again" for name in _NAMES
    )
    assert capsys.readouterr().err.splitlines() == [
        "benchmark: 2 figures look worse and are measured again",
        *(f"benchmark: {line}: noise between runs" for line in found.noise_between_runs),
    ]


def test_a_larger_model_is_worse_without_being_measured_again() -> None:
    before = _report(100)
    after = msgspec.structs.replace(before, models=(model_row(model_bytes=600),))
    again = _Again(before)
    with pytest.raises(StageError, match=r"in 1 runs:\nquantize:q4: model_bytes \+20.0% \(500 -> 600\)$"):
        _hold(before, after, again)
    assert not again.asked


def test_a_baseline_of_another_device_is_reported_and_not_compared(capsys: pytest.CaptureFixture[str]) -> None:
    again = _Again(_report(1))
    found = _hold(_report(900, device="Another"), _report(100), again)
    assert found == ComparisonFigures(baseline="before.toml", compared=False)
    assert not again.asked
    assert capsys.readouterr().err == (
        'benchmark.baseline = "before.toml": not compared, it was measured on Another, this on One. '
        "mlxflow compare --force compares them.\n"
    )
