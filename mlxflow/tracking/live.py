"""Report a stage while it runs: start the process that does, signal the end to it, and show what it said after that."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from mlxflow.messages import terminal
from mlxflow.storage import locks
from mlxflow.tracking import request as requests

# A process that reports takes this much longer than its own deadline to end
_GRACE_SECONDS = 5.0

# ... and holds its request at the latest this long after it was started
_START_SECONDS = 10.0

_POLL_SECONDS = 0.05

_LATER = "mlxflow track"


class Following:
    """The process that reports a stage; a failure of it does not concern the stage.

    Args:
        request: what it reports.
        state: the folder for the request.
    """

    def __init__(self, request: requests.TrackingRequest, state: Path) -> None:
        self._request = request
        self._state = state
        self._process: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        """Start the process; print a line if that fails."""
        try:
            path = self._request.write(self._state)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "mlxflow.tracking.follower", str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        except Exception as error:  # tracking fails no stage
            advice = self._request.advice
            terminal.say(f"tracking: {self._request.run.task}: cannot start ({error}). Later: {advice}")

    def end(self, *, is_finished: bool) -> None:
        """Signal to the process how the stage ended, and do not wait for it; start it now if it was not started."""
        if self._process is None and is_finished:
            self.begin()
        if self._process is None or self._process.stdin is None:
            return
        with suppress(OSError):
            os.write(self._process.stdin.fileno(), requests.FINISHED if is_finished else requests.INTERRUPTED)
        with suppress(OSError):
            self._process.stdin.close()
        self._process.returncode = self._process.returncode or 0  # no one waits for it: no warning about that


def closing_lines(state: Path) -> Iterator[str]:
    """Wait until the processes that report ended stages have ended, and yield their lines.

    Args:
        state: the folder of the requests; it may be missing.
    """
    deadline = time.monotonic() + max(map(_timeout, state.glob("*.json")), default=0.0) + _GRACE_SECONDS
    while any(_may_live(path) for path in state.glob("*.json")) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    for path in sorted(state.glob("*.json")):
        yield f"tracking: {path.name.partition('.')[0]}: its process was killed or still reports. Later: {_LATER}"
        with suppress(OSError):
            path.unlink()
    outcomes: list[requests.TrackerOutcome] = []
    for path in sorted(state.glob("*.said"), key=lambda one: one.stat().st_mtime_ns):
        with suppress(OSError, msgspec.MsgspecError):
            outcomes += msgspec.json.decode(path.read_bytes(), type=list[requests.TrackerOutcome])
        path.unlink(missing_ok=True)
    yield from requests.summary_lines(outcomes)


def _timeout(request: Path) -> float:
    try:
        return requests.read_request(request).timeout_seconds
    except (OSError, msgspec.MsgspecError):  # it has just ended
        return 0.0


def _may_live(request: Path) -> bool:
    """Return whether the process of a request holds it, or has just been started."""
    try:
        return locks.is_held(request) or time.time() - request.stat().st_mtime < _START_SECONDS
    except OSError:
        return False
