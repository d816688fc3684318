from typing import Any

import pytest

from mlxflow.benchmarking.targets import check_targets
from mlxflow.report.stage_reports.benchmark import PromiseFigures
from tests.benchmarking.report_rows import failed_row, model_row, training_row


def _kept(
    speedup: float = 2.0, low: float = 1.6, peak: int = 60, ratio: float = 6.0, share: float = 0.001
) -> dict[str, bool]:
    speedups: Any = {"workflow_speedup": speedup, "low_workflow_speedup": low, "high_workflow_speedup": speedup + 1}
    rows = [training_row(100, name="baseline", peak=100, **speedups), training_row(100 * speedup, peak=peak)]
    models = [model_row("train", compression_ratio_fp32=1.0), model_row("q4", compression_ratio_fp32=ratio)]
    return {name: promise.holds for name, promise in check_targets(rows, models, share, 8).items()}


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


def _sized(**models: tuple[float, float]) -> PromiseFigures:
    """Return the promise of size for models of so many times smaller, with bits per weight that were asked for."""
    rows = [
        model_row(name, compression_ratio_fp32=ratio, asked_bits_per_weight=bits, perplexity=9.0)
        for name, (ratio, bits) in models.items()
    ]
    return check_targets([], rows, None, 8)["model_size"]


def test_the_size_target_follows_from_the_bits_of_each_model() -> None:
    assert _sized(q8=(3.75, 8.5)).holds
    assert not _sized(q8=(3.0, 8.5)).holds, "its bits allow 3.8"
    assert not _sized(q4=(3.9, 4.5)).holds, "its bits allow 7.1, and four is the least"
    promise = _sized(q8=(3.75, 8.5), q4=(7.0, 4.5))
    assert promise.holds
    assert promise.measured == 7.0
    assert promise.figure == (
        "q8 3.8 times (its bits allow 3.8), 3.0 than the dense model, perplexity 9.00 ± 0.10; "
        "q4 7.0 times (its bits allow 7.1), 3.0 than the dense model, perplexity 9.00 ± 0.10"
    )


def test_rows_out_of_memory_meet_no_target() -> None:
    promises = check_targets([failed_row("baseline"), training_row(100, peak=10)], [], 0.0, 8)
    assert [name for name, promise in promises.items() if promise.holds] == ["data_wait"]
    assert promises["training_speed"].measured is None


def test_without_paired_rounds_the_speedup_is_the_ratio_of_the_speeds() -> None:
    rows = [training_row(100, name="baseline"), training_row(170)]
    promise = check_targets(rows, [], None, 8)["training_speed"]
    assert (promise.measured, promise.low, promise.high, promise.holds) == (1.7, 1.7, 1.7, True)


def test_an_increase_in_memory_is_reported_as_more() -> None:
    rows = [training_row(100, name="baseline", peak=100_000_000), training_row(100, peak=120_000_000)]
    figure = check_targets(rows, [], 0.0, 8)["training_memory"].figure
    assert figure == "20% more: 0.12 GB instead of 0.10 GB at 8 rows"
