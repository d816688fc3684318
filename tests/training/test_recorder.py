import time
from pathlib import Path

import pytest

from mlxflow.training.batch_size import BatchSizes
from mlxflow.training.recorder import Recorder
from mlxflow.training.run_state import RunState
from mlxflow.training.settings import SettingNames, TrainingSettings
from mlxflow.training.trainer import Stopped
from tests.training.small_training import (
    checkpoint_store,
    make_trainer,
    records_of,
    train_small,
)


def test_a_training_record_has_every_figure() -> None:
    _, records, _ = train_small(learning_rate=0.25)
    record = records_of(records, "train")[0]
    assert record["learning_rate"] == 0.25
    assert record["batch_size"] == 16
    assert record["skipped_steps"] == 0
    seconds = {"seconds", "data_wait_seconds", "device_wait_seconds", "compile_seconds"}
    memory = {"active_memory_bytes", "cache_memory_bytes", "peak_memory_bytes"}
    others = {"kind", "step", "loss", "gradient_norm", "tokens", "tokens_per_second"}
    assert record.keys() == seconds | memory | others | {"learning_rate", "batch_size", "skipped_steps"}
    assert record["seconds"] >= record["compile_seconds"] > 0


def test_a_checkpoint_has_the_seconds_of_training_until_then_without_the_block_in_which_it_is_saved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    state, settings = RunState(), TrainingSettings(warmup_steps=0)
    recorder = Recorder(state, BatchSizes(settings, names=SettingNames("train", "", "")), lambda _: None)
    now = 5.0
    with recorder.paused():  # a validation
        now = 8.0
        with recorder.paused():  # a checkpoint, since a signal arrived
            assert state.seconds == 5.0
            now = 9.0
    now = 11.0
    recorder.train(1, 0.0, 0.0)
    assert state.seconds == 7.0


def test_a_run_that_was_stopped_between_records_has_the_seconds_of_all_its_steps(tmp_path: Path) -> None:
    store, asked = checkpoint_store(tmp_path), iter([*[False] * 6, *[True] * 100])
    with pytest.raises(Stopped) as stopped:
        make_trainer(lambda _: None, store=store, asked=lambda: next(asked), log_every=100).run()
    assert 0 < stopped.value.step < 6
    checkpoint = store.latest()
    assert checkpoint is not None
    before = dict(checkpoint.facts)
    assert before["seconds"] >= before["compile_seconds"] > 0
    result = make_trainer(lambda _: None, store=store, log_every=100).run(checkpoint)
    assert result.seconds > before["seconds"]
    assert result.seconds >= result.compile_seconds > before["compile_seconds"]
