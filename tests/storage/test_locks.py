"""Locks: who holds them is named, and a file system without them is named with what to do."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlxflow.device import compute_device
from mlxflow.storage.locks import LockedError, LockUnsupportedError, device_lock, hold, is_held

_WAITING = "train: waits for it, used by process {holder}"


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mlxflow"


def _without_locks(monkeypatch: pytest.MonkeyPatch, folder: Path, number: int) -> None:
    """Let files in a folder be on a file system that cannot lock them."""
    real = fcntl.flock

    def flock(file: object, operation: int) -> None:
        if Path(file.name).is_relative_to(folder):  # type: ignore[attr-defined]
            raise OSError(number, os.strerror(number))
        real(file, operation)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", flock)


def test_the_holder_of_a_lock_is_named_with_its_activity(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with (
        hold(path, "", wait=False, about="(benchmark of /here)"),
        pytest.raises(LockedError) as caught,
        hold(path, _WAITING, wait=False),
    ):
        pass
    assert str(caught.value) == f"train: waits for it, used by process {os.getpid()} (benchmark of /here)"


def test_all_holders_of_a_shared_lock_are_named(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with subprocess.Popen(["sleep", "0"]) as gone:
        pass
    path.write_text(f"{gone.pid} (of old)\nnonsense\n")
    with hold(path, "", wait=False, shared=True, about="(a)"), hold(path, "", wait=False, shared=True, about="(b)"):
        with pytest.raises(LockedError) as caught, hold(path, "{holder}", wait=False):
            pass
        assert str(caught.value) == f"{os.getpid()} (a) and {os.getpid()} (b)"
    with hold(path, "", wait=False):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_without_lock_support_a_local_file_is_locked_and_named(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: int
) -> None:
    project = tmp_path / "project"
    _without_locks(monkeypatch, project, number)
    with hold(project / "lock", "", wait=False):
        (stand_in,) = (cache / "locks").iterdir()
        line = (
            f"{project}/lock: its file system cannot lock files ({os.strerror(number)}). {stand_in} is locked instead, "
            "which other machines do not see: let one machine at a time work on this folder.\n"
        )
        assert capfd.readouterr().err == line
        with pytest.raises(LockedError), hold(project / "lock", "", wait=False):
            pass
        with hold(tmp_path / "other/lock", "", wait=False):
            pass


def test_a_cache_folder_without_lock_support_is_an_error_with_advice(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_locks(monkeypatch, tmp_path, errno.ENOLCK)
    for path in (device_lock(), tmp_path / "project/lock"):
        with pytest.raises(LockUnsupportedError) as caught, hold(path, "", wait=False):
            pass
        assert str(caught.value) == (
            f"{path}: its file system cannot lock files (No locks available). "
            "Set XDG_CACHE_HOME to a folder on a local disk."
        )
        assert caught.value.exit_code == 2


def test_other_lock_errors_are_not_taken_for_missing_support(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_locks(monkeypatch, tmp_path, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"), hold(tmp_path / "lock", "", wait=False):
        pass


@pytest.mark.parametrize(
    ("chosen", "has_gpu", "measures", "is_shared"),
    [
        ("auto", True, False, False),
        ("gpu", False, False, True),
        ("auto", False, False, True),
        ("cpu", True, False, True),
        ("cpu", True, True, False),
        ("auto", False, True, False),
    ],
)
def test_a_gpu_and_a_measurement_are_held_alone_and_processors_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str, has_gpu: bool, measures: bool, is_shared: bool
) -> None:
    monkeypatch.setattr(compute_device, "may_have_gpu", lambda: has_gpu)
    with compute_device.turn("one", tmp_path, chosen, measures=measures):
        if is_shared:
            with hold(device_lock(), "", wait=False, shared=True):
                pass
        else:
            with pytest.raises(LockedError), hold(device_lock(), "", wait=False, shared=True):
                pass


def test_waiting_for_the_device_imports_no_mlx() -> None:
    imports = "import sys, mlxflow.device.compute_device, mlxflow.storage.locks"
    command = f"{imports}; print('mlx' in sys.modules, 'numpy' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert found.stdout == "False False\n"


def test_a_lock_is_held_while_its_block_runs(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_held(path)  # there is no file
    for shared in (False, True):
        with hold(path, "", wait=False, shared=shared):
            assert is_held(path) is not shared  # a shared lock excludes no other reader
        assert not is_held(path)
