from pathlib import Path

import pytest

from mlxflow.storage.cache_files import add_entries, read_payload, read_table, write_payload, write_table


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "table.json"
    assert read_table(file) == {}
    write_table(file, {"a": [1, None], "b": {"c": "d"}})
    assert read_table(file) == {"a": [1, None], "b": {"c": "d"}}


@pytest.mark.parametrize("length", [-1, 40, 10, 0])
def test_a_shortened_file_counts_as_empty(length: int, tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    write_table(file, {"a": 1})
    file.write_bytes(file.read_bytes()[:length])
    assert read_payload(file) is None
    assert read_table(file) == {}


def test_a_payload_of_another_kind_is_no_table(tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    for payload in (b"[1]", b"no JSON"):
        write_payload(file, payload)
        assert read_payload(file) == payload
        assert read_table(file) == {}


def test_an_error_of_writing_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    write_table(tmp_path / "file" / "table.json", {"a": 1})
    assert (tmp_path / "file").read_text() == "no folder"


def test_the_oldest_entries_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    for number in (1, 2, 3, 1, 4):
        add_entries(file, {str(number): number}, most=3)
    assert list(read_table(file)) == ["3", "1", "4"]
