"""Trackers that hang, end or fail: each is one line, and the others are not disturbed."""

import os
from pathlib import Path

import pytest

from mlxflow.tracking import tensorboard_run
from mlxflow.tracking.tracked_run import TrackedRun
from tests.tracking.runs import losses, report, request_of, run_in

pytest.importorskip("tensorboardX")


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The source of a library of the name `trackio`, to be broken: the real one cannot be made to hang."""
    folder = tmp_path / "library"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder / "trackio.py"


def _in_tensorboard(run: TrackedRun) -> list[tuple[int, float]]:
    (path,) = Path(run.folder, "tensorboard", run.run_id).iterdir()
    scalars = tensorboard_run.read_scalars(path.read_bytes())
    return [(one.step, round(one.value, 4)) for one in scalars if one.name == "train/loss"]


@pytest.mark.matrix
def test_a_tracker_that_hangs_is_ended_with_what_it_started_and_the_other_one_finishes(
    tmp_path: Path, broken: Path
) -> None:
    marker = tmp_path / "pid"
    broken.write_text(f"""
import pathlib, subprocess, time
child = subprocess.Popen(["sleep", "1000"])
pathlib.Path({str(marker)!r}).write_text(str(child.pid))
time.sleep(1000)
""")
    run = run_in(tmp_path, [10, 20])
    outcomes, said = report(request_of(run, "trackio", "tensorboard", timeout_seconds=20))
    assert said == ["tracking: train: trackio: no answer for 20 s: ended. Later: mlxflow track train"]
    assert [bool(one.problem) for one in outcomes] == [True, False]
    assert _in_tensorboard(run) == losses([10, 20])
    with pytest.raises(ProcessLookupError):
        _require_alive(int(marker.read_text()))


def _require_alive(process: int) -> None:
    """Raise an error if a process has ended; one that nobody has waited for counts as ended."""
    os.kill(process, 0)
    status = Path(f"/proc/{process}/stat")
    if status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z":
        raise ProcessLookupError


@pytest.mark.matrix
def test_a_library_that_holds_the_interpreter_is_ended(tmp_path: Path, broken: Path) -> None:
    broken.write_text("import ctypes\nctypes.PyDLL(None).sleep(1000)\n")
    _, said = report(request_of(run_in(tmp_path, [10]), "trackio", timeout_seconds=5))
    assert said == ["tracking: train: trackio: no answer for 5 s: ended. Later: mlxflow track train"]


@pytest.mark.matrix
def test_a_library_that_ends_its_process_is_one_line_that_names_its_output(tmp_path: Path, broken: Path) -> None:
    broken.write_text("import os\nprint('last words', flush=True)\nos._exit(0)\n")
    _, said = report(request_of(run_in(tmp_path, [10]), "trackio"))
    (line,) = said
    assert line.startswith("tracking: train: trackio: ended unexpectedly; ")
    assert line.endswith("logs/tracking-trackio-train.log has its output. Later: mlxflow track train")
    assert "last words" in (tmp_path / "logs" / "tracking-trackio-train.log").read_text()


@pytest.mark.matrix
def test_an_error_of_a_library_is_one_line_and_its_traceback_is_in_the_log(tmp_path: Path, broken: Path) -> None:
    broken.write_text("raise RuntimeError('no\\nroom at http://a:b@host/?write_token=c')\n")
    _, said = report(request_of(run_in(tmp_path, [10]), "trackio"))
    assert said == ["tracking: train: trackio: no room at http://host/?write_token=. Then: mlxflow track train"]
    assert "Traceback" in (tmp_path / "logs" / "tracking-trackio-train.log").read_text()
