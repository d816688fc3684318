"""State files between runs: read only if they are intact, else ignored.

State can be damaged or untrusted: from an archive, or from a CI cache that others can write. So only this module
reads state files. Links, pipes, devices, files that are too large and files that are no JSON are not read; a checksum
must match. The caller checks the values.
"""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import xxhash

from mlxflow.messages import terminal
from mlxflow.messages.os_errors import naming

#: The largest file of state that is read.
LARGEST_BYTES = 256_000_000

_KEY = b'{"checksum": "'
_DIGITS = 32
_OLDER = (b'{"format": ', b'{"key": ')  # beginning of files without a checksum, of earlier versions
_BEGIN = len(_KEY) + _DIGITS + len(b'", ')

#: Flags of `os.open` that neither block on a pipe nor follow a link.
NO_SURPRISES = os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC


class InvalidStateError(ValueError):
    """A state file, or a part of it, is not valid; the message is the reason."""


class OutdatedStateError(InvalidStateError):
    """A state file is of an earlier version of mlxflow."""


def read_bytes(path: str | os.PathLike[str], largest: int = LARGEST_BYTES) -> bytes:
    """Return the bytes of a regular file.

    Args:
        path: the file.
        largest: maximum size in bytes.

    Raises:
        FileNotFoundError: there is none.
        InvalidStateError: it is no regular file, or is larger.
        OSError: it cannot be read now; its content may be valid.
    """
    with naming(path):
        try:
            descriptor = os.open(path, os.O_RDONLY | NO_SURPRISES)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise InvalidStateError("a link") from error
            raise
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise InvalidStateError("no regular file")
            if status.st_size > largest:
                raise InvalidStateError(f"{status.st_size:,} bytes, at most {largest:,} are read")
            with open(descriptor, "rb", closefd=False) as file:
                return file.read()
        finally:
            os.close(descriptor)


def parse_json(data: bytes) -> Any:
    """Return the value of a JSON text; infinities are accepted, NaN is refused.

    Raises:
        InvalidStateError: it is no JSON, or nested too deeply.
    """
    try:
        return _JSON.decode(data.decode())
    except (ValueError, RecursionError) as error:
        raise InvalidStateError("no valid JSON") from error


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError(name)
    return float(name)


_JSON = json.JSONDecoder(parse_constant=_constant)  # made once: `json.loads` with arguments makes one at every call


def encode(value: dict[str, Any]) -> bytes:
    """Return a JSON object as text whose first key is a checksum of the rest."""
    body = json.dumps(value).encode()[1:]
    return _KEY + xxhash.xxh3_128_hexdigest(body).encode() + b'", ' + body


def decode(data: bytes) -> dict[str, Any]:
    """Return the object of a text made by `encode`.

    Raises:
        OutdatedStateError: it is an object without a checksum, of an earlier version.
        InvalidStateError: it is damaged.
    """
    if not data.startswith(_KEY):
        if data.startswith(_OLDER):
            raise OutdatedStateError("of an earlier version")
        raise InvalidStateError("it has no checksum")
    if xxhash.xxh3_128_hexdigest(data[_BEGIN:]).encode() != data[len(_KEY) : len(_KEY) + _DIGITS]:
        raise InvalidStateError("its bytes do not fit its checksum")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:  # a checksum of another text
        raise InvalidStateError("no valid JSON") from error
    if not isinstance(value, dict):
        raise InvalidStateError("no table")
    del value["checksum"]
    return value


def read(path: Path) -> dict[str, Any]:
    """Return the object in a file made by `encode`.

    Raises:
        FileNotFoundError: there is no file.
        InvalidStateError: it is damaged.
        OSError: it cannot be read now.
    """
    return decode(read_bytes(path))


def say_ignored(path: str | os.PathLike[str], reason: object, effect: str) -> None:
    """Print the message about invalid state.

    Args:
        path: the file.
        reason: why it is not valid.
        effect: the consequence, and what to do.
    """
    terminal.say(f"{os.fspath(path)}: not valid state ({reason}). {effect}")
