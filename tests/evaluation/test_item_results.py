"""Results are kept by key; damaged files are computed again, and old ones go."""

from pathlib import Path

import pytest

from mlxflow.evaluation import item_results
from mlxflow.evaluation.item_results import ItemResult, ResultCache, TaskResult

RESULT = TaskResult(
    "choice", True, [ItemResult("1", 1.0, (-0.1, -1e300)), ItemResult("2", 0.5, (), "é", 3)], {"a": 0.1}, 1
)


def test_a_result_is_read_as_it_was_stored(tmp_path: Path) -> None:
    cache = ResultCache(tmp_path / "scores")
    assert cache.get("k") is None
    cache.put("k", RESULT)
    assert cache.get("k") == RESULT
    assert cache.get("other") is None
    cache.clear(["k", "other"])
    assert cache.get("k") is None


def test_a_damaged_result_is_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = ResultCache(tmp_path)
    cache.put("k", RESULT)
    file = next(tmp_path.glob("*.json"))
    file.write_bytes(file.read_bytes().replace(b"0.5", b"0.9"))
    assert cache.get("k") is None
    assert "its bytes do not fit its checksum). It is computed again." in capsys.readouterr().err


def test_the_oldest_results_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_results, "_MOST_FILES", 2)
    cache = ResultCache(tmp_path)
    for key in "abc":
        cache.put(key, RESULT)
    assert cache.get("a") is None
    assert cache.get("c") == RESULT


def test_an_item_shows_what_it_has() -> None:
    assert RESULT.items[1].named() == {"item": "2", "score": 0.5, "text": "é", "cut_tokens": 3}
    assert RESULT.items[0].named() == {"item": "1", "score": 1.0, "nats": (-0.1, -1e300)}
