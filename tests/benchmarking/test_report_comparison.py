from typing import Any

from mlxflow.benchmarking.report_comparison import (
    compare_reports,
    markdown_of_differences,
    markdown_of_report,
    regressions,
)


def _training(rate: float, *, name: str = "workflow", spread: float = 0.02, peak: int = 1000) -> dict[str, Any]:
    low, high = rate * (1 - spread), rate * (1 + spread)
    return {
        "name": name,
        "batch_size": 8,
        "tokens_per_second": rate,
        "low_tokens_per_second": low,
        "high_tokens_per_second": high,
        "peak_memory_bytes": peak,
        "data_wait_share": 0.0,
    }


def _model(perplexity: float, error: float = 0.1, size: int = 500) -> dict[str, Any]:
    rate = {"tokens_per_second": 10.0, "low_tokens_per_second": 9.0, "high_tokens_per_second": 11.0}
    return {
        "model": "quantize:q4",
        "model_bytes": size,
        "compression_ratio_fp32": 6.0,
        "compression_ratio": 3.0,
        "prefill": [{"prompt_tokens": 16, **rate}],
        **{name.replace("tokens", "decode_tokens", 1): value for name, value in rate.items()},
        "peak_memory_bytes": 2000,
        "perplexity": perplexity,
        "perplexity_standard_error": error,
    }


def _verdicts(before: dict[str, Any], after: dict[str, Any]) -> dict[str, str]:
    return {one.figure: one.verdict for one in compare_reports(before, after)}


def test_overlapping_intervals_are_noise_and_others_better_or_worse() -> None:
    before = {"training": [_training(100)]}
    assert _verdicts(before, {"training": [_training(103)]})["tokens_per_second"] == "noise"
    assert _verdicts(before, {"training": [_training(110)]})["tokens_per_second"] == "better"
    assert _verdicts(before, {"training": [_training(90)]})["tokens_per_second"] == "worse"
    assert _verdicts(before, {"training": [_training(90, spread=0.2)]})["tokens_per_second"] == "noise"


def test_more_memory_bytes_and_perplexity_are_worse() -> None:
    before = {"training": [_training(100)], "models": [_model(20)]}
    after = {"training": [_training(100, peak=1200)], "models": [_model(21, size=501)]}
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


def test_a_regression_exceeds_the_allowed_change() -> None:
    found = compare_reports({"training": [_training(100)]}, {"training": [_training(92)]})
    assert [one.figure for one in regressions(found, 0.05)] == ["tokens_per_second"]
    assert regressions(found, 0.1) == []
    noisy = compare_reports({"training": [_training(100)]}, {"training": [_training(70, spread=0.5)]})
    assert regressions(noisy, 0.05) == []


def test_rows_of_one_report_only_and_rows_out_of_memory_are_left_out() -> None:
    failed = {"name": "baseline", "batch_size": 8, "error": "does not fit"}
    before = {"training": [_training(100), _training(50, name="baseline")]}
    after = {"training": [_training(100), failed, _training(70, name="without compile")]}
    assert {one.what for one in compare_reports(before, after)} == {"workflow, 8 rows"}


def test_markdown_tables_escape_names() -> None:
    row = _model(20.0) | {"model": "quantize:a|b"}
    failed = {"name": "baseline", "batch_size": 8, "error": "does not fit: needs 5 bytes"}
    text = markdown_of_report({"training": [_training(100), failed], "models": [row]})
    assert "| baseline | 8 | does not fit: needs 5 bytes | | | | | |" in text
    assert "| quantize:a\\|b | 0.00 | 6.0 times | 3.0 times | 10 | 20.00 ± 0.10 |" in text
    differences = compare_reports({"training": [_training(100)]}, {"training": [_training(90)]})
    assert markdown_of_differences(differences).splitlines()[2] == (
        "| workflow, 8 rows | tokens_per_second | 100 | 90 | -10.0% | worse |"
    )
