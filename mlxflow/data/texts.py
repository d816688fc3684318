"""Read and split texts in pieces: text files, and long texts of records."""

import codecs
from collections.abc import Iterable, Iterator

from mlxflow.data import decompression
from mlxflow.data.decompression import FileProblem
from mlxflow.data.items import Bad, PlainText, Record

#: Bytes at the beginning of a file from which its kind is recognized.
SNIFFED_BYTES = 8192

# UTF-32 before UTF-16, whose byte order mark is a prefix of it
_WIDE_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


class Binary(FileProblem):
    """A binary file: it has a NUL byte near its beginning."""


def read_text(pieces: Iterable[bytes]) -> Iterator[list[Record | PlainText | Bad]]:
    """Yield a text file in pieces that end at the end of a line, else of a word, else of a character.

    Raises:
        FileProblem: it is not UTF-8 or no text.
    """
    offset, first = 0, True
    for data, ends in cut(_checked(pieces)):
        yield [PlainText(decode(data, offset, bom=first), first, ends)]
        offset, first = offset + len(data), False


def _checked(pieces: Iterable[bytes]) -> Iterator[bytes]:
    for number, piece in enumerate(pieces):
        if number == 0:
            refuse_binary(piece[:SNIFFED_BYTES])
        yield piece


def cut(pieces: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Yield the pieces of a text with their ends moved to the end of a line, else of a word, else of a character.

    Args:
        pieces: UTF-8, each of `PIECE_BYTES` except the last one; yielded pieces have about the same size.

    Yields:
        a piece, and whether it is the last one.
    """
    rest, any_cut = b"", False
    for piece in pieces:
        data = rest + piece
        if len(data) < decompression.PIECE_BYTES:  # it may be the last piece
            rest = data
            continue
        end = _last_break(data)
        yield data[:end], False
        rest, any_cut = data[end:], True
    if rest or any_cut:
        yield rest, True


def _last_break(data: bytes) -> int:
    for mark in (b"\n", b" "):
        if place := data.rfind(mark) + 1:
            return place
    end = len(data)
    while end > len(data) - 4 and data[end - 1] & 0xC0 == 0x80:  # inside a character
        end -= 1
    return end - 1 if data[end - 1] >= 0xC0 else len(data)


def same_size(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield bytes in pieces of `PIECE_BYTES`, the last one smaller."""
    size = decompression.PIECE_BYTES
    waiting = bytearray()
    for chunk in chunks:
        waiting += chunk
        if len(waiting) >= size:
            whole = len(waiting) // size * size
            yield from (bytes(waiting[begin : begin + size]) for begin in range(0, whole, size))
            del waiting[:whole]
    if waiting:
        yield bytes(waiting)


def decode(data: bytes, offset: int, *, bom: bool) -> str:
    """Return bytes of a file as text.

    Args:
        data: the bytes.
        offset: their offset in the file, for messages.
        bom: leave out a byte order mark at their beginning.

    Raises:
        FileProblem: they are not UTF-8, or one of them is NUL.
    """
    nul = data.find(b"\0")
    try:
        text = data.decode("utf-8-sig" if bom else "utf-8")
    except UnicodeDecodeError as error:
        skipped = 3 if bom and data.startswith(b"\xef\xbb\xbf") else 0
        at = error.start + skipped
        if nul < 0 or at < nul:
            raise FileProblem(f"byte {offset + at:,} is not UTF-8. Save the file as UTF-8") from error
    if nul >= 0:
        raise FileProblem(f"byte {offset + nul:,} is NUL. Remove it")
    return text


def refuse_binary(head: bytes) -> None:
    """Refuse a file that is no UTF-8 text, by its beginning.

    Raises:
        FileProblem: it is text in UTF-16 or UTF-32.
        Binary: it contains a NUL byte.
    """
    refuse_encoding(head)
    if (nul := head.find(b"\0")) >= 0:
        raise Binary(f"byte {nul:,} is NUL: no text. Leave the file out")


def refuse_encoding(head: bytes) -> None:
    """Refuse text in UTF-16 or UTF-32, recognized by its byte order mark or by the positions of its NUL bytes.

    Raises:
        FileProblem: it is such text.
    """
    codec = next((codec for mark, codec in _WIDE_MARKS.items() if head.startswith(mark)), None)
    nuls = [half.count(0) > 0.6 * len(half) for half in (head[::2], head[1::2])]
    if codec is None and len(head) >= 4 and nuls[0] != nuls[1]:
        codec = "utf-16-be" if nuls[0] else "utf-16-le"
    text = head[: len(head) // 4 * 4].decode(codec, errors="replace") if codec else ""
    printable = sum(one.isprintable() or one.isspace() for one in text.lstrip("\ufeff"))
    if codec and printable >= 0.9 * len(text.lstrip("\ufeff")):
        raise FileProblem(f"is {codec[:6].upper()}, not UTF-8. Save the file as UTF-8")
