r"""Printing to the terminal with control characters escaped; all output of the package goes through here.

File names, keys of TOML and JSON, names in an unpacked record and generated text are untrusted. Unescaped, they could
retitle the terminal, move its cursor, hide or reorder text, or imitate our own lines. U+001B is printed as the four
characters `\x1b`. Imported by every `doit`, so it imports nothing heavy.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

from mlxflow.messages.os_errors import naming

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TextColumn

# Controls of C0 (except tab and newline) and C1, invisible and bidirectional marks, line separators that only some
# programs recognize, surrogates (bytes of a file name that are no UTF-8), tags
_UNSAFE = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e0fff"
)
_TEXT = re.compile(f"[{_UNSAFE}]")
_LINE = re.compile(f"[{_UNSAFE}\t\n]")

# Sequences that progress bars need: colors, moving or hiding the cursor, erasing a line
_BAR = r"\r|\x1b\[[0-9;]{0,20}[ABCDGKm]|\x1b\[\?25[hl]"
_FOREIGN = re.compile(f"({_BAR})|[{_UNSAFE}]")
_UNFINISHED = re.compile(r"\x1b(\[[0-9;?]{0,20})?\Z")


def escaped(text: str) -> str:
    """Return a text with everything escaped that is not printable; newlines and tabs stay."""
    return text if text.isprintable() else _TEXT.sub(_escape, text)


def one_line(text: object) -> str:
    """Return the text of an object as one printable line: tabs and newlines are escaped, too."""
    line = str(text)
    return line if line.isprintable() else _LINE.sub(_escape, line)


def foreign(text: str) -> str:
    """Return a text of another program with everything escaped except colors and progress bars."""
    is_plain = text.isprintable() or text.removesuffix("\n").isprintable()  # a line, as of a no-op, needs no search
    return text if is_plain else _FOREIGN.sub(lambda found: found[1] or _escape(found), text)


def _escape(match: re.Match[str]) -> str:
    number = ord(match[0])
    if 0xDC80 <= number <= 0xDCFF:  # a byte of a name that is no UTF-8
        number -= 0xDC00
    return {9: "\\t", 10: "\\n", 13: "\\r"}.get(number) or (
        f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
    )


def say(*lines: object) -> None:
    """Print lines on standard error; see `one_line`."""
    _print(sys.stderr, "".join(f"{one_line(line)}\n" for line in lines))


def say_error(error: BaseException) -> None:
    """Print the message of an error on standard error, a line for each problem; see `say_last`."""
    say_last(*str(error).split("\n"))


def say_last(*lines: object) -> None:
    """Print the lines that explain an exit code; if standard error cannot be written, no error is raised."""
    try:
        say(*lines)
    except OSError:
        discard_unwritable()


def discard_unwritable() -> None:
    """Discard output that cannot be written, so that Python's flush at exit does not change the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
            with suppress(OSError):
                stream.flush()


def show(*lines: object) -> None:
    """Print lines on standard output; see `one_line`."""
    write("".join(f"{one_line(line)}\n" for line in lines))


def write(text: str) -> None:
    """Print a text on standard output; see `escaped`."""
    _print(sys.stdout, text)


def stream(text: str) -> None:
    """Print a piece of generated text on standard output: escaped on a terminal, unchanged elsewhere."""
    output: Any = sys.stdout
    if output is None or output.isatty():
        write(text)
        return
    output = output.stream if isinstance(output, _EscapingStream) else output
    with naming(_name_of(output)):
        output.write(_encodable(text, output))
        output.flush()


def _print(stream: TextIO | None, text: str) -> None:
    if stream is not None:  # None if it was closed
        with naming(_name_of(stream)):
            stream.write(_encodable(escaped(text), stream))
            stream.flush()


def _name_of(stream: TextIO) -> str:
    """Return the name of a stream for error messages."""
    inner = stream.stream if isinstance(stream, _EscapingStream) else stream
    return {"<stdout>": "standard output", "<stderr>": "standard error"}.get(getattr(inner, "name", ""), "the output")


def _encodable(text: str, stream: TextIO) -> str:
    """Return a text with characters escaped that a stream's encoding does not have."""
    encoding = stream.encoding or "utf-8"
    return text if text.isascii() else text.encode(encoding, "backslashreplace").decode(encoding)


class Foreign:
    """Escapes the output of another program for a terminal, piece by piece; pieces may break anywhere."""

    def __init__(self) -> None:
        import codecs

        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._held = ""

    def feed(self, data: bytes, *, ends: bool = False) -> bytes:
        """Return the output that can be printed now.

        Args:
            data: the next piece of the program's output.
            ends: whether it is the last piece.
        """
        text = self._held + self._decoder.decode(data, ends)
        unfinished = None if ends else _UNFINISHED.search(text)
        begin = unfinished.start() if unfinished else len(text)
        self._held = text[begin:]
        return foreign(text[:begin]).encode()


class _EscapingStream:
    """A standard stream that escapes the output of other libraries, such as doit and warnings."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            self.stream.write(_encodable(foreign(text), self.stream))
        except OSError:
            with naming(_name_of(self.stream)):  # only on an error: this is called for each task of a graph
                raise
        return len(text)

    def flush(self) -> None:
        with naming(_name_of(self.stream)):
            self.stream.flush()

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def guard() -> None:
    """Make the standard streams escape the output of other libraries, for the rest of this process."""
    sys.stdout, sys.stderr = _guarded(sys.stdout), _guarded(sys.stderr)


@contextmanager
def guarded() -> Iterator[None]:
    """Make the standard streams escape the output of other libraries, until the block ends."""
    before = sys.stdout, sys.stderr
    guard()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _guarded(stream: TextIO) -> Any:
    return stream if stream is None or isinstance(stream, _EscapingStream) else _EscapingStream(stream)


def console(*, stderr: bool = False, **settings: Any) -> "Console":
    """Return a console of rich that escapes every text and interprets no markup.

    Args:
        stderr: whether it writes to standard error.
        settings: of `rich.console.Console`.
    """
    import rich.console
    from rich.segment import Segment
    from rich.text import Text

    class Escaping(rich.console.Console):
        def on_broken_pipe(self) -> None:
            raise  # the BrokenPipeError, with which rich would exit with 1

        def render_str(self, text: str, **settings: Any) -> Text:
            return super().render_str(escaped(text), **settings)

        def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(escaped(segment.text), segment.style)

    return Escaping(stderr=stderr, markup=False, highlight=False, **settings)


def text_column(text: str = "") -> "TextColumn":
    """Return a column of a rich progress bar: a text, or the description of each task; no markup."""
    from rich.progress import TextColumn

    shown = one_line(text).replace("{", "{{").replace("}", "}}") if text else "{task.description}"
    return TextColumn(shown, markup=False)
