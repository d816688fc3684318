import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlxflow.kernels import registry, verifier_process
from mlxflow.kernels.early_start import cache_file
from mlxflow.kernels.verifier_process import Verifier
from mlxflow.storage import cache_files
from tests.conftest import REPOSITORY

_GOOD = 'print(\'begin \' + NAME); print(\'{"name": "\' + NAME + \'", "passed": true, "reason": ""}\', flush=True)'
_BEGIN = "print('begin ' + NAME, flush=True); "
_RESULT = {"name": "a", "passed": True, "reason": ""}
_LOST = "not verified: its process ended with code 9"
_HANG = "__import__('threading').Event().wait()"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def _prover(body: str) -> list[str]:
    start = "import sys\nNAMES = sys.stdin.readline().split()\nprint('ready', flush=True)"
    return [sys.executable, "-c", f"{start}\nfor NAME in NAMES:\n    {body}"]


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


def test_verification_results_are_cached(capfd: pytest.CaptureFixture[str]) -> None:
    assert _outcomes(_GOOD, "a", "b") == {"a": True, "b": True}
    assert capfd.readouterr().err == "verifying 2 GPU kernels, once on this device: a, b\n"
    assert _outcomes("raise SystemExit(1)", "a", "b") == {"a": True, "b": True}
    assert capfd.readouterr().err == ""


def test_only_kernels_without_a_result_are_verified() -> None:
    assert _outcomes(_GOOD, "a") == {"a": True}
    assert _outcomes(_BEGIN + "sys.exit(1)", "a", "b") == {"a": True, "b": False}


def test_the_reason_for_a_refused_kernel_is_printed_once(capfd: pytest.CaptureFixture[str]) -> None:
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


def test_results_of_another_version_are_kept_beside_those_of_this_one() -> None:
    assert _outcomes(_GOOD, "a") == {"a": True}
    found = registry.verify_all(["a"], "there", Verifier(_prover("sys.exit(3)"), None, 20))
    assert not found["a"].passed
    assert _outcomes("raise SystemExit(1)", "a") == {"a": True}


def test_without_a_usable_cache_folder_kernels_are_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert _outcomes(_GOOD, "a") == {"a": True}


@contextmanager
def read_only_cache() -> Iterator[Path]:
    """Give a cache folder that may be read and not written, by root neither."""
    room = Path(tempfile.mkdtemp())
    (room / "mlxflow").mkdir()
    kept = {"here": {"a": {"passed": False, "reason": "it was slow"}}}
    cache_files.write_table(room / "mlxflow" / "kernels.json", kept)
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


def test_a_read_only_cache_is_read_and_missing_results_are_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    told = 'echo ready; echo \'{"name": "b", "passed": true, "reason": ""}\''
    with read_only_cache() as room:
        monkeypatch.setenv("XDG_CACHE_HOME", str(room))
        for _ in range(2):
            found = registry.verify_all(["a", "b"], "here", Verifier(["/bin/sh", "-c", told], None, 20))
            assert {name: result.passed for name, result in found.items()} == {"a": False, "b": True}
        assert sorted(path.name for path in (room / "mlxflow").iterdir()) == ["kernels.json"]


def test_of_two_processes_one_verifies_and_the_other_waits(tmp_path: Path) -> None:
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
def test_other_work_runs_during_compilation_and_verification_waits_for_it(
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


def test_without_compilation_no_other_work_runs() -> None:
    asked: list[int] = []
    assert _outcomes(_GOOD, "a", "b", compiler="pass", meanwhile=lambda: asked.append(1)) == {"a": True, "b": True}
    assert not asked


@pytest.mark.usefixtures("_hasty")
@pytest.mark.parametrize(
    ("then", "reason"),
    [
        (_HANG, "its process printed nothing for 1.5 s"),
        ("sys.exit(7)", "its process ended with code 7"),
        ("raise RuntimeError('no device')", "its process ended with code 1: RuntimeError: no device"),
    ],
)
def test_the_kernel_begun_last_is_blamed_for_a_hang_or_crash(tmp_path: Path, then: str, reason: str) -> None:
    body = _cold(tmp_path, then)
    assert _outcomes(body, "a", "b", "c", compiler="pass", limit=1.5) == {"a": False, "b": True, "c": True}
    assert _reason("a") == reason


def test_a_kernel_that_crashes_its_process_before_it_begins_is_found() -> None:
    assert _outcomes(f"'b' in NAMES and sys.exit(7); {_GOOD}", "a", "b", "c") == {"a": True, "b": False, "c": True}
    assert _reason("b") == "its process ended with code 7"


@pytest.mark.parametrize(
    ("program", "failure"),
    [
        (
            "import no_such_module",
            "its process ended with code 1: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ("import os; os.kill(os.getpid(), 9)", "its process ended with code -9"),
        (_HANG, "its process printed nothing for 1 s"),
        ("pass", "its verification printed no result"),
    ],
)
@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"]])
def test_a_verifier_that_fails_before_the_kernels_refuses_them_for_this_run_only(
    names: list[str], program: str, failure: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    starts = tmp_path / "starts"
    command = [sys.executable, "-c", f"open({str(starts)!r}, 'a').write('x'); {program}"]
    found = registry.verify_all(names, "here", Verifier(command, None, 1))
    assert found == dict.fromkeys(names, verifier_process.VerificationResult(False, f"not verified: {failure}"))
    kernels = "GPU kernel a is" if len(names) == 1 else "GPU kernels a, b, c are"
    assert capfd.readouterr().err.splitlines()[1:] == [
        f"{kernels} not used in this run, the next one verifies again. Verification failed: {failure}"
    ]
    assert starts.read_text() == "x", "one process shows it, not one a kernel"
    assert _outcomes(_GOOD, *names) == dict.fromkeys(names, True)


def test_results_from_before_the_failure_of_a_verifier_are_cached(tmp_path: Path) -> None:
    crash = f"{_BEGIN}open({str(tmp_path / 'crashed')!r}, 'w'); sys.exit(7)"
    command = _prover(f"NAME == 'a' and print('begin a\\n' + {json.dumps(_RESULT)!r})\n    if NAME == 'b': {crash}")
    command[2] = f"import os\nif os.path.exists({str(tmp_path / 'crashed')!r}): raise SystemExit(9)\n{command[2]}"
    found = registry.verify_all(["a", "b", "c"], "here", Verifier(command, None, 20))
    assert [result.reason for result in found.values()] == ["", "its process ended with code 7", _LOST]
    assert sorted(registry.known_results("here")) == ["a", "b"]


def test_a_kernel_without_memory_to_verify_it_is_verified_again_by_the_next_run(
    capfd: pytest.CaptureFixture[str],
) -> None:
    refused = json.dumps({"name": "b", "passed": False, "reason": "out of memory", "holds": False})
    body = f"print({refused!r} if NAME == 'b' else json.dumps({_RESULT!r}), flush=True)"
    assert _outcomes("import json; " + body, "a", "b") == {"a": True, "b": False}
    line = "GPU kernel b is not used in this run, the next one verifies again: out of memory"
    assert capfd.readouterr().err.splitlines()[1:] == [line]
    assert list(registry.known_results("here")) == ["a"]
    assert _outcomes(_GOOD, "a", "b") == {"a": True, "b": True}


def test_a_reason_shared_by_kernels_is_printed_once(capfd: pytest.CaptureFixture[str]) -> None:
    body = _BEGIN + "NAME in 'ac' and sys.exit(1); " + _GOOD
    assert _outcomes(body, "a", "b", "c") == {"a": False, "b": True, "c": False}
    line = "GPU kernels a, c are not used on this device: its process ended with code 1"
    assert capfd.readouterr().err.splitlines()[1:] == [line]


# --- a process that is started ahead


# --- the device


def test_on_a_device_without_kernels_nothing_is_verified() -> None:
    found = registry.choose(["rms_norm/float32/64"])
    assert found.refused == {"rms_norm/float32/64": "MLX takes no kernels on this device"}
    assert not cache_file().exists()
