"""Warnings about a training run: each has its threshold, its key and its advice."""

import pytest

from mlxflow.training.figures import TrainingFigures
from mlxflow.training.run_warnings import Ending, RunOutline, before

OUTLINE = RunOutline(
    length_key="num_steps",
    length=30,
    num_epochs=4.0,
    num_rows=60,
    tokens=1000,
    trained_weights=100_000,
    is_adapter=False,
    validation_rows=20,
    max_validation_rows=256,
    tokens_table="pretokenize",
)

BEFORE = [
    ({}, []),
    ({"trained_weights": None}, []),
    (
        {"num_epochs": 33.3},
        [
            "train.num_steps = 30: 33.3 epochs of 60 rows, more than 4: the model learns the text by heart. Lower it, "
            'add text to pretokenize.sources, or set keep = "best" and patience.'
        ],
    ),
    (
        {"trained_weights": 100_001},
        [
            "train.model: 100,001 trained weights for 1,000 tokens, more than 100 for each. Train a smaller one or add "
            "text to pretokenize.sources."
        ],
    ),
    (
        {"trained_weights": 100_001, "is_adapter": True},
        [
            "train.lora.rank: 100,001 trained weights for 1,000 tokens, more than 100 for each. Lower it or add text "
            "to pretokenize.sources."
        ],
    ),
    (
        {"validation_rows": 19},
        [
            "pretokenize.holdout: 19 validation rows, fewer than 20: their loss is mostly chance. Raise it, add text, "
            "or name validation_sources."
        ],
    ),
    (
        {"max_validation_rows": 8},
        ["train.max_validation_rows = 8: 8 validation rows, fewer than 20: their loss is mostly chance. Raise it."],
    ),
]


@pytest.mark.parametrize(("changes", "lines"), BEFORE)
def test_warnings_before_the_first_step(changes: dict[str, object], lines: list[str]) -> None:
    assert [one.line for one in before(OUTLINE._replace(**changes), task="train")] == lines  # type: ignore[arg-type]


def _ending(first: float, published: float, best: float, *, keep: str = "last", rises: int = 0) -> Ending:
    figures = TrainingFigures(
        steps=30,
        tokens=1000,
        skipped_steps=0,
        first_validation_perplexity=first,
        trained_validation_perplexity=published,
        best_validation_perplexity=best,
        best_validation_step=10,
    )
    return Ending(figures, published, keep, 0, rises)


AFTER = [
    (_ending(9.0, 5.0, 5.0), []),
    (_ending(9.0, 5.004, 5.0), []),  # within the rounding of a measurement
    (_ending(9.0, 9.0, 9.0, keep="best"), []),
    (
        _ending(3086.0, 19648.0, 3086.0),
        [
            'train.keep = "last": the published weights are worse than the start: perplexity 3,086 before training, '
            '19,648 after. Set keep = "best", with a lower eval_every, or lower learning_rate or the epochs.'
        ],
    ),
    (
        _ending(9.0, float("nan"), 9.0, keep="best"),
        [
            'train.keep = "best": the published weights are worse than the start: perplexity 9 before training, nan '
            "after. Lower learning_rate or the epochs."
        ],
    ),
    (
        _ending(9.0, 8.0, 5.0, rises=3),
        [
            "train.patience = 0: the last 3 validations were all worse than that of step 10. Set patience = 3, which "
            "ends such a run.",
            'train.keep = "last": the published weights are worse than the best: perplexity 8, and 5 after step 10. '
            'Set keep = "best".',
        ],
    ),
]


@pytest.mark.parametrize(("ending", "lines"), AFTER)
def test_warnings_about_the_written_model(ending: Ending, lines: list[str]) -> None:
    assert [one.line for one in ending.warnings("train")] == lines


@pytest.mark.parametrize("published", [9.0, 10.0, float("nan")])
def test_what_is_no_improvement_is_refused(published: float) -> None:
    assert _ending(9.0, 8.999, 8.0).is_improvement
    assert not _ending(9.0, published, 9.0).is_improvement
    assert _ending(9.0, published, 9.0).refusal("train") == (
        f"train.require_improvement = true: perplexity 9 before training and {published:.4g} after, nothing is "
        'published. Lower train.learning_rate or the epochs, or set train.keep = "best".'
    )
