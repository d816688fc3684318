"""Plain technical English: words that the field does not use are kept out of what people read.

Read are docstrings, comments, messages and help of the code, the README, docs and templates. The table of files that
still have some may only shrink: a file with fewer than listed fails as one with more does.
"""

import functools
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

_FORBIDDEN = re.compile(
    r"\b(?:serve[sd]?|serving|tells?|told|telling|anew|comes? to|came to|makes? small|made small|somebody|nobody"
    r"|so-manieth|of which|for want of|be had|goes? on with|gone on with|next to nothing|own way|to speak of"
    r"|self-proof|prove[sdn]?|proving|proofs?"
    r"|as (?:it|they) (?:was|were)|(?:are|is) no more|at work on|of others|without a word|anybody|all the same"
    r"|laid into|held against|puts? back|given back|becomes? of|became of|go(?:es)? on|went on|of theirs|but for"
    r"|passed over|looked at|look(?:s|ing)? at|asked for|learnt|none where|empty where|makes of"
    r"|in its place|done without|rehears\w*|seldom|hardly|half-?way|mend(?:s|ed|ing)?)\b",
    re.IGNORECASE,
)

#: Uses of the field that the words above do not forbid.
_FIELD_TERMS = re.compile(
    r"mlxflow[- ]serve\b|\"serve\"|`serve`|\[serve\]|model server|proof of work|waterproof", re.IGNORECASE
)

#: Files that still have such words, and how many.
REMAINING: dict[str, int] = {}


def _texts(path: Path) -> Iterator[str]:
    """Yield the strings and comments of a Python file, or the whole text of another one."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield text
        return
    kinds = (tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in kinds:
            yield token.string


def forbidden_words(text: str) -> list[str]:
    """Return the forbidden words in a text."""
    return [match[0] for match in _FORBIDDEN.finditer(_FIELD_TERMS.sub("", re.sub(r"\s+", " ", text)))]


@functools.cache
def _found() -> dict[str, int]:
    files = [*(REPOSITORY / "mlxflow").rglob("*"), *(REPOSITORY / "tasks").rglob("*.py"), REPOSITORY / "README.md"]
    files += (REPOSITORY / "docs").rglob("*.md")
    counts = {
        path.relative_to(REPOSITORY).as_posix(): sum(len(forbidden_words(text)) for text in _texts(path))
        for path in files
        if path.suffix in (".py", ".md", ".html") and path.is_file()
    }
    return {file: count for file, count in sorted(counts.items()) if count}


def test_no_file_has_more_forbidden_words_than_listed() -> None:
    found = _found()
    assert not {file: count for file, count in found.items() if count > REMAINING.get(file, 0)}, "say it plainly"


def test_files_without_forbidden_words_are_not_listed() -> None:
    found = _found()
    assert not {file: count for file, count in REMAINING.items() if count > found.get(file, 0)}, "lower these numbers"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Whether a kernel serves.", ["serves"]),
        ("It is told what the loss\n    comes to.", ["told", "comes to"]),
        ("Every so-manieth layer is computed anew.", ["so-manieth", "anew"]),
        ("`mlxflow serve` answers over HTTP; a reserved name, outcomes", []),
        ("Kernels that passed verification are selected.", []),
    ],
)
def test_forbidden_words(text: str, words: list[str]) -> None:
    assert forbidden_words(text) == words
