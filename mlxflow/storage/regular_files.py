"""Open mlxflow's own files only if they are regular files, without blocking and without following links.

Opening a FIFO would block, and a link in place of a log or a lock would redirect writes to another file.
"""

import errno
import os
import stat
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from mlxflow.messages.errors import StageError
from mlxflow.messages.os_errors import naming


def read_regular(path: str | os.PathLike[str]) -> bytes:
    """Return the content of a regular file or of a link's target.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with naming(path), open(descriptor, "rb") as file:  # noqa: PTH123
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "is no regular file", os.fspath(path))
        return file.read()


def open_own(path: Path, flags: int) -> int:
    """Open one of mlxflow's own files for writing, create it if missing, and return its descriptor.

    Args:
        path: the file.
        flags: of `os.open`, besides `O_CREAT`.

    Raises:
        StageError: a link, a FIFO or a folder has its name.
        OSError: it cannot be opened.
    """
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.EISDIR):
            raise
        raise _in_the_way(path) from error
    with ExitStack() as opened, naming(path):
        opened.callback(os.close, descriptor)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _in_the_way(path)
        opened.pop_all()
    return descriptor


def open_log(path: Path) -> BinaryIO:
    """Open a log for writing from the beginning. A link, a FIFO or a hard link to another file is replaced.

    Raises:
        StageError: a folder has its name.
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        there = path.lstat()
    except FileNotFoundError:
        pass
    else:
        if stat.S_ISDIR(there.st_mode):
            raise _in_the_way(path)
        if not stat.S_ISREG(there.st_mode) or there.st_nlink > 1:
            path.unlink()
    return open(path, "wb", opener=lambda *_: open_own(path, os.O_WRONLY | os.O_TRUNC))


def _in_the_way(path: Path) -> StageError:
    return StageError(f"{path}: is no regular file, and nothing is written through it. Move it away.")
