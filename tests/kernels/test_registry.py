import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlxflow.device import compute_device
from mlxflow.kernels import cache, fingerprint, registry, verifier_process
from mlxflow.kernels import early_start as ahead_of
from mlxflow.kernels.early_start import EarlyVerifier, cache_file, lock_file
from mlxflow.kernels.verifier_process import Verifier
from mlxflow.storage.locks import hold
from tests.conftest import REPOSITORY

_GOOD = 'print(\'begin \' + NAME); print(\'{"name": "\' + NAME + \'", "passed": true, "reason": ""}\', flush=True)'
_BEGIN = "print('begin ' + NAME, flush=True); "
_HANG = "__import__('threading').Event().wait()"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def _prover(body: str) -> list[str]:
    return [sys.executable, "-c", f"import sys\nfor NAME in sys.stdin.readline().split():\n    {body}"]


def _outcomes(
    body: str,
    *names: str,
    compiler: str | None = None,
    limit: float = 20.0,
    meanwhile: Callable[[], object] = lambda: None,
) -> dict[str, bool]:
    compiled, command = None if compiler is None else _prover(compiler), _prover(body)
    found = registry.verify_all(names, "here", Verifier(command, compiled, limit), meanwhile=meanwhile)
    return {name: result.passed for name, result in found.items()}


def _reason(name: str) -> str:
    return registry.known_results("here")[name].reason


# --- the cache


def test_what_was_proved_is_kept_and_not_proved_again(capfd: pytest.CaptureFixture[str]) -> None:
    assert _outcomes(_GOOD, "a", "b") == {"a": True, "b": True}
    assert capfd.readouterr().err == "verifying 2 GPU kernels, once on this device: a, b\n"
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
        b'{"here": {"a": {"passed": "false", "reason": ""}}}',
        b'{"another version": {"a": {"passed": false, "reason": "then"}}}',
    ],
)
def test_a_damaged_or_foreign_cache_counts_as_empty(damaged: bytes) -> None:
    cache_file().write_bytes(damaged)
    assert _outcomes(_GOOD, "a") == {"a": True}
    assert _outcomes("raise SystemExit(1)", "a") == {"a": True}, "what came out is kept in its place"


def test_outcomes_of_another_version_stay_beside_those_of_this_one() -> None:
    assert _outcomes(_GOOD, "a") == {"a": True}
    found = registry.verify_all(["a"], "there", Verifier(_prover("sys.exit(3)"), None, 20))
    assert not found["a"].passed
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
    kept = {"here": {"a": {"passed": False, "reason": "it was slow"}}}
    cache.write_table(room / "mlxflow" / "kernels.json", kept)
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
    told = 'echo \'{"name": "b", "passed": true, "reason": ""}\''
    with read_only_cache() as room:
        monkeypatch.setenv("XDG_CACHE_HOME", str(room))
        for _ in range(2):
            found = registry.verify_all(["a", "b"], "here", Verifier(["/bin/sh", "-c", told], None, 20))
            assert {name: result.passed for name, result in found.items()} == {"a": False, "b": True}
        assert sorted(path.name for path in (room / "mlxflow").iterdir()) == ["kernels.json"]


def test_of_two_processes_that_want_the_same_one_proves_and_the_other_waits(tmp_path: Path) -> None:
    record, go = tmp_path / "proved", tmp_path / "go"
    wait = f"import pathlib, threading\n    while not pathlib.Path({str(go)!r}).exists(): threading.Event().wait(0.01)"
    prover = _prover(f"open({str(record)!r}, 'a').write(NAME)\n    {wait}\n    {_GOOD}")
    program = (
        "import sys\nfrom mlxflow.kernels import registry\nfrom mlxflow.kernels.verifier_process import Verifier\n"
        f"found = registry.verify_all(['a', 'b'], 'here', Verifier({prover!r}, None, 60))\n"
        "print([result.passed for result in found.values()])"
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
    assert sum("is verifying the GPU kernels; waiting for it" in line for line in first_lines) == 1
    assert sum(line.startswith("verifying 2 GPU kernels") for line in first_lines) == 1


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
    assert _reason("b") == "its process printed nothing for 1 s"


def test_one_that_ends_without_a_word_does_not_serve() -> None:
    assert _outcomes("pass", "a") == {"a": False}
    assert _reason("a") == "its verification printed no result"


# --- compiling first, where a kernel that was begun tells nothing for a while


@pytest.fixture
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifier_process, "COLD_SECONDS", 0.2)


def _cold(tmp_path: Path, then: str = "break") -> str:
    """Return what proves kernels, but the first time compiles until it is told to stop, and does `then`."""
    first = f"pathlib.Path({str(tmp_path)!r}) / 'first'"
    return (
        f"{_BEGIN}import pathlib\n    if not ({first}).exists():\n        ({first}).write_text('')\n"
        f"        assert sys.stdin.readline() == 'stop\\n'\n        {then}\n    {_GOOD}"
    )


@pytest.mark.usefixtures("_hasty")
def test_all_are_compiled_at_the_same_time_before_any_is_proved(
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


def test_where_all_is_compiled_already_one_process_proves_and_none_compiles(tmp_path: Path) -> None:
    process = f"open({str(tmp_path / 'processes')!r}, 'a').write(str(__import__('os').getpid()) + ' '); "
    assert _outcomes(process + _GOOD, "a", "b", compiler=process) == {"a": True, "b": True}
    assert len({*(tmp_path / "processes").read_text().split()}) == 1


@pytest.mark.usefixtures("_hasty")
def test_while_all_are_compiled_something_else_is_done_and_nothing_is_proved_until_it_is(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "others").mkdir()
    done = tmp_path / "done"

    def meanwhile() -> None:
        deadline = time.monotonic() + 20
        while len(list((tmp_path / "others").iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        done.write_text("")

    compiler = f"import pathlib; (pathlib.Path({str(tmp_path)!r}) / 'others' / NAME).write_text('')"
    body = _cold(tmp_path).replace(f"\n    {_GOOD}", f"\n    assert pathlib.Path({str(done)!r}).exists(); {_GOOD}")
    names = {"a": True, "b": True, "c": True}
    assert _outcomes(body, *names, compiler=compiler, meanwhile=meanwhile) == names
    assert capfd.readouterr().err.splitlines()[1:] == [
        "MLX compiles its own operations for that and for training, once on this machine: about a minute"
    ]
    assert sorted(path.name for path in (tmp_path / "others").iterdir()) == ["b", "c"], "the prover compiles its own"


def test_where_nothing_has_to_be_compiled_nothing_is_done_meanwhile() -> None:
    asked: list[int] = []
    assert _outcomes(_GOOD, "a", "b", compiler="pass", meanwhile=lambda: asked.append(1)) == {"a": True, "b": True}
    assert not asked


@pytest.mark.usefixtures("_hasty")
def test_what_was_timed_beside_compilations_is_timed_again(tmp_path: Path) -> None:
    slow = json.dumps({"name": "a", "passed": False, "reason": "slow", "error": 0, "seconds": 2, "mlx_seconds": 1})
    assert _outcomes(_cold(tmp_path, f"print({slow!r}); break"), "a", "b", compiler="pass") == {"a": True, "b": True}


@pytest.mark.usefixtures("_hasty")
def test_one_that_does_not_compile_is_not_proved_and_the_others_are(tmp_path: Path) -> None:
    said = "it does not run: no headers"
    told = json.dumps({"name": "b", "passed": False, "reason": said})
    compiler = f"NAME == 'b' and print({told!r}); NAME == 'c' and sys.exit(5); NAME == 'd' and {_HANG}"
    body = _cold(tmp_path).replace(f"\n    {_GOOD}", f"\n    assert NAME == 'a'; {_GOOD}")
    expected = {"a": True, "b": False, "c": False, "d": False}
    assert _outcomes(body, "a", "b", "c", "d", compiler=compiler, limit=1.5) == expected
    assert _reason("b") == said
    assert _reason("c") == "its process ended with code 5"
    assert _reason("d") == "its process printed nothing for 1.5 s"


@pytest.mark.usefixtures("_hasty")
@pytest.mark.parametrize(
    ("then", "reason"),
    [
        (_HANG, "its process printed nothing for 1.5 s"),
        ("sys.exit(7)", "its process ended with code 7"),
        ("raise RuntimeError('no device')", "its process ended with code 1: RuntimeError: no device"),
    ],
)
def test_the_one_that_was_begun_may_be_the_one_that_hangs_or_crashes(tmp_path: Path, then: str, reason: str) -> None:
    body = _cold(tmp_path, then)
    assert _outcomes(body, "a", "b", "c", compiler="pass", limit=1.5) == {"a": False, "b": True, "c": True}
    assert _reason("a") == reason


def test_who_brings_down_its_process_before_it_is_begun_is_found_alone() -> None:
    body = f"'b' in NAMES and sys.exit(7); {_GOOD}"
    command = [
        sys.executable,
        "-c",
        f"import sys\nNAMES = sys.stdin.readline().split()\nfor NAME in NAMES:\n    {body}",
    ]
    found = registry.verify_all(["a", "b", "c"], "here", Verifier(command, None, 20))
    assert [result.passed for result in found.values()] == [True, False, True]


# --- a process that is started ahead


@pytest.fixture
def _takes_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "language", lambda: "cuda")


def _is_running(number: int) -> bool:
    try:
        return bool(psutil.Process(number).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _wait_for_end(number: int) -> None:
    for _ in range(2000):
        if not _is_running(number):
            return
        threading.Event().wait(0.01)
    raise AssertionError("it was left behind")


def _number(ahead: EarlyVerifier) -> int:
    assert ahead.process is not None
    return ahead.process._process.pid


@pytest.mark.usefixtures("_takes_kernels")
def test_a_process_started_ahead_is_the_one_that_proves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = f"open({str(tmp_path / 'provers')!r}, 'a').write(str(__import__('os').getpid()) + ' '); "
    command = _prover(record + _GOOD)
    monkeypatch.setattr(registry, "COMMAND", command)
    with registry.begin(command=command) as ahead:
        number = _number(ahead)
        assert registry.choose(["a", "b"], ahead).selected == ["a", "b"]
        assert {*(tmp_path / "provers").read_text().split()} == {str(number)}
        _wait_for_end(number)
        with hold(lock_file(), "", wait=False):
            pass  # the lock is free, though the block goes on
    with registry.begin(command=command) as ahead:
        assert ahead.process is None, "all is known"


def test_the_proof_itself_may_be_started_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "language", lambda: "metal")
    with registry.begin() as ahead:
        found = registry.choose(["sum_of_squares/float32"], ahead).results["sum_of_squares/float32"]
    assert found.reason.startswith("it does not run: "), "on the CPU"


@pytest.mark.usefixtures("_takes_kernels")
def test_the_process_may_be_started_before_mlx_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    command = _prover(_GOOD)
    monkeypatch.setattr(registry, "COMMAND", command)
    monkeypatch.setattr(ahead_of, "may_have_gpu", lambda: False)
    assert ahead_of.begin_early(command).process is None, "there is no GPU"
    monkeypatch.setattr(ahead_of, "may_have_gpu", lambda: True)
    with ahead_of.begin_early(command) as early:
        number = _number(early)
        with registry.begin(early, command) as ahead:
            assert _number(ahead) == number
            assert registry.choose(["a"], ahead).selected == ["a"]
        _wait_for_end(number)
    assert ahead_of.begin_early(command).process is None, "something was proved before"


@pytest.mark.usefixtures("_takes_kernels")
def test_a_process_started_too_early_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead_of, "may_have_gpu", lambda: True)
    with ahead_of.begin_early(_prover(_GOOD)) as early:
        number = _number(early)
        monkeypatch.setattr(registry, "language", lambda: None)
        with registry.begin(early):
            _wait_for_end(number)
        with hold(lock_file(), "", wait=False):
            pass


def test_it_is_started_without_mlx() -> None:
    imports = "import sys, mlxflow.workflow.execution, mlxflow.stages.train, mlxflow.kernels.early_start; "
    loaded = imports + "print({name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True, timeout=60)
    assert "'mlxflow'" in done.stdout
    assert "'mlx'" not in done.stdout


@pytest.mark.usefixtures("_takes_kernels")
def test_a_process_started_ahead_that_ended_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "COMMAND", _prover(_GOOD))
    with registry.begin(command=[sys.executable, "-c", "raise SystemExit(9)"]) as ahead:
        _wait_for_end(_number(ahead))
        assert registry.choose(["a"], ahead).selected == ["a"]


@pytest.mark.usefixtures("_takes_kernels")
def test_a_process_started_ahead_and_told_nothing_ends_with_the_block() -> None:
    with registry.begin() as ahead:
        number = _number(ahead)
        assert _is_running(number)
    _wait_for_end(number)


@pytest.mark.usefixtures("_takes_kernels")
def test_of_two_that_begin_at_once_one_starts_a_process() -> None:
    with registry.begin(command=_prover(_GOOD)) as first, registry.begin(command=_prover(_GOOD)) as second:
        assert first.process is not None
        assert second.process is None
    with registry.begin(command=_prover(_GOOD)) as third:
        assert third.process is not None


def test_a_device_without_kernels_starts_nothing() -> None:
    with registry.begin() as ahead:
        assert ahead.process is None


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("is_told", [False, True])
def test_a_process_started_ahead_ends_when_its_parent_does(ending: signal.Signals, is_told: bool) -> None:
    command = [sys.executable, "-m", "mlxflow.kernels.verification", "-"]
    if is_told:  # at work on a kernel that hangs
        command = [sys.executable, "-c", _HANGING_PROOF, "-"]
    program = (
        "import signal, sys, threading\nfrom mlxflow.kernels import registry\nregistry.language = lambda: 'metal'\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job of a shell ignores it
        f"with registry.begin(command={command!r}) as ahead:\n    print(ahead.process._process.pid, flush=True)\n"
        f"    if {is_told}:\n        ahead.process.send(['a']); print(ahead.process._lines.get(), end='', flush=True)\n"
        "    threading.Event().wait()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with parent:
        assert parent.stdout is not None
        number = int(parent.stdout.readline())
        if is_told:
            assert parent.stdout.readline() == "begin a\n"
        parent.send_signal(ending)
    _wait_for_end(number)


_HANGING_PROOF = """
import sys, threading
from mlxflow.kernels import verification
verification.make_ready = verification.load_common_operations = lambda *_: None
verification.case_of = lambda name: threading.Event().wait()
verification.main(sys.argv[1:])
"""


# --- the device


def test_a_device_without_kernels_proves_nothing() -> None:
    found = registry.choose(["rms_norm/float32/64"])
    assert found.refused == {"rms_norm/float32/64": "MLX takes no kernels on this device"}
    assert not cache_file().exists()


def test_an_outcome_holds_for_one_device_system_mlx_and_state_of_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
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
