"""The process that reports a stage while it runs: python -m mlxflow.tracking.follower REQUEST.

It outlives the stage's process, which waits for nothing, by a bounded time. Standard input says that the stage has
ended. Until then it may print on the stage's standard error; afterwards it closes that, so that whoever reads the
stage's output sees its end, and writes the outcomes into a file, which `mlxflow.tracking.live.closing_lines` reads.
"""

import fcntl
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path

import msgspec

from mlxflow.messages import terminal
from mlxflow.storage import atomic_folders
from mlxflow.tracking import request as requests
from mlxflow.tracking.reporting import report_run

# Training comes first where processors are scarce
_NICENESS = 10


class _Speaker:
    """Prints lines while the stage runs; afterwards no one would read them.

    Attributes:
        said: the lines that were printed.
    """

    def __init__(self) -> None:
        self.said: list[str] = []
        self._lock = threading.Lock()
        self._is_heard = True

    def say(self, line: str) -> None:
        """Print a line."""
        with self._lock, suppress(OSError):
            if self._is_heard:
                terminal.say(line)
                self.said.append(line)

    def leave(self) -> None:
        """Close the stage's standard error."""
        with self._lock:
            self._is_heard = False
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 2)
            os.close(nowhere)


def main(path: Path) -> int:
    """Report the run of a request to its end."""
    with suppress(OSError):
        os.nice(_NICENESS)
    speaker = _Speaker()
    reading, writing = os.pipe()

    def watch() -> None:
        ending = os.read(0, 1) or requests.INTERRUPTED
        speaker.leave()
        os.write(writing, ending)

    threading.Thread(target=watch, daemon=True).start()
    try:
        with path.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # for `closing_lines`: this process is alive
            outcomes = report_run(path, requests.read_request(path), reading, speaker.say)
            unsaid = [one for one in outcomes if not (one.problem and one.line in speaker.said)]
            atomic_folders.write_whole(requests.said_file(path), msgspec.json.encode(unsaid))
    finally:
        path.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
