"""English texts to calibrate and to judge on, from a package of the package index: two kinds, kept apart.

gensim's wheel carries 206 pages of the English Wikipedia (2016, CC BY-SA) and 300 news articles (Lee et al. 2005) for
its tests. Methods learn the former; the latter judge them.
"""

import bz2
import html
import json
import re
import tempfile
import zipfile
from pathlib import Path

from benchmarks.real_models import download
from mlxflow.storage import atomic_folders
from tests.journey import pretrained

_PACKAGE = "gensim==4.4.0"
_DATA = "gensim/test/test_data/"
_PAGES = f"{_DATA}enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_NEWS = f"{_DATA}lee_background.cor"

# Shorter articles are redirects and stubs; shorter lines are headings and remains of lists
_LEAST_ARTICLE, _LEAST_LINE = 1000, 80

# Markup that is removed, in this order; templates and tables are nested
_REMOVED = (
    r"<!--.*?-->",
    r"<ref[^>/]*/>",
    r"<ref.*?</ref>",
    r"(?i)<(gallery|math|table|div|timeline|source|pre|code).*?</\1>",
)
_NESTED = (r"\{\{[^{}]*\}\}", r"\{\|[^{}]*?\|\}")
_REPLACED = (
    (r"(?i)\[\[(?:File|Image|Category):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", ""),
    (r"\[\[[^\]|]*\|([^\]]*)\]\]", r"\1"),
    (r"\[\[([^\]]*)\]\]", r"\1"),
    (r"\[https?:[^ \]]*\s?([^\]]*)\]", r"\1"),
    (r"<[^>]+>", ""),
    (r"'{2,}", ""),
)


def texts() -> tuple[Path, Path]:
    """Return JSON-lines files of encyclopedia articles and of news articles, in the user's cache.

    Raises:
        UnavailableError: the package cannot be downloaded.
    """
    folder = pretrained.cache_folder() / "texts"
    articles, news = folder / "articles.jsonl", folder / "news.jsonl"
    if not (articles.is_file() and news.is_file()):
        folder.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory() as own,  # another process may download, too
            zipfile.ZipFile(download(_PACKAGE, Path(own))) as archive,
        ):
            pages = bz2.decompress(archive.read(_PAGES)).decode()
            stories = archive.read(_NEWS).decode("latin-1").splitlines()
        _write(articles, [text for text in map(_plain, _page_texts(pages)) if len(text) >= _LEAST_ARTICLE])
        _write(news, [text.strip() for text in stories if text.strip()])
    return articles, news


def _write(file: Path, documents: list[str]) -> None:
    content = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    atomic_folders.write_whole(file, content.encode())


def _page_texts(pages: str) -> list[str]:
    return re.findall(r"<text[^>]*>(.*?)</text>", pages, re.DOTALL)


def _plain(markup: str) -> str:
    """Return the paragraphs of an article without markup."""
    text = html.unescape(markup)
    for pattern in _REMOVED:
        text = re.sub(pattern, "", text, flags=re.DOTALL)
    for pattern in _NESTED:
        count = 1
        while count:
            text, count = re.subn(pattern, "", text)
    for pattern, replacement in _REPLACED:
        text = re.sub(pattern, replacement, text)
    lines = (line.strip() for line in text.split("\n"))
    return "\n\n".join(
        line
        for line in lines
        if len(line) > _LEAST_LINE and line[0].isalnum() and "|" not in line and line[-1] in '.!?"'
    )
