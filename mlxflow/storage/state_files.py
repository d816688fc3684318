"""Files in which something is remembered: read only where they are what was written, else as if they were not there.

State can be damaged, and it can come from elsewhere: out of an archive, or out of a cache of CI that others can write.
So a file of state is read through here and nowhere else. A link, a pipe or a device in its place is not read, nor is
what is too large or no JSON; a file with a checksum is read only where that fits its bytes. What the values mean is
checked by whoever reads them.
"""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import xxhash

from mlxflow.system import terminal
from mlxflow.system.os_errors import naming

#: The largest file of state that is read.
LARGEST_BYTES = 256_000_000

_KEY = b'{"checksum": "'
_DIGITS = 32
_OLDER = (b'{"format": ', b'{"key": ')  # how earlier versions began files without a checksum
_BEGIN = len(_KEY) + _DIGITS + len(b'", ')

#: Arguments of `os.open` that neither wait for the writer of a pipe nor follow a link.
NO_SURPRISES = os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC


class InvalidStateError(ValueError):
    """A file of state, or a part of it, is not what was written; the message is the reason."""


class OutdatedStateError(InvalidStateError):
    """A file of state is of an earlier version of mlxflow."""


def read_bytes(path: str | os.PathLike[str], largest: int = LARGEST_BYTES) -> bytes:
    """Return the bytes of a regular file.

    Args:
        path: the file.
        largest: bytes at most.

    Raises:
        FileNotFoundError: there is none.
        InvalidStateError: it is no regular file, or is larger.
        OSError: it cannot be read now; what it holds may be valid.
    """
    with naming(path):
        try:
            descriptor = os.open(path, os.O_RDONLY | NO_SURPRISES)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise InvalidStateError("a link") from error
            raise
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise InvalidStateError("no regular file")
            if found.st_size > largest:
                raise InvalidStateError(f"{found.st_size:,} bytes, at most {largest:,} are read")
            with open(descriptor, "rb", closefd=False) as file:
                return file.read()
        finally:
            os.close(descriptor)


def parse_json(data: bytes) -> Any:
    """Return the value of a JSON text; infinities are numbers, what is not a number is refused.

    Raises:
        InvalidStateError: it is no JSON, or nested too deeply to be state.
    """
    try:
        return _JSON.decode(data.decode())
    except (ValueError, RecursionError) as error:
        raise InvalidStateError("no valid JSON") from error


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError(name)
    return float(name)


_JSON = json.JSONDecoder(parse_constant=_constant)  # made once: `json.loads` makes one at every call with an argument


def encode(value: dict[str, Any]) -> bytes:
    """Return a JSON object as text whose first key is a checksum of what follows it."""
    body = json.dumps(value).encode()[1:]
    return _KEY + xxhash.xxh3_128_hexdigest(body).encode() + b'", ' + body


def decode(data: bytes) -> dict[str, Any]:
    """Return the object that `encode` made a text of.

    Raises:
        OutdatedStateError: it is an object without a checksum, as earlier versions wrote them.
        InvalidStateError: a byte of it changed.
    """
    if not data.startswith(_KEY):
        if data.startswith(_OLDER):
            raise OutdatedStateError("of an earlier version")
        raise InvalidStateError("it has no checksum")
    if xxhash.xxh3_128_hexdigest(data[_BEGIN:]).encode() != data[len(_KEY) : len(_KEY) + _DIGITS]:
        raise InvalidStateError("its bytes do not fit its checksum")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:  # a checksum that was made for other text
        raise InvalidStateError("no valid JSON") from error
    if not isinstance(value, dict):
        raise InvalidStateError("no table")
    del value["checksum"]
    return value


def read(path: Path) -> dict[str, Any]:
    """Return what `encode` made a file's text of.

    Raises:
        FileNotFoundError: there is no file.
        InvalidStateError: it is not what was written.
        OSError: it cannot be read now.
    """
    return decode(read_bytes(path))


def say_ignored(path: str | os.PathLike[str], reason: object, effect: str) -> None:
    """Print the line about state that is not valid.

    Args:
        path: the file.
        reason: what is wrong with it.
        effect: what follows from that, and what to do.
    """
    terminal.say(f"{os.fspath(path)}: not valid state ({reason}). {effect}")
