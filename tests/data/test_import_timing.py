"""Tests that imports of installed packages do not count as the time of untrusted work, and that other time does."""

from pathlib import Path

import pytest

from mlxflow.data import guard
from mlxflow.data.guard import ProcessLimits, guarded
from mlxflow.messages.errors import SourceError

_WORK = """
import time
from mlxflow.data.watched import Work

def busy(seconds):
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass

def open_with_imports(name, more):
    with Work("the tokenizer"):
        module = __import__(name)
        busy(more)
    return module.VALUE
"""


@pytest.fixture(autouse=True)
def _slow_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put packages that take long to import on the path of guarded processes, and lower the limit."""
    (tmp_path / "work_of_a_test.py").write_text(_WORK)
    (tmp_path / "slow_module.py").write_text("from work_of_a_test import busy\nbusy(1.5)\nVALUE = 1\n")
    (tmp_path / "slow_package").mkdir()
    (tmp_path / "slow_package/__init__.py").write_text("from slow_package import first, second\nVALUE = 2\n")
    for name in ("first", "second"):
        (tmp_path / f"slow_package/{name}.py").write_text("from work_of_a_test import busy\nbusy(0.7)\n")
    (tmp_path / "failing_module.py").write_text("raise ImportError('it needs another package')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(guard, "LIMITS", ProcessLimits(seconds=0.5))


def _open(name: str, more: float = 0.0) -> int:
    value: int = guarded("work_of_a_test:open_with_imports", name, more)
    return value


@pytest.mark.parametrize(("name", "value"), [("slow_module", 1), ("slow_package", 2)])
def test_importing_a_package_does_not_count_as_the_time_of_a_tokenizer(name: str, value: int) -> None:
    assert _open(name) == value


def test_the_time_after_an_import_counts() -> None:
    with pytest.raises(SourceError) as caught:
        _open("slow_module", more=30)
    assert str(caught.value) == "the tokenizer took over 0.5 s of processor time. Fix it or name another."


def test_a_module_that_never_ends_does_not_lift_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "LIMITS", ProcessLimits(seconds=0.2, module_seconds=0.3))
    with pytest.raises(SourceError, match=r"took over 0\.2 s of processor time"):
        _open("slow_module")


def test_an_import_that_fails_is_raised_and_time_counts_again() -> None:
    with guard.Guard() as process:
        with pytest.raises(ImportError, match=r"it needs another package"):
            process.call("work_of_a_test:open_with_imports", "failing_module", 0)
        with pytest.raises(SourceError, match=r"took over 0\.5 s of processor time"):
            process.call("work_of_a_test:open_with_imports", "json", 30)
