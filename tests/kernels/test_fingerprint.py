import platform
from pathlib import Path
from typing import Any

import pytest

from mlxflow.device import compute_device
from mlxflow.kernels import fingerprint
from tests.kernels.test_registry import _own_cache  # noqa: F401


def test_a_result_holds_for_one_device_system_mlx_and_source_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(target: Any, name: str, value: Any) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            fingerprint.sources_digest.cache_clear()
            return fingerprint.environment()

    usual = fingerprint.environment()
    assert usual == fingerprint.environment()
    others = [
        changed(compute_device, "name", lambda: "another device"),
        changed(platform, "release", lambda: "another system"),
        changed(compute_device, "environment", lambda _: {"mlx": "another version"}),
        changed(Path, "read_bytes", lambda _: b"another source"),
    ]
    fingerprint.sources_digest.cache_clear()
    assert len({usual, *others}) == 5
