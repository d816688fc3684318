"""Folders that are replaced whole, wherever links lead."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxflow.messages.errors import StageError
from mlxflow.storage import atomic_folders


def _publish(folder: Path, content: str = "new") -> None:
    with atomic_folders.publishing(folder) as private:
        (private / "file").write_text(content)


def _tree(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=["the same disk", "another disk"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder for what a link leads to."""
    memory = Path("/dev/shm")  # noqa: S108 - a disk of its own on every Linux
    if request.param == "the same disk":
        yield tmp_path
        return
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second disk")
    made = Path(tempfile.mkdtemp(dir=memory))
    yield made
    shutil.rmtree(made)


def test_a_linked_folder_is_replaced_at_its_target_and_stays_a_link(tmp_path: Path, disk: Path) -> None:
    place, link = disk / "big", tmp_path / "artifacts" / "train"
    place.mkdir()
    (place / "old").write_text("old")
    link.parent.mkdir()
    link.symlink_to(place)
    for content in ("first", "second"):
        _publish(link, content)
        assert link.is_symlink()
        assert _tree(place) == {"file": content}
    assert [path.name for path in link.parent.iterdir()] == ["train"]
    assert [path.name for path in disk.iterdir() if path.name.startswith(".")] == []


def test_a_folder_of_all_artifacts_may_be_a_link(tmp_path: Path, disk: Path) -> None:
    (tmp_path / "artifacts").symlink_to(disk / "all")
    atomic_folders.make_link_target(tmp_path / "artifacts")
    _publish(tmp_path / "artifacts" / "train")
    assert _tree(disk / "all") == {"train/file": "new"}


def test_a_link_to_a_missing_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "train").symlink_to(tmp_path / "big")
    _publish(tmp_path / "train")
    assert _tree(tmp_path / "big") == {"file": "new"}
    assert (tmp_path / "train").is_symlink()


def test_a_link_to_an_unmounted_disk_is_refused_before_any_work(tmp_path: Path) -> None:
    target = tmp_path / "not-mounted" / "train"
    (tmp_path / "train").symlink_to(target)
    with pytest.raises(StageError) as caught, atomic_folders.publishing(tmp_path / "train"):
        pytest.fail("the block is not entered")
    assert str(caught.value) == (
        f"{tmp_path}/train: is a link to {target}, and {target.parent} is not there. "
        "Mount its disk, make that folder, or remove the link."
    )
    assert not target.parent.exists()


def test_a_link_in_a_circle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train").symlink_to(tmp_path / "other")
    (tmp_path / "other").symlink_to(tmp_path / "train")
    with pytest.raises(StageError) as caught:
        _publish(tmp_path / "train")
    assert str(caught.value) == f"{tmp_path}/train: is a link that leads in a circle. Remove it."


def test_a_file_in_the_place_of_a_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "train").write_text("somebody's")
    with pytest.raises(StageError) as caught, atomic_folders.publishing(tmp_path / "train"):
        pytest.fail("the block is not entered")
    assert str(caught.value) == f"{tmp_path}/train: is a file, and a folder has to be there. Move it away."
    assert (tmp_path / "train").read_text() == "somebody's"


def test_a_mount_point_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "train").symlink_to(tmp_path / "disk")
    monkeypatch.setattr(atomic_folders, "_is_mounted", lambda place: place == tmp_path / "disk")
    with pytest.raises(StageError) as caught, atomic_folders.publishing(tmp_path / "train"):
        pytest.fail("the block is not entered")
    assert str(caught.value) == (
        f"{tmp_path}/train: at {tmp_path}/disk a disk is mounted, so it cannot be replaced whole. "
        f"Let it be a link to a folder on that disk, such as {tmp_path}/disk/train."
    )


def test_the_root_is_a_mount_point_and_a_plain_folder_is_not(tmp_path: Path) -> None:
    assert atomic_folders._is_mounted(Path("/"))
    assert not atomic_folders._is_mounted(tmp_path)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EBUSY, errno.EIO])
def test_a_failed_rename_keeps_the_old_folder_and_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    _publish(tmp_path / "train", "old")
    moved: list[Path] = []

    def rename(path: Path, target: Path) -> None:
        if path.name == ".train.partial" and target.name == "train":
            raise OSError(number, os.strerror(number), str(path))
        moved.append(path)
        os.rename(path, target)  # noqa: PTH104 - pathlib's is replaced

    monkeypatch.setattr(atomic_folders, "_exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(StageError) as caught:
        _publish(tmp_path / "train")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/.train.partial: cannot be written ({os.strerror(number)}; ")
    assert message.endswith(f"Look whether its disk works, and run it again; {tmp_path}/train is unchanged.")
    assert _tree(tmp_path) == {"train/file": "old"}
    assert len(moved) == 2  # aside, and back


def test_an_old_folder_that_cannot_be_removed_is_named_without_failing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _publish(tmp_path / "train", "old")
    remove = atomic_folders.remove_folder

    def refuse(folder: Path) -> None:
        if folder.is_dir():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        remove(folder)

    monkeypatch.setattr(atomic_folders, "remove_folder", refuse)
    _publish(tmp_path / "train")
    assert (tmp_path / "train/file").read_text() == "new"
    assert capsys.readouterr().err == f"{tmp_path}/.train.partial: cannot be removed (Permission denied). Remove it.\n"


def test_private_folders_are_found_beside_link_targets(tmp_path: Path) -> None:
    artifacts, disk = tmp_path / "artifacts", tmp_path / "disk"
    for folder in (artifacts, disk / "train", disk / ".train.partial", disk / "quantize" / ".q4.partial.old"):
        folder.mkdir(parents=True)
    (artifacts / "train").symlink_to(disk / "train")
    (artifacts / "quantize").symlink_to(disk / "quantize")
    found = [os.path.realpath(path) for path in atomic_folders.partial_folders(artifacts)]
    assert found == [str(disk / "quantize/.q4.partial.old"), str(disk / ".train.partial")]


def test_a_variant_named_like_a_private_folder_is_not_taken_for_one(tmp_path: Path) -> None:
    (tmp_path / "train" / "q.partial").mkdir(parents=True)
    assert atomic_folders.partial_folders(tmp_path) == []


def test_a_leftover_link_of_an_earlier_version_is_removed_but_not_its_target(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "weights").write_text("precious")
    (tmp_path / ".train.partial").symlink_to(tmp_path / "big")
    _publish(tmp_path / "train")
    assert _tree(tmp_path) == {"big/weights": "precious", "train/file": "new"}


def test_files_to_keep_are_in_the_new_folder_as_the_same_files(tmp_path: Path) -> None:
    old = tmp_path / "train"
    (old / "a").mkdir(parents=True)
    for name in ("a/weights", "notes.txt", "file", "stale"):
        (old / name).write_text(name)
    (old / "link").symlink_to("notes.txt")
    inode = (old / "a/weights").stat().st_ino
    with atomic_folders.publishing(old, keep=lambda: ["a/weights", "file", "link", "notes.txt"]) as private:
        (private / "file").write_text("new")
    assert _tree(old) == {"a/weights": "a/weights", "file": "new", "link": "notes.txt", "notes.txt": "notes.txt"}
    assert (old / "a/weights").stat().st_ino == inode
    assert (old / "link").is_symlink()


@pytest.mark.parametrize(("kept", "written"), [("config.json/weights", "config.json"), ("adapters", "adapters/a")])
def test_a_kept_file_that_conflicts_is_named_and_nothing_is_lost(tmp_path: Path, kept: str, written: str) -> None:
    old = tmp_path / "train"
    (old / kept).parent.mkdir(parents=True)
    (old / kept).write_text("kept")

    def publish() -> None:
        with atomic_folders.publishing(old, keep=lambda: [kept]) as private:
            (private / written).parent.mkdir(exist_ok=True)
            (private / written).write_text("new")

    with pytest.raises(StageError) as caught:
        publish()
    assert str(caught.value) == f"{old}/{kept}: is in the way of a file that this stage writes. Move it away."
    assert _tree(tmp_path) == {f"train/{kept}": "kept"}


def test_a_linked_file_is_written_at_its_target(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    atomic_folders.write_whole(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    folder.mkdir()
    (folder / "old").write_text("old")
    with atomic_folders.publishing(folder) as private:
        (private / "new").write_text("new")
        assert (folder / "old").read_text() == "old"
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_a_failure_keeps_the_old_folder_and_removes_the_new_one(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    folder.mkdir()
    (folder / "old").write_text("old")

    def fail_half_way() -> None:
        with atomic_folders.publishing(folder) as private:
            (private / "new").write_text("half")
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        fail_half_way()
    assert (folder / "old").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_files_left_by_a_crash_are_not_in_the_next_artifact(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    with atomic_folders.publishing(folder) as private:
        left = private
    left.mkdir()
    (left / "half").write_text("half")
    variant = tmp_path / "quantize" / ".q4.partial"
    variant.mkdir(parents=True)
    assert atomic_folders.partial_folders(tmp_path) == [left, variant]
    variant.rmdir()
    with atomic_folders.publishing(folder) as private:
        (private / "whole").write_text("whole")
    assert [path.name for path in folder.iterdir()] == ["whole"]
    assert atomic_folders.partial_folders(tmp_path) == []


def test_without_atomic_exchange_the_folder_is_still_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_folders, "_exchange", lambda one, other: False)
    folder = tmp_path / "train"
    for content in ("first", "second"):
        with atomic_folders.publishing(folder) as private:
            (private / "file").write_text(content)
    assert (folder / "file").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    place = Path(tempfile.mkdtemp(dir="/tmp"))  # others may not look into tmp_path
    (place / "train").mkdir()
    place.chmod(0o555)
    (place / "train").chmod(0o555)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        with pytest.raises(StageError) as caught, atomic_folders.publishing(place / "train"):
            pass
    finally:
        if root:
            os.seteuid(0)
        place.chmod(0o755)
        shutil.rmtree(place)
    message = str(caught.value)
    assert message.startswith(f"{place}/.train.partial: cannot be written (Permission denied; ")
    said = "Let it be written or choose another folder"
    assert message.endswith(f"B free). {said}; {place}/train is unchanged.")


def test_a_full_disk_keeps_the_old_folder_and_is_reported(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    folder.mkdir()
    with (
        pytest.raises(StageError) as caught,
        atomic_folders.publishing(folder),
        Path("/dev/full").open("wb", 0) as full,
    ):
        full.write(b"0")
    message = str(caught.value)
    assert message.startswith(f"{folder}: cannot be written (No space left on device; ")
    assert message.endswith(f"B free). Make room or choose another folder; {folder} is unchanged.")
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_the_private_folder_of_an_artifact_exists_while_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "train").symlink_to(tmp_path / "disk/train")
    (tmp_path / "disk/train").mkdir()
    for folder in (tmp_path / "train", tmp_path / "plain"):
        with atomic_folders.publishing(folder) as private:
            assert atomic_folders.private_folder(folder).samefile(private)
        assert not atomic_folders.private_folder(folder).exists()
