"""One doit at a time on an artifacts folder, one stage at a time on the device: file locks, gone with their holder."""

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path

from mlxflow.errors import UserError
from mlxflow.storage.regular_files import open_own
from mlxflow.storage.user_folders import cache_folder
from mlxflow.system import terminal
from mlxflow.system.os_errors import naming, word_cause

# How file systems say that they have no locks: NFS without its lock service, Lustre without -o flock, FUSE
_UNSUPPORTED = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
_UNWRITABLE = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST})

# Who waited for less needs no line about it
_WORTH_A_LINE_SECONDS = 1.0


class LockedError(Exception):
    """Another process holds the lock, and waiting was not wanted."""


class LockUnsupportedError(UserError):
    """No file system at hand can lock files."""


class UnwritableError(UserError):
    """The lock's file cannot be made, so nothing that it guards may be written."""


@contextmanager
def hold(
    path: Path, waiting: str, *, wait: bool, shared: bool = False, about: str = "", needed: bool = False
) -> Iterator[UnwritableError | None]:
    """Hold a lock until the block ends; the system releases it when the process ends, however it ends.

    On a file system without locks a stand-in in the user's cache folder is locked instead, and a line says so: it
    keeps apart the processes of this machine only.

    Args:
        path: the lock's file, created where it is missing.
        waiting: the line to print before waiting; `{holder}` becomes the process that holds the lock.
        wait: whether to wait.
        shared: whether other shared holders may hold it at the same time.
        about: what this process does with it, for the line that others print.
        needed: whether something will be written that it guards.

    Yields:
        None: it is held. Else its file cannot be made: what it guards may be read, and the error is to be raised before
        any of that is written.

    Raises:
        LockedError: it is held and `wait` is false; the message is the line.
        LockUnsupportedError: neither the file system nor that of the user's cache folder has locks.
        UnwritableError: its file cannot be made, and it is needed.
        StageError: a link, a FIFO or a folder is in the place of the lock's file.
    """
    try:
        file = _open(path)
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        unwritable = UnwritableError(word_cause(error, path))
        if needed:
            raise unwritable from error
        yield unwritable
        return
    with ExitStack() as held:
        held.enter_context(_closing(file, path))
        with naming(path):
            refusal = _acquire(file, waiting, wait=wait, shared=shared)
        if refusal:
            file = held.enter_context(_stand_in(path, refusal))
            if _acquire(file, waiting, wait=wait, shared=shared):
                raise _unsupported(path, refusal)
            _say(
                f"{path}: its file system cannot lock files ({refusal}). {file.name} is locked instead, which other "
                "machines do not see: let one machine at a time work on this folder."
            )
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
    """Close a lock's file at the end, naming it where that fails; the lock is gone in any case."""
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
        return path.open(encoding="utf-8", errors="surrogateescape")  # another user's: it can be locked all the same
    # so that the file knows its name
    return open(path, "a+", encoding="utf-8", errors="surrogateescape", opener=lambda *_: descriptor)


def _acquire(file: TextIOWrapper, waiting: str, *, wait: bool, shared: bool) -> str:
    """Lock a file, saying whom it waits for and, where that took long, that it is over.

    Returns:
        why its file system cannot lock it; empty: it is locked.
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
            _say(f"{line.partition(':')[0]}: waited {took:,.0f} s")
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return error.strerror or str(error)
    return ""


def _write_holders(file: TextIOWrapper, lines: Sequence[str]) -> None:
    """Write down who holds the lock; on a full disk that stays unknown, and the lock is held all the same.

    Nothing is written into a file that has a second name, which may be anybody's.
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
    """Return who wrote down that they hold the lock, of those that are still there."""
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
    except PermissionError:  # another user's
        return True
    return True


def _stand_in(path: Path, refusal: str) -> TextIOWrapper:
    """Return a file in the user's cache folder to lock instead of one whose file system has no locks.

    Raises:
        LockUnsupportedError: there can be none.
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
    """Return the lock of this machine's device, the same for every workflow of a user: in the user's cache folder.

    Raises:
        NoFolderError: there is no place for a cache folder.
    """
    return cache_folder() / "device.lock"
