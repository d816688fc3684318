import json
from pathlib import Path

import pytest

from mlxflow.workflow.disk_queries import Disk, unchanged


def test_a_query_is_answered_once_and_recorded(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    assert not disk.is_file("a.txt")
    (tmp_path / "a.txt").write_text("text")
    assert not disk.is_file("a.txt")  # the answer of before
    assert disk.lookups == [["is_file", ["a.txt"], False, None]]


def test_recorded_answers_are_returned_without_the_disk(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("text")
    disk = Disk(tmp_path)
    answers = (disk.source("notes"), disk.has_text("notes"), disk.left_out("notes"), disk.is_dir("notes"))
    lookups = json.loads(json.dumps(disk.lookups))
    elsewhere = Disk(Path("no such folder"), lookups)
    assert (
        elsewhere.source("notes"),
        elsewhere.has_text("notes"),
        elsewhere.left_out("notes"),
        elsewhere.is_dir("notes"),
    ) == answers
    assert elsewhere.lookups == lookups


def test_a_file_error_is_an_answer(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    with pytest.raises(FileNotFoundError):
        disk.model_folder("base")
    (tmp_path / "base").mkdir()
    for asked in (disk, Disk(tmp_path, json.loads(json.dumps(disk.lookups)))):
        with pytest.raises(FileNotFoundError, match="No such file or directory"):
            asked.model_folder("base")


def test_unchanged_asks_every_query_again(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    disk.is_dir("notes")
    disk.is_quantized("base")
    with pytest.raises(FileNotFoundError):
        disk.tokenizer_files("base")
    lookups = json.loads(json.dumps(disk.lookups))
    assert unchanged(tmp_path, lookups)
    (tmp_path / "base").mkdir()
    assert not unchanged(tmp_path, lookups)
    assert not unchanged(tmp_path, [["of_other_code", [], 1, None]])
