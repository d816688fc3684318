"""Content digests and identities of files, and their cache.

Two digests, both xxh3-128 in hexadecimal:

- the *content digest* covers every byte;
- the *identity* covers what readers use: for a safetensors file the tensors (name, dtype, shape, bytes) and the
  relevant metadata, for a report everything except its `[run]` table, else it is the content digest.

Both are computed in one pass over the file. `DigestCache` keeps them by path, size, mtime, ctime and inode, so that
an unchanged file is not read again.
"""

import io
import json
import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from mlxflow.messages.os_errors import naming
from mlxflow.storage import layout, state_files, temporary_files, toml_text
from mlxflow.storage.state_files import InvalidStateError, OutdatedStateError
from mlxflow.storage.tensor_header import read_safetensors_header, tensor_offsets

#: The safetensors metadata key of the provenance, which is no part of the identity.
PROVENANCE_KEY = "mlxflow"

#: The table of a report that holds times and host names.
RUN_TABLE = "run"

_CHUNK_BYTES = 1 << 22
# A file changed twice within one tick of the file system's clock keeps its times. Times without a fraction of a second
# are assumed to be those of a coarse file system (FAT counts in steps of two seconds).
_CLOCK_TICK_NS = 20_000_000
_COARSE_TICK_NS = 2_000_000_000
_SECOND_NS = 1_000_000_000


class Digests(NamedTuple):
    """The content digest and the identity of one file."""

    content: str
    identity: str


class _Stamp(NamedTuple):
    """Size, times and inode of a file; equal stamps mean an unchanged file."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, stat: os.stat_result) -> "_Stamp":
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)

    def shows_changes_after(self, moment: int) -> bool:
        """Return whether every change of the file after a moment gives it other times.

        A modification time in the future was set by a program, which also changes ctime. If ctime is in the future,
        too, the file system's clock differs from ours, and nothing follows from the times.

        Args:
            moment: in nanoseconds since 1970, by the clock of this machine.
        """
        is_coarse = not self.mtime_ns % _SECOND_NS and not self.ctime_ns % _SECOND_NS
        newest = self.ctime_ns if self.mtime_ns > moment else max(self.mtime_ns, self.ctime_ns)
        return moment - newest >= (_COARSE_TICK_NS if is_coarse else _CLOCK_TICK_NS)


class _RememberedFile(NamedTuple):
    """The cache entry of a file.

    Attributes:
        stamp: of the file when it was read.
        digests: of its content.
        doubted_since: when the file was first read with this stamp, in nanoseconds since 1970, if it could have
            changed since without a change of the stamp, so that it is read once more; else 0.
    """

    stamp: _Stamp
    digests: Digests
    doubted_since: int = 0


def digest_text(text: str) -> str:
    """Return the xxh3-128 of a text's UTF-8 bytes."""
    return xxhash.xxh3_128_hexdigest(text.encode(errors="surrogatepass"))  # for file names that are not UTF-8


def digest_json(value: object) -> str:
    """Return the digest of a JSON value, independent of the order of keys."""
    return digest_text(json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")))


def digest_file(path: Path) -> Digests:
    """Read a file once and return both its digests.

    Raises:
        OSError: the file cannot be read.
        ValueError: a safetensors file whose header disagrees with its length.
    """
    with naming(path):
        if path.suffix == ".safetensors":
            return _digest_safetensors(path)
        if path.name == layout.REPORT:
            return _digest_report(path)
        with io.FileIO(path) as file:
            content = _digest_span(file, 0, os.fstat(file.fileno()).st_size)
        return Digests(content, content)


def _digest_span(file: io.FileIO, begin: int, end: int) -> str:
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(max(1, min(_CHUNK_BYTES, end - begin))))
    file.seek(begin)
    while begin < end:
        count = file.readinto(buffer[: min(len(buffer), end - begin)])
        if not count:
            raise ValueError("it was cut off while it was read")
        digest.update(buffer[:count])
        begin += count
    return digest.hexdigest()


def tensor_digests(path: Path) -> dict[str, tuple[object, object, str]]:
    """Return type, shape and digest of every tensor of a safetensors file, by name.

    Raises:
        OSError: the file cannot be read.
        ValueError: its header disagrees with its length.
    """
    header, begin = read_safetensors_header(path)
    with io.FileIO(path) as file:
        return {
            name: (entry.get("dtype"), entry.get("shape"), _digest_span(file, begin + span[0], begin + span[1]))
            for name, span in tensor_offsets(header)
            if isinstance(entry := header[name], dict)
        }


def _digest_safetensors(path: Path) -> Digests:
    header, begin = read_safetensors_header(path)
    tensors = tensor_digests(path)
    with io.FileIO(path) as file:
        content = digest_json([_digest_span(file, 0, begin), *(digest for _, _, digest in tensors.values())])
    metadata = header.get("__metadata__", {})
    matters = {k: v for k, v in metadata.items() if k != PROVENANCE_KEY} if isinstance(metadata, dict) else {}
    return Digests(content, digest_json([tensors, matters]))


def _digest_report(path: Path) -> Digests:
    data = path.read_bytes()
    content = xxhash.xxh3_128_hexdigest(data)
    try:
        report = toml_text.loads(data.decode())
    except ValueError:
        return Digests(content, content)
    report.pop(RUN_TABLE, None)
    return Digests(content, digest_text(json.dumps(report, sort_keys=True, default=str)))


class DigestCache:
    """Digests by path, kept in one file between runs.

    The cache file is optional: if it is damaged or missing, the files are read again. Keys are absolute paths, so the
    cache file belongs to one machine. Entries of removed files are dropped when it is written.

    Args:
        path: the cache file; it is not written while its folder does not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._changed = False
        self._known: dict[str, _RememberedFile] = {}
        self._computed: dict[str, list[str]] = {}
        self._there: set[str] = set()
        self.files_read = 0
        try:
            self._known, self._computed = _remembered(state_files.read(path))
        except OutdatedStateError:
            self._changed = True
        except InvalidStateError as error:
            self._changed = True
            state_files.say_ignored(path, error, "Files are read again.")
        except OSError:  # usually because it is missing
            pass

    def digests(
        self, path: str | os.PathLike[str], *, again: bool = False, status: os.stat_result | None = None
    ) -> Digests:
        """Return the digests of a file; it is read only if its size or times changed.

        Args:
            path: the file.
            again: read it in any case.
            status: the current result of `os.stat`; None to call it.

        Raises:
            OSError: the file cannot be read.
            ValueError: a safetensors file whose header disagrees with its length.
        """
        text = os.fspath(path)  # hot path of a no-op: strings, because pathlib takes ten times as long
        key = text if text.startswith("/") else f"{os.getcwd()}/{text}"  # noqa: PTH109
        status = status or os.stat(key)  # noqa: PTH116
        stamp = _Stamp.of(status)
        self._there.add(key)
        known = self._known.get(key)
        if known and known.stamp == stamp and not known.doubted_since and not again:
            return known.digests
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise ValueError("it is no regular file")
        begin = time.time_ns()
        digests = digest_file(Path(key))
        self.files_read += 1
        if _Stamp.of(os.stat(key)) == stamp:  # noqa: PTH116
            first = known.doubted_since if known and known.stamp == stamp else begin
            is_settled = stamp.shows_changes_after(begin) or begin - first >= _COARSE_TICK_NS
            self._known[key] = _RememberedFile(stamp, digests, 0 if is_settled else first)
            self._changed = True
        return digests

    def recall(self, name: str, stamp: str, compute: Callable[[], str]) -> str:
        """Return the cached value of a name if its stamp is unchanged, else compute it.

        Args:
            name: of a set of files.
            stamp: changes if any of them changes.
            compute: reads them.
        """
        known = self._computed.get(name)
        if known and known[0] == stamp:
            return known[1]
        self._computed[name] = [stamp, compute()]
        self._changed = True
        return self._computed[name][1]

    def save(self) -> None:
        """Write new entries to the cache file, unless its folder is missing or cannot be written."""
        if not self._changed:
            return
        self._forget_missing()
        files = {
            key: [*one.stamp, *one.digests, *([one.doubted_since] if one.doubted_since else [])]
            for key, one in sorted(self._known.items())
        }
        temporary = temporary_files.beside(self._path)
        try:
            temporary.write_bytes(state_files.encode({"files": files, "computed": self._computed}))
            temporary.replace(self._path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            return
        self._changed = False

    def drop_missing(self) -> int:
        """Drop the digests of removed files, and return how many there were."""
        before = len(self._known)
        self._there.clear()
        self._forget_missing()
        self._changed = self._changed or len(self._known) < before
        return before - len(self._known)

    def _forget_missing(self) -> None:
        """Drop the digests of removed files."""
        for key in self._known.keys() - self._there:
            if not os.path.lexists(key):
                del self._known[key]


_ENTRY = [int, int, int, int, str, str]


def _remembered(stored: dict[str, Any]) -> tuple[dict[str, _RememberedFile], dict[str, list[str]]]:
    """Parse the content of a cache file: the digests by path, and those by name.

    Raises:
        InvalidStateError: the content is not valid.
    """
    files, computed = stored.get("files"), stored.get("computed")
    if not isinstance(files, dict) or not isinstance(computed, dict):
        raise InvalidStateError("expected two tables")
    for entries, kinds in ((files, (_ENTRY, [*_ENTRY, int])), (computed, ([str, str],))):
        for name, entry in entries.items():
            if not isinstance(entry, list) or [type(value) for value in entry] not in kinds:
                raise InvalidStateError(f"{name!r}: expected a stamp and digests")
    return {name: _RememberedFile(_Stamp(*e[:4]), Digests(*e[4:6]), *e[6:]) for name, e in files.items()}, computed
