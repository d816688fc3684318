import os
from pathlib import Path

import mlx.core as mx
import pytest

from mlxflow.quantization.kept_tensors import KeptTensors, facts_of, names_kept, unread

ONE, TWO = {"a.b": mx.array([1.0, 1 / 3], mx.bfloat16)}, {"a.b": mx.array([2.0])}


def _store(folder: Path, identity: str = "1") -> KeptTensors:
    return KeptTensors(folder, identity, effect="It is computed again.")


def test_tensors_are_read_by_the_next_run_to_the_bit(tmp_path: Path) -> None:
    folder = tmp_path / "not there yet"
    assert _store(folder).read("state") is None
    file = _store(folder).write("state", ONE, {"number": 3})
    found = _store(folder).read("state")
    assert found is not None
    assert (found.file, found.facts) == (file, {"number": 3})
    assert found.tensors["a.b"].dtype == mx.bfloat16
    assert mx.array_equal(found.tensors["a.b"], ONE["a.b"])
    assert mx.array_equal(unread(folder, "state")["a.b"], ONE["a.b"])
    assert (unread(folder, "other"), facts_of(folder, "other")) == ({}, {})
    assert (names_kept(folder), names_kept(tmp_path / "missing")) == (["state"], [])


def test_a_later_state_replaces_the_earlier_one_and_names_stay_apart(tmp_path: Path) -> None:
    store = _store(tmp_path)
    first = store.write("model.layers.1", ONE)
    store.write("model.layers.10", ONE)
    second = store.write("model.layers.1", TWO, {"number": 4})
    assert second.exists()
    assert not first.exists()
    assert facts_of(tmp_path, "model.layers.1") == {"number": 4}
    other = store.read("model.layers.10")
    assert other is not None
    assert mx.array_equal(other.tensors["a.b"], ONE["a.b"])


def test_tensors_of_another_identity_are_not_used_and_say_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _store(tmp_path).write("state", ONE)
    assert _store(tmp_path, "2").read("state") is None
    assert capsys.readouterr().err == ""
    assert _store(tmp_path).read("state") is not None  # nor are they removed


@pytest.mark.parametrize("pattern", ["state-*.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["changed", "cut"])
def test_damaged_files_are_reported_and_not_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pattern: str, damage: str
) -> None:
    _store(tmp_path).write("state", ONE)
    (file,) = tmp_path.glob(pattern)
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data if damage == "changed" else data[:-2])
    assert _store(tmp_path).read("state") is None
    line = capsys.readouterr().err
    assert line.startswith(f"{tmp_path}/state.json: not valid state (")
    assert line.endswith("). It is computed again.\n")


def test_a_state_that_a_killed_run_has_half_written_is_ignored(tmp_path: Path) -> None:
    store = _store(tmp_path)
    store.write("state", ONE, {"number": 1})
    whole = tmp_path / "scratch"
    other = _store(whole).write("state", TWO, {"number": 2})
    ended = 2**22 - 1  # no process has this id
    (tmp_path / f".state.{ended}.tmp.safetensors").write_bytes(other.read_bytes()[:40])
    os.utime(tmp_path / f".state.{ended}.tmp.safetensors", (0, 0))
    other.rename(tmp_path / other.name)  # whole, but the run was killed before the facts named it
    (tmp_path / f".state.json.{ended}.tmp").write_bytes(b"{")
    again = _store(tmp_path)
    found = again.read("state")
    assert found is not None
    assert found.facts == {"number": 1}
    assert mx.array_equal(found.tensors["a.b"], ONE["a.b"])
    assert not list(tmp_path.glob(".*"))
    again.write("state", TWO, {"number": 2})
    assert sorted(path.name for path in tmp_path.glob("state*")) == ["state.json", other.name][::-1]
