"""Replace folders and files atomically: written to a temporary sibling, flushed, and moved in one step.

An artifact's folder may be a symbolic link, for example to another disk. It stays a link: its target is replaced, and
temporary files are siblings of the target, so no move crosses file systems.
"""

import errno
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlxflow.messages import terminal
from mlxflow.messages.byte_sizes import show_bytes
from mlxflow.messages.errors import StageError
from mlxflow.messages.os_errors import OF_WRITING, advise, is_about_a_file, named, naming
from mlxflow.storage import flushing, temporary_files

_PARTIAL_SUFFIX = ".partial"
_ASIDE_SUFFIX = f"{_PARTIAL_SUFFIX}.old"

# Errors of file systems that cannot flush a folder
_CANNOT_FLUSH = frozenset({errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP})


@contextmanager
def publishing(folder: Path, keep: Callable[[], Iterable[str]] = tuple) -> Iterator[Path]:
    """Yield a private folder to write into; it becomes `folder` if the block succeeds, else it is removed.

    Args:
        folder: the artifact, replaced as a whole or created; of a link, its target.
        keep: returns the names of the current files that the new folder keeps; called at the end.

    Yields:
        an empty folder on the same file system.

    Raises:
        StageError: a file call failed: for example because the disk is full;
            the old artifact is unchanged, unless the message says that it was replaced.
    """
    with writable(folder):
        place = place_of(folder)
        yield from _publish(_private(place), place, keep)


def private_folder(folder: Path) -> Path:
    """Return the folder into which a run writes that will replace an artifact; it exists meanwhile, or after a kill.

    Args:
        folder: the artifact.
    """
    return _private(Path(os.path.realpath(folder)) if folder.is_symlink() else folder)


def _private(place: Path) -> Path:
    return place.with_name(f".{place.name}{_PARTIAL_SUFFIX}")


def _publish(private: Path, folder: Path, keep: Callable[[], Iterable[str]]) -> Iterator[Path]:
    try:
        remove_folder(private)  # left by a crash
        private.mkdir(parents=True)
        yield private
        for name in keep():
            _carry_over(folder / name, private / name)
        _flush_all(private)
        _swap(private, folder)
    except BaseException:
        with suppress(OSError):  # the first error is reported, and the next run removes the folder
            remove_folder(private)
        raise
    try:
        _flush(folder.parent)
    except OSError as error:
        message = f"{folder.parent}: cannot be flushed to the disk ({error.strerror})"
        raise StageError(f"{message}. {advise(error)}; {folder} was replaced.") from error
    _remove_replaced(private)


def _carry_over(old: Path, new: Path) -> None:
    """Hard-link a file into the new folder; files of the new folder have priority.

    Raises:
        StageError: a file has the name of a folder, or the reverse.
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
    except OSError:  # a file system without hard links
        shutil.copy2(old, new)


def _remove_replaced(old: Path) -> None:
    """Remove the replaced folder. The new artifact is in place, so a failure is only reported."""
    try:
        remove_folder(old)
    except OSError as error:
        terminal.say(f"{old}: cannot be removed ({error.strerror}). Remove it.")


def place_of(folder: Path) -> Path:
    """Return the location of a folder that will be replaced: the folder itself, or the target of a link.

    Raises:
        StageError: a link is broken, or its target cannot be replaced as a whole.
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
    """Refuse a broken link, unless only the last folder of its target is missing.

    Raises:
        StageError: the link is broken.
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
    """Create the missing target folder of a link; does nothing for a folder that is no link.

    Raises:
        StageError: the link is broken.
        OSError: the folder cannot be created.
    """
    if folder.is_symlink() and not folder.is_dir():
        place_of(folder).mkdir(exist_ok=True)


def _is_mounted(place: Path) -> bool:
    """Return whether a folder is a mount point, including bind mounts."""
    if place.is_mount():
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:  # not Linux: the check above is complete there
        return False
    points = (re.sub(r"\\(\d{3})", lambda escaped: chr(int(escaped[1], 8)), line.split(" ")[4]) for line in lines)
    return os.path.realpath(place) in points


@contextmanager
def writable(target: Path) -> Iterator[None]:
    """Convert errors of file calls in this block, which writes a file or folder, to a `StageError`.

    Raises:
        StageError: one failed; the target is unchanged.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, BrokenPipeError) or not is_about_a_file(error):
            raise
        raise StageError(f"{_failure_message(error, target)}. {advise(error)}; {target} is unchanged.") from error


def _failure_message(error: OSError, target: Path) -> str:
    """Return which file could not be written, or only which call failed for files outside of the target."""
    where = named(error, target)
    file, place = Path(os.path.realpath(where)), Path(os.path.realpath(target))
    is_own = file.parent == place.parent or any(file.is_relative_to(one) for one in (place, _private(place)))
    if error.errno not in OF_WRITING and not is_own:
        return f"{where}: {error.strerror}"
    free = shutil.disk_usage(next(path for path in (target, *target.parents) if os.access(path, os.F_OK))).free
    return f"{where}: cannot be written ({error.strerror}; {show_bytes(free)} free)"


def remove_folder(folder: Path) -> None:
    """Remove a folder made by this module if it exists; of a link, only the link."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.is_dir():
        shutil.rmtree(folder)


def partial_folders(artifacts: Path) -> list[Path]:
    """Return the private folders of stages and variants, in use or left by a crash."""
    folders: set[Path] = set()
    for entry in _folders(artifacts):
        for one in (entry, *(() if entry.name[0] == "." else _folders(Path(entry.path)))):
            place = _private(Path(os.path.realpath(one.path))) if one.is_symlink() else Path(one.path)
            if place.name[0] == "." and place.name.endswith((_PARTIAL_SUFFIX, _ASIDE_SUFFIX)) and _is_own(place):
                folders.add(place)
    return sorted(folders)


def _is_own(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink()


def _folders(folder: Path) -> list["os.DirEntry[str]"]:
    """Return the folders and links in a folder; a link's target may not exist yet."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return [entry for entry in entries if entry.is_symlink() or entry.is_dir()]


def _flush_all(folder: Path) -> None:
    """Flush everything in a folder to the disk: each file to the drive, and the drive's cache once."""
    paths = [path for path in sorted(folder.rglob("*")) if not path.is_symlink()]
    last = next(filter(Path.is_file, reversed(paths)), folder)
    for path in (*paths, folder):
        if path != last:
            _flush(path)
    _flush(last, by=flushing.flush_drive)


def _flush(path: Path, *, by: Callable[[int], None] = flushing.flush) -> None:
    """Flush a file or folder."""
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            by(descriptor)
        except OSError as error:
            if error.errno not in _CANNOT_FLUSH or not path.is_dir():
                raise
        finally:
            os.close(descriptor)


def _swap(private: Path, folder: Path) -> None:
    """Exchange two folders."""
    if not folder.exists():
        private.rename(folder)
    elif not _exchange(private, folder):
        # Not atomic: after a crash in between there is no artifact, and the next run builds it again.
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
    """Exchange two names atomically if the system can; return whether it did."""
    import ctypes  # not needed by a run whose stages are all fresh

    library = ctypes.CDLL(None, use_errno=True)
    exchange = 2  # RENAME_EXCHANGE on Linux and RENAME_SWAP on macOS have the same value
    first, second = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        return bool(library.renamex_np(first, second, exchange) == 0)
    if hasattr(library, "renameat2"):
        here = -100  # AT_FDCWD
        return bool(library.renameat2(here, first, here, second, exchange) == 0)
    return False


def write_whole(path: Path, data: bytes, *, is_published: bool = False) -> None:
    """Write a file atomically: readers see the old bytes or the new ones.

    A link stays a link; its target is written.

    Args:
        path: the file.
        data: its new content.
        is_published: the file lies in the folder of `publishing`, which flushes the drive for all of its files.
    """
    place = Path(os.path.realpath(path)) if path.is_symlink() else path
    temporary = temporary_files.beside(place)
    try:
        with naming(place), temporary.open("wb") as file:
            file.write(data)
            file.flush()
            (flushing.flush if is_published else flushing.flush_drive)(file.fileno())
        temporary.replace(place)
    except BaseException:
        with suppress(OSError):  # the first error is reported
            temporary.unlink(missing_ok=True)
        raise
