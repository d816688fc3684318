"""Find the files that a source names. Imported by every `doit`, so it imports nothing heavy."""

import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mlxflow.data import splits
from mlxflow.messages.errors import SourceError
from mlxflow.storage import layout
from mlxflow.storage.digests import DigestCache, digest_file, digest_json, digest_text
from mlxflow.storage.paths import escape_existing, expand

#: The text of the running Python's standard library sources: about 12 MB of English and code on every machine.
PYTHON_STDLIB = "builtin:python-stdlib"

BUILTINS = (PYTHON_STDLIB,)

#: Prefix of a source that is a data set of the `datasets` library.
HF = "hf:"

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}

# Suffixes of binary files, which are skipped in a folder without opening them; other files are checked by content.
_BINARY_SUFFIXES = frozenset(
    [
        ".7z",
        ".a",
        ".avi",
        ".bin",
        ".bmp",
        ".bz2",
        ".class",
        ".db",
        ".dll",
        ".dmg",
        ".doc",
        ".docx",
        ".dylib",
        ".exe",
        ".flac",
        ".gguf",
        ".gif",
        ".ico",
        ".iso",
        ".jar",
        ".jpeg",
        ".jpg",
        ".m4a",
        ".mkv",
        ".mov",
        ".mp3",
        ".mp4",
        ".npy",
        ".npz",
        ".o",
        ".ogg",
        ".onnx",
        ".otf",
        ".pdf",
        ".pickle",
        ".pkl",
        ".png",
        ".ppt",
        ".pptx",
        ".pt",
        ".pth",
        ".pyc",
        ".pyd",
        ".rar",
        ".safetensors",
        ".so",
        ".sqlite",
        ".tar",
        ".tgz",
        ".tiff",
        ".ttf",
        ".wasm",
        ".wav",
        ".webm",
        ".webp",
        ".whl",
        ".woff",
        ".woff2",
        ".xls",
        ".xlsx",
        ".xz",
        ".zip",
    ]
)


class Corpus(NamedTuple):
    """An input that is not a file of the project: `builtin:NAME`, identified by its content."""

    name: str


class SourceFiles(NamedTuple):
    """The files that a source names.

    Attributes:
        files: in sorted order, relative to the workflow's folder if the source is.
        hidden: files and folders left out because their names begin with a dot.
        binary: files left out because of their suffix.
        broken_links: symbolic links left out because they are broken or circular.
        beside_records: files left out because they are beside the record files of a data set with its own splits.
    """

    files: list[Path]
    hidden: int = 0
    binary: int = 0
    broken_links: int = 0
    beside_records: int = 0


def find(source: str, root: Path) -> SourceFiles:
    """Find the files of a source.

    A folder is walked; symbolic links are followed, each folder once. From a data set with its own splits, such as
    `train.jsonl` beside `valid.jsonl`, only record files are read: other files describe the data set. Files that the
    workflow itself writes are excluded unless the source names them.

    Args:
        source: a file, a glob, a folder, or `hf:FOLDER`, as written: with `~` and `$VAR`. The leading folders of a
            glob are taken literally if they exist.
        root: the workflow's folder, to which relative sources are relative.

    Raises:
        OSError: a folder cannot be read.
    """
    name = expand(source.removeprefix(HF))
    place = root / name
    if place.is_file():
        source_files = SourceFiles([place])
    elif place.is_dir() and source.startswith(HF):
        source_files = _Walk(binary=True).walk(place)
    elif place.is_dir():
        source_files = _records_of(_Walk().walk(place), place)
    elif source.startswith(HF):
        source_files = SourceFiles([])
    else:
        import glob

        if os.path.islink(place):  # noqa: PTH114 - one in a circle: say so
            os.stat(place)  # noqa: PTH116
        pattern = escape_existing(name, root)
        matching = (root / name for name in glob.iglob(pattern, root_dir=root, recursive=True))  # noqa: PTH207
        source_files = SourceFiles([path for path in matching if path.is_file()])
    files = sorted(_not_made_here(source_files.files, place, root), key=lambda path: path.as_posix())
    return source_files._replace(
        files=files if Path(name).is_absolute() else [path.relative_to(root) for path in files]
    )


def source_files(source: str, root: Path) -> list[Path]:
    """Return the files that a source names; see `find`."""
    return find(source, root).files


def _records_of(files: SourceFiles, folder: Path) -> SourceFiles:
    """Return only the record files if the files of a folder are a data set with its own splits."""
    begin = len(str(folder)) + 1
    if not splits.is_divided(str(path)[begin:] for path in files.files):
        return files
    records = [path for path in files.files if splits.is_records(path.name)]
    return files._replace(files=records, beside_records=len(files.files) - len(records))


class _Walk:
    """Walks a folder and follows links in it, each folder once."""

    def __init__(self, *, binary: bool = False) -> None:
        self._takes_binary = binary
        self._seen: set[tuple[int, int]] = set()
        self._files: list[Path] = []
        self._hidden = self._binary = self._broken = 0

    def walk(self, folder: Path) -> SourceFiles:
        self._enter(str(folder), os.stat(folder))  # noqa: PTH116
        return SourceFiles(self._files, self._hidden, self._binary, self._broken)

    def _enter(self, folder: str, status: os.stat_result) -> None:
        if (status.st_dev, status.st_ino) in self._seen:
            return
        self._seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda one: one.name):
                self._look_at(entry)

    def _look_at(self, entry: "os.DirEntry[str]") -> None:
        if entry.name.startswith("."):
            self._hidden += 1
        elif entry.is_symlink():
            try:
                status = entry.stat()
            except OSError:
                self._broken += 1
                return
            if stat.S_ISDIR(status.st_mode):
                self._enter(entry.path, status)
            elif stat.S_ISREG(status.st_mode):
                self._take(entry)
        elif entry.is_dir():
            self._enter(entry.path, entry.stat())
        elif entry.is_file():
            self._take(entry)

    def _take(self, entry: "os.DirEntry[str]") -> None:
        if not self._takes_binary and os.path.splitext(entry.name)[1].lower() in _BINARY_SUFFIXES:  # noqa: PTH122
            self._binary += 1
        else:
            self._files.append(Path(entry.path))


def _not_made_here(files: list[Path], place: Path, root: Path) -> list[Path]:
    """Return the files without those that the workflow itself writes, unless `place` is inside of them.

    Args:
        files: below `place`.
        place: the resolved path of the source.
        root: the workflow's folder.
    """
    written = [os.path.abspath(root / name) for name in (layout.ARTIFACTS, layout.LOCKFILE)]  # noqa: PTH100

    def is_written(path: Path) -> bool:
        absolute = os.path.abspath(path)  # noqa: PTH100 - links stay as they are named
        return any(absolute == one or absolute.startswith(one + os.sep) for one in written)

    return files if is_written(place) else [path for path in files if not is_written(path)]


def builtin_files(name: str) -> list[Path]:
    """Return the files of a built-in corpus in a fixed order: sorted by their path below the corpus's folder.

    Tests, installed packages and files that a build generated for one machine are left out.

    Raises:
        SourceError: there is no such corpus, or this Python is installed without its sources.
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
    """Return the folder of the running Python's library; importing `sysconfig` would be too slow for a no-op."""
    return os.path.dirname(os.__file__)  # noqa: PTH120


def _library_entries(folder: str) -> Iterator["os.DirEntry[str]"]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".py"):
                if not entry.name.startswith("_sysconfigdata"):
                    yield entry
            elif entry.name not in _SKIPPED_FOLDERS and entry.is_dir(follow_symlinks=False):
                yield from _library_entries(entry.path)


def corpus_identity(name: str, cache: DigestCache) -> str:
    """Return the identity of a corpus that is no file of the project.

    For a built-in corpus it is the digest of its files' names and contents; they are read only if size or times of a
    file changed. For a data set on the hub, `hf:NAME@REVISION`, it is the name: a revision does not change, and the
    newest revision cannot be queried at every run.
    """
    if name.startswith(HF):
        return digest_text(name)
    stats = [(entry.path, entry.stat()) for entry in _library_entries(_library())]
    stamps = sorted((path, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for path, s in stats)

    def compute() -> str:
        root = Path(_library())
        return digest_json([[p.relative_to(root).as_posix(), digest_file(p).content] for p in builtin_files(name)])

    return cache.recall(name, digest_json(stamps), compute)
