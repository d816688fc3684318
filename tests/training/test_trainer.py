import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxflow.data.token_file import Rows
from mlxflow.errors import StageError, WorkflowError
from mlxflow.storage import state_files
from mlxflow.training import build
from mlxflow.training.batch_size import BatchSizes, Decision
from mlxflow.training.checkpoints import CheckpointStore
from mlxflow.training.objective import plain_objective
from mlxflow.training.optimizers import Update
from mlxflow.training.run_state import Result
from mlxflow.training.settings import SettingNames, TrainingSettings
from mlxflow.training.step import Step
from mlxflow.training.stop_signals import heeding_signals
from mlxflow.training.trainer import Session, Stopped, Trainer
from tests.small_models import llama

GB = 10**9
Records = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def _room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give runs that are told of no store one that ends with the test."""
    monkeypatch.setitem(ROOM, "folder", tmp_path / "room")


ROOM: dict[str, Path] = {}


def _model() -> nn.Module:
    return llama()[0]


def _rows(count: int = 40, length: int = 9) -> Rows:
    """Return rows, each with another number of targets."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 50, (count, length)).astype(np.uint16)
    marks = np.where(np.arange(length) <= generator.integers(2, length, (count, 1)), 3, 2).astype(np.uint8)
    return Rows(tokens, marks)


def _trainer(
    log: Callable[[dict[str, Any]], None],
    *,
    model: nn.Module | None = None,
    rows: Rows | None = None,
    store: CheckpointStore | None = None,
    asked: Callable[[], bool] = lambda: False,
    replay: list[Decision] | None = None,
    learning_rate: float | Callable[[mx.array], mx.array] = 1e-2,
    accum: int = 2,
    constant: bool = True,
    batch_size: int = 8,
    limit: int = GB,
    optimizer: optim.Optimizer | None = None,
    **changes: Any,
) -> Trainer:
    model = model or _model()
    rows = rows or _rows()
    model.train()
    update = Update(model, optimizer or optim.AdamW(learning_rate), max_grad_norm=1.0, has_masters=False)
    settings = TrainingSettings(
        batch_size=batch_size,
        max_batch_size=2 * batch_size,
        grad_accum_steps=accum,
        constant_tokens_per_step=constant,
        num_steps=6,
        lazy_eval_every=2,
        log_every=2,
        eval_every=0,
        max_validation_rows=6,
        adjust_every=1,
        save_every=0,
        max_bad_steps=3,
        workers=2,
        prefetch_batches=2,
    ).replace(**changes)
    names = SettingNames("train", "pretokenize.context_length", "workflow.memory_limit")
    return Trainer(
        model,
        Step(model, update, plain_objective(masks_documents=False)),
        settings,
        sizes=BatchSizes(settings, replay=replay or (), names=names),
        data=build.make_data(rows, rows, settings, seed=0),
        session=Session(store or _store(ROOM["folder"]), limit, log, asked),
        names=names,
    )


def _run(**settings: Any) -> tuple[Result, Records, dict[str, bytes]]:
    records: Records = []
    model = settings.pop("model", None) or _model()
    result = _trainer(records.append, model=model, **settings).run()
    return result, records, _bytes(model)


def _bytes(model: nn.Module) -> dict[str, bytes]:
    return {name: np.array(value).tobytes() for name, value in tree_flatten(model.parameters())}


def _kinds(records: Records, kind: str) -> Records:
    return [record for record in records if record["kind"] == kind]


def _store(folder: Path, **settings: Any) -> CheckpointStore:
    return CheckpointStore(folder / "own", keep=2, settings=settings or {"train.num_steps": 6}, say=lambda line: None)


# --- steps and records


def test_every_target_of_every_row_is_counted_once() -> None:
    result, records, _ = _run(num_steps=5)  # 80 rows: two epochs
    assert result.tokens == 2 * _rows_targets()
    assert [record["step"] for record in _kinds(records, "train")] == [2, 4, 5]


def _rows_targets() -> int:
    return int((_rows().marks[:, 1:] & 1).sum())


def test_a_record_tells_the_whole_of_it() -> None:
    _, records, _ = _run(learning_rate=0.25)
    record = _kinds(records, "train")[0]
    assert record["learning_rate"] == 0.25
    assert record["batch_size"] == 16
    assert record["skipped_steps"] == 0
    seconds = {"seconds", "data_wait_seconds", "device_wait_seconds", "compile_seconds"}
    memory = {"active_memory_bytes", "cache_memory_bytes", "peak_memory_bytes"}
    others = {"kind", "step", "loss", "gradient_norm", "tokens", "tokens_per_second"}
    assert record.keys() == seconds | memory | others | {"learning_rate", "batch_size", "skipped_steps"}
    assert record["seconds"] >= record["compile_seconds"] > 0


@pytest.mark.parametrize(("eval_every", "expected"), [(0, [0, 6]), (2, [0, 2, 4, 6]), (6, [0, 6])])
def test_validation_comes_first_last_and_when_asked(eval_every: int, expected: list[int]) -> None:
    result, records, _ = _run(eval_every=eval_every)
    measured = _kinds(records, "validation")
    assert [record["step"] for record in measured] == expected
    assert result.first_validation_loss == measured[0]["loss"]
    assert result.last_validation_loss == measured[-1]["loss"]


@pytest.mark.parametrize(
    "change", [{"eval_every": 1}, {"log_every": 1}, {"lazy_eval_every": 1}, {"lazy_eval_every": 5}, {"save_every": 1}]
)
def test_what_only_looks_changes_no_byte(tmp_path: Path, change: dict[str, int]) -> None:
    _, _, usual = _run()
    _, _, changed = _run(store=_store(tmp_path), **change)
    assert changed == usual


def test_rows_per_update_being_the_same_the_batch_size_changes_nothing_but_rounding() -> None:
    """SGD, whose weights move in proportion to the gradient; AdamW divides a rounding of almost nothing by itself."""
    steps, rate, rows = 6, 1e-2, _rows()
    trained = []
    for decisions in ([Decision(0, 16, "begin", {})], [Decision(0, 8, "begin", {}), Decision(2, 4, "shrink", {})]):
        model = _model()
        _run(model=model, replay=decisions, optimizer=optim.SGD(rate), rows=rows, num_steps=steps)
        trained.append(dict(tree_flatten(model.parameters())))
    # A sum of N fp32 numbers is off by N eps of their norm at most, the gradient's norm is clipped to 1, and each step
    # also rounds the weight: steps * eps * (rate * N + |weight|), for each of the two runs.
    eps, additions = float(np.finfo(np.float32).eps), 16 * (rows.tokens.shape[1] - 1)
    for name, value in trained[0].items():
        most = 2 * steps * eps * (rate * additions + float(mx.abs(value).max()))
        assert mx.allclose(value, trained[1][name], rtol=0, atol=most), name


# --- the batch size follows the memory


def test_a_batch_grows_shrinks_and_is_followed_again(tmp_path: Path) -> None:
    held: list[mx.array] = []

    def log(record: dict[str, Any]) -> None:
        records.append(record)
        if record.get("step") == 2 and record["kind"] == "train":
            held.append(mx.zeros((260_000_000,), mx.uint8))  # a real allocation, of over 0.8 of the limit with the rest
            mx.eval(held)

    records: Records = []
    model = _model()
    _trainer(log, model=model, limit=300_000_000, log_every=1, lazy_eval_every=1).run()
    held.clear()
    decisions = [Decision(**{key: one[key] for key in Decision._fields}) for one in _kinds(records, "batch_size")]
    assert [(one.batch_size, one.reason) for one in decisions[:2]] == [(8, "begin"), (12, "grow")]
    shrunk = next(one for one in decisions if one.reason == "shrink")
    assert shrunk.reading["active_bytes"] > 260_000_000
    assert shrunk.reading["peak_bytes"] / shrunk.reading["limit_bytes"] > 0.8
    again = _model()
    _, followed, _ = _run(model=again, replay=decisions)
    assert [one["batch_size"] for one in _kinds(followed, "batch_size")] == [one.batch_size for one in decisions]
    assert _bytes(again) == _bytes(model)


def test_rows_per_update_follow_the_batch_where_they_are_to(tmp_path: Path) -> None:
    result, records, _ = _run(constant=False, num_steps=2)
    assert [one["batch_size"] for one in _kinds(records, "batch_size")] == [8, 12, 16]
    assert result.tokens > _run(num_steps=2)[0].tokens


def test_a_batch_that_cannot_fit_says_what_it_needs_and_has() -> None:
    with pytest.raises(WorkflowError) as caught:
        _run(limit=1000, num_steps=30)
    assert str(caught.value).startswith("train.batch_size: forward passes of 4 rows, the fewest, need ")
    assert " bytes and may use 1,000. Lower train.batch_size" in str(caught.value)


def test_a_step_that_runs_out_of_memory_is_tried_again_with_fewer_rows() -> None:
    """The error is made here: MLX's GPU backends raise it, its CPU backend ends by a segmentation fault instead."""
    records: Records = []
    model = _model()
    trainer = _trainer(records.append, model=model, num_steps=3, adjust_every=0)
    compute = trainer._step.add
    failed: list[int] = []

    def add(tokens: mx.array, marks: mx.array, so_far: Any) -> Any:
        gradients = compute(tokens, marks, so_far)
        if not failed and trainer._facts.step == 1 and so_far is not None:  # in the middle of an update
            failed.append(len(tokens))
            raise RuntimeError("[malloc] Unable to allocate 12345 bytes.")
        return gradients

    trainer._step.add = add  # type: ignore[method-assign]
    trainer.run()
    out = [one for one in _kinds(records, "batch_size") if one["reason"] == "out of memory"]
    assert [(one["step"], one["batch_size"]) for one in out] == [(1, 6)]
    decisions = [Decision(**{key: one[key] for key in Decision._fields}) for one in _kinds(records, "batch_size")]
    again = _model()
    _run(model=again, num_steps=3, adjust_every=0, replay=decisions)
    assert _bytes(again) == _bytes(model)


# --- what goes wrong


def test_steps_without_a_finite_loss_are_skipped_and_then_end_training() -> None:
    with pytest.raises(StageError) as caught:
        _run(learning_rate=lambda step: mx.where(step < 1, 1e38, 1e-3), num_steps=30)
    said = str(caught.value)
    assert said.startswith("train: 3 steps in a row had no finite loss and gradient, the last being step 4 (loss ")
    assert said.endswith(" with learning rate 0.001. Lower train.learning_rate.")


# --- checkpoints


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4, 5, 6])
def test_a_run_that_is_stopped_between_any_two_passes_goes_on_to_the_same_bytes(tmp_path: Path, stop_at: int) -> None:
    _, whole_records, whole = _run(eval_every=2, save_every=2)
    asked = iter([*[False] * (stop_at - 1), True, *[False] * 100])
    store = _store(tmp_path)
    first: Records = []
    with pytest.raises(Stopped) as stopped:
        _trainer(first.append, store=store, asked=lambda: next(asked), eval_every=2, save_every=2).run()
    assert stopped.value.checkpoint.is_dir()
    model = _model()
    mx.random.seed(99)
    checkpoint = store.latest()
    assert checkpoint is not None
    records: Records = [json.loads(line) for line in checkpoint.metrics.splitlines()]
    result = _trainer(records.append, model=model, store=store, eval_every=2, save_every=2).run(checkpoint)
    assert _bytes(model) == whole
    assert result.steps == 6
    for kind, keys in (("validation", ["step", "loss"]), ("train", ["step", "loss", "tokens", "gradient_norm"])):
        told = [[record[key] for key in keys] for record in _kinds(records, kind)]
        assert told == [[record[key] for key in keys] for record in _kinds(whole_records, kind)]


def test_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    _run(store=_store(tmp_path), save_every=1)
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == ["step-000004", "step-000005"]


def _flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    path.write_bytes(data)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _outdated(path: Path) -> None:
    path.write_text('{"settings": {}, "facts": {"step": 4}, "bytes": 1}')


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a flipped bit of the weights": ("state.safetensors", _flipped, "state.safetensors is not what was written"),
    "a flipped bit of the facts": ("state.json", _flipped, "state.json: its bytes do not fit its checksum"),
    "a flipped bit of the records": ("metrics.jsonl", _flipped, "metrics.jsonl is not what was written"),
    "a flipped bit of the best weights": (
        "../best-000004.safetensors",
        _flipped,
        "best-000004.safetensors is not what was written",
    ),
    "records cut off": ("metrics.jsonl", _cut, "metrics.jsonl is not what was written"),
    "facts cut off": ("state.json", _cut, "state.json: its bytes do not fit its checksum"),
    "facts without a checksum": ("state.json", _outdated, "state.json: it has no checksum"),
    "no records": ("metrics.jsonl", Path.unlink, "metrics.jsonl is missing"),
    "no best weights": ("../best-000004.safetensors", Path.unlink, "best-000004.safetensors is missing"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_told_by_name_and_the_one_before_it_is_taken(tmp_path: Path, case: str) -> None:
    store = _store(tmp_path)
    trainer = _trainer(lambda record: None, store=store, save_every=2, eval_every=2, keep="best")
    trainer.run()
    name, damage, reason = DAMAGE[case]
    damaged = tmp_path / "own" / "step-000004"
    damage(damaged / name)
    said: list[str] = []
    store = CheckpointStore(tmp_path / "own", keep=2, settings={"train.num_steps": 6}, say=said.append)
    found = store.latest(trainer.unfit)
    assert found is not None
    assert found.facts["step"] == 2
    assert said == [f"{damaged}: not a whole checkpoint ({reason}); it is not used. Remove it."]


MADE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a step that is text": (lambda facts: facts.update(step="4"), "step is no number"),
    "a step below zero": (lambda facts: facts.update(step=-1), "step is out of range"),
    "no loss": (lambda facts: facts.update(best_loss=None), "best_loss is no number"),
    "an end that is a number": (lambda facts: facts.update(ended_early=1), "ended_early is neither true nor false"),
    "a fact too many": (lambda facts: facts.update(more=1), "other facts than this version keeps"),
    "sizes that are a list": (
        lambda facts: facts.update(sizes=[]),
        "its batch sizes: Expected `object`, got `array`",
    ),
    "an update that was not cut short": (
        lambda facts: facts.update(rows_done=1),
        "partial.0 is missing",
    ),
}


@pytest.mark.parametrize("case", MADE)
def test_a_checkpoint_that_somebody_made_is_not_gone_on_from(tmp_path: Path, case: str) -> None:
    trainer = _trainer(lambda record: None, store=_store(tmp_path), save_every=4)
    trainer.run()
    change, reason = MADE[case]
    folder = tmp_path / "own" / "step-000004"
    kept = state_files.read(folder / "state.json")
    change(kept["facts"])
    (folder / "state.json").write_bytes(state_files.encode(kept))
    said: list[str] = []
    store = CheckpointStore(tmp_path / "own", keep=2, settings={"train.num_steps": 6}, say=said.append)
    assert store.latest(trainer.unfit) is None
    assert said == [f"{folder}: not a whole checkpoint ({reason}); it is not used. Remove it."]


def test_best_weights_that_are_damaged_while_training_runs_are_not_published(tmp_path: Path) -> None:
    store = _store(tmp_path)
    store.save_best(4, {"weight": mx.ones((8, 8))})
    path = tmp_path / "own" / "best-000004.safetensors"
    assert store.read_best(4)["weight"].shape == (8, 8)
    _flipped(path)
    with pytest.raises(StageError) as caught:
        store.read_best(4)
    expected = f"{path}: is not what was written. Run it again, which uses an earlier checkpoint."
    assert str(caught.value) == expected


def test_what_a_killed_run_was_writing_beside_its_checkpoints_is_removed(tmp_path: Path) -> None:
    store = _store(tmp_path)
    _run(store=store, save_every=4)
    (tmp_path / "own" / ".step-000005.partial").mkdir()
    (tmp_path / "own" / ".best-000004.safetensors.9999999999.tmp.safetensors").touch()
    assert store.latest() is not None
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["step-000004"]


def test_a_checkpoint_of_another_configuration_is_told_by_name_and_left_alone(tmp_path: Path) -> None:
    _run(store=_store(tmp_path), save_every=4)
    said: list[str] = []
    settings = {"train.num_steps": 7, "train.batch_size": 8}
    other = CheckpointStore(tmp_path / "other", keep=2, settings=settings, say=said.append)
    assert other.latest() is None
    assert said == [
        f"{tmp_path / 'own' / 'step-000004'}: a checkpoint of another configuration "
        "(train.num_steps: 6 -> 7, train.batch_size: None -> 8); it is left alone and training starts from step 0."
    ]


def test_a_checkpoint_with_equal_settings_in_another_folder_is_of_another_version(tmp_path: Path) -> None:
    _run(store=_store(tmp_path), save_every=4)
    said: list[str] = []
    other = CheckpointStore(tmp_path / "other", keep=2, settings={"train.num_steps": 6}, say=said.append)
    assert other.latest() is None
    assert said == [
        f"{tmp_path / 'own' / 'step-000004'}: a checkpoint of another configuration "
        "(made by another version of the stage); it is left alone and training starts from step 0."
    ]


def test_a_disk_that_is_full_while_saving_ends_training_and_keeps_what_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run(store=_store(tmp_path), save_every=2, num_steps=5)
    kept = sorted(path.name for path in (tmp_path / "own").iterdir())
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(StageError, match=r"^state\.safetensors: needs [\d,]+ bytes, 10 are free in .* Make room\.$"):
        _run(store=_store(tmp_path), save_every=2)
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == kept


def test_the_best_validation_ends_training_and_comes_out(tmp_path: Path) -> None:
    def rate(step: mx.array) -> mx.array:
        return mx.where(step < 4, 1e-2, 0.5)  # it learns, then it is thrown off

    best, records, weights = _run(
        store=_store(tmp_path), learning_rate=rate, num_steps=30, eval_every=1, patience=2, keep="best"
    )
    losses = {record["step"]: record["loss"] for record in _kinds(records, "validation")}
    lowest = min(losses, key=lambda step: losses[step])
    assert best.best_step == lowest
    assert best.steps == lowest + 2 < 30
    _, _, until_then = _run(learning_rate=rate, num_steps=lowest, eval_every=1)
    assert weights == until_then


def test_a_signal_is_noted_once_and_then_ends_as_ever() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with heeding_signals() as asked:
        assert not asked()
        signal.raise_signal(signal.SIGTERM)
        assert asked()
        assert asked.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == before
    assert signal.getsignal(signal.SIGTERM) == before


def test_checkpoints_are_plain_files(tmp_path: Path) -> None:
    _run(store=_store(tmp_path), save_every=4)
    folder = tmp_path / "own" / "step-000004"
    arrays = mx.load(str(folder / "state.safetensors"))
    assert isinstance(arrays, dict)
    assert {name.split(".")[0] for name in arrays} == {"update", "random"}
    assert json.loads((folder / "state.json").read_text())["facts"]["step"] == 4
