from typing import Any

from mlxflow.benchmarking.report_comparison import (
    RepeatedRows,
    compare_reports,
    markdown_of_differences,
    markdown_of_report,
    regressions,
)
from mlxflow.report.stage_reports.benchmark_rows import ModelRow, TrainingRow
from tests.benchmarking.report_rows import failed_row, model_row, training_row


def _training(speed: float, **figures: Any) -> RepeatedRows:
    return _rows(training_row(speed, **figures))


def _rows(*rows: TrainingRow | ModelRow) -> RepeatedRows:
    return RepeatedRows(
        tuple(row for row in rows if isinstance(row, TrainingRow)),
        tuple(row for row in rows if isinstance(row, ModelRow)),
    )


def _verdicts(before: RepeatedRows, after: RepeatedRows) -> dict[str, str]:
    return {one.figure: one.verdict for one in compare_reports(before, after)}


def test_overlapping_intervals_are_noise_and_others_better_or_worse() -> None:
    before = _training(100)
    assert _verdicts(before, _training(103))["tokens_per_second"] == "noise"
    assert _verdicts(before, _training(110))["tokens_per_second"] == "better"
    assert _verdicts(before, _training(90))["tokens_per_second"] == "worse"
    assert _verdicts(before, _training(90, spread=0.2))["tokens_per_second"] == "noise"


def test_more_memory_bytes_and_perplexity_are_worse() -> None:
    before = _rows(training_row(100), model_row(perplexity=20))
    after = _rows(training_row(100, peak=1200), model_row(perplexity=21, model_bytes=501))
    assert _verdicts(before, after) == {
        "tokens_per_second": "noise",
        "peak_memory_bytes": "noise",  # that of the model comes last
        "decode_tokens_per_second": "noise",
        "prefill of 16": "noise",
        "model_bytes": "worse",
        "perplexity": "worse",
    }
    assert [one.verdict for one in compare_reports(before, after) if one.figure == "peak_memory_bytes"] == [
        "worse",
        "noise",
    ]


def test_a_speed_relative_to_the_fixed_work_is_compared_where_both_reports_have_it() -> None:
    def relative(speed: float, machine_seconds: float) -> RepeatedRows:
        interval = {f"{end}_relative_tokens_per_second": speed * machine_seconds for end in ("low", "high")}
        return _training(speed, machine_seconds=machine_seconds, **interval)

    before = relative(100, 0.01)
    assert _verdicts(before, relative(50, 0.02))["tokens_per_second"] == "noise"  # the machine is half as fast
    assert _verdicts(before, relative(50, 0.01))["tokens_per_second"] == "worse"
    assert _verdicts(before, _training(50))["tokens_per_second"] == "worse"


def test_a_regression_exceeds_the_allowed_change() -> None:
    found = compare_reports(_training(100), _training(92))
    assert [one.figure for one in regressions(found, 0.05)] == ["tokens_per_second"]
    assert regressions(found, 0.1) == []
    noisy = compare_reports(_training(100), _training(70, spread=0.5))
    assert regressions(noisy, 0.05) == []


def test_rows_of_one_report_only_and_rows_out_of_memory_are_left_out() -> None:
    before = _rows(training_row(100), training_row(50, name="baseline"))
    after = _rows(training_row(100), failed_row("baseline"), training_row(70, name="without compile"))
    assert {one.what for one in compare_reports(before, after)} == {"workflow, 8 rows"}


def test_markdown_tables_escape_names() -> None:
    failed = failed_row("baseline", "does not fit: needs 5 bytes")
    broken = ModelRow(model="train", model_bytes=5, error="out of memory")
    row = training_row(50, name="without compile", workflow_speedup=2.0, verdict="noise")
    timed = training_row(
        100, name="without bf16", workflow_speedup=2, low_workflow_speedup=1, high_workflow_speedup=3, verdict="noise"
    )
    text = markdown_of_report(_rows(timed, row, failed, model_row("quantize:a|b"), broken))
    assert text.splitlines()[2:5] == [
        "| without bf16 | 8 | 100 | 98 to 102 | 100 | 1.0 kB | 0.0% | 2.00 times as fast (noise) |",
        "| without compile | 8 | 50 | 49 to 51 | 50 | 1.0 kB | 0.0% |  |",
        "| baseline | 8 | does not fit: needs 5 bytes | | | | | |",
    ]
    assert text.splitlines()[8:] == [
        "| quantize:a\\|b | 500 bytes | 6.0 times | 3.0 times | 10 | 20.00 ± 0.10 |",
        "| train | out of memory | | | | |",
    ]
    differences = compare_reports(_training(100), _training(90))
    assert markdown_of_differences(differences).splitlines()[2] == (
        "| workflow, 8 rows | tokens_per_second | 100 | 90 | -10.0% | worse |"
    )
