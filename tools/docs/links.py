"""Relative links and anchors of Markdown files, checked without a network."""

import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from markdown_it import MarkdownIt
from markdown_it.token import Token


def broken_links(files: Iterable[Path]) -> list[str]:
    """Return a line for each relative link whose file or anchor does not exist."""
    return [
        f"{path}:{line}: {target}: {problem}"
        for path in files
        for line, target in _links(path)
        if (problem := _problem(path, target))
    ]


@cache
def anchors(path: Path) -> frozenset[str]:
    """Return the anchors that GitHub gives the headings of a Markdown file."""
    tokens = _parse(path)
    titles = [tokens[place + 1] for place, token in enumerate(tokens) if token.type == "heading_open"]
    found: set[str] = set()
    for title in titles:
        slug, number = slugify(_plain(title)), 0
        while (name := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(name)
    return frozenset(found)


def slugify(title: str) -> str:
    """Return the anchor of a heading: lower case, punctuation removed, spaces as hyphens."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")


@cache
def _parse(path: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8"))


def _plain(token: Token) -> str:
    return "".join(child.content for child in token.children or [] if child.type in ("text", "code_inline"))


def _links(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and target of each link and image."""
    line = 0
    for token in _parse(path):
        line = token.map[0] + 1 if token.map else line
        for child in token.children or []:
            target = child.attrs.get("href") or child.attrs.get("src")
            if target:
                yield line, str(target)


def _problem(path: Path, target: str) -> str:
    """Return what is wrong with a link; empty if nothing is, or if it leads out of the repository's files."""
    parts = urlsplit(target)
    if parts.scheme or parts.netloc:
        return ""
    file = path.parent / unquote(parts.path) if parts.path else path
    if not file.exists():
        return "no such file"
    if parts.fragment and parts.fragment not in anchors(file.resolve()):
        return "no such heading"
    return ""
