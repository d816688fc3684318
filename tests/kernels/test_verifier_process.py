import json
import os
from pathlib import Path

import pytest

from tests.kernels.test_registry import _BEGIN, _GOOD, _HANG, _cold, _hasty, _outcomes, _own_cache, _reason  # noqa: F401


def test_a_kernel_that_crashes_its_process_is_refused_and_the_others_are_used() -> None:
    assert _outcomes(_BEGIN + "NAME == 'b' and sys.exit(7); " + _GOOD, "a", "b", "c") == {
        "a": True,
        "b": False,
        "c": True,
    }
    assert _reason("b") == "its process ended with code 7"


def test_the_last_line_of_a_process_is_the_reason() -> None:
    assert _outcomes(_BEGIN + "raise RuntimeError('no device')", "a") == {"a": False}
    assert _reason("a") == "its process ended with code 1: RuntimeError: no device"


def test_a_kernel_that_hangs_is_refused_and_the_others_are_used() -> None:
    body = _BEGIN + f"NAME == 'b' and {_HANG}; " + _GOOD
    assert _outcomes(body, "a", "b", "c", limit=1.0) == {"a": True, "b": False, "c": True}
    assert _reason("b") == "its process printed nothing for 1 s"


def test_a_process_that_ends_without_a_result_refuses_its_kernel() -> None:
    assert _outcomes("pass", "a") == {"a": False}
    assert _reason("a") == "its verification printed no result"


@pytest.mark.usefixtures("_hasty")
def test_all_kernels_are_compiled_together_before_any_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    # each compilation waits for the others' beginnings, the prover's that it has begun too, and a proof for all ends
    waiting = "exec('while len(list(here.glob(\"[abc]\"))) < 3: threading.Event().wait(0.01)')"
    compiler = (
        f"import pathlib, threading; here = pathlib.Path({str(tmp_path)!r}); (here / NAME).write_text('');"
        f"{waiting}; (here / (NAME + '.done')).write_text('')"
    )
    body = _cold(tmp_path, f"{compiler}; break").replace(
        f"\n    {_GOOD}", f"\n    assert len(list(pathlib.Path({str(tmp_path)!r}).glob('*.done'))) == 3; {_GOOD}"
    )
    assert _outcomes(body, "a", "b", "c", compiler=compiler) == {"a": True, "b": True, "c": True}


def test_compiled_kernels_are_verified_by_one_process(tmp_path: Path) -> None:
    process = f"open({str(tmp_path / 'processes')!r}, 'a').write(str(__import__('os').getpid()) + ' '); "
    assert _outcomes(process + _GOOD, "a", "b", compiler=process) == {"a": True, "b": True}
    assert len({*(tmp_path / "processes").read_text().split()}) == 1


@pytest.mark.usefixtures("_hasty")
def test_timings_taken_during_compilation_are_repeated(tmp_path: Path) -> None:
    slow = json.dumps({"name": "a", "passed": False, "reason": "slow", "error": 0, "seconds": 2, "mlx_seconds": 1})
    assert _outcomes(_cold(tmp_path, f"print({slow!r}); break"), "a", "b", compiler="pass") == {"a": True, "b": True}


@pytest.mark.usefixtures("_hasty")
def test_a_kernel_that_does_not_compile_is_not_verified_and_the_others_are(tmp_path: Path) -> None:
    said = "it does not run: no headers"
    told = json.dumps({"name": "b", "passed": False, "reason": said})
    compiler = f"NAME == 'b' and print({told!r}); NAME == 'c' and sys.exit(5); NAME == 'd' and {_HANG}"
    body = _cold(tmp_path).replace(f"\n    {_GOOD}", f"\n    assert NAME == 'a'; {_GOOD}")
    expected = {"a": True, "b": False, "c": False, "d": False}
    assert _outcomes(body, "a", "b", "c", "d", compiler=compiler, limit=1.5) == expected
    assert _reason("b") == said
    assert _reason("c") == "its process ended with code 5"
    assert _reason("d") == "its process printed nothing for 1.5 s"
