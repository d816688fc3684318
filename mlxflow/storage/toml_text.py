"""TOML text to tables, in bounded time and memory: `tomllib` itself takes the square of a dotted key's length of both.

Imported by every `doit`: nothing heavy here; `tomllib` is imported when a text is parsed.
"""

import re
from typing import Any

#: The most parts that a key may have, such as 3 in `train.model.from`, and the most levels of tables and lists.
MAX_KEY_PARTS, MAX_DEPTH = 16, 32

#: The longest workflow file; lists of more sources than fit are better written as folders or globs.
MAX_WORKFLOW_BYTES = 256 * 1024

_PART = r"""(?>[A-Za-z0-9_-]+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*')"""
# What can hold a dot, each taken whole: comments, texts of several lines, and keys (or plain values) with their parts
_TOKENS = (
    r'''#[^\n]*|(?>"""(?:[^"\\]|\\.|"(?!""))*""")|'''
    r"""(?>'''(?:[^']|'(?!''))*''')|"""
    rf"(?P<key>{_PART}(?>(?:[ \t]*\.[ \t]*{_PART})*))"
)


def loads(text: str) -> dict[str, Any]:
    """Return the table that a TOML text is.

    Time and memory are proportionate to the text; how long it may be, the caller decides.

    Raises:
        tomllib.TOMLDecodeError: no valid TOML, or too deep; the message ends in `(at line 1, column 2)` where the place
            is known.
    """
    import tomllib

    _refuse_long_keys(text)
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except RecursionError as error:
        raise tomllib.TOMLDecodeError("nested too deeply") from error
    except ValueError as error:  # of `int`, for a number of more than 4,300 digits
        raise tomllib.TOMLDecodeError("a whole number of too many digits") from error
    if _depth(table) > MAX_DEPTH:
        raise tomllib.TOMLDecodeError(f"nested deeper than {MAX_DEPTH} levels")
    return table


def _refuse_long_keys(text: str) -> None:
    """Refuse a key of too many parts.

    Raises:
        tomllib.TOMLDecodeError: names its place.
    """
    import tomllib

    if text.count(".") < MAX_KEY_PARTS:
        return
    for match in re.finditer(_TOKENS, text, re.DOTALL):
        key = match["key"]
        if key and key.count(".") >= MAX_KEY_PARTS and len(re.findall(_PART, key)) > MAX_KEY_PARTS:
            line = text.count("\n", 0, match.start()) + 1
            column = match.start() - text.rfind("\n", 0, match.start())
            raise tomllib.TOMLDecodeError(f"a key of more than {MAX_KEY_PARTS} parts (at line {line}, column {column})")


def _depth(table: dict[str, Any]) -> int:
    """Return how many levels of tables and lists a table has, at most one more than may be."""
    level: list[Any] = [table]
    depth = 0
    while level and depth <= MAX_DEPTH:
        depth += 1
        level = [
            item
            for one in level
            for item in (one.values() if isinstance(one, dict) else one)
            if isinstance(item, dict | list)
        ]
    return depth
