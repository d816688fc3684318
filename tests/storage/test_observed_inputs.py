"""The first answer about an input holds for a run, and a change of it does not go unseen."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mlxflow.messages.errors import StageError
from mlxflow.storage.observed_inputs import ObservedInputs


def _edit(path: Path) -> None:
    path.write_bytes(b"two")


def _edit_and_put_back(path: Path) -> None:
    path.write_bytes(b"two")
    path.write_bytes(b"one")


def _replace_and_put_back(path: Path) -> None:
    copy = path.with_name("copy")
    shutil.copy2(path, copy)
    path.unlink()
    copy.rename(path)


def _edit_with_old_dates(path: Path) -> None:
    stat = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], object]] = {
    "edited": _edit,
    "edited, with the dates of before": _edit_with_old_dates,
    "edited and put back": _edit_and_put_back,
    "replaced and put back": _replace_and_put_back,
    "deleted": lambda path: path.unlink(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen_and_the_first_content_stays(tmp_path: Path, change: Callable[[Path], object]) -> None:
    path = tmp_path / "data/a"
    path.parent.mkdir()
    path.write_bytes(b"one")
    inputs = ObservedInputs(tmp_path / "digests.json")
    first = inputs.digests(path)
    inputs.require_unchanged("train", tmp_path)
    change(path)
    assert inputs.digests(path) == first
    with pytest.raises(StageError) as caught:
        inputs.require_unchanged("train", tmp_path)
    assert str(caught.value) == "data/a: changed while train ran, so its result is not kept. Run it again."
    inputs.settle([path])  # what was read of it has been compared with its digest
    inputs.require_unchanged("train", tmp_path)


def test_permissions_and_hard_links_are_no_change(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    inputs = ObservedInputs(tmp_path / "digests.json")
    inputs.digests(path)
    path.chmod(0o600)
    (tmp_path / "b").hardlink_to(path)
    assert inputs.changed() == []
