"""README and docs: short, true where the code can say so, and without a broken link."""

import re
import tomllib
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tools.docs.links import broken_links
from tools.docs.pages import differing, generated_pages

PAGES = sorted((REPOSITORY / "docs").rglob("*.md"))
FILES = [
    *PAGES,
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")),
]

_SET_UP = [
    "    python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/doit",
    "    python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest",
]


def test_generated_pages_are_up_to_date() -> None:
    assert differing(generated_pages()) == [], "run: python -m tools.docs"


def test_every_relative_link_and_anchor_exists() -> None:
    assert broken_links(FILES) == []


def test_the_readme_is_short_and_begins_with_the_two_set_up_commands() -> None:
    lines = (REPOSITORY / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    assert [line for line in lines if line.startswith("    ")][:2] == _SET_UP


def test_the_picture_of_the_page_is_small() -> None:
    assert (REPOSITORY / "docs/page.png").stat().st_size <= 300 * 1024


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_every_page_is_linked_from_another_one(path: Path) -> None:
    if path == REPOSITORY / "docs/README.md":
        return
    others = "\n".join(_targets(other) for other in FILES if other != path)
    assert path.as_posix() in others.split()


def _targets(page: Path) -> str:
    found = re.findall(r"\]\(([^)#\s]+\.md)", page.read_text())
    return "\n".join((page.parent / target).resolve().as_posix() for target in found)


def test_benchmark_pages_name_command_and_date() -> None:
    for path in (REPOSITORY / "docs/benchmarks").glob("*.md"):
        if path.name != "README.md":
            text = path.read_text()
            assert re.search(r"`python benchmarks/\w+\.py|`doit ", text), path
            assert re.search(r"20\d\d-\d\d-\d\d", text), path


def test_the_changelog_has_the_version_and_at_most_15_entries_for_each() -> None:
    sections = re.split(r"^## ", (REPOSITORY / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1:]
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    assert any(section.startswith(f"[{version}]") for section in sections)
    counts = {section.splitlines()[0]: len(re.findall(r"^- ", section, flags=re.MULTILINE)) for section in sections}
    assert {title: count for title, count in counts.items() if count > 15} == {}


def test_the_navigation_of_the_site_has_every_page_once() -> None:
    navigation = tomllib.loads((REPOSITORY / "zensical.toml").read_text())["project"]["nav"]
    pages = re.findall(r"'([\w/-]+\.md)'", repr(navigation))
    assert sorted(pages) == sorted(path.relative_to(REPOSITORY / "docs").as_posix() for path in PAGES)
