"""The help of `doit` on a graph of stages: how to build, the commands that work on stages, and where to read on."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

#: Commands of doit that stages refuse, or that only print state for programs.
_UNLISTED = ("reset-dep", "strace", "dumpdb", "help")

_CALLS = (
    ("doit", "build every stale stage"),
    ("doit STAGE ...", "build these stages and what they need, such as: doit train quantize:q4"),
    ("doit -n N", "independent stages at a time"),
    ("doit COMMAND workflow=FILE", "use another workflow file; works with every command, and without one"),
)

_MORE = (
    ("doit help COMMAND", "the options of a command; of building: doit help run"),
    ("mlxflow --help", "check or explore a workflow, show artifacts, talk with the models"),
)


def usage(commands: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the overview.

    Args:
        commands: doit's command classes by name.
    """
    yield "Build the stages of a workflow.toml, those that are stale and what they need."
    yield ""
    yield from _columns(_CALLS)
    yield ""
    yield "Commands"
    yield from _columns(
        (f"doit {name}", commands[name].doc_purpose) for name in sorted(commands) if name not in _UNLISTED
    )
    yield ""
    yield from _columns(_MORE)


def _columns(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    pairs = list(rows)
    width = max(len(call) for call, _ in pairs)
    yield from (f"  {call:<{width}}  {about}" for call, about in pairs)
