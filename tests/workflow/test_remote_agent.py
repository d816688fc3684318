from pathlib import Path

import pytest

from mlxflow.storage.digests import digest_file
from mlxflow.workflow.remote_agent import ProjectCopy, project_folder


def _listed(folder: Path) -> list[tuple[str, int, str]]:
    return [
        (path.relative_to(folder).as_posix(), path.stat().st_size, digest_file(path).content)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return the folder of a project."""
    folder = tmp_path / "project"
    (folder / "a/b").mkdir(parents=True)
    (folder / "a/b/one.txt").write_text("one")
    (folder / "empty").write_text("")
    return folder


def test_only_files_that_differ_are_missing_and_others_are_removed(project: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    copy = ProjectCopy(folder, _listed(project))
    assert copy.missing() == ["a/b/one.txt", "empty"]
    copy.begin_file("a/b/one.txt")
    assert copy.is_receiving
    copy.add(b"on")
    copy.add(b"e")
    assert not copy.is_receiving
    copy.begin_file("empty")
    assert not copy.is_receiving
    (folder / "old/step-000002").mkdir(parents=True)
    (folder / "old/step-000002/state.json").write_text("{}")
    assert copy.missing() == []
    assert not (folder / "old").exists()
    (folder / "a/b/one.txt").write_text("two")
    assert copy.missing() == ["a/b/one.txt"]


def test_a_file_that_changes_while_it_is_copied_is_refused(project: Path, tmp_path: Path) -> None:
    copy = ProjectCopy(tmp_path / "copy", _listed(project))
    copy.begin_file("a/b/one.txt")
    with pytest.raises(ValueError, match=r"^a/b/one\.txt: changed while it was copied$"):
        copy.add(b"two")
    assert not (tmp_path / "copy/a/b/one.txt").exists()


@pytest.mark.parametrize("name", ["/etc/passwd", "../other", "a/../../other"])
def test_no_file_outside_of_the_copy_is_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is outside of the project"):
        ProjectCopy(tmp_path, [(name, 1, "")])


def test_copies_that_no_run_used_for_a_month_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    old, new = project_folder("old"), project_folder("new")
    os.utime(old, (0, 0))
    assert project_folder("../../new") == new
    assert not old.exists()
