import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from mlxflow.device import child_processes
from tests.chain import Chain

# A number of 370 million digits: hours in one call of C code that holds the interpreter
IN_C = "9**9**9"

BOUND = "from mlxflow.device.child_processes import end_with_parent; end_with_parent()"
STARTER = """
import sys
from mlxflow.device import child_processes
child_processes._HAS_DEATH_SIGNAL = {has_signal}
process = child_processes.start([sys.executable, "-c", {program!r}])
print(process.pid, flush=True)
process.wait()
"""


def _ends_with_starter(program: str, *, has_signal: bool) -> bool:
    """Start a program through a process that is killed once it has said so, and return whether it ends."""
    starter = [sys.executable, "-c", STARTER.format(program=program, has_signal=has_signal)]
    with subprocess.Popen(starter, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = [process.stdout.readline().strip() for _ in range(2)]
        started = psutil.Process(int(next(line for line in said if line != "ready")))
        process.kill()
    ended = not psutil.wait_procs([started], timeout=20)[1]
    if not ended:
        started.kill()
    return ended


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills a process when its parent ends")
def test_a_process_inside_of_c_code_is_killed_with_its_starter_by_the_kernel() -> None:
    assert _ends_with_starter(f"{BOUND}; print('ready', flush=True); {IN_C}", has_signal=True)


def test_a_process_whose_starter_ended_before_it_asked_ends_at_once() -> None:
    reading, writing = os.pipe()
    os.close(writing)
    program = f"{BOUND}; print('went on')"
    environment = {**os.environ, child_processes.PARENT_VARIABLE: str(reading)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, pass_fds=(reading,), capture_output=True, check=False
    )
    os.close(reading)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, b"")


def test_a_process_outlives_the_thread_that_started_it() -> None:
    program = f"{BOUND}; print('ready', flush=True); print(input())"
    started: list[subprocess.Popen[str]] = []

    def begin() -> None:
        pipe = subprocess.PIPE
        started.append(child_processes.start([sys.executable, "-c", program], stdin=pipe, stdout=pipe, text=True))
        assert started[0].stdout is not None
        assert started[0].stdout.readline() == "ready\n"

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    assert started[0].communicate("still here")[0] == "still here\n"


def test_a_stage_inside_of_c_code_does_not_outlive_doit(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    stage = tmp_path / "stage.py"
    stage.write_text(stage.read_text().replace("go.read()", IN_C))
    go = tmp_path / "go"
    for name in ("ready", "go"):
        os.mkfifo(tmp_path / name)
    pause = tmp_path / "pause-s2"
    pause.touch()
    process = chain.start()
    number = psutil.Process(chain.stopped_stage(process))
    with go.open("w"):  # opens when the stage does, which then computes
        before = number.cpu_times().user
    while number.cpu_times().user < before + 0.3:
        number.cpu_percent(0.05)
    process.kill()
    process.communicate(timeout=60)
    assert psutil.wait_procs([number], timeout=20)[1] == []
    pause.unlink()
    stage.write_text(stage.read_text().replace(IN_C, "go.read()"))
    assert chain.numbers_that_run() == [2, 3, 4, 5, 6]
    chain.assert_correct()
