"""What the processes that report a run share: the request, in a file, and the names of files beside it."""

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from mlxflow.storage import atomic_folders
from mlxflow.tracking.table import TrackerName
from mlxflow.tracking.tracked_run import TrackedRun

#: How a run ended, as a byte; a pipe that closes without one means that its process was killed.
FINISHED, INTERRUPTED = b"f", b"i"


class TrackingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The request to report a run.

    Attributes:
        run: the run.
        to: the trackers.
        timeout_seconds: see the table `[tracking]`.
        logs: the folder for what the libraries print.
        advice: the command that reports the run later.
        ends_soon: whether the deadline also counts for all that is left when the run has ended.
    """

    run: TrackedRun
    to: tuple[TrackerName, ...]
    timeout_seconds: float
    logs: str
    advice: str
    ends_soon: bool

    def write(self, folder: Path) -> Path:
        """Write the request into a folder, which is made, and return the file."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.run.run_id}.{os.getpid()}.json"
        atomic_folders.write_whole(path, msgspec.json.encode(self))
        return path

    def log_of(self, tracker: str) -> Path:
        """Return the file for what a tracker's library prints."""
        return Path(self.logs, f"tracking-{tracker}-{self.run.task.replace(':', '-')}.log")


class TrackerOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """The result of reporting a run to one tracker.

    Attributes:
        task: the stage.
        tracker: the tracker.
        points: how many were sent; those that the tracker had are not.
        where: how to see them.
        problem: why not everything was reported, and what to do; empty if it was.
    """

    task: str
    tracker: str
    points: int = 0
    where: str = ""
    problem: str = ""

    @property
    def line(self) -> str:
        """The line for a problem."""
        return f"tracking: {self.task}: {self.tracker}: {self.problem}"


def summary_lines(outcomes: list[TrackerOutcome]) -> Iterator[str]:
    """Yield a line for each tracker that has reports, and before them one for each problem."""
    yield from (one.line for one in outcomes if one.problem)
    done = [one for one in outcomes if not one.problem]
    for tracker, where in dict.fromkeys((one.tracker, one.where) for one in done):
        runs = [one for one in done if (one.tracker, one.where) == (tracker, where)]
        points = sum(one.points for one in runs)
        yield f"tracking: {tracker}: {', '.join(one.task for one in runs)}: {points:,} points sent. Look: {where}"


def read_request(path: Path) -> TrackingRequest:
    """Return the request in a file.

    Raises:
        OSError: it cannot be read.
        msgspec.MsgspecError: it is damaged.
    """
    return msgspec.json.decode(path.read_bytes(), type=TrackingRequest)


def said_file(request: Path) -> Path:
    """Return the file for the outcomes of a report, beside its request."""
    return request.with_suffix(".said")


def lock_file(request: Path, run: TrackedRun, tracker: str) -> Path:
    """Return the lock of the only process that reports a stage to a tracker, beside a request."""
    return request.with_name(f"{run.task.replace(':', '-')}.{tracker}.lock")
