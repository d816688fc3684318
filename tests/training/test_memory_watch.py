from typing import Any

import mlx.core as mx
import pytest

from mlxflow.messages.errors import WorkflowError
from mlxflow.training.batch_size import Decision
from tests.training.small_training import (
    Records,
    bytes_of,
    make_trainer,
    records_of,
    small_model,
    train_small,
)


def test_a_batch_that_cannot_fit_is_an_error_with_needed_and_allowed_bytes() -> None:
    with pytest.raises(WorkflowError) as caught:
        train_small(limit=1000, num_steps=30)
    assert str(caught.value).startswith("train.batch_size: forward passes of 4 rows, the fewest, need ")
    assert " bytes and may use 1,000. Lower train.batch_size" in str(caught.value)


def test_a_step_out_of_memory_is_retried_with_fewer_rows() -> None:
    """The error is made here: MLX's GPU backends raise it, its CPU backend ends by a segmentation fault instead."""
    records: Records = []
    model = small_model()
    trainer = make_trainer(records.append, model=model, num_steps=3, adjust_every=0)
    compute = trainer._step.add
    failed: list[int] = []

    def add(so_far: Any, *batch: mx.array) -> Any:
        gradients = compute(so_far, *batch)
        if not failed and trainer._facts.step == 1 and so_far is not None:  # in the middle of an update
            failed.append(len(batch[0]))
            raise RuntimeError("[malloc] Unable to allocate 12345 bytes.")
        return gradients

    trainer._step.add = add  # type: ignore[method-assign]
    trainer.run()
    out = [one for one in records_of(records, "batch_size") if one["reason"] == "out of memory"]
    assert [(one["step"], one["batch_size"]) for one in out] == [(1, 6)]
    decisions = [Decision(**{key: one[key] for key in Decision._fields}) for one in records_of(records, "batch_size")]
    again = small_model()
    train_small(model=again, num_steps=3, adjust_every=0, replay=decisions)
    assert bytes_of(again) == bytes_of(model)
