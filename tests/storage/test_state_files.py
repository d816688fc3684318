import os
from pathlib import Path

import pytest

from mlxflow.storage import state_files
from mlxflow.storage.state_files import InvalidStateError, OutdatedStateError

VALUE = {"format": 1, "names": ["a", "é"]}


def test_decode_returns_the_encoded_object() -> None:
    assert state_files.decode(state_files.encode(VALUE)) == VALUE


def test_a_change_of_any_byte_is_found() -> None:
    data = state_files.encode(VALUE)
    for place in range(len(data)):
        changed = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        with pytest.raises(InvalidStateError):
            state_files.decode(changed)


def test_an_object_without_a_checksum_is_of_an_earlier_version() -> None:
    with pytest.raises(OutdatedStateError, match="of an earlier version"):
        state_files.decode(b'{"format": 1}')
    with pytest.raises(InvalidStateError, match="it has no checksum"):
        state_files.decode(b"[]")


def test_read_of_a_missing_file_is_a_file_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        state_files.read(tmp_path / "state.json")
    (tmp_path / "state.json").write_bytes(state_files.encode(VALUE))
    assert state_files.read(tmp_path / "state.json") == VALUE


def test_links_pipes_and_large_files_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    assert state_files.read_bytes(tmp_path / "file", largest=5) == b"12345"
    for name, largest, reason in (("link", 5, "a link"), ("pipe", 5, "no regular file"), ("file", 4, "5 bytes")):
        with pytest.raises(InvalidStateError, match=reason):
            state_files.read_bytes(tmp_path / name, largest=largest)


@pytest.mark.parametrize("text", ["NaN", "{", "[" * 100_000, "\xff"])
def test_parse_json_refuses_invalid_json(text: str) -> None:
    with pytest.raises(InvalidStateError, match="no valid JSON"):
        state_files.parse_json(text.encode("latin-1"))


def test_parse_json_takes_infinities_for_numbers() -> None:
    assert state_files.parse_json(b"[Infinity, -Infinity]") == [float("inf"), float("-inf")]


def test_state_that_is_ignored_is_named_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    state_files.say_ignored("a/state.json", "no table", "It is written again.")
    assert "a/state.json: not valid state (no table). It is written again.\n" in "".join(capsys.readouterr())
