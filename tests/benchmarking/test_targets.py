from typing import Any

import pytest

from mlxflow.benchmarking.targets import keep_promises


def _row(name: str, rate: float, peak: int) -> dict[str, Any]:
    return {"name": name, "batch_size": 8, "tokens_per_second": rate, "peak_memory_bytes": peak}


def _kept(speedup: float = 2.0, low: float = 1.6, peak: int = 60, ratio: float = 6.0, share: float = 0.001) -> Any:
    baseline = _row("baseline", 100, 100) | {
        "workflow_speedup": speedup,
        "low_workflow_speedup": low,
        "high_workflow_speedup": speedup + 1,
    }
    model = {"model": "q4", "compression_ratio_fp32": ratio, "perplexity": 9.0, "perplexity_standard_error": 0.5}
    dense = model | {"model": "train", "compression_ratio_fp32": 1.0}
    rows = [baseline, _row("workflow", 100 * speedup, peak)]
    return {name: told["holds"] for name, told in keep_promises(rows, [dense, model], share, 8).items()}


def test_every_target_is_checked_by_its_own_figure() -> None:
    assert all(_kept().values())


@pytest.mark.parametrize(
    ("broken", "name"),
    [
        ({"speedup": 1.6, "low": 1.4}, "training_speed"),  # not sure enough
        ({"peak": 75}, "training_memory"),
        ({"ratio": 3.5}, "model_size"),
        ({"share": 0.1}, "data_wait"),
    ],
)
def test_a_missed_target_is_reported_and_the_others_are_met(broken: dict[str, Any], name: str) -> None:
    assert [one for one, holds in _kept(**broken).items() if not holds] == [name]


def _sized(**models: tuple[float, float]) -> dict[str, Any]:
    """Return the promise of size for models of so many times smaller, with bits a weight that were asked for."""
    rows = [
        {"model": name, "compression_ratio_fp32": ratio, "asked_bits_per_weight": bits}
        | {"perplexity": 9.0, "perplexity_standard_error": 0.5}
        for name, (ratio, bits) in models.items()
    ]
    told: dict[str, Any] = keep_promises([], rows, None, 8)["model_size"]
    return told


def test_the_size_target_follows_from_the_bits_of_each_model() -> None:
    assert _sized(q8=(3.75, 8.5))["holds"]
    assert not _sized(q8=(3.0, 8.5))["holds"], "its bits allow 3.8"
    assert not _sized(q4=(3.9, 4.5))["holds"], "its bits allow 7.1, and four is the least"
    told = _sized(q8=(3.75, 8.5), q4=(7.0, 4.5))
    assert told["holds"]
    assert told["figure"] == (
        "q8 3.8 times (its bits allow 3.8), perplexity 9.00 ± 0.50; q4 7.0 times (its bits allow 7.1), "
        "perplexity 9.00 ± 0.50"
    )


def test_rows_out_of_memory_meet_no_target() -> None:
    rows = [{"name": "baseline", "batch_size": 8, "error": "does not fit"}, _row("workflow", 100, 10)]
    told = keep_promises(rows, [], 0.0, 8)
    assert [one for one in told if told[one]["holds"]] == ["data_wait"]
    assert "measured" not in told["training_speed"]


def test_an_increase_in_memory_is_reported_as_more() -> None:
    rows = [_row("baseline", 100, 100), _row("workflow", 100, 120)]
    assert keep_promises(rows, [], 0.0, 8)["training_memory"]["figure"].startswith("20% more: 120 bytes instead of")
