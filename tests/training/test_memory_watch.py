import gc
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxflow.data.token_file import Rows
from mlxflow.device import memory_limit
from mlxflow.kernels import model_kernels
from mlxflow.messages.errors import WorkflowError
from mlxflow.training import build, memory_threshold
from mlxflow.training.batch_size import Decision
from mlxflow.training.checkpoints import CheckpointStore
from mlxflow.training.run_state import Result
from mlxflow.training.settings import AdapterShape, TrainingSettings
from mlxflow.training.trainer import Session
from tests.small_models import llama
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
    assert " and may use 1.0 kB. Lower train.batch_size" in str(caught.value)


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


def _train_adapters(folder: Path, limit: int, **changes: Any) -> tuple[Result, nn.Module]:
    """Train adapters of recomputed layers: a host far ahead holds twice as much as one that waits."""
    gc.collect()  # models of other tests
    shape = {"hidden_size": 96, "intermediate_size": 256, "num_heads": 3, "num_kv_heads": 1, "num_layers": 4}
    model, _ = llama(vocab_size=512, context_length=128, **shape, seed=0)
    nn.quantize(model, group_size=32, bits=4)
    settings = TrainingSettings(
        adapters=AdapterShape(
            method="lora", rank=8, scale=20.0, dropout=0.0, num_layers=0, keys=("self_attn.*", "mlp.*")
        ),
        batch_size=4,
        num_steps=10,
        warmup_steps=0,
        fused_loss=True,
        checkpoint_every=1,
        dynamic_batch_size=False,
        lazy_eval_every=1,
        eval_every=0,
        max_validation_rows=1,
        adjust_every=0,
        save_every=0,
    ).replace(**changes)
    build.prepare_model(model, settings, adapter_seed=0)
    subject = build.Subject(model, settings, 512, 128)
    tokens = np.random.default_rng(0).integers(0, 512, (16, 129)).astype(np.int32)
    rows = Rows(tokens, np.full(tokens.shape, 3, np.uint8))
    session = Session(CheckpointStore(folder, keep=1, settings={}, say=print), limit, lambda _: None)
    before = mx.set_memory_limit(limit)  # as a stage does
    try:
        data = build.make_data(rows, rows.head(1), settings, seed=0)
        with build.ready_trainer(subject, model_kernels.no_kernels(), data, session) as trainer:
            result = trainer.run()
        assert mx.get_memory_limit() == limit
    finally:
        mx.set_memory_limit(before)
    return result, model


@pytest.mark.parametrize("adjust_every", [0, 3])
def test_the_peak_stays_within_the_limit_and_the_weights_are_the_same_to_the_bit(
    adjust_every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = _train_adapters(tmp_path, 1 << 40)
    limit = int(0.75 * plain.peak_memory_bytes)
    limited, same = _train_adapters(tmp_path, limit, adjust_every=adjust_every)
    assert limited.peak_memory_bytes <= limit == limited.memory_limit_bytes
    assert bytes_of(same) == bytes_of(model)
    monkeypatch.setattr(memory_threshold, "_FIRST_SHARE", 1.0)
    monkeypatch.setattr(memory_threshold.MemoryThreshold, "learn", lambda *_: None)
    by_mlx, _ = _train_adapters(tmp_path, limit)
    assert by_mlx.peak_memory_bytes > limit  # with the limit itself as the threshold


def test_a_limit_that_cannot_be_kept_does_not_end_a_training_that_reads_no_memory() -> None:
    _, _, expected = train_small(adjust_every=0)
    result, _, found = train_small(adjust_every=0, limit=1000)
    assert result.peak_memory_bytes > result.memory_limit_bytes == 1000
    assert found == expected


def test_what_is_allowed_in_a_validation_is_the_limit_and_not_the_threshold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a pass of a validation follow from it, and sums from them."""
    seen: list[tuple[int, int]] = []

    def looking() -> str:
        seen.append((memory_limit.allowed_bytes(), mx.get_memory_limit()))
        return "cpu"

    monkeypatch.setattr("mlxflow.evaluation.slices._device", looking)
    _train_adapters(tmp_path, 1 << 30, num_steps=1)
    assert seen
    assert all(allowed == 1 << 30 > threshold for allowed, threshold in seen)
