import json
import os
from pathlib import Path

import pytest

from mlxflow.tasks.doit_backend import Journal


def _open(folder: Path) -> Journal:
    return Journal(str(folder / "state" / "state.jsonl"), None)


def _finish(journal: Journal, task: str, value: object = 1) -> None:
    journal.set(task, "_values_:", {"value": value})
    journal.set(task, "deps:", [])


def _known(folder: Path) -> dict[str, object]:
    journal = _open(folder)
    return {task: journal.get(task, "_values_:")["value"] for task in "abc" if journal.in_(task)}


def test_a_finished_task_is_on_the_disk_without_closing_anything(tmp_path: Path) -> None:
    journal = _open(tmp_path)
    _finish(journal, "a")
    journal.set("b", "_values_:", {"value": 2})  # unfinished
    assert _known(tmp_path) == {"a": 1}


def test_a_dropped_record_is_removed_at_once(tmp_path: Path) -> None:
    journal = _open(tmp_path)
    _finish(journal, "a")
    _finish(journal, "b")
    journal.remove("a")
    assert _known(tmp_path) == {"b": 1}
    journal.remove_all()
    assert _known(tmp_path) == {}


@pytest.mark.parametrize("cut", range(2, 12))
def test_a_torn_last_line_is_ignored_and_the_next_append_is_whole(tmp_path: Path, cut: int) -> None:
    journal = _open(tmp_path)
    _finish(journal, "a")
    _finish(journal, "b")
    path = Path(journal.name)
    path.write_bytes(path.read_bytes()[:-cut])
    assert _known(tmp_path) == {"a": 1}
    _finish(_open(tmp_path), "c", 3)
    assert _known(tmp_path) == {"a": 1, "c": 3}


def test_a_last_line_without_a_newline_is_read(tmp_path: Path) -> None:
    journal = _open(tmp_path)
    _finish(journal, "a")
    path = Path(journal.name)
    path.write_bytes(path.read_bytes()[:-1])
    _finish(_open(tmp_path), "b")
    assert _known(tmp_path) == {"a": 1, "b": 1}


NO_JSON, NO_TASK = "no valid JSON", "no task with its record"
GARBAGE = {
    b"\xff\xfe": NO_JSON,
    b"": NO_JSON,
    b"[" * 100_000: NO_JSON,
    b'{"task": "a", "record": {"ignore:": NaN}}': NO_JSON,
    b"{}": NO_TASK,
    b"[1]": NO_TASK,
    b"null": NO_TASK,
    b'{"task": 3, "record": 4}': NO_TASK,
}


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_damaged_line_loses_no_other_record_and_is_reported_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], garbage: bytes
) -> None:
    journal = _open(tmp_path)
    _finish(journal, "a")
    path = Path(journal.name)
    path.write_bytes(garbage + b"\n" + path.read_bytes())
    journal = _open(tmp_path)
    journal.load()
    said = f"{path}: line 1 is not valid state ({GARBAGE[garbage]}). It is as if it were not there.\n"
    assert capsys.readouterr() == ("", said)
    assert _known(tmp_path) == {"a": 1}
    journal.repair()
    capsys.readouterr()
    assert _known(tmp_path) == {"a": 1}
    assert capsys.readouterr() == ("", "")


RECORDS: dict[str, tuple[object, str]] = {
    "a list": ([], "no table"),
    "values are a list": ({"_values_:": [1]}, "no table"),
    "values are null": ({"_values_:": None}, "no table"),
    "seconds are text": ({"_values_:": {"seconds": "1"}}, "seconds: expected a number of seconds"),
    "outputs alone": ({"_values_:": {"outputs": {"a": [1, "0f"]}}}, "settings: missing"),
    "ignored by a list": ({"ignore:": [1]}, "ignore: expected text"),
    "a checker that is a table": ({"checker:": {}}, "checker: expected text"),
}


@pytest.mark.parametrize("case", RECORDS)
def test_an_invalid_record_counts_as_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    record, reason = RECORDS[case]
    journal = _open(tmp_path)
    _finish(journal, "a")
    _finish(journal, "b")
    path = Path(journal.name)
    with path.open("a") as file:
        file.write(json.dumps({"task": "a", "record": record}) + "\n")
    journal = _open(tmp_path)
    said = f"{path}: the record of a is not valid state ({reason}). It is as if it were not there.\n"
    assert capsys.readouterr() == ("", said)
    assert [task for task in "ab" if journal.in_(task)] == ["b"]
    _finish(journal, "a", 2)
    assert _known(tmp_path) == {"a": 2, "b": 1}
    assert capsys.readouterr() == ("", "")


def test_a_damaged_record_replaced_by_a_later_one_is_not_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "state" / "state.jsonl"
    path.parent.mkdir()
    path.write_text('{"task":"a","record":[]}\n{"task":"a","record":{"_values_:":{"value":1}}}\n')
    assert _known(tmp_path) == {"a": 1}
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_a_journal_that_is_no_regular_file_is_neither_read_nor_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    path, other = tmp_path / "state" / "state.jsonl", tmp_path / "other"
    path.parent.mkdir()
    other.write_text('{"task":"a","record":{"_values_:":{"value":1}}}\n')
    before = other.read_bytes()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(other)
    else:
        path.mkdir()
    journal = _open(tmp_path)
    assert not journal.in_("a")
    assert len(capsys.readouterr().err.splitlines()) == 1
    if kind == "folder":
        with pytest.raises(IsADirectoryError):
            _finish(journal, "b")
    else:
        _finish(journal, "b")
        assert _known(tmp_path) == {"b": 1}
    assert other.read_bytes() == before


def test_nothing_is_written_when_nothing_ran(tmp_path: Path) -> None:
    journal = _open(tmp_path)
    journal.remove("a")
    journal.dump()
    assert list(tmp_path.iterdir()) == []


def test_a_journal_of_mostly_outdated_lines_is_rewritten(tmp_path: Path) -> None:
    journal = _open(tmp_path)
    for number in range(200):
        _finish(journal, "a", number)
    journal.dump()
    lines = Path(journal.name).read_text().splitlines()
    assert [json.loads(line)["task"] for line in lines] == ["a"]
    assert _known(tmp_path) == {"a": 199}
