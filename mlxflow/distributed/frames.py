"""Messages between the supervisor and the agent of a rank on another host, over the pipes of ssh.

The agent's first line is a greeting, which any version of mlxflow can read. Then both sides send frames: a kind of one
byte, the length of the content in four, and the content.
"""

import json
import os
import struct
from collections.abc import Iterator
from typing import Any

_HEAD = struct.Struct(">cI")

#: The most bytes of one frame; files are sent in several.
MAX_BYTES = 1 << 20

#: How the agent's greeting begins; what a shell's profile prints before it is ignored.
GREETING = b"mlxflow-agent "

#: Kinds of frames to the agent.
PROJECT, FILE, CONTENT, RUN, SIGNAL, ALIVE = b"P", b"F", b"C", b"R", b"K", b"A"

#: Kinds of frames from the agent.
WANTED, BEATS, OUTPUT, STOPPED, ENDED, REFUSED = b"W", b"B", b"O", b"S", b"E", b"X"


def encode(kind: bytes, content: bytes = b"") -> bytes:
    """Return a frame."""
    return _HEAD.pack(kind, len(content)) + content


def encode_json(kind: bytes, value: Any) -> bytes:
    """Return a frame with a JSON value; it may be longer than `MAX_BYTES`."""
    return encode(kind, json.dumps(value).encode())


class Decoder:
    """Cuts a stream into frames."""

    def __init__(self) -> None:
        self._data = bytearray()

    def add(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Yield kind and content of each frame that is whole with the given data."""
        self._data += data
        while len(self._data) >= _HEAD.size:
            kind, length = _HEAD.unpack_from(self._data)
            if len(self._data) < _HEAD.size + length:
                return
            content = bytes(self._data[_HEAD.size : _HEAD.size + length])
            del self._data[: _HEAD.size + length]
            yield kind, content

    def take_line(self, data: bytes) -> bytes | None:
        """Return the next line that is whole with the given data, without its end; None if none is."""
        self._data += data
        line, end, rest = self._data.partition(b"\n")
        if not end:
            return None
        self._data = rest
        return bytes(line)


class Outbox:
    """Frames to be written to a pipe that must not block its writer.

    Args:
        descriptor: of the pipe.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._data = bytearray()
        os.set_blocking(descriptor, False)

    def __len__(self) -> int:
        """Return the number of bytes that wait."""
        return len(self._data)

    def add(self, frame: bytes) -> None:
        """Add a frame, and write as much as the pipe takes.

        Raises:
            BrokenPipeError: no one reads the pipe.
        """
        self._data += frame
        self.flush()

    def flush(self) -> None:
        """Write as much as the pipe takes.

        Raises:
            BrokenPipeError: no one reads the pipe.
        """
        try:
            while self._data:
                del self._data[: os.write(self._descriptor, self._data[: 1 << 16])]
        except BlockingIOError:
            pass
