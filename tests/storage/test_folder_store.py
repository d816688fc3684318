"""A store in a folder: what is no store, and what killed writers leave."""

import os
from pathlib import Path

import pytest

from mlxflow.messages.errors import StoreError
from mlxflow.storage.object_store import Blob, open_store
from tests.storage.s3_server import file_of, nothing


def test_a_missing_folder_is_an_error_and_not_an_empty_store(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/unmounted")
    for attempt in (lambda: store.names("keys/k"), store.check_writable):
        with pytest.raises(StoreError) as caught:
            attempt()
        assert str(caught.value) == "no such folder. Make it, or mount its drive"
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_file_is_refused_and_blocks_nothing(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}")
    (tmp_path / "keys").mkdir()
    os.mkfifo(tmp_path / "keys/pipe")
    for attempt in (lambda: store.read("keys/pipe", 1), lambda: store.download(Blob("keys/pipe", 0), tmp_path / "x")):
        with pytest.raises(StoreError) as caught:
            attempt()
        assert str(caught.value) == "keys/pipe is no regular file"
    assert store.names("keys") == []


def test_a_folder_that_cannot_be_written_is_an_error_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "incoming").write_bytes(b"")
    with pytest.raises(StoreError) as caught:
        open_store(f"file://{tmp_path}").check_writable()
    assert str(caught.value) == "File exists. Move away the file or folder of this name"


def test_files_that_killed_writers_left_are_removed_after_a_week(tmp_path: Path) -> None:
    (tmp_path / "incoming").mkdir()
    old, new = (file_of(tmp_path / "incoming", data) for data in (b"1", b"22"))
    os.utime(old, (0, 0))
    assert open_store(f"file://{tmp_path}").publish({}, "keys/k/x", b"x", nothing, replace=False)
    assert list((tmp_path / "incoming").iterdir()) == [new]
