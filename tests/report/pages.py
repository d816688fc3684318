"""The elements, attributes and text of a page."""

from html.parser import HTMLParser
from pathlib import Path

from mlxflow.report.render import render
from tests.report.runs import read


class Seen(HTMLParser):
    """The elements, attributes and text of a page."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(page.decode())
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def text_of(root: Path) -> str:
    """Return the text of the page of a run."""
    return Seen(render([read(root)])).text
