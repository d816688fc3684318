"""A stage that is reported while it runs, through kill -9 of the stage and of the process that reports it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from mlxflow.tracking import live, tensorboard_run
from mlxflow.tracking.tracked_run import TrackedRun
from tests.tracking.runs import lines, losses, request_of, run_in

pytest.importorskip("tensorboardX")

# A stage: it starts the process that reports it, writes what standard input brings, and ends at its end
_STAGE = """
import sys
from pathlib import Path
import msgspec
from mlxflow.tracking.live import Following
from mlxflow.tracking.request import TrackingRequest
request = msgspec.json.decode(sys.argv[1], type=TrackingRequest)
following = Following(request, Path(sys.argv[2]))
with open(request.run.metrics[0], "w") as metrics:
    following.begin()
    for line in sys.stdin:
        metrics.write(line)
        metrics.flush()
following.end(is_finished=True)
"""


_started: "list[subprocess.Popen[str]]" = []


@pytest.fixture(autouse=True)
def _ended_stages() -> Iterator[None]:
    """End every stage that a failed test has left."""
    yield
    while _started:
        stage = _started.pop()
        if stage.poll() is None:
            stage.kill()
        for stream in (stage.stdin, stage.stdout):
            if stream:
                stream.close()
        stage.wait()


def _start(folder: Path, run: TrackedRun, timeout_seconds: float = 120) -> "subprocess.Popen[str]":
    request = msgspec.json.encode(request_of(run, "tensorboard", timeout_seconds=timeout_seconds)).decode()
    command = [sys.executable, "-c", _STAGE, request, str(folder / "state")]
    pipe = subprocess.PIPE
    stage = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    _started.append(stage)
    return stage


def _write(stage: "subprocess.Popen[str]", text: str) -> None:
    assert stage.stdin
    stage.stdin.write(text)
    stage.stdin.flush()


def _logged(run: TrackedRun) -> list[tuple[int, float]]:
    """Return what is in TensorBoard's files now."""
    files = sorted(Path(run.folder, "tensorboard", run.run_id).glob("*"))
    scalars = [one for path in files for one in tensorboard_run.read_scalars(path.read_bytes())]
    return [(one.step, round(one.value, 4)) for one in scalars if one.name == "train/loss"]


def _wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.matrix
def test_points_are_reported_while_the_stage_runs_and_once_through_a_kill_of_it(tmp_path: Path) -> None:
    run = run_in(tmp_path, [])
    first = _start(tmp_path, run)
    _write(first, lines([10, 20, 30]))
    _wait_until(lambda: _logged(run) == losses([10, 20, 30]))
    first.kill()
    first.communicate()
    second = _start(tmp_path, run)  # it resumes after step 10
    _write(second, lines([10, 20, 30, 40]))
    output, _ = second.communicate()
    assert (second.returncode, output) == (0, "")
    said = list(live.closing_lines(tmp_path / "state"))
    assert _logged(run) == losses([10, 20, 30, 40])
    look = f"Look: tensorboard --logdir {tmp_path}/tracking/tensorboard"
    assert said == [f"tracking: tensorboard: train, train: 16 points sent. {look}"]
    assert list(live.closing_lines(tmp_path / "state")) == []


@pytest.mark.matrix
def test_a_kill_of_the_process_that_reports_is_one_line_and_nothing_to_the_stage(tmp_path: Path) -> None:
    run = run_in(tmp_path, [])
    stage = _start(tmp_path, run)
    _write(stage, lines([10]))
    _wait_until(lambda: _logged(run) == losses([10]))
    children = Path(f"/proc/{stage.pid}/task/{stage.pid}/children")
    if not children.exists():
        pytest.skip("finds the process by /proc")
    (reporter,) = map(int, children.read_text().split())
    os.kill(reporter, signal.SIGKILL)
    _write(stage, lines([20]))
    output, _ = stage.communicate()
    assert (stage.returncode, output) == (0, "")
    (request,) = (tmp_path / "state").glob("*.json")
    os.utime(request, (0, 0))  # it was started long ago
    assert list(live.closing_lines(tmp_path / "state")) == [
        "tracking: train-0123456789ab: its process was killed or still reports. Later: mlxflow track"
    ]
    again = _start(tmp_path, run)
    _write(again, lines([10, 20]))
    again.communicate()
    list(live.closing_lines(tmp_path / "state"))
    assert _logged(run) == losses([10, 20])


@pytest.mark.matrix
def test_a_stage_does_not_wait_for_a_tracker_that_hangs_and_its_output_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorboardX.py").write_text("import time\ntime.sleep(1000)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "tracking" / "tensorboard" / "train-0123456789ab").mkdir(parents=True)
    stage = _start(tmp_path, run_in(tmp_path, []), timeout_seconds=10)
    _write(stage, lines([10]))
    output, _ = stage.communicate()  # until its output ends
    assert (stage.returncode, output) == (0, "")
    assert list((tmp_path / "state").glob("*.json"))  # it hangs still
    assert list(live.closing_lines(tmp_path / "state")) == [
        "tracking: train: tensorboard: no answer for 10 s: ended. Later: mlxflow track train"
    ]


@pytest.mark.matrix
def test_what_hangs_early_is_said_while_the_stage_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorboardX.py").write_text("import time\ntime.sleep(1000)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    stage = _start(tmp_path, run_in(tmp_path, []), timeout_seconds=3)
    _write(stage, lines([10]))
    assert stage.stdout
    line = stage.stdout.readline()
    assert line == "tracking: train: tensorboard: no answer for 3 s: ended. Later: mlxflow track train\n"
    stage.communicate()
    assert stage.returncode == 0
    assert list(live.closing_lines(tmp_path / "state")) == []


@pytest.mark.matrix
def test_a_process_that_cannot_be_started_is_one_line_and_nothing_to_the_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "state").write_text("no folder")
    following = live.Following(request_of(run_in(tmp_path, []), "tensorboard"), tmp_path / "state")
    following.begin()
    following.end(is_finished=True)
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("tracking: train: cannot start (")
    assert said[0].endswith("). Later: mlxflow track train")
