"""Names of files that are being written, each with its process in it, and the removal of those whose process is gone.

A process that is killed leaves the file that it was writing. The next run removes it: every such name holds the number
of a process, and what no living process owns is an orphan.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_SUFFIXES = (".tmp", ".partial")
_NAME = re.compile(r"\.?[^/]+\.(\d{1,10})(?:\.tmp|\.partial)(?:\.safetensors)?")
_SCRATCH = re.compile(r"mlxflow-(\d{1,10})-\w+")


def beside(place: Path, suffix: str = _SUFFIXES[0]) -> Path:
    """Return the file to write before it is moved to its place: in the same folder, hidden, of this process."""
    return place.with_name(f".{place.name}.{os.getpid()}{suffix}")


def remove_orphans(folder: Path, begin: str = "") -> None:
    """Remove the files in a folder that a process was writing that is gone; other files and links stay.

    To be called while this process writes nothing there: what bears its own number is of one before it.

    Args:
        folder: is looked at by itself, without the folders in it; it may be missing.
        begin: of the names that are looked at.
    """
    try:
        entries = os.scandir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    with entries:
        for entry in entries:
            if entry.name.startswith(begin) and entry.name.endswith((*_SUFFIXES, ".safetensors")):
                match = _NAME.fullmatch(entry.name)
                if match and entry.is_file(follow_symlinks=False) and not _is_owned(int(match[1]), entry):
                    Path(entry.path).unlink(missing_ok=True)


def remove_orphans_below(folder: Path) -> None:
    """Remove such files in a folder and in all folders in it; links are not followed."""
    for parent, _, _ in os.walk(folder):
        remove_orphans(Path(parent))


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Give an empty folder among the temporary files that is removed in the end; those of killed processes are, too."""
    import tempfile

    for entry in list(os.scandir(tempfile.gettempdir())):
        match = _SCRATCH.fullmatch(entry.name)
        if match and int(match[1]) != os.getpid():
            with suppress(FileNotFoundError):  # its process may end and remove it meanwhile
                is_ours = entry.stat(follow_symlinks=False).st_uid == os.geteuid()
                if is_ours and entry.is_dir(follow_symlinks=False) and not _is_owned(int(match[1]), entry):
                    shutil.rmtree(entry.path, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"mlxflow-{os.getpid()}-") as name:
        yield Path(name)


def _is_owned(process: int, entry: "os.DirEntry[str]") -> bool:
    """Return whether a process lives that may be the one that began a file, and not a later one of the same number."""
    if process == os.getpid():
        return False
    import psutil  # only where there is such a file

    try:
        began: float = psutil.Process(process).create_time()
        return began <= entry.stat(follow_symlinks=False).st_mtime + 1
    except (psutil.NoSuchProcess, FileNotFoundError, OverflowError):
        return False
    except psutil.AccessDenied:
        return True
