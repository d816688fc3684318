"""Ranks that Open MPI connects, where it is installed."""

import ctypes.util
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from mlxflow.distributed.mpi_meeting import MpiHost, MpiMeeting
from mlxflow.messages.errors import UserError
from tests.distributed.conftest import Build, Faults

Alone = tuple[Path, bytes]

needs_mpi = pytest.mark.skipif(
    shutil.which("mpirun") is None or not ctypes.util.find_library("mpi"), reason="Open MPI is not installed"
)


@needs_mpi
def test_ranks_of_mpi_make_the_bytes_of_one_process_after_one_was_killed(
    trained_alone: Alone, train: Build, faults: Faults, capfd: pytest.CaptureFixture[str]
) -> None:
    faults.planned = {(0, 4): (signal.SIGKILL, "rank")}
    assert train(2, backend='"mpi"') == trained_alone[1]
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("train: rank")]
    assert len(said) == 1
    assert "ended with signal SIGKILL" in said[0]


@needs_mpi
def test_nothing_of_a_group_is_left_behind() -> None:
    with MpiMeeting([MpiHost()] * 3, lambda: False) as meeting:
        assert [variables["PMIX_RANK"] for variables in meeting.variables] == ["0", "1", "2"]
        assert {variables["OMPI_COMM_WORLD_SIZE"] for variables in meeting.variables} == {"3"}
        processes = psutil.Process(meeting._process.pid).children(recursive=True)
        assert len(processes) >= 3
    assert not psutil.wait_procs(processes, timeout=30)[1]
    assert meeting._process.returncode == 0


@needs_mpi
def test_a_group_ends_with_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import time; from mlxflow.distributed.mpi_meeting import MpiHost, MpiMeeting\n"
        "with MpiMeeting([MpiHost()] * 2, lambda: False) as one: print(one._process.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        group = psutil.Process(int(supervisor.stdout.readline()))
        processes = [group, *group.children(recursive=True)]
        supervisor.kill()
    assert not psutil.wait_procs(processes, timeout=30)[1]


@needs_mpi
def test_an_mpirun_that_fails_is_one_line(train: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_MCA_plm", "nothing_of_this_name")
    monkeypatch.setenv("PRTE_MCA_plm", "nothing_of_this_name")
    with pytest.raises(UserError, match=r'backend = "mpi": mpirun formed no group of 2 ranks'):
        train(2, backend='"mpi"')


@needs_mpi
def test_a_host_that_mpirun_cannot_reach_is_one_line() -> None:
    hosts = [MpiHost(), MpiHost("nowhere.invalid", sys.executable, "127.0.0.1")]
    with pytest.raises(UserError, match=r'formed no group of 2 .*"mpirun -host localhost,nowhere\.invalid hostname"'):
        MpiMeeting(hosts, lambda: False)


def test_mpi_without_mpirun_is_refused_before_anything_is_computed(
    train: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r'backend = "mpi": there is no mpirun in the PATH\. Install Open MPI'):
        train(2, backend='"mpi"')
