"""One doit at a time on an artifacts folder, one stage at a time on the device: file locks, gone with their holder."""

import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class LockedError(Exception):
    """Somebody else holds the lock, and waiting was not wanted."""


@contextmanager
def hold(path: Path, waiting: str, *, wait: bool) -> Iterator[None]:
    """Hold a lock until the block ends; the system lets it go when the process ends, however it ends.

    Args:
        path: the lock's file, made where it is missing.
        waiting: the line to print before waiting; `{holder}` becomes the process that holds the lock.
        wait: whether to wait.

    Raises:
        LockedError: it is held and `wait` is false; the message is the line.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.open("a+")
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise
        yield  # where nothing can be written nobody else is at work; whoever must write says so
        return
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            line = waiting.format(holder=file.read().strip() or "unknown")
            if not wait:
                raise LockedError(line) from None
            print(line, file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def device_lock() -> Path:
    """Return the lock of this machine's device, the same for every workflow of a user: in the user's cache folder."""
    usual = Path("Library/Caches") if sys.platform == "darwin" else Path(".cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / usual) / "mlxflow" / "device.lock"
