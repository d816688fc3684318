"""The page of all messages with exit code 1 or 2, read from the code."""

from itertools import groupby
from pathlib import Path

from tools.docs import markdown
from tools.docs.messages import KnownMessage, messages

_INTRODUCTION = """\
Every message with which a command ends, as it stands in the code: a value that is filled in is shown by its name in
capitals, and `[...]` is a part that is not always there. The end of a message says what to do. Exit codes and the shape
of messages: [messages and exit codes](messages-and-exit-codes.md)."""

_CALLS = """\
Besides these, a mistyped command or option ends with exit code 2 and a line of Python's argparse or of doit, such as
`mlxflow: error: argument COMMAND: invalid choice: 'biuld'`, and a full disk or a file that cannot be read or written
with exit code 1 and the system's reason."""


def source_files(repository: Path) -> list[Path]:
    """Return the modules whose messages are on the page."""
    return sorted([*(repository / "mlxflow").rglob("*.py"), *(repository / "tasks").rglob("*.py")])


def messages_page(repository: Path) -> str:
    """Return the page.

    Args:
        repository: the folder of the code.
    """
    known = messages(source_files(repository))
    sections = groupby(known, lambda one: (one.exit_code, one.about))
    parts = [part for kind, group in sections for part in _section(*kind, list(group))]
    return markdown.page("Messages", _INTRODUCTION, _CALLS, *parts)


def _section(exit_code: int, about: str, known: list[KnownMessage]) -> list[str]:
    rows = ((_code(one.text),) for one in known)
    return [f"## {about}: exit code {exit_code}", markdown.table(("message",), rows)]


def _code(text: str) -> str:
    """Return a text as code, which may contain backticks."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"
