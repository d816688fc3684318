"""Which files a source names, and the documents in them."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from mlxflow.errors import SourceError
from mlxflow.identity import DigestCache, digest_file, digest_json

#: The text of the running Python's standard library sources: about 12 MB of English and code on every machine.
PYTHON_STDLIB = "builtin:python-stdlib"

BUILTINS = (PYTHON_STDLIB,)

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def source_files(source: str, root: Path) -> list[Path]:
    """Return the files that a source names, in sorted order, relative to `root` where the source is.

    Args:
        source: a file, a glob or a folder; a folder is walked, hidden files and folders are left out;
            what the workflow itself writes is no source unless it is named outright.
        root: the workflow's folder, from which relative sources begin.
    """
    place = root / source
    if place.is_file():
        found = [place]
    elif place.is_dir():
        found = [p for p in place.rglob("*") if p.is_file() and not _is_hidden(p.relative_to(place))]
    else:
        import glob

        matching = (root / name for name in glob.iglob(source, root_dir=root, recursive=True))  # noqa: PTH207
        found = [path for path in matching if path.is_file()]
    found = [path for path in found if not _is_made_here(path, source, root)]
    found.sort(key=lambda path: path.as_posix())
    return [path.relative_to(root) if not Path(source).is_absolute() else path for path in found]


def _is_made_here(path: Path, source: str, root: Path) -> bool:
    """Return whether a file is written by the workflow itself, and the source does not name that place outright."""
    if Path(source).parts[:1] in (("artifacts",), ("mlxflow.lock",)) or not path.is_relative_to(root):
        return False
    return path.relative_to(root).parts[0] in ("artifacts", "mlxflow.lock")


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def builtin_files(name: str) -> list[Path]:
    """Return the files of a built-in corpus in a fixed order: sorted by their path below the corpus's folder.

    Tests, installed packages and files that a build generated for one machine are left out.

    Raises:
        SourceError: there is no such corpus, or this Python came without its sources.
    """
    if name not in BUILTINS:
        raise SourceError(f"{name}: no such built-in corpus. Known: {', '.join(BUILTINS)}.")
    files = [Path(entry.path) for entry in _library_entries(_library())]
    if not files:
        raise SourceError(
            f"{name}: Python {sys.version.split()[0]} has no library sources here. Name a source of yours."
        )
    return sorted(files, key=lambda path: path.as_posix())


def _library() -> str:
    """Return the folder of the running Python's library; asking `sysconfig` takes longer than a no-op may."""
    return os.path.dirname(os.__file__)  # noqa: PTH120


def _library_entries(folder: str) -> Iterator["os.DirEntry[str]"]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".py"):
                if not entry.name.startswith("_sysconfigdata"):
                    yield entry
            elif entry.name not in _SKIPPED_FOLDERS and entry.is_dir(follow_symlinks=False):
                yield from _library_entries(entry.path)


def builtin_identity(name: str, cache: DigestCache) -> str:
    """Return the identity of a built-in corpus: the digest of its files' names and contents.

    The files are read only when the file system says of any of them that it changed.
    """
    stats = [(entry.path, entry.stat()) for entry in _library_entries(_library())]
    stamps = sorted((path, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for path, s in stats)

    def compute() -> str:
        root = Path(_library())
        return digest_json([[p.relative_to(root).as_posix(), digest_file(p).content] for p in builtin_files(name)])

    return cache.recall(name, digest_json(stamps), compute)


def read_documents(path: Path) -> Iterator[str]:
    """Yield the documents of one file: the `text` of each line of a .jsonl file, else the whole file.

    Raises:
        SourceError: the file is not UTF-8, or a line is no JSON object with a `text`; names the place.
    """
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{path}: byte {error.start:,} is not UTF-8. Save the file as UTF-8 or leave it out of pretokenize.sources."
        ) from error
    if path.suffix != ".jsonl":
        yield text
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _record_text(path, number, line)


def _record_text(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise SourceError(f"{path}:{number}: not valid JSON ({error}). Fix the line.") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise SourceError(f'{path}:{number}: expected an object with a "text". Fix the line.')
    return text
