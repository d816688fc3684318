"""File locks: one doit at a time on an artifacts folder, one stage at a time on the device."""

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path

from mlxflow.messages import terminal
from mlxflow.messages.errors import UserError
from mlxflow.messages.os_errors import cause_message, naming
from mlxflow.storage.regular_files import open_own
from mlxflow.storage.user_folders import cache_folder

# Errors of file systems without locks: NFS without its lock service, Lustre without -o flock, FUSE
_UNSUPPORTED = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
_UNWRITABLE = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST})

# Shorter waits are not reported
_WORTH_A_LINE_SECONDS = 1.0


class LockedError(Exception):
    """Another process holds the lock, and the caller does not wait."""


class LockUnsupportedError(UserError):
    """Neither the file system nor the cache folder's can lock files."""


class UnwritableError(UserError):
    """The lock file cannot be created, so nothing that it protects may be written."""


@contextmanager
def hold(
    path: Path, waiting: str, *, wait: bool, shared: bool = False, about: str = "", needed: bool = False
) -> Iterator[UnwritableError | None]:
    """Hold a lock until the block ends; the system releases it when the process ends for any reason.

    On a file system without locks, a substitute file in the user's cache folder is locked, with a message: it only
    excludes processes of this machine.

    Args:
        path: the lock file, created if missing.
        waiting: the line to print before waiting; `{holder}` is replaced by the process that holds the lock.
        wait: whether to wait.
        shared: whether several shared holders may hold it at the same time.
        about: the activity of this process, for the lines of other processes.
        needed: whether protected files will be written.

    Yields:
        None if the lock is held; else the error of creating its file: protected files may be read, and the caller
        must raise the error before writing any.

    Raises:
        LockedError: it is held by another process and `wait` is false; the message is the line.
        LockUnsupportedError: neither the file system nor that of the user's cache folder has locks.
        UnwritableError: its file cannot be created, and it is needed.
        StageError: a link, a FIFO or a folder has the name of the lock file.
    """
    try:
        file = _open(path)
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        unwritable = UnwritableError(cause_message(error, path))
        if needed:
            raise unwritable from error
        yield unwritable
        return
    with ExitStack() as held:
        held.enter_context(_closing(file, path))
        with naming(path):
            refusal = _acquire(file, waiting, wait=wait, shared=shared)
        if refusal:
            file = held.enter_context(_locked_stand_in(path, refusal, waiting, wait=wait, shared=shared))
        line = f"{os.getpid()} {about}".strip()
        with naming(path):
            _write_holders(file, [*(_holders(file) if shared else ()), line])
        try:
            yield None
        finally:
            with naming(path):
                _remove_holder(file, line)


@contextmanager
def _closing(file: TextIOWrapper, path: Path) -> Iterator[None]:
    """Close a lock file, which releases the lock; an error names the file."""
    try:
        yield
    finally:
        with naming(path):
            file.close()


def _open(path: Path) -> TextIOWrapper:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = open_own(path, os.O_RDWR | os.O_APPEND)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EROFS) or not path.is_file():
            raise
        # owned by another user: it can be locked nevertheless
        return path.open(encoding="utf-8", errors="surrogateescape")
    # so that errors have the file's name
    return open(path, "a+", encoding="utf-8", errors="surrogateescape", opener=lambda *_: descriptor)


def is_held(path: Path) -> bool:
    """Return whether a process holds a lock; False if the file is missing or its file system has no locks."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _acquire(file: TextIOWrapper, waiting: str, *, wait: bool, shared: bool) -> str:
    """Lock a file; print which process it waits for and, after a long wait, its duration.

    Returns:
        why its file system cannot lock it; empty if it is locked.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        line = waiting.format(holder=" and ".join(_holders(file)) or "unknown")
        if not wait:
            raise LockedError(line) from None
        _say(line)
        begin = time.perf_counter()
        fcntl.flock(file, kind)
        took = time.perf_counter() - begin
        if took > _WORTH_A_LINE_SECONDS:
            _say(f"{line.partition(': ')[0]}: waited {took:,.0f} s")
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return error.strerror or str(error)
    return ""


def _write_holders(file: TextIOWrapper, lines: Sequence[str]) -> None:
    """Write the holder into the lock file; on a full disk the lock is held without that.

    Nothing is written into a file with several hard links, which may be any user's file.
    """
    if os.fstat(file.fileno()).st_nlink > 1:
        return
    with suppress(OSError):
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape"))


def _remove_holder(file: TextIOWrapper, line: str) -> None:
    others = _holders(file)
    if line in others:
        others.remove(line)
        _write_holders(file, others)


def _holders(file: TextIOWrapper) -> list[str]:
    """Return the holders written in the lock file whose processes still exist."""
    file.seek(0)
    lines = [line.strip() for line in file]
    return [line for line in dict.fromkeys(lines) if _is_alive(line.partition(" ")[0])]


def _is_alive(process: str) -> bool:
    if not process.isdecimal():
        return False
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # owned by another user
        return True
    return True


@contextmanager
def _locked_stand_in(path: Path, refusal: str, waiting: str, *, wait: bool, shared: bool) -> Iterator[TextIOWrapper]:
    """Lock the substitute for a file whose file system has no locks, with a message; arguments as those of `hold`."""
    with _stand_in(path, refusal) as file:
        if _acquire(file, waiting, wait=wait, shared=shared):
            raise _unsupported(path, refusal)
        _say(
            f"{path}: its file system cannot lock files ({refusal}). {file.name} is locked instead, which other "
            "machines do not see: let one machine at a time work on this folder."
        )
        yield file


def _stand_in(path: Path, refusal: str) -> TextIOWrapper:
    """Return the substitute in the user's cache folder for a file whose file system has no locks.

    Raises:
        LockUnsupportedError: it cannot be created.
    """
    own = device_lock().parent
    digest = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    stand_in = own / "locks" / f"{digest}.lock"
    if path.resolve().is_relative_to(own.resolve()):
        raise _unsupported(path, refusal)
    try:
        return _open(stand_in)
    except OSError as error:
        raise _unsupported(path, f"{refusal}; {stand_in} would do, but: {error.strerror}") from error


def _unsupported(path: Path, refusal: str) -> LockUnsupportedError:
    return LockUnsupportedError(
        f"{path}: its file system cannot lock files ({refusal}). Set XDG_CACHE_HOME to a folder on a local disk."
    )


def _say(line: str) -> None:
    terminal.say(line)


def device_lock() -> Path:
    """Return the lock of this machine's device, shared by all workflows of a user, in the user's cache folder.

    Raises:
        NoFolderError: there is no usable cache folder.
    """
    return cache_folder() / "device.lock"
