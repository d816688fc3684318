"""Which pages are generated, and from what."""

from collections.abc import Mapping
from pathlib import Path

from tools.docs.api_page import api_page
from tools.docs.command_page import command_page
from tools.docs.messages_page import messages_page
from tools.docs.workflow_pages import workflow_pages

REPOSITORY = Path(__file__).parents[2]
REFERENCE = "docs/reference"


def generated_pages() -> dict[str, str]:
    """Return the text of every generated page by its path relative to the repository."""
    tables = {f"{REFERENCE}/workflow/{name}.md": text for name, text in workflow_pages().items()}
    return {
        **tables,
        f"{REFERENCE}/command.md": command_page(REPOSITORY),
        f"{REFERENCE}/messages.md": messages_page(REPOSITORY),
        f"{REFERENCE}/python-api.md": api_page(REPOSITORY),
    }


def differing(pages: Mapping[str, str], repository: Path = REPOSITORY) -> list[str]:
    """Return the paths of pages whose file is missing or has another text."""
    paths = {name: repository / name for name in pages}
    return [
        name for name, path in paths.items() if not path.is_file() or path.read_text(encoding="utf-8") != pages[name]
    ]


def write(pages: Mapping[str, str], repository: Path = REPOSITORY) -> None:
    """Write each page that differs."""
    for name in differing(pages, repository):
        path = repository / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(pages[name], encoding="utf-8")
