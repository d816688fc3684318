from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxflow.data.loader import Loader
from mlxflow.data.token_file import Rows
from mlxflow.errors import StageError
from mlxflow.training.loop import Result, train


class Uniform(nn.Module):  # type: ignore[misc]
    """Gives every token the same probability."""

    def __call__(self, ids: mx.array) -> mx.array:
        return mx.zeros((*ids.shape, 8))


def _rows(count: int) -> Rows:
    """Return rows of five tokens, of which the last is not trained on."""
    return Rows(np.zeros((count, 5), np.uint8), np.tile(np.array([2, 3, 3, 3, 2], np.uint8), (count, 1)))


def _train(losses: list[float], **changes: int) -> tuple[Result, list[dict[str, Any]], list[int]]:
    records: list[dict[str, Any]] = []
    seen: list[int] = []
    remaining = iter(losses)
    settings = {"num_steps": len(losses), "log_every": 2, "eval_every": 0, **changes}

    def step(tokens: mx.array, marks: mx.array) -> tuple[mx.array, mx.array]:
        assert tokens.shape == marks.shape
        seen.append(len(tokens))
        return mx.array(next(remaining)), mx.array(1.0)

    with Loader(_rows(6), batch_size=2, seed=0, workers=2, prefetch_batches=2) as loader:
        result = train(
            model=Uniform(),
            step=step,
            state=[],
            loader=loader,
            validation_rows=_rows(3),
            eval_batch_size=2,
            masks_documents=False,
            learning_rate=lambda: mx.array(0.25),
            log=records.append,
            num_steps=settings["num_steps"],
            log_every=settings["log_every"],
            eval_every=settings["eval_every"],
        )
    return result, records, seen


def test_each_step_takes_one_batch_and_every_real_token_is_counted() -> None:
    result, _, seen = _train([1.0] * 5)
    assert seen == [2] * 5
    assert result.tokens == 5 * 2 * 3


def test_records_come_every_few_steps_and_after_the_last() -> None:
    _, records, _ = _train([1.0, 2.0, 3.0, 4.0, 5.0])
    trained = [(r["step"], r["loss"]) for r in records if r["kind"] == "train"]
    assert trained == [(2, 2.0), (4, 4.0), (5, 5.0)]
    keys = {"kind", "step", "loss", "gradient_norm", "learning_rate", "tokens", "tokens_per_second", "seconds"}
    keys |= {"data_wait_seconds"}
    assert keys | {"active_memory_bytes", "peak_memory_bytes"} == records[1].keys()
    assert records[1]["learning_rate"] == 0.25


@pytest.mark.parametrize(("eval_every", "expected"), [(0, [0, 5]), (2, [0, 2, 4, 5]), (5, [0, 5])])
def test_validation_comes_first_last_and_when_asked(eval_every: int, expected: list[int]) -> None:
    result, records, _ = _train([1.0] * 5, eval_every=eval_every)
    measured = [r for r in records if r["kind"] == "validation"]
    assert [r["step"] for r in measured] == expected
    assert all(r["perplexity"] == pytest.approx(8) for r in measured)
    assert result.first_validation_loss == pytest.approx(np.log(8))


@pytest.mark.parametrize(("bad", "said"), [(float("nan"), "nan"), (float("inf"), "inf")])
def test_a_loss_that_is_not_finite_ends_training_with_the_step_and_the_rate(bad: float, said: str) -> None:
    with pytest.raises(StageError) as caught:
        _train([1.0, 1.0, 1.0, bad])
    assert str(caught.value) == (
        f"train: the loss is {said} at step 4 with learning rate 0.25. "
        "Lower train.learning_rate or train.max_grad_norm."
    )
