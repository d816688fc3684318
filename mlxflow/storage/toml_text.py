"""Parse TOML in bounded time and memory; `tomllib` alone needs both quadratic in the length of a dotted key.

Imported by every `doit`: nothing heavy here; `tomllib` is imported when a text is parsed.
"""

import re
from typing import Any

#: The most parts that a key may have, such as 3 in `train.model.from`, and the most levels of tables and lists.
MAX_KEY_PARTS, MAX_DEPTH = 16, 32

#: The longest workflow file; instead of a longer list of sources, use folders or globs.
MAX_WORKFLOW_BYTES = 256 * 1024

_PART = r"""(?>[A-Za-z0-9_-]+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*')"""
# Tokens that can contain a dot: comments, multi-line texts, and keys (or plain values) with their parts
_TOKENS = (
    r'''#[^\n]*|(?>"""(?:[^"\\]|\\.|"(?!""))*""")|'''
    r"""(?>'''(?:[^']|'(?!''))*''')|"""
    rf"(?P<key>{_PART}(?>(?:[ \t]*\.[ \t]*{_PART})*))"
)


def loads(text: str) -> dict[str, Any]:
    """Parse a TOML text to a table.

    Time and memory are proportional to the length of the text; the caller limits the length.

    Raises:
        tomllib.TOMLDecodeError: it is no valid TOML, or nested too deeply; the message ends in `(at line 1, column
            2)` if the position is known.
    """
    import tomllib

    _refuse_long_keys(text)
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except RecursionError as error:
        raise tomllib.TOMLDecodeError("nested too deeply") from error
    except ValueError as error:  # raised by `int` for more than 4,300 digits
        raise tomllib.TOMLDecodeError("a whole number of too many digits") from error
    if _depth(table) > MAX_DEPTH:
        raise tomllib.TOMLDecodeError(f"nested deeper than {MAX_DEPTH} levels")
    return table


def _refuse_long_keys(text: str) -> None:
    """Refuse a key with too many parts.

    Raises:
        tomllib.TOMLDecodeError: names its position.
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
    """Return the nesting depth of tables and lists, up to one more than allowed."""
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
