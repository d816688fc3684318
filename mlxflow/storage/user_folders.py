"""Private folders of the user: the cache, and the folder in which MLX compiles code and loads it from.

On a machine with several users, any user can create a folder of any name in the shared temporary folder. MLX loads
libraries and includes headers from such a folder, so it gets one that was checked: it belongs to this user, no other
user can enter it, and none can replace it. The cache folder and its locks are checked in the same way. If a location
cannot be used, the next one is tried; if none can, the error names the problem of each.
"""

import os
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from mlxflow.messages.byte_sizes import show_apart
from mlxflow.messages.errors import UserError

# Free space required for compiled code
_COMPILED_BYTES = 16 * 2**20

# The variables that C++'s `std::filesystem::temp_directory_path`, used by MLX, reads, in its order
_TEMPORARY_VARIABLES = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")


class NoFolderError(UserError):
    """There is no usable location for a private folder."""


def cache_folder() -> Path:
    """Return mlxflow's private folder in the user's cache; it is created if missing.

    Its location is `XDG_CACHE_HOME` if that is an absolute path, else the system's cache folder, else the temporary
    folder.

    Raises:
        NoFolderError: none of these can be used.
    """
    return _first_usable("caches and locks", _cache_places())


def temporary_folder() -> Path:
    """Return the folder for temporary files: the one in the environment if it exists, else `/tmp`."""
    written = next(filter(None, map(os.environ.get, _TEMPORARY_VARIABLES)), "")
    folder = Path(written).absolute()
    if not written or not folder.is_dir():
        return Path("/tmp")  # noqa: S108
    return folder.parent if folder.name == _own_name() else folder  # set by the parent process


def prepare_compiled_folder() -> Path:
    """Return the private folder in which MLX compiles, and make MLX and child processes use it.

    It is in the temporary folder, or else in the cache. Python's temporary files are not affected. Has no effect on
    code that MLX has already loaded.

    Raises:
        NoFolderError: there is no usable location.
    """
    import tempfile

    places = [temporary_folder() / _own_name(), *(place / "compiled" / _own_name() for place in _cache_places())]
    folder = _first_usable("compiled code", places, needed_bytes=_COMPILED_BYTES)
    try:
        inherited = tempfile.gettempdir() == str(folder)  # Python caches it
    except FileNotFoundError:
        tempfile.tempdir = str(folder)
    else:
        tempfile.tempdir = str(temporary_folder()) if inherited else tempfile.tempdir
    os.environ[_TEMPORARY_VARIABLES[0]] = str(folder)
    return folder


def _own_name() -> str:
    return f"mlxflow-{os.geteuid()}"


def _cache_places() -> Iterator[Path]:
    written = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(written):  # noqa: PTH117 - others are to be ignored, says the XDG specification
        yield Path(written, "mlxflow")
    home = os.path.expanduser("~")  # noqa: PTH111 - pathlib raises where a user has no home
    if os.path.isabs(home):  # noqa: PTH117
        yield Path(home, "Library/Caches" if sys.platform == "darwin" else ".cache", "mlxflow")
    yield temporary_folder() / _own_name() / "cache"


def _first_usable(purpose: str, places: Iterable[Path], needed_bytes: int = 0) -> Path:
    reasons = []
    for place in places:
        reason = _make_own(place) or (_lacks(place, needed_bytes) if needed_bytes else "")
        if not reason:
            return Path(os.path.realpath(place))  # links are resolved once, now
        reasons.append(f"{place} ({reason})")
    raise NoFolderError(
        f"{' and '.join(dict.fromkeys(reasons))}: no folder of your own for {purpose}. "
        "Set XDG_CACHE_HOME to a folder that only you can write."
    )


def _make_own(folder: Path) -> str:
    """Create a folder that only this user can enter; return why it cannot be used, empty if it can.

    An existing folder that is read-only on purpose can be used, too: content put there by root is trusted.
    """
    try:
        for place in reversed([folder, *folder.parents]):
            if not place.is_dir():
                place.mkdir(mode=0o700, exist_ok=True)
        real = Path(os.path.realpath(folder))
        status = real.stat()
        owners = {folder.lstat().st_uid, status.st_uid}  # a link of another user may point to a folder of this user
        is_read_only = not status.st_mode & stat.S_IWUSR or bool(os.statvfs(real).f_flag & os.ST_RDONLY)
        for owner in owners - {os.geteuid(), 0 if is_read_only else os.geteuid()}:
            return f"belongs to user {owner}"
        for place in (real, *real.parents):
            if reason := _exposed(place):
                return reason
        if status.st_uid == os.geteuid() and status.st_mode & 0o077 and not is_read_only:
            real.chmod(0o700)
        return "" if is_read_only or os.access(real, os.W_OK | os.X_OK) else "cannot be written"
    except OSError as error:
        return error.strerror or str(error)


def _exposed(folder: Path) -> str:
    """Return how another user could change or replace a folder's content; empty if none could.

    The owner of a parent folder can, and everyone with write permission unless its sticky bit is set. A group with
    the user's own id has no other members by convention.
    """
    status = folder.stat()
    if status.st_uid not in (os.geteuid(), 0, Path("/").stat().st_uid):
        return f"{folder} belongs to user {status.st_uid}"
    own_group = status.st_gid in (0, os.geteuid())
    writers = status.st_mode & (stat.S_IWOTH if own_group else stat.S_IWOTH | stat.S_IWGRP)
    return f"{folder} can be written by others" if writers and not status.st_mode & stat.S_ISVTX else ""


def _lacks(folder: Path, needed_bytes: int) -> str:
    """Return why a folder cannot hold compiled code; empty if it can."""
    status = os.statvfs(folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        return "cannot be written"
    if status.f_flag & getattr(os, "ST_NOEXEC", 0):
        return "is on a file system from which nothing may be run"
    free = status.f_bavail * status.f_frsize
    left, needed = show_apart(free, needed_bytes)
    return f"{left} are free and {needed} needed" if free < needed_bytes else ""
