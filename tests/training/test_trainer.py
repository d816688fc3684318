import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxflow.messages.errors import StageError
from mlxflow.training.accumulation import Accumulator
from mlxflow.training.batch_size import Decision
from mlxflow.training.gradient_packing import Gradients
from mlxflow.training.step import Outcome, Step
from mlxflow.training.trainer import Stopped
from tests.late_device import LateDevice
from tests.training.small_training import (
    Records,
    bytes_of,
    checkpoint_store,
    make_trainer,
    padded_rows,
    records_of,
    small_model,
    small_rows,
    train_small,
)

# --- steps and records


def test_every_target_of_every_row_is_counted_once() -> None:
    result, records, _ = train_small(num_steps=5)  # 80 rows: two epochs
    assert result.tokens == 2 * _rows_targets()
    assert [record["step"] for record in records_of(records, "train")] == [2, 4, 5]


def test_steps_are_announced_where_the_host_waits_for_the_device() -> None:
    steps: list[int] = []
    trainer = make_trainer(lambda record: None, log_every=100, lazy_eval_every=2)
    trainer._session = trainer._session._replace(on_step=steps.append)
    trainer.run()
    assert steps == [1, 2, 4, 6]


def _rows_targets() -> int:
    return int((small_rows().marks[:, 1:] & 1).sum())


@pytest.mark.parametrize(
    "change", [{"eval_every": 1}, {"log_every": 1}, {"lazy_eval_every": 1}, {"lazy_eval_every": 5}, {"save_every": 1}]
)
def test_logging_and_validation_change_no_byte_of_the_weights(tmp_path: Path, change: dict[str, int]) -> None:
    _, _, usual = train_small()
    _, _, changed = train_small(store=checkpoint_store(tmp_path), **change)
    assert changed == usual


def test_with_equal_rows_per_update_the_batch_size_changes_only_rounding() -> None:
    """SGD, whose weights move in proportion to the gradient; AdamW divides a rounding of almost nothing by itself."""
    steps, rate, rows = 6, 1e-2, small_rows()
    trained = []
    for decisions in ([Decision(0, 16, "begin", {})], [Decision(0, 8, "begin", {}), Decision(2, 4, "shrink", {})]):
        model = small_model()
        train_small(model=model, replay=decisions, optimizer=optim.SGD(rate), rows=rows, num_steps=steps)
        trained.append(dict(tree_flatten(model.parameters())))
    # A sum of N fp32 numbers is off by N eps of their norm at most, the gradient's norm is clipped to 1, and each step
    # also rounds the weight: steps * eps * (rate * N + |weight|), for each of the two runs.
    eps, additions = float(np.finfo(np.float32).eps), 16 * (rows.tokens.shape[1] - 1)
    for name, value in trained[0].items():
        most = 2 * steps * eps * (rate * additions + float(mx.abs(value).max()))
        assert mx.allclose(value, trained[1][name], rtol=0, atol=most), name


# --- the batch size follows the memory


def test_a_batch_size_that_grows_and_shrinks_is_replayed_on_resuming(tmp_path: Path) -> None:
    held: list[mx.array] = []

    def log(record: dict[str, Any]) -> None:
        records.append(record)
        if record.get("step") == 2 and record["kind"] == "train":
            held.append(mx.zeros((260_000_000,), mx.uint8))  # a real allocation, of over 0.8 of the limit with the rest
            mx.eval(held)

    records: Records = []
    model = small_model()
    make_trainer(log, model=model, limit=300_000_000, log_every=1, lazy_eval_every=1).run()
    held.clear()
    decisions = [Decision(**{key: one[key] for key in Decision._fields}) for one in records_of(records, "batch_size")]
    assert [(one.batch_size, one.reason) for one in decisions[:2]] == [(8, "begin"), (12, "grow")]
    shrunk = next(one for one in decisions if one.reason == "shrink")
    assert shrunk.reading["active_bytes"] > 260_000_000
    assert shrunk.reading["peak_bytes"] / shrunk.reading["limit_bytes"] > 0.8
    again = small_model()
    _, followed, _ = train_small(model=again, replay=decisions)
    assert [one["batch_size"] for one in records_of(followed, "batch_size")] == [one.batch_size for one in decisions]
    assert bytes_of(again) == bytes_of(model)


def test_rows_per_update_follow_the_batch_size_if_configured(tmp_path: Path) -> None:
    result, records, _ = train_small(constant=False, num_steps=2)
    assert [one["batch_size"] for one in records_of(records, "batch_size")] == [8, 12, 16]
    assert result.tokens > train_small(num_steps=2)[0].tokens


# --- what goes wrong


def test_steps_without_a_finite_loss_are_skipped_and_then_end_training() -> None:
    with pytest.raises(StageError) as caught:
        train_small(learning_rate=lambda step: mx.where(step < 1, 1e38, 1e-3), num_steps=30)
    said = str(caught.value)
    assert said.startswith("train: 3 steps in a row had no finite loss and gradient, the last being step 4 (loss ")
    assert said.endswith(" with learning rate 0.001. Lower train.learning_rate.")


# --- out of memory on Metal: the error is raised later


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4, 5, 6])
def test_a_lost_update_ends_training_and_is_never_taken_for_a_batch_that_is_too_large(
    fails_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights hold anything: a smaller batch would train on with them."""
    device, update, store = LateDevice(monkeypatch), Step.update, checkpoint_store(tmp_path)
    done: list[int] = []

    def lose(step: Step, gradients: Gradients) -> Outcome:
        outcome = update(step, gradients)
        done.append(1)
        device.calls_left = 2 if len(done) == fails_at else 0  # not yet where it is sent
        return outcome

    monkeypatch.setattr(Step, "update", lose)
    records: Records = []
    trainer = make_trainer(records.append, store=store, dynamic_batch_size=False, adjust_every=0, save_every=2)
    with pytest.raises(RuntimeError, match="Insufficient Memory"):
        trainer.run()
    assert len(device.raised_by) == 1
    assert [one["reason"] for one in records_of(records, "batch_size")] == ["begin"]
    checkpoint = store.latest()
    assert (0 if checkpoint is None else checkpoint.facts["step"]) < fails_at


def test_a_forward_pass_of_a_new_shape_that_fails_late_is_repeated_with_fewer_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, compute = LateDevice(monkeypatch), Step.compute

    def fail_once(step: Step, tokens: mx.array, marks: mx.array) -> Gradients:
        gradients = compute(step, tokens, marks)
        device.calls_left = int(len(tokens) == 8)
        return gradients

    monkeypatch.setattr(Step, "compute", fail_once)
    result, records, _ = train_small(accum=1, num_steps=2, adjust_every=0)
    assert result.steps == 2
    decisions = [(one["batch_size"], one["reason"]) for one in records_of(records, "batch_size")]
    assert decisions == [(8, "begin"), (6, "out of memory")]
    assert device.raised_by == ["eval"]


def test_an_error_of_earlier_work_is_not_blamed_on_the_pass_that_meets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    device = LateDevice(monkeypatch)
    accumulator = make_trainer(lambda record: None, accum=1)._accumulator
    assert isinstance(accumulator, Accumulator)
    accumulator.take_batch()
    device.calls_left = 1
    with pytest.raises(RuntimeError, match="Insufficient Memory"):
        accumulator.accumulate(waits=False)
    accumulator._parts.batches.close()


# --- checkpoints


#: Rows with padding, which the steps after the first leave out
_PADDED = {"rows": padded_rows(), "adjust_every": 100}


@pytest.mark.parametrize(
    ("stop_at", "changes"), [*((number, {}) for number in range(1, 7)), *((number, _PADDED) for number in (1, 4, 5))]
)
def test_a_run_stopped_between_any_two_passes_resumes_to_the_same_bytes(
    tmp_path: Path, stop_at: int, changes: dict[str, Any]
) -> None:
    changes = {"eval_every": 2, "save_every": 2} | changes
    _, whole_records, whole = train_small(**changes)
    asked = iter([*[False] * (stop_at - 1), True, *[False] * 100])
    store = checkpoint_store(tmp_path)
    first: Records = []
    with pytest.raises(Stopped) as stopped:
        make_trainer(first.append, store=store, asked=lambda: next(asked), **changes).run()
    assert stopped.value.checkpoint.is_dir()
    model = small_model()
    mx.random.seed(99)
    checkpoint = store.latest()
    assert checkpoint is not None
    records: Records = [json.loads(line) for line in checkpoint.metrics.splitlines()]
    result = make_trainer(records.append, model=model, store=store, **changes).run(checkpoint)
    assert bytes_of(model) == whole
    assert result.steps == 6
    for kind, keys in (("validation", ["step", "loss"]), ("train", ["step", "loss", "tokens", "gradient_norm"])):
        told = [[record[key] for key in keys] for record in records_of(records, kind)]
        assert told == [[record[key] for key in keys] for record in records_of(whole_records, kind)]


@pytest.mark.parametrize(("step", "part"), [(2, 0), (2, 1), (6, 0), (6, 1), (6, 2)])
def test_a_run_stopped_in_a_validation_resumes_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, part: int
) -> None:
    """Part 2 is none: the signal arrives after the last forward pass of the last validation."""
    settings: dict[str, Any] = {"eval_every": 2, "batch_size": 4, "keep": "best"}
    whole_result, whole_records, whole = train_small(**settings, store=checkpoint_store(tmp_path / "whole"))
    store = checkpoint_store(tmp_path)
    first: Records = []
    num_asked = 0

    def asked() -> bool:  # within a validation, or at the end
        nonlocal num_asked
        num_asked += trainer._facts.step == step
        return num_asked > part

    trainer = make_trainer(first.append, store=store, asked=asked, **settings)
    monkeypatch.setattr(trainer._accumulator, "stop_requested", lambda: False)
    with pytest.raises(Stopped) as stopped:
        trainer.run()
    assert stopped.value.step == step
    assert (records_of(first, "validation")[-1]["step"] == step) == (part == 2)
    model = small_model()
    checkpoint = store.latest()
    assert checkpoint is not None
    records: Records = [json.loads(line) for line in checkpoint.metrics.splitlines()]
    result = make_trainer(records.append, model=model, store=store, **settings).run(checkpoint)
    assert bytes_of(model) == whole
    assert (result.best_step, result.validations_since_best) == (
        whole_result.best_step,
        whole_result.validations_since_best,
    )
    for kind, keys in (("validation", ["step", "loss"]), ("train", ["step", "loss", "tokens", "gradient_norm"])):
        told = [[record[key] for key in keys] for record in records_of(records, kind)]
        assert told == [[record[key] for key in keys] for record in records_of(whole_records, kind)]


@pytest.mark.parametrize("part", ["shards", "layers"])
def test_ranks_that_share_the_state_write_the_checkpoint_of_the_last_step_before_they_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    store = checkpoint_store(tmp_path)
    trainer = make_trainer(lambda record: None, store=store)
    trainer.run()
    assert store.latest() is None
    monkeypatch.setattr(Step, part, "parts of other ranks")
    folder = trainer._keep_last()()
    checkpoint = store.latest()
    assert checkpoint is not None
    assert (checkpoint.folder, checkpoint.facts["step"]) == (folder, 6)
