"""What is an artifact's own, and what stays when it is replaced or removed."""

import os
from pathlib import Path

import pytest

from mlxflow.storage import ownership
from mlxflow.storage.report_files import write_report


def _write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def _make(folder: Path, task: str, *names: str, lists: bool = True) -> Path:
    """Write an artifact as a stage does."""
    _write(folder, *names)
    run = {"files": ["report.toml", *names]} if lists else {}
    write_report(folder / "report.toml", {"stage": {"stage": task}, "run": run})
    return folder


def test_files_not_listed_by_the_run_are_foreign(tmp_path: Path) -> None:
    folder = _make(tmp_path / "train", "train", "config.json", "adapters/a")
    _write(folder, "notes.txt", "adapters/mine", "generation_config.json")  # the last one would be read
    _make(folder / "a", "train:a", "config.json")
    (folder / "link").symlink_to(tmp_path)
    assert ownership.foreign_names(folder) == [
        "a/config.json",
        "a/report.toml",
        "adapters/mine",
        "link",
        "notes.txt",
    ]


def test_without_a_list_only_other_artifacts_are_foreign(tmp_path: Path) -> None:
    folder = _make(tmp_path / "train", "train", "config.json", "notes.txt", lists=False)
    _make(folder / "a", "train:a", "config.json", "deeper/x")
    elsewhere = _make(tmp_path / "elsewhere", "train:b", "config.json")
    (folder / "b").symlink_to(elsewhere)
    assert ownership.foreign_names(folder) == ["a/config.json", "a/deeper/x", "a/report.toml", "b"]


def test_without_a_report_all_files_except_outputs_are_foreign(tmp_path: Path) -> None:
    _write(tmp_path / "train", "config.json", "notes.txt")
    assert ownership.foreign_names(tmp_path / "train", ["config.json"]) == ["notes.txt"]
    assert ownership.foreign_names(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    "text",
    ["", "[stage\n", "stage = 1\n", "run = 1\n", "[run]\nfiles = 1\n", "[stage]\nstage = 'train'\n[run]\nfiles = 1\n"],
)
def test_an_empty_report_owns_nothing(tmp_path: Path, text: str) -> None:
    _write(tmp_path, "config.json")
    (tmp_path / "report.toml").write_text(text)
    assert ownership.maker(tmp_path) == ""
    assert ownership.foreign_names(tmp_path) == ["config.json", "report.toml"]


def test_removing_an_artifact_keeps_foreign_files(tmp_path: Path) -> None:
    folder = _make(tmp_path / "train", "train", "config.json", "adapters/a")
    _write(folder, "notes.txt")
    assert ownership.remove_own_files(folder) == ["notes.txt"]
    assert [path.name for path in folder.rglob("*")] == ["notes.txt"]


def test_removing_an_artifact_of_its_own_files_removes_its_folder(tmp_path: Path) -> None:
    folder = _make(tmp_path / "train", "train", "config.json", "adapters/a")
    assert ownership.remove_own_files(folder) == []
    assert not folder.exists()


def test_removing_a_linked_artifact_leaves_the_link(tmp_path: Path) -> None:
    place = _make(tmp_path / "big", "train", "config.json")
    (tmp_path / "train").symlink_to(place)
    assert ownership.remove_own_files(tmp_path / "train") == []
    assert not place.exists()
    assert os.readlink(tmp_path / "train") == str(place)  # noqa: PTH115
