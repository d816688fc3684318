"""A connection to an agent on another host: the pipes of an `ssh` that runs it."""

import json
import os
import select
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import IO, BinaryIO, cast

from mlxflow.device import child_processes
from mlxflow.distributed import frames

# For ssh: to connect, and between two questions whether the other host lives; without three answers it gives up
_CONNECT_SECONDS, _ASK_SECONDS = 15, 10

# For the agent's greeting after ssh has connected
_GREETING_SECONDS = 120.0

_TICK_SECONDS = 0.1
_READ_BYTES = 1 << 16
_END_SECONDS = 10.0

# What ssh returns if it could not connect or lost the connection
_SSH_FAILED = 255


class LinkError(Exception):
    """The agent cannot be reached, or not be run.

    Args:
        reason: in words.
        is_final: whether another attempt would fail in the same way.
    """

    def __init__(self, reason: str, *, is_final: bool) -> None:
        super().__init__(reason)
        self.is_final = is_final


class StopRequestedError(Exception):
    """A stop was requested while the agent was waited for."""


class SshLink:
    """A connection to an agent.

    Args:
        host: a name for ssh.
        command: of the agent.
        log: for what ssh and the agent print as errors.
        stop_requested: whether to give up waiting.

    Attributes:
        pipes: descriptors to read with `read`, until each has ended.
        complaint: the last line that was printed as an error.
    """

    def __init__(self, host: str, command: list[str], log: BinaryIO, stop_requested: Callable[[], bool]) -> None:
        self.complaint = ""
        self._host = host
        self._log = log
        self._stop_requested = stop_requested
        self._decoder = frames.Decoder()
        self._is_greeted = False
        try:
            self._ssh: subprocess.Popen[bytes] = child_processes.start(
                _ssh_command(host, command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C in the terminal is for the supervisor
            )
        except OSError as error:
            raise LinkError(f"ssh cannot be run ({error.strerror})", is_final=True) from error
        self._files = [cast("IO[bytes]", file) for file in (self._ssh.stdin, self._ssh.stdout, self._ssh.stderr)]
        self._orders, self._frames, self._errors = (file.fileno() for file in self._files)
        self.pipes = {self._frames, self._errors}
        self._outbox = frames.Outbox(self._orders)

    def greeting(self) -> dict[str, str]:
        """Return what the agent greets with; lines of a shell's profile before it are ignored.

        Raises:
            LinkError: the agent does not answer.
            StopRequestedError: a stop was requested.
        """
        for data in self._data(_CONNECT_SECONDS + _GREETING_SECONDS):
            line = self._decoder.take_line(data)
            while line is not None:
                if line.startswith(frames.GREETING):
                    self._is_greeted = True
                    return dict(json.loads(line.removeprefix(frames.GREETING)))
                line = self._decoder.take_line(b"")
        raise self._failure()

    def received(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield kind and content of frames as they arrive, for ever.

        Raises:
            LinkError: the connection has ended.
            StopRequestedError: a stop was requested.
        """
        for data in self._data(float("inf")):
            yield from self._decoder.add(data)
        raise self._failure()

    def read(self, pipe: int) -> Iterator[tuple[bytes, bytes]]:
        """Yield the frames that a pipe has; log what it has of errors."""
        data = os.read(pipe, _READ_BYTES)
        if not data:
            self.pipes.discard(pipe)
        if pipe == self._frames:
            yield from self._decoder.add(data)
            return
        self._log.write(data)
        self._log.flush()
        for line in data.decode(errors="backslashreplace").splitlines():
            self.complaint = line.strip() or self.complaint

    def post(self, frame: bytes) -> None:
        """Send a frame as far as the pipe has room; the rest is sent with later ones.

        Raises:
            LinkError: the connection has ended.
        """
        try:
            self._outbox.add(frame)
        except OSError:
            raise self._failure() from None

    def post_all(self, frame: bytes) -> None:
        """Send a frame and wait until it is on its way.

        Raises:
            LinkError: the connection has ended.
            StopRequestedError: a stop was requested.
        """
        self.post(frame)
        while len(self._outbox):
            self._check_stop()
            select.select([], [self._orders], [], _TICK_SECONDS)
            self.post(b"")

    @property
    def is_congested(self) -> bool:
        """Whether much waits to be sent."""
        return len(self._outbox) > _READ_BYTES

    @property
    def exit_code(self) -> int | None:
        """The exit code of ssh; None while it runs."""
        code = self._ssh.poll()
        while code is not None and self._errors in self.pipes and self._errors in self._ready(0.0):
            list(self.read(self._errors))
        return code

    def end(self, take: Callable[[bytes, bytes], object]) -> None:
        """End the agent, which kills its rank, and wait for that; kill ssh if that takes too long.

        Args:
            take: called with the frames that still arrive.
        """
        with suppress(OSError):
            self._files[0].close()
        until = time.monotonic() + (_END_SECONDS if self._is_greeted else 0.0)
        while self._ssh.poll() is None and time.monotonic() < until:
            for pipe in self._ready(_TICK_SECONDS):
                for frame in self.read(pipe):
                    take(*frame)
        self._ssh.kill()
        self._ssh.wait()

    def kill(self) -> None:
        """End the connection at once, as a lost network does."""
        self._ssh.kill()

    def close(self) -> None:
        """Close the pipes."""
        for file in self._files:
            with suppress(OSError):
                file.close()
        self.pipes.clear()

    def _data(self, seconds: float) -> Iterator[bytes]:
        """Yield what the agent sends, until its pipe has ended or the time is over."""
        until = time.monotonic() + seconds
        while self._frames in self.pipes and time.monotonic() < until:
            self._check_stop()
            for pipe in self._ready(_TICK_SECONDS):
                if pipe == self._errors:
                    list(self.read(pipe))
                elif data := os.read(pipe, _READ_BYTES):
                    yield data
                else:
                    self.pipes.discard(pipe)

    def _check_stop(self) -> None:
        if self._stop_requested():
            raise StopRequestedError

    def _ready(self, seconds: float) -> list[int]:
        if not self.pipes:
            time.sleep(seconds)
            return []
        poll = select.poll()
        for pipe in self.pipes:
            poll.register(pipe, select.POLLIN | select.POLLHUP)
        return [pipe for pipe, _ in poll.poll(seconds * 1000)]

    def _failure(self) -> LinkError:
        """Return the error of an agent that does not answer."""
        with suppress(subprocess.TimeoutExpired):
            self._ssh.wait(1.0)
        code, host = self.exit_code, self._host
        words = (self.complaint or "no answer").rstrip(".")
        if code in (None, _SSH_FAILED):
            return LinkError(f"ssh to {host} failed: {words}. Check: ssh -o BatchMode=yes {host} true", is_final=False)
        advice = f"Set workflow.distributed.python to a Python with mlxflow on {host}."
        return LinkError(f"mlxflow cannot be run on {host}: {words}. {advice}", is_final=True)


def _ssh_command(host: str, command: list[str]) -> list[str]:
    options = {
        "BatchMode": "yes",  # no question for a password
        "ConnectTimeout": _CONNECT_SECONDS,
        "ServerAliveInterval": _ASK_SECONDS,
        "ServerAliveCountMax": 3,
        "LogLevel": "ERROR",
        "ClearAllForwardings": "yes",
        "ControlPath": "none",  # a connection of this process alone, which ends with it
    }
    flags = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    return ["ssh", "-T", *flags, "--", host, f"exec {shlex.join(command)}"]
