"""Temporary file names that contain the process id, and removal of those whose process has ended.

A killed process leaves unfinished files. The next run removes them: every name contains a process id, and a file
whose process no longer exists is an orphan.
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
    """Return the temporary name for a file: in the same folder, hidden, with the id of this process."""
    return place.with_name(f".{place.name}.{os.getpid()}{suffix}")


def remove_orphans(folder: Path, begin: str = "") -> None:
    """Remove the temporary files of ended processes in a folder; other files and links are kept.

    Call it while this process writes nothing there: files with its own id are taken for those of an earlier process.

    Args:
        folder: searched without its subfolders; it may be missing.
        begin: prefix of the names.
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
    """Remove such files in a folder and all its subfolders; links are not followed."""
    for parent, _, _ in os.walk(folder):
        remove_orphans(Path(parent))


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield an empty temporary folder and remove it afterwards; also removes those of killed processes."""
    import tempfile

    for entry in list(os.scandir(tempfile.gettempdir())):
        match = _SCRATCH.fullmatch(entry.name)
        if match and int(match[1]) != os.getpid():
            with suppress(FileNotFoundError):  # its process may remove it concurrently
                is_ours = entry.stat(follow_symlinks=False).st_uid == os.geteuid()
                if is_ours and entry.is_dir(follow_symlinks=False) and not _is_owned(int(match[1]), entry):
                    shutil.rmtree(entry.path, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"mlxflow-{os.getpid()}-") as name:
        yield Path(name)


def _is_owned(process: int, entry: "os.DirEntry[str]") -> bool:
    """Return whether the process that began a file may still run; a later process with the same id does not count."""
    if process == os.getpid():
        return False
    import psutil  # imported only if there is such a file

    try:
        began: float = psutil.Process(process).create_time()
        return began <= entry.stat(follow_symlinks=False).st_mtime + 1
    except (psutil.NoSuchProcess, FileNotFoundError, OverflowError):
        return False
    except psutil.AccessDenied:
        return True
