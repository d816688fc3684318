import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from mlxflow.kernels import early_start as ahead_of
from mlxflow.kernels import registry
from mlxflow.kernels.early_start import EarlyVerifier, lock_file
from mlxflow.storage.locks import hold
from tests.conftest import REPOSITORY
from tests.kernels.test_registry import (
    _GOOD,
    _own_cache,  # noqa: F401
    _prover,
)


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
def test_a_verifier_started_early_is_the_one_that_verifies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_verification_may_be_started_early(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_begin_early_imports_no_mlx() -> None:
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
def test_an_unused_process_ends_with_the_context() -> None:
    with registry.begin() as ahead:
        number = _number(ahead)
        assert _is_running(number)
    _wait_for_end(number)


@pytest.mark.usefixtures("_takes_kernels")
def test_of_two_concurrent_starts_one_starts_a_process() -> None:
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
        f"    if {is_told}:\n        ahead.process.send(['a'])\n"
        "        print(ahead.process._lines.get() + ahead.process._lines.get(), end='', flush=True)\n"
        "    while not threading.Event().wait(0.1):\n        pass"  # a wait without end misses a signal just before it
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with parent:
        assert parent.stdout is not None
        number = int(parent.stdout.readline())
        if is_told:
            assert [parent.stdout.readline() for _ in range(2)] == ["ready\n", "begin a\n"]
        parent.send_signal(ending)
    _wait_for_end(number)


_HANGING_PROOF = """
import sys, threading
from mlxflow.kernels import verification
verification.make_ready = verification.load_common_operations = lambda *_: None
verification.case_of = lambda name: threading.Event().wait()
verification.main(sys.argv[1:])
"""
