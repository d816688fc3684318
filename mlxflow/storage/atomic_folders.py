"""Folders and files that appear whole: written beside their place, flushed, and moved there in one step.

An artifact's folder may be a symbolic link, to another disk for instance. It stays a link: everything happens in the
folder that it leads to and beside that one, so no move crosses from one file system to another.
"""

import errno
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlxflow.errors import StageError
from mlxflow.storage import temporary_files
from mlxflow.system import terminal
from mlxflow.system.os_errors import OF_WRITING, advise, is_about_a_file, named, naming

_PARTIAL_SUFFIX = ".partial"
_ASIDE_SUFFIX = f"{_PARTIAL_SUFFIX}.old"

# What a file system answers that cannot flush a folder
_CANNOT_FLUSH = frozenset({errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP})


@contextmanager
def publishing(folder: Path, keep: Callable[[], Iterable[str]] = tuple) -> Iterator[Path]:
    """Give a private folder to write into; when the block ends well it becomes `folder`, else it is removed.

    Args:
        folder: the artifact; replaced whole, or made. Where it is a link, the folder that it leads to is.
        keep: returns the names of the files that are in the folder now and will be in the new one; asked at the end.

    Yields:
        an empty folder on the same file system.

    Raises:
        StageError: a file call failed: the disk is full or cannot be written, or the folder cannot be replaced, say;
            the old artifact is as it was, unless the line says that it was replaced.
    """
    with writable(folder):
        place = place_of(folder)
        yield from _publish(_private(place), place, keep)


def _private(place: Path) -> Path:
    return place.with_name(f".{place.name}{_PARTIAL_SUFFIX}")


def _publish(private: Path, folder: Path, keep: Callable[[], Iterable[str]]) -> Iterator[Path]:
    try:
        remove_folder(private)  # what a crash left behind
        private.mkdir(parents=True)
        yield private
        for name in keep():
            _carry_over(folder / name, private / name)
        for path in sorted(private.rglob("*")):
            if not path.is_symlink():
                _flush(path)
        _flush(private)
        _swap(private, folder)
    except BaseException:
        with suppress(OSError):  # the first error is the one to know, and the next run removes the folder
            remove_folder(private)
        raise
    try:
        _flush(folder.parent)
    except OSError as error:
        said = f"{folder.parent}: cannot be flushed to the disk ({error.strerror})"
        raise StageError(f"{said}. {advise(error)}; {folder} was replaced.") from error
    _remove_replaced(private)


def _carry_over(old: Path, new: Path) -> None:
    """Give a file a second name in the folder that will replace its own; the new folder's own files come first.

    Raises:
        StageError: a file is where a folder has to be, or the other way round.
    """
    if new.exists() and not new.is_dir():
        return
    for parent in (new, *new.parents):
        if parent.exists() and parent.is_dir() == (parent == new):
            raise StageError(f"{old}: is in the way of a file that this stage writes. Move it away.")
    new.parent.mkdir(parents=True, exist_ok=True)
    if old.is_symlink():
        new.symlink_to(old.readlink())
        return
    try:
        new.hardlink_to(old)
    except OSError:  # a file system without a second name for a file
        shutil.copy2(old, new)


def _remove_replaced(old: Path) -> None:
    """Remove what was replaced. The new artifact is in its place: that the old one cannot go fails nothing."""
    try:
        remove_folder(old)
    except OSError as error:
        terminal.say(f"{old}: cannot be removed ({error.strerror}). Remove it.")


def place_of(folder: Path) -> Path:
    """Return where a folder that will be replaced whole lies, which is the folder itself where no link leads to it.

    Nothing is made.

    Raises:
        StageError: a link leads nowhere, or what is there cannot be replaced whole.
    """
    links = [one for one in (*reversed(folder.parents), folder) if one.is_symlink()]
    for link in (one for one in links if not one.exists()):
        _check_target(link)
    place = Path(os.path.realpath(folder)) if links else folder
    if place.exists() and not place.is_dir():
        raise StageError(f"{folder}: is a file, and a folder has to be there. Move it away.")
    if place.is_dir() and _is_mounted(place):
        raise StageError(
            f"{folder}: at {place} a disk is mounted, so it cannot be replaced whole. "
            f"Let it be a link to a folder on that disk, such as {place / folder.name}."
        )
    return place


def _check_target(link: Path) -> None:
    """Refuse a link that leads nowhere, unless only the last folder on its way is missing.

    Raises:
        StageError: it does.
    """
    target = Path(os.path.realpath(link))
    if target.is_symlink():
        raise StageError(f"{link}: is a link that leads in a circle. Remove it.")
    if not target.parent.is_dir():
        raise StageError(
            f"{link}: is a link to {target}, and {target.parent} is not there. "
            "Mount its disk, make that folder, or remove the link."
        )


def make_link_target(folder: Path) -> None:
    """Make the folder that a link leads to where it is missing; a folder that is no link is left alone.

    Raises:
        StageError: the link leads nowhere.
        OSError: the folder cannot be made.
    """
    if folder.is_symlink() and not folder.is_dir():
        place_of(folder).mkdir(exist_ok=True)


def _is_mounted(place: Path) -> bool:
    """Return whether a file system, or a part of one, is mounted at a folder."""
    if place.is_mount():
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:  # no Linux, where the above sees all there is
        return False
    points = (re.sub(r"\\(\d{3})", lambda escaped: chr(int(escaped[1], 8)), line.split(" ")[4]) for line in lines)
    return os.path.realpath(place) in points


@contextmanager
def writable(target: Path) -> Iterator[None]:
    """Word a file call that fails in this block, which writes a file or folder.

    Raises:
        StageError: one failed; the target is unchanged.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, BrokenPipeError) or not is_about_a_file(error):
            raise
        raise StageError(f"{_word_failure(error, target)}. {advise(error)}; {target} is unchanged.") from error


def _word_failure(error: OSError, target: Path) -> str:
    """Return which file could not be written, or merely failed where it is not one that the target is made of."""
    where = named(error, target)
    file, place = Path(os.path.realpath(where)), Path(os.path.realpath(target))
    is_own = file.parent == place.parent or any(file.is_relative_to(one) for one in (place, _private(place)))
    if error.errno not in OF_WRITING and not is_own:
        return f"{where}: {error.strerror}"
    free = shutil.disk_usage(next(path for path in (target, *target.parents) if os.access(path, os.F_OK))).free
    return f"{where}: cannot be written ({error.strerror}; {free:,} bytes free)"


def remove_folder(folder: Path) -> None:
    """Remove a folder of this module's making, if it is there; of a link, only the link."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.is_dir():
        shutil.rmtree(folder)


def partial_folders(artifacts: Path) -> list[Path]:
    """Return the private folders of stages and variants: of running ones, or left by a crash."""
    found: set[Path] = set()
    for entry in _folders(artifacts):
        for one in (entry, *(() if entry.name[0] == "." else _folders(Path(entry.path)))):
            place = _private(Path(os.path.realpath(one.path))) if one.is_symlink() else Path(one.path)
            if place.name[0] == "." and place.name.endswith((_PARTIAL_SUFFIX, _ASIDE_SUFFIX)) and _is_own(place):
                found.add(place)
    return sorted(found)


def _is_own(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink()


def _folders(folder: Path) -> list["os.DirEntry[str]"]:
    """Return the folders in a folder, and the links, a link may lead to a folder that is not there yet."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return [entry for entry in entries if entry.is_symlink() or entry.is_dir()]


def _flush(path: Path) -> None:
    """Ask the system to put a file or folder on the disk itself."""
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            _flush_descriptor(descriptor)
        except OSError as error:
            if error.errno not in _CANNOT_FLUSH or not path.is_dir():
                raise
        finally:
            os.close(descriptor)


def _flush_descriptor(descriptor: int) -> None:
    import fcntl

    full = getattr(fcntl, "F_FULLFSYNC", None)  # macOS: fsync alone stops at the drive's own cache
    if full is not None:
        try:
            fcntl.fcntl(descriptor, full)
        except OSError:  # a file system that has no such call
            pass
        else:
            return
    os.fsync(descriptor)


def _swap(private: Path, folder: Path) -> None:
    """Put a folder in the place of another; the other ends up under the first one's name."""
    if not folder.exists():
        private.rename(folder)
    elif not _exchange(private, folder):
        # No single step here: for an instant there is no artifact, which the next run mends by building it again.
        aside = private.with_name(f".{folder.name}{_ASIDE_SUFFIX}")
        remove_folder(aside)
        folder.rename(aside)
        try:
            private.rename(folder)
        except BaseException:
            aside.rename(folder)
            raise
        aside.rename(private)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step where the system can; return whether it did."""
    import ctypes  # a run whose stages are all fresh needs none

    library = ctypes.CDLL(None, use_errno=True)
    exchange = 2  # RENAME_EXCHANGE on Linux and RENAME_SWAP on macOS have the same value
    first, second = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        return bool(library.renamex_np(first, second, exchange) == 0)
    if hasattr(library, "renameat2"):
        here = -100  # AT_FDCWD
        return bool(library.renameat2(here, first, here, second, exchange) == 0)
    return False


def write_whole(path: Path, data: bytes) -> None:
    """Write a file beside its place, flush it and move it there; other readers see the old bytes or the new ones.

    A link stays a link: the file that it leads to is written.
    """
    place = Path(os.path.realpath(path)) if path.is_symlink() else path
    temporary = temporary_files.beside(place)
    try:
        with naming(place), temporary.open("wb") as file:
            file.write(data)
            file.flush()
            _flush_descriptor(file.fileno())
        temporary.replace(place)
    except BaseException:
        with suppress(OSError):  # the first error is the one to know
            temporary.unlink(missing_ok=True)
        raise
