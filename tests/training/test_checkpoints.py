import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from mlxflow.messages.errors import StageError
from mlxflow.training.checkpoints import CheckpointStore, last_step
from tests.training.small_training import (
    checkpoint_store,
    make_trainer,
    train_small,
)


def test_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    train_small(store=checkpoint_store(tmp_path), save_every=1)
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
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path: Path, case: str) -> None:
    store = checkpoint_store(tmp_path)
    trainer = make_trainer(lambda record: None, store=store, save_every=2, eval_every=2, keep="best")
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


def test_damaged_best_weights_are_an_error(tmp_path: Path) -> None:
    store = checkpoint_store(tmp_path)
    store.save_best(4, {"weight": mx.ones((8, 8))})
    path = tmp_path / "own" / "best-000004.safetensors"
    assert store.read_best(4)["weight"].shape == (8, 8)
    _flipped(path)
    with pytest.raises(StageError) as caught:
        store.read_best(4)
    expected = f"{path}: is not what was written. Run it again, which uses an earlier checkpoint."
    assert str(caught.value) == expected


def test_latest_removes_unfinished_files_of_a_killed_run(tmp_path: Path) -> None:
    store = checkpoint_store(tmp_path)
    train_small(store=store, save_every=4)
    (tmp_path / "own" / ".step-000005.partial").mkdir()
    (tmp_path / "own" / ".best-000004.safetensors.9999999999.tmp.safetensors").touch()
    assert store.latest() is not None
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["step-000004"]


def test_a_checkpoint_of_another_configuration_is_named_and_kept(tmp_path: Path) -> None:
    train_small(store=checkpoint_store(tmp_path), save_every=4)
    said: list[str] = []
    settings = {"train.num_steps": 7, "train.batch_size": 8}
    other = CheckpointStore(tmp_path / "other", keep=2, settings=settings, say=said.append)
    assert other.latest() is None
    assert said == [
        f"{tmp_path / 'own' / 'step-000004'}: a checkpoint of another configuration "
        "(train.num_steps: 6 -> 7, train.batch_size: None -> 8); it is left alone and training starts from step 0."
    ]


def test_a_checkpoint_with_equal_settings_in_another_folder_is_of_another_version(tmp_path: Path) -> None:
    train_small(store=checkpoint_store(tmp_path), save_every=4)
    said: list[str] = []
    other = CheckpointStore(tmp_path / "other", keep=2, settings={"train.num_steps": 6}, say=said.append)
    assert other.latest() is None
    assert said == [
        f"{tmp_path / 'own' / 'step-000004'}: a checkpoint of another configuration "
        "(made by another version of the stage); it is left alone and training starts from step 0."
    ]


def test_a_full_disk_at_a_checkpoint_keeps_the_earlier_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_small(store=checkpoint_store(tmp_path), save_every=2, num_steps=5)
    kept = sorted(path.name for path in (tmp_path / "own").iterdir())
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(StageError, match=r"^state\.safetensors: needs [\d.]+ kB, 10 bytes are free in .* Make room\.$"):
        train_small(store=checkpoint_store(tmp_path), save_every=2)
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == kept


def test_checkpoints_are_plain_files(tmp_path: Path) -> None:
    train_small(store=checkpoint_store(tmp_path), save_every=4)
    folder = tmp_path / "own" / "step-000004"
    arrays = mx.load(str(folder / "state.safetensors"))
    assert isinstance(arrays, dict)
    assert {name.split(".")[0] for name in arrays} == {"update", "random"}
    assert json.loads((folder / "state.json").read_text())["facts"]["step"] == 4


def test_the_last_step_is_read_from_the_names(tmp_path: Path) -> None:
    assert last_step(tmp_path / "missing") == 0
    for name in ("step-000009", "step-000100", ".step-000200.partial", "step-x"):
        (tmp_path / name).mkdir()
    assert last_step(tmp_path) == 100
