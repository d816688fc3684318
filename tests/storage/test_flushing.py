import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from mlxflow.storage import flushing
from mlxflow.storage.atomic_folders import publishing, write_whole
from mlxflow.storage.report_files import write_report
from mlxflow.tasks.doit_backend import Journal

#: The number of macOS's F_FULLFSYNC.
_FULL = 51


@pytest.fixture
def flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """A system with F_FULLFSYNC: the flushes in their order, each with the name of its file."""
    calls: list[tuple[str, str]] = []
    call = fcntl.fcntl

    def name(descriptor: int) -> str:
        inode = os.fstat(descriptor).st_ino
        return next(path.name for path in (tmp_path, *tmp_path.rglob("*")) if path.stat().st_ino == inode)

    def control(descriptor: int, command: int, *arguments: Any) -> Any:
        if command != _FULL:
            return call(descriptor, command, *arguments)
        calls.append(("full", name(descriptor)))
        return 0

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", _FULL, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", control)
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append(("fsync", name(descriptor))))
    return calls


def test_an_artifact_takes_one_full_flush_after_all_of_its_files(
    tmp_path: Path, flushed: list[tuple[str, str]]
) -> None:
    with publishing(tmp_path / "artifact") as private:
        (private / "model.safetensors").write_bytes(b"weights")
        (private / "tokenizer").mkdir()
        (private / "tokenizer/tokenizer.json").write_bytes(b"{}")
        write_report(private / "report.toml", {"run": {}})
    position = [kind for kind, _ in flushed].index("full")
    assert [kind for kind, _ in flushed].count("full") == 1
    before = {name for kind, name in flushed[:position] if kind == "fsync"}
    files = {"model.safetensors", "report.toml", "tokenizer.json", "tokenizer", ".artifact.partial"}
    assert before >= files
    assert flushed[position:] == [("full", "tokenizer.json"), ("fsync", tmp_path.name)]  # then the folder's new name


def test_a_single_file_takes_one_full_flush(tmp_path: Path, flushed: list[tuple[str, str]]) -> None:
    write_whole(tmp_path / "mlxflow.lock", b"text")
    assert [kind for kind, _ in flushed] == ["fsync", "full"]
    assert (tmp_path / "mlxflow.lock").read_bytes() == b"text"


def test_each_line_of_the_journal_leaves_the_drives_cache(tmp_path: Path, flushed: list[tuple[str, str]]) -> None:
    journal = Journal(str(tmp_path / "state.jsonl"), None)
    journal.set("train", "_values_:", {"settings": {}})
    journal.set("train", "deps:", [])
    assert flushed == [("fsync", "state.jsonl"), ("full", "state.jsonl")]


def test_a_file_system_without_the_full_flush_is_flushed_as_elsewhere(
    tmp_path: Path, flushed: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(45, "Operation not supported")

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with (tmp_path / "file").open("wb") as file:
        flushing.flush_drive(file.fileno())
    assert flushed == [("fsync", "file")]
