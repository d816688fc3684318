"""Stores in a folder and in a bucket of a real S3 server: whole or absent, and no credentials shown."""

import os
from pathlib import Path

import pytest

from mlxflow.messages.errors import StoreError
from mlxflow.storage.object_store import Blob, ObjectStore, open_store
from tests.storage.s3_server import BUCKET, S3Server, file_of, nothing, use

pytestmark = pytest.mark.usefixtures("no_credentials")


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    if request.param == "file":
        (tmp_path / "shared").mkdir()
        return open_store(f"file://{tmp_path}/shared")
    server: S3Server = request.getfixturevalue("server")
    use(server.port, monkeypatch)
    return open_store(f"s3://{BUCKET}/{tmp_path.name}")


def test_a_published_artifact_is_read_back(store: ObjectStore, tmp_path: Path) -> None:
    data = os.urandom(20_000_000)  # three pieces
    files = {
        Blob("blobs/a", len(data)): file_of(tmp_path / "from", data),
        Blob("blobs/empty", 0): file_of(tmp_path, b""),
    }
    assert store.names("keys/train-1") == []
    assert store.read("keys/train-1/x.json", 100) is None
    assert store.publish(files, "keys/train-1/x.json", b"about them", nothing, replace=False)
    assert store.names("keys/train-1") == ["keys/train-1/x.json"]
    assert store.read("keys/train-1/x.json", 100) == b"about them"
    for blob, path in files.items():
        assert store.download(blob, tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == path.read_bytes()
    assert not store.download(Blob("blobs/a", 7), tmp_path / "back")
    assert not store.download(Blob("blobs/b", 7), tmp_path / "back")


def test_the_first_document_of_a_name_is_kept_unless_it_is_replaced(store: ObjectStore) -> None:
    assert store.publish({}, "keys/k/x.json", b"one", nothing, replace=False)
    assert not store.publish({}, "keys/k/x.json", b"two", nothing, replace=False)
    assert store.read("keys/k/x.json", 100) == b"one"
    assert store.publish({}, "keys/k/x.json", b"three", nothing, replace=True)
    assert store.read("keys/k/x.json", 100) == b"three"


def test_a_file_that_changed_meanwhile_leaves_no_document(store: ObjectStore, tmp_path: Path) -> None:
    def fail() -> None:
        raise StoreError("changed")

    with pytest.raises(StoreError):
        store.publish({Blob("blobs/a", 1): file_of(tmp_path, b"a")}, "keys/k/x.json", b"x", fail, replace=False)
    assert store.names("keys/k") == []


def test_a_document_that_is_too_large_is_not_read(store: ObjectStore) -> None:
    store.publish({}, "keys/k/x.json", b"x" * 101, nothing, replace=False)
    with pytest.raises(StoreError, match=r"^keys/k/x\.json has more than 100 bytes$"):
        store.read("keys/k/x.json", 100)
