import os
import time
from pathlib import Path

from mlxflow.storage import unfinished_runs
from mlxflow.storage.unfinished_runs import KEPT_SECONDS, folder_of, of_no_task, of_task, prune

KEYS = ("0123456789ab", "123456789abc", "23456789abcd")


def _leave(state: Path, task: str, key: str, *, num_bytes: int = 10, days_ago: float = 0) -> Path:
    folder = folder_of(state, task, key)
    path = folder / "step-000002/state.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x" * num_bytes)
    written = time.time() - days_ago * 24 * 3600
    os.utime(path, (written, written))
    return folder


def test_the_newest_run_of_other_settings_is_kept_while_recent(tmp_path: Path) -> None:
    left = [_leave(tmp_path, "train", key, num_bytes=100 + days, days_ago=days) for days, key in enumerate(KEYS)]
    other = _leave(tmp_path, "train:a", KEYS[0], days_ago=99)
    assert [(one.folder, one.num_bytes) for one in prune(tmp_path, "train")] == [(left[1], 101), (left[2], 102)]
    assert [path.exists() for path in (*left, other)] == [True, False, False, True]
    assert list(prune(tmp_path, "train")) == []


def test_runs_of_other_settings_are_removed_after_a_week(tmp_path: Path) -> None:
    left = _leave(tmp_path, "train:a", KEYS[0], days_ago=KEPT_SECONDS / 24 / 3600 + 0.1)
    assert [one.folder for one in prune(tmp_path, "train:a")] == [left]
    assert of_task(tmp_path, "train:a") == []


def test_runs_of_removed_stages_and_variants_are_found(tmp_path: Path) -> None:
    _leave(tmp_path, "train", KEYS[0])
    _leave(tmp_path, "quantize:q4", KEYS[0])
    gone = [_leave(tmp_path, "quantize:q8", KEYS[1]), _leave(tmp_path, "export", KEYS[2])]
    assert sorted(one.folder for one in of_no_task(tmp_path, ["train", "quantize:q4"])) == sorted(gone)


def test_only_run_folders_are_removed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    place = folder_of(tmp_path, "train", "")
    (place / "notes").mkdir(parents=True)
    (place / KEYS[0]).symlink_to(elsewhere)
    (place / KEYS[1]).write_text("a file")
    assert list(prune(tmp_path, "train")) == []
    assert of_no_task(tmp_path, []) == []


def test_the_size_of_a_linked_folder_counts_its_files(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a").write_bytes(b"x" * 1000)
    (tmp_path / "link").symlink_to("folder")
    assert unfinished_runs.size_of(tmp_path / "link") == 1000
