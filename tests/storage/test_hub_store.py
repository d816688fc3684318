"""A store in a data set on the Hugging Face hub, by the real client: one commit for each artifact."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.storage.hub_server import TOKEN, Hub, hub

_CLIENT = """
import json, sys
from pathlib import Path
from mlxflow.messages.errors import StoreError
from mlxflow.storage.object_store import Blob, open_store

def result(act):
    try:
        return act()
    except StoreError as error:
        return f"error: {error}"

store, path = open_store(sys.argv[1]), Path("file")
blob, record = Blob("v1/blobs/ab/x", path.stat().st_size), "v1/keys/k/x.record"
def publish(document, replace=False):
    return store.publish({blob: path}, record, document, lambda: None, replace=replace)
acts = {
    "names": lambda: store.names("v1/keys/k"),
    "read": lambda: (store.read(record, 10) or b"").decode(),
    "has": lambda: store.has(blob),
    "probe": lambda: store.check_writable(),
    "publish": lambda: publish(b"one"),
    "publish another": lambda: publish(b"two"),
    "replace": lambda: publish(b"three", replace=True),
    "download": lambda: store.download(blob, Path("back")) and Path("back").read_bytes() == path.read_bytes(),
}
print(json.dumps([result(acts[name]) for name in sys.argv[2:]]))
"""


def _start(server: Hub, folder: Path, *acts: str, url: str = "hf://datasets/owner/store/a") -> subprocess.Popen[str]:
    (folder / "file").write_bytes(b"data" * 10_000)
    variables = {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HOME": str(folder), "HF_HUB_DISABLE_XET": "1"}
    variables |= {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-W", "ignore", "-c", _CLIENT, url, *acts]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env={**os.environ, **variables}, stdout=pipe, stderr=pipe, text=True)


def _result(process: subprocess.Popen[str]) -> list[Any]:
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    results: list[Any] = json.loads(out)
    return results


@pytest.mark.matrix
def test_an_artifact_is_one_commit_and_the_first_record_is_kept(tmp_path: Path) -> None:
    before, after = ("names", "read", "has", "download"), ("names", "has", "download", "read")
    with hub() as server:
        results = _result(
            _start(server, tmp_path, *before, "probe", "publish", *after, "publish another", "read", "replace", "read")
        )
        assert results[:6] == [[], "", False, False, None, True]
        assert results[6:10] == [["v1/keys/k/x.record"], True, True, "one"]
        assert results[10:] == [False, "one", True, "three"]
        assert server.commits == ["Add x.record"] * 2
        assert set(server.files) == {"a/v1/blobs/ab/x", "a/v1/keys/k/x.record"}


@pytest.mark.matrix
def test_of_two_uploads_at_once_one_is_kept(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "ab"]
    with hub() as server:
        for folder in folders:
            folder.mkdir()
        running = [
            _start(server, folder, act) for folder, act in zip(folders, ("publish", "publish another"), strict=True)
        ]
        assert sorted(_result(one) for one in running) == [[False], [True]]
        assert len(server.commits) == 1


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("url", "act", "expected"),
    [
        ("hf://datasets/owner/other", "names", "no such data set, or the credentials do not allow to see it"),
        ("hf://datasets/owner/store", "publish", "the hub answered 403"),
        ("hf://datasets/owner/store", "probe", "the hub answered 403"),
    ],
)
def test_a_hub_that_refuses_is_one_line(tmp_path: Path, url: str, act: str, expected: str) -> None:
    with hub() as server:
        server.refuses = True
        assert _result(_start(server, tmp_path, act, url=url)) == [f"error: {expected}"]
