"""What lies in the place of a file of ours is neither waited for nor written through."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mlxflow.messages.errors import StageError
from mlxflow.storage.digests import DigestCache
from mlxflow.storage.locks import LockedError, hold
from mlxflow.storage.regular_files import open_log, open_own
from mlxflow.storage.report_files import read_report

IN_THE_WAY: dict[str, Callable[[Path, Path], object]] = {
    "link": lambda path, other: path.symlink_to(other),
    "dangling link": lambda path, other: path.symlink_to(other.with_name("nothing")),
    "second name": lambda path, other: path.hardlink_to(other),
    "FIFO": lambda path, other: os.mkfifo(path),
    "folder": lambda path, other: path.mkdir(),
}


@pytest.fixture
def other(tmp_path: Path) -> Path:
    path = tmp_path / "other/file"
    path.parent.mkdir()
    path.write_text("precious")
    return path


@pytest.mark.parametrize("kind", IN_THE_WAY)
def test_a_lock_is_never_written_through(tmp_path: Path, other: Path, kind: str) -> None:
    path = tmp_path / "lock"
    IN_THE_WAY[kind](path, other)
    if kind == "second name":  # it is locked, and holds no word about its holder
        with hold(path, "", wait=True):
            assert path.read_text() == "precious"
    else:
        with pytest.raises(StageError) as caught, hold(path, "", wait=True):
            pass
        assert str(caught.value) == f"{path}: is no regular file, and nothing is written through it. Move it away."
    assert [one.name for one in other.parent.iterdir()] == ["file"]
    assert other.read_text() == "precious"


@pytest.mark.parametrize("kind", IN_THE_WAY)
def test_a_log_is_never_written_through(tmp_path: Path, other: Path, kind: str) -> None:
    path = tmp_path / "logs/train.log"
    path.parent.mkdir()
    IN_THE_WAY[kind](path, other)
    if kind == "folder":
        with pytest.raises(StageError) as caught:
            open_log(path)
        assert str(caught.value) == f"{path}: is no regular file, and nothing is written through it. Move it away."
    else:
        with open_log(path) as log:
            log.write(b"said")
        assert path.read_text() == "said"
        assert not path.is_symlink()
    assert [one.name for one in other.parent.iterdir()] == ["file"]
    assert other.read_text() == "precious"


def test_a_log_is_written_from_its_beginning(tmp_path: Path) -> None:
    for text in (b"a long text", b"short"):
        with open_log(tmp_path / "logs/log") as log:
            log.write(text)
    assert (tmp_path / "logs/log").read_text() == "short"


def test_opening_a_fifo_does_not_block(tmp_path: Path) -> None:
    path = tmp_path / "report.toml"
    os.mkfifo(path)
    with pytest.raises(OSError, match="is no regular file"):
        read_report(path)
    with pytest.raises(ValueError, match=r"^it is no regular file$"):
        DigestCache(tmp_path / "digests.json").digests(path)


def test_a_lock_file_of_another_user_can_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock"
    path.write_text("")
    real = os.open

    def opened(name: object, flags: int, *rest: int, **named: int) -> int:
        if name == path and flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied", str(name))
        return real(name, flags, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", opened)
    with hold(path, "", wait=False), pytest.raises(LockedError), hold(path, "{holder} is at work", wait=False):
        pass


def test_a_file_whose_fstat_fails_is_named_and_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []

    def fail(descriptor: int) -> os.stat_result:
        opened.append(descriptor)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fstat", fail)
        with pytest.raises(OSError, match="Input/output error") as caught:
            open_own(tmp_path / "lock", os.O_RDWR)
    assert caught.value.filename == str(tmp_path / "lock")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])
