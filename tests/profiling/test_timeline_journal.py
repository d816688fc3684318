import fcntl
import os
from pathlib import Path

import pytest

from mlxflow.profiling.timeline_journal import TimelineJournal


def test_a_kept_line_is_written_before_the_next_appended_one(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = TimelineJournal(path, ["seconds"])
    journal.keep("sample", 0.1)
    assert path.read_text() == '["columns","seconds"]\n'
    journal.append("step", 1, 0.2)
    assert path.read_text() == '["columns","seconds"]\n["sample",0.1]\n["step",1,0.2]\n'
    journal.keep("sample", 0.3)
    journal.close()
    assert path.read_text().endswith('["sample",0.3]\n["end"]\n')


def test_the_file_is_locked_until_the_journal_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = TimelineJournal(path, ["seconds"])
    with path.open("rb") as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        journal.close()
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_a_write_error_closes_the_journal_without_an_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.jsonl"
    journal = TimelineJournal(path, ["seconds"])
    write = os.write
    monkeypatch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    journal.append("step", 1, 0.2)
    monkeypatch.setattr(os, "write", write)
    journal.append("step", 2, 0.4)
    assert path.read_text() == '["columns","seconds"]\n'
