"""Heartbeats of a rank to its supervisor, one JSON line each: what it does in which step, and why it failed."""

import json
import os
import time
from contextlib import suppress
from typing import Any, Literal, NamedTuple

#: Why a rank failed: a mistake that a restart repeats, an unexpected error, a peer that is gone, a group of ranks that
#: could not be formed, another host that cannot be reached or used, or memory that ran out.
Kind = Literal["refused", "error", "peer", "join", "host", "memory"]

_MAX_LINES, _MAX_CHARACTERS = 100, 400

# A failure is the last message, so the rank waits for room in the pipe
_FAILURE_SECONDS = 2.0


class Beat(NamedTuple):
    """What a rank does.

    Attributes:
        step: the update; 0 before the first, -1 before the training.
        doing: in words, such as "forward pass".
        waits: whether it waits for other ranks.
        is_done: whether its training is over.
        batch_size: rows of its forward passes, where fewer would need less memory; 0 elsewhere.
    """

    step: int = -1
    doing: str = "start"
    waits: bool = False
    is_done: bool = False
    batch_size: int = 0


class Failure(NamedTuple):
    """Why a rank ends.

    Attributes:
        kind: see `Kind`.
        lines: of the message.
        exit_code: of the command.
    """

    kind: Kind
    lines: tuple[str, ...]
    exit_code: int


class Heart:
    """Sends the heartbeats of this process.

    Args:
        descriptor: of the writing end of a pipe; -1 to send nothing.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        if descriptor >= 0:
            os.set_blocking(descriptor, False)  # a stopped supervisor must not stop the rank

    def beat(self, step: int, doing: str, *, waits: bool = False, is_done: bool = False, batch_size: int = 0) -> None:
        """Say what the process does from now on."""
        self._send({"beat": [step, doing, waits, is_done, batch_size]})

    def fail(self, kind: Kind, message: str, exit_code: int) -> None:
        """Say why the process is about to end."""
        lines = [line[:_MAX_CHARACTERS] for line in message.split("\n")[:_MAX_LINES]]
        self._send({"failure": [kind, lines, exit_code]}, patience_seconds=_FAILURE_SECONDS)

    def _send(self, message: dict[str, Any], *, patience_seconds: float = 0.0) -> None:
        """Send a message as far as the pipe has room; a heartbeat is short, so it is sent whole or not at all."""
        if self._descriptor < 0:
            return
        data = json.dumps(message).encode() + b"\n"
        until = time.monotonic() + patience_seconds
        with suppress(BrokenPipeError):  # the supervisor has ended, and this process is about to end, too
            while data:
                with suppress(BlockingIOError):
                    data = data[os.write(self._descriptor, data) :]
                if time.monotonic() >= until:
                    return
                time.sleep(0.01)


def read_message(line: bytes) -> Beat | Failure | None:
    """Return the message of a line; None for a line that was cut off by the end of the process."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    if "beat" in message:
        return Beat(*message["beat"])
    kind, lines, exit_code = message["failure"]
    return Failure(kind, tuple(lines), exit_code)
