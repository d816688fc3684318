import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from mlxflow.device import child_processes
from tests.device.test_child_processes import IN_C, _ends_with_starter


def test_the_watcher_kills_a_process_that_hangs_in_c_code() -> None:
    assert _ends_with_starter(f"print('ready', flush=True); {IN_C}", has_signal=False)


def test_the_children_of_a_watched_process_are_killed_with_it(tmp_path: Path) -> None:
    child = f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', '{IN_C}'])"
    told = tmp_path / "child"
    program = f"{child}; open({str(told)!r}, 'w').write(str(child.pid)); print('ready', flush=True); {IN_C}"
    assert _ends_with_starter(program, has_signal=False)
    number = int(told.read_text())
    if psutil.pid_exists(number):
        assert psutil.wait_procs([psutil.Process(number)], timeout=20)[1] == []


def test_a_watcher_ends_with_the_process_that_it_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_processes, "_HAS_DEATH_SIGNAL", False)
    process = child_processes.start([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    watchers = [one for one in psutil.Process().children() if str(process.pid) in one.cmdline()]
    assert len(watchers) == 1
    process.communicate()
    assert psutil.wait_procs(watchers, timeout=20)[1] == []
