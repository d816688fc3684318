import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlxflow import device, doctor
from mlxflow.kernels import choice, language
from tests.conftest import REPOSITORY

_GOOD = 'print(\'begin \' + NAME); print(\'{"name": "\' + NAME + \'", "serves": true, "reason": ""}\', flush=True)'
_BEGIN = "print('begin ' + NAME, flush=True); "
_HANG = "__import__('threading').Event().wait()"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def _prover(body: str) -> list[str]:
    return [sys.executable, "-c", f"import sys\nfor NAME in sys.argv[1:]:\n    {body}"]


def _outcomes(body: str, *names: str, compiler: str | None = None, limit: float = 20.0) -> dict[str, bool]:
    first = None if compiler is None else _prover(compiler)
    found = choice.prove_all(names, "here", command=_prover(body), compiler=first, limit_seconds=limit)
    return {name: outcome.serves for name, outcome in found.items()}


def _reason(name: str) -> str:
    return choice.known_outcomes("here")[name].reason


# --- the cache


def test_what_was_proved_is_kept_and_not_proved_again(capfd: pytest.CaptureFixture[str]) -> None:
    assert _outcomes(_GOOD, "a", "b") == {"a": True, "b": True}
    assert capfd.readouterr().err == "proving 2 GPU kernels, once on this device: a, b\n"
    assert _outcomes("raise SystemExit(1)", "a", "b") == {"a": True, "b": True}
    assert capfd.readouterr().err == ""


def test_only_what_is_not_known_is_proved() -> None:
    assert _outcomes(_GOOD, "a") == {"a": True}
    assert _outcomes(_BEGIN + "sys.exit(1)", "a", "b") == {"a": True, "b": False}


def test_why_one_does_not_serve_is_said_once(capfd: pytest.CaptureFixture[str]) -> None:
    assert _outcomes(_BEGIN + "sys.exit(1)", "a") == {"a": False}
    line = "GPU kernel a is not used on this device: its process ended with code 1"
    assert capfd.readouterr().err.splitlines()[1:] == [line]
    assert _outcomes(_GOOD, "a") == {"a": False}
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"[]",
        b"{",
        b"\xff\xfe",
        b'{"here": 3}',
        b'{"here": {"a": {"other": 1}}}',
        b'{"here": {"a": 1}}',
        b'{"here": {"a": {"serves": "false", "reason": ""}}}',
        b'{"another version": {"a": {"serves": false, "reason": "then"}}}',
    ],
)
def test_a_damaged_or_foreign_cache_counts_as_empty(damaged: bytes) -> None:
    choice.cache_file().parent.mkdir(parents=True)
    choice.cache_file().write_bytes(damaged)
    assert _outcomes(_GOOD, "a") == {"a": True}
    assert _outcomes("raise SystemExit(1)", "a") == {"a": True}, "what came out is kept in its place"


def test_outcomes_of_another_version_stay_beside_those_of_this_one() -> None:
    assert _outcomes(_GOOD, "a") == {"a": True}
    found = choice.prove_all(["a"], "there", command=_prover("sys.exit(3)"), compiler=None, limit_seconds=20)
    assert not found["a"].serves
    assert _outcomes("raise SystemExit(1)", "a") == {"a": True}


def test_a_cache_whose_folder_is_a_file_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert _outcomes(_GOOD, "a") == {"a": True}


@contextmanager
def read_only_cache() -> Iterator[Path]:
    """Give a cache folder that may be read and not written, by root neither."""
    room = Path(tempfile.mkdtemp())
    (room / "mlxflow").mkdir()
    kept = {"here": {"a": {"serves": False, "reason": "it was slow"}}}
    (room / "mlxflow" / "kernels.json").write_text(json.dumps(kept))
    for folder in (room / "mlxflow", room):
        folder.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield room
    finally:
        os.seteuid(user)
        for folder in (room, room / "mlxflow"):
            folder.chmod(0o755)
        shutil.rmtree(room)


def test_a_read_only_cache_folder_is_read_and_what_it_lacks_is_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    told = 'echo \'{"name": "b", "serves": true, "reason": ""}\''
    with read_only_cache() as room:
        monkeypatch.setenv("XDG_CACHE_HOME", str(room))
        for _ in range(2):
            found = choice.prove_all(
                ["a", "b"], "here", command=["/bin/sh", "-c", told], compiler=None, limit_seconds=20
            )
            assert {name: outcome.serves for name, outcome in found.items()} == {"a": False, "b": True}
        assert sorted(path.name for path in (room / "mlxflow").iterdir()) == ["kernels.json"]


def test_of_two_processes_that_want_the_same_one_proves_and_the_other_waits(tmp_path: Path) -> None:
    record, go = tmp_path / "proved", tmp_path / "go"
    wait = f"import pathlib, threading\n    while not pathlib.Path({str(go)!r}).exists(): threading.Event().wait(0.01)"
    prover = _prover(f"open({str(record)!r}, 'a').write(NAME)\n    {wait}\n    {_GOOD}")
    program = (
        "import sys\nfrom mlxflow.kernels import choice\n"
        f"found = choice.prove_all(['a', 'b'], 'here', command={prover!r}, compiler=None, limit_seconds=60)\n"
        "print([outcome.serves for outcome in found.values()])"
    )

    def start() -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", program]
        return subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
        )

    both = [start(), start()]
    first_lines = [process.stderr.readline() for process in both if process.stderr]
    go.write_text("")
    rest = [process.communicate(timeout=60) for process in both]
    assert [out for out, _ in rest] == ["[True, True]\n"] * 2
    assert record.read_text() == "ab", "each was proved once"
    assert sum("is proving the GPU kernels; waiting for it" in line for line in first_lines) == 1
    assert sum(line.startswith("proving 2 GPU kernels") for line in first_lines) == 1


# --- processes that end badly


def test_one_that_crashes_its_process_does_not_serve_and_the_others_do() -> None:
    assert _outcomes(_BEGIN + "NAME == 'b' and sys.exit(7); " + _GOOD, "a", "b", "c") == {
        "a": True,
        "b": False,
        "c": True,
    }
    assert _reason("b") == "its process ended with code 7"


def test_what_a_process_says_last_is_the_reason() -> None:
    assert _outcomes(_BEGIN + "raise RuntimeError('no device')", "a") == {"a": False}
    assert _reason("a") == "its process ended with code 1: RuntimeError: no device"


def test_one_that_hangs_does_not_serve_and_the_others_do() -> None:
    body = _BEGIN + f"NAME == 'b' and {_HANG}; " + _GOOD
    assert _outcomes(body, "a", "b", "c", limit=1.0) == {"a": True, "b": False, "c": True}
    assert _reason("b") == "its process told nothing for 1 s"


def test_one_that_ends_without_a_word_does_not_serve() -> None:
    assert _outcomes("pass", "a") == {"a": False}
    assert _reason("a") == "its proof told nothing"


# --- compiling first


def test_all_are_compiled_at_the_same_time_before_any_is_proved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    # each compilation waits for the other's beginning, and a proof for the end of both
    compiler = (
        f"import pathlib, threading; here = pathlib.Path({str(tmp_path)!r}); (here / NAME).write_text('');"
        "exec('while len(list(here.glob(\"[ab]\"))) < 2: threading.Event().wait(0.01)');"
        "(here / (NAME + '.done')).write_text('')"
    )
    body = f"assert len(list(__import__('pathlib').Path({str(tmp_path)!r}).glob('*.done'))) == 2; {_GOOD}"
    assert _outcomes(body, "a", "b", compiler=compiler) == {"a": True, "b": True}


def test_one_that_does_not_compile_is_not_proved_and_the_others_are() -> None:
    said = "it does not run: no headers"
    told = json.dumps({"name": "b", "serves": False, "reason": said})
    compiler = f"NAME == 'b' and print({told!r}); NAME == 'c' and sys.exit(5); NAME == 'd' and {_HANG}"
    body = f"assert NAME == 'a'; {_GOOD}"
    expected = {"a": True, "b": False, "c": False, "d": False}
    assert _outcomes(body, "a", "b", "c", "d", compiler=compiler, limit=1.5) == expected
    assert _reason("b") == said
    assert _reason("c") == "its process ended with code 5"
    assert _reason("d") == "its process told nothing for 1.5 s"


# --- the device


def test_a_device_without_kernels_proves_nothing() -> None:
    found = choice.choose(["rms_norm/float32/64"])
    assert found.refused == {"rms_norm/float32/64": "MLX takes no kernels on this device"}
    assert not choice.cache_file().exists()


def test_an_outcome_holds_for_one_device_system_mlx_and_state_of_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(target: Any, name: str, value: Any) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            choice._sources.cache_clear()
            return choice.environment()

    usual = choice.environment()
    assert usual == choice.environment()
    others = [
        changed(device, "name", lambda: "another device"),
        changed(platform, "release", lambda: "another system"),
        changed(device, "environment", lambda _: {"mlx": "another version"}),
        changed(Path, "read_bytes", lambda _: b"another source"),
    ]
    choice._sources.cache_clear()
    assert len({usual, *others}) == 5


def test_the_doctor_shows_what_the_proof_came_to(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._describe_kernels() == "none on this device"
    monkeypatch.setattr(language, "language", lambda: "metal")
    assert doctor._describe_kernels() == "not proved yet; the first training run does it"
    body = "NAME == 'b' and sys.exit(3); " + _GOOD
    choice.prove_all(["a", "b"], choice.environment(), command=_prover(body), compiler=None, limit_seconds=20)
    assert doctor._describe_kernels() == "a: serves\nb: its process ended with code 3"
