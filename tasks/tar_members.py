"""A strict reader of tar files as written by `doit pack`: regular files and long names only.

Python's reader accepts headers that fill a disk from a few bytes (sparse files), that read or recurse without bound
(long names), and links, devices and pipes. Here a header is that of a regular file, or of a long name before one.
"""

import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

_LARGEST_NAMES_BYTES = 65_536
_KINDS = {
    tarfile.DIRTYPE: "a folder",
    tarfile.SYMTYPE: "a link",
    tarfile.LNKTYPE: "a link",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
#: First bytes of compressed files, and the compression.
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"\x04\x22\x4d\x18": "lz4",
    b"\x5d\x00\x00": "lzma",
}


class ArchiveError(ValueError):
    """An archive is damaged, or has content that `doit pack` does not write; the message is the reason."""


class TarMember(NamedTuple):
    """A regular file in an archive: its name, offset and size in bytes."""

    name: str
    offset: int
    size: int


def compression(file: BinaryIO) -> str:
    """Return the compression of a file by its first bytes; empty for none."""
    file.seek(0)
    begin = file.read(8)
    return next((name for magic, name in _COMPRESSED.items() if begin.startswith(magic)), "")


def members(file: BinaryIO) -> Iterator[TarMember]:
    """Yield the files of an archive in its order.

    Raises:
        ArchiveError: it is damaged, or contains anything else.
    """
    end = file.seek(0, 2)
    offset = 0
    names: dict[str, str] | None = None
    while (header := _header(file, offset)) is not None:
        data, offset = offset + tarfile.BLOCKSIZE, 0
        size = header.size
        if header.type == tarfile.XHDTYPE:
            if names is not None or not 0 < size <= _LARGEST_NAMES_BYTES:
                raise ArchiveError("holds a header of long names that doit pack does not write")
            names = _long_names(file.read(size))
        elif header.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
            size = int((names or {}).get("size", size))
            yield TarMember((names or {}).get("path", header.name), data, _within(data, size, end))
            names = None
        else:
            kind = _KINDS.get(header.type, "of a kind that doit pack does not write")
            raise ArchiveError(f"holds {header.name!r}, which is {kind}")
        offset = data + -(-_within(data, size, end) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    if names is not None:
        raise ArchiveError("is cut off")


def _within(offset: int, size: int, end: int) -> int:
    if size < 0 or offset + size > end:
        raise ArchiveError("is cut off")
    return size


def _header(file: BinaryIO, offset: int) -> tarfile.TarInfo | None:
    """Return the header at an offset, or None at the end of the archive; reads up to the end of the header."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if not block.strip(b"\0"):
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError) as error:
        raise ArchiveError(f"is damaged ({error})") from error


def _long_names(data: bytes) -> dict[str, str]:
    """Return the fields of an extended header: `path`, and `size` of a file of 8 GB or more."""
    fields: dict[str, str] = {}
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or len(length) > 5 or not len(length) < int(length) <= len(data):
            raise ArchiveError("holds a header of long names that cannot be read")
        key, _, value = data[len(length) + 1 : int(length) - 1].decode("utf-8", "surrogateescape").partition("=")
        if key not in ("path", "size") or (key == "size" and not (value.isdecimal() and len(value) < 20)):
            raise ArchiveError(f"holds a header with {key!r}, which doit pack does not write")
        fields[key] = value
        data = data[int(length) :]
    return fields
