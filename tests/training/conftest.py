from pathlib import Path

import pytest

from tests.training.small_training import ROOM


@pytest.fixture(autouse=True)
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give runs that are told of no store one that ends with the test."""
    monkeypatch.setitem(ROOM, "folder", tmp_path / "room")
