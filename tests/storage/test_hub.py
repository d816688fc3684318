from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from mlxflow.messages.errors import SourceError
from mlxflow.storage import hub


def test_fetch_passes_name_revision_and_patterns_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any, list[str]]] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((name, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.fetch("a/b", patterns=("*.json",), key="train.model.from") == tmp_path
    assert hub.fetch("a/b@v1", patterns=(), key="train.model.from") == tmp_path
    assert calls == [("a/b", None, ["*.json"]), ("a/b", "v1", [])]


def test_a_model_that_cannot_be_downloaded_is_named_with_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise OSError("no network\n  here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(SourceError) as caught:
        hub.fetch("a/b", patterns=(), key="train.model.from")
    assert str(caught.value) == (
        'train.model.from = "a/b": cannot be fetched from the hub (no network here). Name a folder, or fetch it first.'
    )
