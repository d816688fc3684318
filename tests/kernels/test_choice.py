import sys
from pathlib import Path

import pytest

from mlxflow.kernels import choice
from mlxflow.kernels.operations import operation
from mlxflow.kernels.proof import prove

_GOOD = 'print(\'begin \' + NAME); print(\'{"name": "\' + NAME + \'", "serves": true, "reason": ""}\', flush=True)'


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def _prover(body: str) -> list[str]:
    return [sys.executable, "-c", f"import sys\nfor NAME in sys.argv[1:]:\n    {body}"]


def _outcomes(body: str, *names: str, limit: float = 20.0) -> dict[str, bool]:
    found = choice.prove_all(names, "here", command=_prover(body), limit_seconds=limit)
    return {name: outcome.serves for name, outcome in found.items()}


def test_what_was_proved_is_kept_and_not_proved_again() -> None:
    assert _outcomes(_GOOD, "a", "b") == {"a": True, "b": True}
    assert _outcomes("raise SystemExit(1)", "a", "b") == {"a": True, "b": True}


@pytest.mark.parametrize("damaged", ["", "[]", "{", '{"here": 3}', '{"here": {"a": {"other": 1}}}'])
def test_a_damaged_or_foreign_cache_counts_as_empty(damaged: str) -> None:
    choice.cache_file().parent.mkdir(parents=True)
    choice.cache_file().write_text(damaged)
    assert _outcomes(_GOOD, "a") == {"a": True}


def test_one_that_crashes_its_process_does_not_serve_and_the_others_do() -> None:
    body = "print('begin ' + NAME, flush=True); NAME == 'b' and sys.exit(7); " + _GOOD
    assert _outcomes(body, "a", "b", "c") == {"a": True, "b": False, "c": True}
    assert choice.known_outcomes("here")["b"].reason == "its process ended with code 7"


def test_one_that_hangs_does_not_serve() -> None:
    body = "print('begin ' + NAME, flush=True); NAME == 'b' and __import__('threading').Event().wait(); " + _GOOD
    assert _outcomes(body, "a", "b", limit=0.5) == {"a": True, "b": False}


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert _outcomes(_GOOD, "a") == {"a": True}


def test_a_wrong_kernel_is_found_out() -> None:
    right = operation("sum_of_squares/float32")
    wrong = right._replace(kernel=lambda x: [right.reference(x)[0] * 1.001])
    assert prove(wrong).reason == "it is wrong by 0.001 (at most 2e-05)"


def test_a_kernel_that_does_not_run_is_found_out() -> None:
    assert prove(operation("sum_of_squares/float32")).reason.startswith("it does not run")
