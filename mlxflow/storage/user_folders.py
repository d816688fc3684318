"""Folders that belong to the user alone: the cache, and the folder in which MLX compiles and from which it loads code.

On a machine of several users anybody may make a folder of any name in the shared temporary folder first. MLX loads
libraries and includes headers from such a folder, so it is given one that was checked: it belongs to this user, no
other user may enter it, and none may put another one in its place. The cache folder and its locks are checked alike.

Where one place cannot be used the next one is taken; where none can, one line says what is wrong with each.
"""

import os
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from mlxflow.errors import UserError

# What a place for compiled code must have free
_COMPILED_BYTES = 16 * 2**20

# The variables that C++'s `std::filesystem::temp_directory_path` reads, which MLX asks, in its order
_TEMPORARY_VARIABLES = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")


class NoFolderError(UserError):
    """There is no place for a folder of the user's own."""


def cache_folder() -> Path:
    """Return mlxflow's folder in the user's cache; it is there, and the user's own.

    That is in `XDG_CACHE_HOME` where that is an absolute path, else where the system has caches, else in the temporary
    folder.

    Raises:
        NoFolderError: none of these can be used.
    """
    return _first_usable("caches and locks", _cache_places())


def temporary_folder() -> Path:
    """Return the folder for temporary files: the one that the environment names, if it is there, or else `/tmp`."""
    written = next(filter(None, map(os.environ.get, _TEMPORARY_VARIABLES)), "")
    folder = Path(written).absolute()
    if not written or not folder.is_dir():
        return Path("/tmp")  # noqa: S108
    return folder.parent if folder.name == _own_name() else folder  # set by the process that started this one


def prepare_compiled_folder() -> Path:
    """Return the folder in which MLX compiles, and make MLX and all processes that this one starts use it.

    It is a folder of the user's own in the temporary folder, or else in the cache. Python's temporary files stay where
    they are. Has no effect on code that MLX has loaded already.

    Raises:
        NoFolderError: there is no place for such a folder.
    """
    import tempfile

    places = [temporary_folder() / _own_name(), *(place / "compiled" / _own_name() for place in _cache_places())]
    folder = _first_usable("compiled code", places, needed_bytes=_COMPILED_BYTES)
    try:
        inherited = tempfile.gettempdir() == str(folder)  # Python remembers it
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
            return Path(os.path.realpath(place))  # its links are followed now, and not again
        reasons.append(f"{place} ({reason})")
    raise NoFolderError(
        f"{' and '.join(dict.fromkeys(reasons))}: no folder of your own for {purpose}. "
        "Set XDG_CACHE_HOME to a folder that only you can write."
    )


def _make_own(folder: Path) -> str:
    """Make a folder that only this user can enter; return why it cannot be used, empty where it can.

    A folder that is there and read-only on purpose can be used, too: what root has put into it can be trusted.
    """
    try:
        for place in reversed([folder, *folder.parents]):
            if not place.is_dir():
                place.mkdir(mode=0o700, exist_ok=True)
        real = Path(os.path.realpath(folder))
        found = real.stat()
        owners = {folder.lstat().st_uid, found.st_uid}  # a link of another user may lead to a folder of this user
        is_read_only = not found.st_mode & stat.S_IWUSR or bool(os.statvfs(real).f_flag & os.ST_RDONLY)
        for owner in owners - {os.geteuid(), 0 if is_read_only else os.geteuid()}:
            return f"belongs to user {owner}"
        for place in (real, *real.parents):
            if reason := _exposed(place):
                return reason
        if found.st_uid == os.geteuid() and found.st_mode & 0o077 and not is_read_only:
            real.chmod(0o700)
        return "" if is_read_only or os.access(real, os.W_OK | os.X_OK) else "cannot be written"
    except OSError as error:
        return error.strerror or str(error)


def _exposed(folder: Path) -> str:
    """Return how another user may change or replace what is in a folder; empty where none may.

    Whoever owns a folder may, and whoever may write it unless its sticky bit is set. A group that has the user's own
    number has no other member by convention.
    """
    found = folder.stat()
    if found.st_uid not in (os.geteuid(), 0, Path("/").stat().st_uid):
        return f"{folder} belongs to user {found.st_uid}"
    own_group = found.st_gid in (0, os.geteuid())
    writers = found.st_mode & (stat.S_IWOTH if own_group else stat.S_IWOTH | stat.S_IWGRP)
    return f"{folder} can be written by others" if writers and not found.st_mode & stat.S_ISVTX else ""


def _lacks(folder: Path, needed_bytes: int) -> str:
    """Return why compiled code cannot lie in a folder; empty where it can."""
    found = os.statvfs(folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        return "cannot be written"
    if found.f_flag & getattr(os, "ST_NOEXEC", 0):
        return "is on a file system from which nothing may be run"
    free = found.f_bavail * found.f_frsize
    return f"{free:,} bytes are free and {needed_bytes:,} needed" if free < needed_bytes else ""
