import json
from pathlib import Path

import pytest

from tasks.state import Journal


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


def test_a_dropped_record_is_gone_at_once(tmp_path: Path) -> None:
    journal = _open(tmp_path)
    _finish(journal, "a")
    _finish(journal, "b")
    journal.remove("a")
    assert _known(tmp_path) == {"b": 1}
    journal.remove_all()
    assert _known(tmp_path) == {}


@pytest.mark.parametrize("cut", range(2, 12))
def test_a_torn_last_line_is_as_if_not_written_and_the_next_one_is_whole(tmp_path: Path, cut: int) -> None:
    journal = _open(tmp_path)
    _finish(journal, "a")
    _finish(journal, "b")
    path = Path(journal.name)
    path.write_bytes(path.read_bytes()[:-cut])
    assert _known(tmp_path) == {"a": 1}
    _finish(_open(tmp_path), "c", 3)
    assert _known(tmp_path) == {"a": 1, "c": 3}


def test_a_line_that_lacks_only_its_end_is_whole(tmp_path: Path) -> None:
    journal = _open(tmp_path)
    _finish(journal, "a")
    path = Path(journal.name)
    path.write_bytes(path.read_bytes()[:-1])
    _finish(_open(tmp_path), "b")
    assert _known(tmp_path) == {"a": 1, "b": 1}


@pytest.mark.parametrize("garbage", [b"\xff\xfe\n", b"{}\n", b"[1]\n", b'{"task": 3, "record": 4}\n', b"\n", b"null\n"])
def test_a_damaged_line_costs_no_other_record(tmp_path: Path, garbage: bytes) -> None:
    journal = _open(tmp_path)
    _finish(journal, "a")
    path = Path(journal.name)
    path.write_bytes(garbage + path.read_bytes() + garbage)
    assert _known(tmp_path) == {"a": 1}


def test_nothing_is_written_when_nothing_ran(tmp_path: Path) -> None:
    journal = _open(tmp_path)
    journal.remove("a")
    journal.dump()
    assert list(tmp_path.iterdir()) == []


def test_a_journal_that_is_mostly_past_is_rewritten(tmp_path: Path) -> None:
    journal = _open(tmp_path)
    for number in range(200):
        _finish(journal, "a", number)
    journal.dump()
    lines = Path(journal.name).read_text().splitlines()
    assert [json.loads(line)["task"] for line in lines] == ["a"]
    assert _known(tmp_path) == {"a": 199}
