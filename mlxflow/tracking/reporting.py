"""Report a run to trackers: a process for each, ended when it does not answer in time."""

import json
import math
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlxflow.device import child_processes
from mlxflow.storage import paths
from mlxflow.tracking import request as requests
from mlxflow.tracking.table import TrackerName

Say = Callable[[str], None]

# How often deadlines are checked
_POLL_SECONDS = 0.2

# User and password of an address, and trackio's token
_SECRETS = re.compile(r"(?<=//)[^/@\s]+@|(?<=write_token=)[^&\s]+")


class _Reporter:
    """A tracker's process.

    Attributes:
        outcome: of its report; None until it is known.
        is_running: whether `finish` was not called yet.
    """

    def __init__(self, path: Path, request: requests.TrackingRequest, tracker: TrackerName) -> None:
        self.tracker: TrackerName = tracker
        self._request = request
        self.outcome: requests.TrackerOutcome | None = None
        self.is_running = True
        self._held = b""
        log = request.log_of(tracker)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            self.process = child_processes.start(
                [sys.executable, "-P", "-m", "mlxflow.tracking.worker", str(path), tracker],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
            )
        self._shown_log = paths.shown(log)
        self._is_waiting = False
        self._answered = time.monotonic()

    @property
    def output(self) -> int:
        """The descriptor of its answers."""
        assert self.process.stdout  # noqa: S101 - it is a pipe
        return int(self.process.stdout.fileno())

    def read(self) -> bool:
        """Take in its answers; return False at their end."""
        data = os.read(self.output, 1 << 16)
        *lines, self._held = (self._held + data).split(b"\n")
        for line in lines:
            self._take(json.loads(line))
        if not data and not self.outcome:
            self._fail(f"ended unexpectedly; {self._shown_log} has its output. Later: {self._request.advice}")
        return bool(data)

    def _take(self, answer: dict[str, Any]) -> None:
        self._answered = time.monotonic()
        self._is_waiting = answer.get("at") == "waiting"
        if "problem" in answer:
            problem = _SECRETS.sub("", str(answer["problem"])).rstrip(".")
            self._fail(f"{problem}. Then: {self._request.advice}")
        elif "done" in answer:
            where = _SECRETS.sub("", answer["where"])
            self.outcome = self._outcome(points=answer["done"], where=where)

    def _fail(self, problem: str) -> None:
        self.outcome = self._outcome(problem=problem)

    def _outcome(self, **facts: Any) -> requests.TrackerOutcome:
        return requests.TrackerOutcome(task=self._request.run.task, tracker=self.tracker, **facts)

    def end(self, ending: bytes) -> None:
        """Say how the run ended."""
        with suppress(OSError):
            os.write(self.process.stdin.fileno(), ending)  # type: ignore[union-attr]
            self.process.stdin.close()  # type: ignore[union-attr]

    def is_over(self, ready: set[int], deadline: float) -> bool:
        """Take in its answers; return whether it has ended or has to be ended.

        Args:
            ready: descriptors that can be read.
            deadline: at which every reporter has to end.
        """
        if self.output in ready and not self.read():
            return True
        now = time.monotonic()
        is_late = not self._is_waiting and now - self._answered > self._request.timeout_seconds
        return is_late or now > deadline

    def result(self) -> requests.TrackerOutcome:
        """Return the outcome of a reporter that has ended."""
        return self.outcome or self._outcome(problem="has not ended")

    def finish(self, say: Say) -> None:
        """Kill it, if it has not ended, and what it started; say its problem if it has one."""
        self.is_running = False
        if self.outcome is None:
            self._fail(f"no answer for {self._request.timeout_seconds:g} s: ended. Later: {self._request.advice}")
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream:
                with suppress(OSError):
                    stream.close()
        if self.outcome and self.outcome.problem:
            say(self.outcome.line)


def report_run(
    path: Path, request: requests.TrackingRequest, ending: bytes | int, say: Say
) -> list[requests.TrackerOutcome]:
    """Report a run to its trackers until all have finished or were ended, and return the outcomes.

    Args:
        path: of the request.
        request: the request.
        ending: how the run ended, see `mlxflow.tracking.request`; or a descriptor from which that can be read then.
        say: is called with a line for each problem, at once.
    """
    reporters = [_Reporter(path, request, tracker) for tracker in request.to]
    with selectors.DefaultSelector() as selector:
        for one in reporters:
            selector.register(one.output, selectors.EVENT_READ)
        deadline = math.inf
        if isinstance(ending, bytes):
            _end_all(reporters, ending)
        else:
            selector.register(ending, selectors.EVENT_READ)
        while any(one.is_running for one in reporters):
            ready = {key.fd for key, _ in selector.select(_POLL_SECONDS)}
            if isinstance(ending, int) and ending in ready:
                selector.unregister(ending)
                _end_all(reporters, os.read(ending, 1) or requests.INTERRUPTED)
                deadline = time.monotonic() + request.timeout_seconds if request.ends_soon else math.inf
            for one in reporters:
                if one.is_running and one.is_over(ready, deadline):
                    selector.unregister(one.output)
                    one.finish(say)
    return [one.result() for one in reporters]


def _end_all(reporters: list[_Reporter], ending: bytes) -> None:
    for one in reporters:
        one.end(ending)
