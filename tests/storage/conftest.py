"""What the tests of stores share: an S3 server, and an environment without credentials."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.storage import s3_server
from tests.storage.s3_server import S3Server


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    pytest.importorskip("obstore")
    pytest.importorskip("moto")
    with s3_server.s3_server() as running:
        yield running


@pytest.fixture
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
