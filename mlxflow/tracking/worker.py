"""The process that reports one run to one tracker: python -m mlxflow.tracking.worker REQUEST TRACKER.

It opens the run, logs the points that the tracker lacks, follows the metrics file until standard input says how the run
ended, and finishes. It answers with a line of JSON for each thing that it begins, by which `mlxflow.tracking.reporting`
notices that a tracker hangs. What the library prints goes to standard error, which is a log.
"""

import json
import os
import select
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, cast

from mlxflow.device.child_processes import end_with_parent
from mlxflow.messages.errors import StageError, reason_of
from mlxflow.storage.locks import LockedError, hold
from mlxflow.tracking import request as requests
from mlxflow.tracking.metrics_tail import MetricsTail
from mlxflow.tracking.table import TrackerName
from mlxflow.tracking.tracked_run import Scalar, final_figures
from mlxflow.tracking.trackers import OpenRun, open_run

# How often the metrics file is read
_POLL_SECONDS = 1.0


class _Answers:
    """The lines for the process that started this one."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def say(self, **answer: Any) -> None:
        self._stream.write(json.dumps(answer) + "\n")
        self._stream.flush()


def main(path: Path, tracker: TrackerName) -> int:
    """Report a run to its end, and return the exit code."""
    answers = _Answers(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)  # what the library prints
    end_with_parent()
    try:
        answers.say(at="opening")
        request = requests.read_request(path)
        with _alone(requests.lock_file(path, request.run, tracker), request.timeout_seconds / 2):
            _report(request, tracker, answers)
    except Exception as error:  # every library has its own
        sys.excepthook(*cast("Any", sys.exc_info()))  # for the log
        answers.say(problem=reason_of(error) or type(error).__name__)
        return 1
    return 0


@contextmanager
def _alone(lock: Path, patience_seconds: float) -> Iterator[None]:
    """Wait until no other process reports the run to the tracker.

    Raises:
        StageError: one still does after some time.
    """
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            with hold(lock, "", wait=False):
                yield
                return
        except LockedError:
            if time.monotonic() > deadline:
                raise StageError("another process reports this run") from None
            time.sleep(0.1)


def _report(request: requests.TrackingRequest, tracker: TrackerName, answers: _Answers) -> None:
    run = request.run
    opened = open_run(tracker, run)
    tail = MetricsTail(run.metrics, opened.known, opened.known_of_all)
    ending: bytes | None = None
    num_points = 0
    while True:
        # of a running stage only its own new file counts, not that of the artifact that it will replace
        num_points += _log_all(tail, opened, answers, only=None if ending == requests.FINISHED else 0)
        if ending is not None:
            break
        answers.say(at="waiting")
        ending = _ending(_POLL_SECONDS)
    tail.close()
    answers.say(at="finishing")
    where = opened.finish(_figures(run.report) if ending == requests.FINISHED else None)
    answers.say(done=num_points, where=where)


def _log_all(tail: MetricsTail, opened: OpenRun, answers: _Answers, *, only: int | None) -> int:
    """Log what can be read now and return the number of points."""
    num_points = 0
    while (points := tail.read(only)) is not None:
        if points:
            answers.say(at="logging")
            opened.log(points)
            num_points += len(points)
    return num_points


def _ending(seconds: float) -> bytes | None:
    """Return how the run ended; None if it runs on after some time."""
    if not select.select([0], [], [], seconds)[0]:
        return None
    return os.read(0, 1) or requests.INTERRUPTED


def _figures(report: str) -> dict[str, Scalar]:
    return final_figures(tomllib.loads(Path(report).read_text(encoding="utf-8"))) if report else {}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), cast("TrackerName", sys.argv[2])))
