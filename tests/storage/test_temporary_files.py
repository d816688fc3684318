import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mlxflow.storage.temporary_files import beside, remove_orphans, scratch_folder


def _dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_only_temporary_files_of_ended_processes_are_removed(tmp_path: Path) -> None:
    dead, living = _dead_process(), os.getppid()
    orphans = [f".a.json.{dead}.tmp", f"digests.json.{dead}.tmp", f".key.{dead}.partial", f".b.{os.getpid()}.tmp"]
    orphans += [f".best-000002.safetensors.{dead}.tmp.safetensors", ".c.9999999999.tmp"]
    kept = ["a.json", f".a.json.{living}.tmp", ".tmp", f"{dead}.tmp.txt", ".train.partial", "model.safetensors"]
    for name in (*orphans, *kept):
        (tmp_path / name).touch()
    (tmp_path / f".folder.{dead}.tmp").mkdir()
    (tmp_path / f".link.{dead}.tmp").symlink_to("a.json")
    remove_orphans(tmp_path)
    expected = {*kept, f".folder.{dead}.tmp", f".link.{dead}.tmp"}
    assert {path.name for path in tmp_path.iterdir()} == expected


def test_a_later_process_with_the_same_pid_owns_nothing(tmp_path: Path) -> None:
    orphan = tmp_path / f".a.{os.getppid()}.tmp"
    orphan.touch()
    os.utime(orphan, (1, 1))
    remove_orphans(tmp_path)
    assert not orphan.exists()


def test_only_names_with_the_given_prefix_are_considered(tmp_path: Path) -> None:
    dead = _dead_process()
    for name in ("ours", "theirs"):
        (tmp_path / f".{name}.{dead}.tmp").touch()
    remove_orphans(tmp_path, ".ours.")
    assert [path.name for path in tmp_path.iterdir()] == [f".theirs.{dead}.tmp"]
    remove_orphans(tmp_path / "nowhere")


def test_a_temporary_file_is_a_sibling_named_by_the_process(tmp_path: Path) -> None:
    assert beside(tmp_path / "a.json") == tmp_path / f".a.json.{os.getpid()}.tmp"


def test_the_scratch_folder_of_a_killed_process_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    script = "import os, tempfile\nfrom mlxflow.storage.temporary_files import scratch_folder\n"
    script += f"tempfile.tempdir = {str(tmp_path)!r}\nwith scratch_folder():\n    os.kill(os.getpid(), 9)"
    killed = subprocess.run([sys.executable, "-c", script], check=False)
    assert killed.returncode == -9
    (left,) = tmp_path.iterdir()
    (left / "copy").write_text("of a tokenizer")
    theirs = tmp_path / f"mlxflow-{os.getuid()}"  # as the folder for compiled code is called
    theirs.mkdir()
    with scratch_folder() as scratch:
        assert set(tmp_path.iterdir()) == {theirs, scratch}
    assert list(tmp_path.iterdir()) == [theirs]


def test_a_scratch_folder_removed_concurrently_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ends = tmp_path / f"mlxflow-{os.getppid()}-x"
    ends.mkdir()
    listed = os.scandir

    def listed_before_it_ends(place: str) -> list["os.DirEntry[str]"]:
        with listed(place) as entries:
            found = list(entries)
        ends.rmdir()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", listed_before_it_ends)
        scratch = scratch_folder()
        folder = scratch.__enter__()
    assert list(tmp_path.iterdir()) == [folder]
    scratch.__exit__(None, None, None)
    assert not list(tmp_path.iterdir())
