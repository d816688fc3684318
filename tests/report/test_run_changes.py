"""A change of any file of a run is noticed by the stamps, and one of other files is not."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mlxflow.report.run_changes import stamps

CHANGES: dict[str, tuple[Callable[[Path], object], bool]] = {
    "a longer file": (lambda root: (root / "artifacts/train/metrics.jsonl").write_text("{}\n"), True),
    "a new time": (lambda root: os.utime(root / "artifacts/train/report.toml", (1, 1)), True),
    "a run that begins": (lambda root: (root / "artifacts/.train.partial").mkdir(), True),
    "the workflow file": (lambda root: (root / "workflow.toml").write_text("[train]\n"), True),
    "the lock": (lambda root: (root / "mlxflow.lock").unlink(), True),
    "an unfinished timeline": (
        lambda root: (root / "artifacts/.mlxflow/unfinished/profile/1/timeline.jsonl").write_text("[]\n"),
        True,
    ),
    "cached digests": (lambda root: (root / "artifacts/.mlxflow/digests.json").write_text("{}"), False),
    "another file of the folder": (lambda root: (root / "notes.txt").write_text("x"), False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_run_is_noticed(root: Path, name: str) -> None:
    (root / "artifacts/.mlxflow/unfinished/profile/1").mkdir(parents=True)
    (root / "workflow.toml").touch()
    before = stamps(root)
    assert before == stamps(root)
    change, is_noticed = CHANGES[name]
    change(root)
    assert (stamps(root) != before) == is_noticed


def test_an_artifact_behind_a_link_is_noticed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("disk") / "train"
    (root / "artifacts/train").rename(elsewhere)
    (root / "artifacts/train").symlink_to(elsewhere)
    before = stamps(root)
    (elsewhere / "report.toml").write_text("")
    assert stamps(root) != before


def test_a_folder_without_artifacts_has_few_stamps(tmp_path: Path) -> None:
    assert stamps(tmp_path) == ()
