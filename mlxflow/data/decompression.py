"""Read a source file in pieces of bounded size, decompressed if necessary."""

import os
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from gzip import BadGzipFile, GzipFile
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any

import xxhash

from mlxflow.messages.errors import SourceError
from mlxflow.messages.os_errors import advise_on
from mlxflow.storage.paths import printable

#: Bytes that are read, parsed and tokenized at a time.
PIECE_BYTES = 1 << 20

# Text compresses 3 to 10 times, repetitive logs and records 30 times; a larger factor is taken for a bomb.
MAX_INFLATION = 400
_FREE_INFLATION_BYTES = 1 << 24
# zstd can expand 4 bytes to 128 KB of equal bytes, so it gets little input at a time.
_ZSTD_FEED_BYTES = 1 << 10


class FileProblem(Exception):  # noqa: N818 - not an error yet: the workflow may ask to skip such files
    """A file that cannot be used as a whole; the message is position and reason, without the file's name."""


#: The default name of the setting that names a file.
THE_SOURCES = "the sources"


class _HashingFile(FileIO):
    """A file that computes the digest of the bytes read so far; behind a buffered reader each byte is read once."""

    def __init__(self, path: Path, on_read: Callable[[int], None]) -> None:
        super().__init__(path)
        self._on_read = on_read
        self.digest = xxhash.xxh3_128()
        self.num_read = 0

    def readinto(self, buffer: Any) -> int:
        """Read as FileIO does."""
        count = super().readinto(buffer) or 0
        self.digest.update(memoryview(buffer)[:count])
        self.num_read += count
        self._on_read(count)
        return count


def read_pieces(
    path: Path,
    *,
    compression: str,
    expected_digest: str,
    on_read: Callable[[int], None],
    source: str = THE_SOURCES,
) -> Iterator[bytes]:
    """Yield a file's bytes in pieces of `PIECE_BYTES`; up to 4 times as large for .zst, the last one smaller.

    Args:
        path: the file.
        compression: "", "gz" or "zst".
        expected_digest: xxh3-128 of the file on the disk.
        on_read: called with the number of bytes of each read.
        source: the setting that names the file, for messages.

    Raises:
        FileProblem: it cannot be decompressed to its end, or expands without bound.
        SourceError: it changed, vanished or became unreadable since its digest was computed.
    """
    with naming_errors(path, source), _HashingFile(path, on_read) as file:
        pieces = {"gz": _inflate_gzip, "zst": _inflate_zstd}.get(compression, _read_plain)(file)
        with closing(pieces):  # closed before the file, also if the caller stops midway
            yield from pieces if not compression else _bounded(pieces, file)
        if file.digest.hexdigest() != expected_digest:
            raise SourceError(f"{printable(str(path))}: changed while it was read. Run the stage again.")


@contextmanager
def naming_errors(path: Path, source: str = THE_SOURCES) -> Iterator[None]:
    """Convert an `OSError` about a file to a `SourceError` that names it.

    Args:
        path: the file.
        source: the setting that names it.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise SourceError(f"{printable(str(path))}: vanished before it was read. Run the stage again.") from error
    except OSError as error:
        if error.errno is None:
            raise
        reason = f"{printable(str(path))}: cannot be read ({os.strerror(error.errno)})"
        advice = advise_on(error, f"Fix it or leave it out of {source}")
        raise SourceError(f"{reason}. {advice}.") from error


def _read_plain(file: _HashingFile) -> Generator[bytes]:
    while piece := _read(file, PIECE_BYTES):
        yield piece


def _read(file: _HashingFile, count: int) -> bytes:
    buffer = bytearray(count)
    return bytes(memoryview(buffer)[: file.readinto(buffer)])


def _bounded(pieces: Iterator[bytes], file: _HashingFile) -> Iterator[bytes]:
    """Yield pieces until their total exceeds what text can have been compressed to in the bytes read so far."""
    total = 0
    for piece in pieces:
        total += len(piece)
        require_plausible(total, file.num_read)
        yield piece


def require_plausible(total: int, stored: int) -> None:
    """Refuse data that is far larger than the highest compression of text allows; a few megabytes always pass.

    Args:
        total: bytes so far.
        stored: compressed bytes in the file.

    Raises:
        FileProblem: the data is too large.
    """
    if total > max(_FREE_INFLATION_BYTES, MAX_INFLATION * stored):
        raise FileProblem(
            f"inflates to over {MAX_INFLATION} times its size ({total:,} bytes and no end). Unpack it and check it"
        )


def _inflate_gzip(file: _HashingFile) -> Generator[bytes]:
    reader = BufferedReader(file, 1 << 16)
    try:
        with GzipFile(fileobj=reader, mode="rb") as inflated:
            while piece := inflated.read(PIECE_BYTES):
                yield piece
    except EOFError as error:
        raise FileProblem(f"ends before its gzip stream does (byte {file.num_read:,})") from error
    except (BadGzipFile, zlib.error) as error:
        raise FileProblem(f"is no valid gzip file ({error})") from error
    finally:
        reader.detach()  # the caller closes the file


def _inflate_zstd(file: _HashingFile) -> Generator[bytes]:
    import zstandard

    decompressor = zstandard.ZstdDecompressor()
    frame = decompressor.decompressobj()
    waiting: list[bytes] = []
    size = 0
    fed = b""
    begun = False
    reader = BufferedReader(file, 1 << 16)
    try:
        while data := fed or reader.read(_ZSTD_FEED_BYTES):
            begun = True
            waiting.append(frame.decompress(data))
            size += len(waiting[-1])
            fed = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame, begun = decompressor.decompressobj(), False
            if size >= PIECE_BYTES:
                yield from _parted(b"".join(waiting))
                waiting, size = [], 0
    except zstandard.ZstdError as error:
        raise FileProblem(f"is no valid zstd file ({error})") from error
    finally:
        reader.detach()
    if begun:
        raise FileProblem(f"ends before its zstd frame does (byte {file.num_read:,})")
    if size:
        yield b"".join(waiting)


def _parted(data: bytes) -> Iterator[bytes]:
    """Yield data unchanged, or in pieces if a few bytes expanded to many megabytes."""
    size = PIECE_BYTES if len(data) > 4 * PIECE_BYTES else len(data)
    yield from (data[begin : begin + size] for begin in range(0, len(data), size))
