"""Rows of a benchmark's report: all figures, or why there are none."""

from typing import Any

import pytest

from mlxflow.report.stage_reports.benchmark_rows import ModelRow, TrainingRow


def test_a_row_without_figures_says_why() -> None:
    assert TrainingRow(name="workflow", batch_size=2, error="out of memory").error == "out of memory"
    with pytest.raises(ValueError, match=r"^expected `num_steps` or `error`$"):
        TrainingRow(name="workflow", batch_size=2)
    with pytest.raises(ValueError, match=r"^expected `decode_tokens_per_second` or `error`$"):
        ModelRow(model="train", model_bytes=10)


def test_a_perplexity_has_a_standard_error() -> None:
    speeds: Any = {f"{end}decode_tokens_per_second": 10.0 for end in ("", "low_", "high_")}
    assert ModelRow(model="train", perplexity=3.0, perplexity_standard_error=0.1, **speeds).perplexity == 3.0
    with pytest.raises(ValueError, match=r"^`perplexity` without `perplexity_standard_error`$"):
        ModelRow(model="train", perplexity=3.0, **speeds)
