"""The messages on the page, against those that the program prints."""

from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.workflow.test_loader import ONE_MISTAKE
from tools.docs.messages import KnownMessage, messages
from tools.docs.messages_page import messages_page, source_files

SOURCE = """
def f(path, names, is_short):
    what = "is empty"
    raise SourceError(f"{path}: {what}{'' if is_short else ' and short'}. Name {advise_build(path)}")

def g(config):
    yield Problem("bits", config.bits, "expected a few", "Use fewer." if config else "Use more.")
    yield Problem("name", UNSET, f"missing in {len(config.names)} files", "Write one.")
    refuse("x: expected a stage. Use: doit x", 1)
    refuse(config.item, "a function of the same name")
"""


def _known(folder: Path, text: str) -> list[KnownMessage]:
    (folder / "code.py").write_text(text)
    return messages([folder / "code.py"])


def test_messages_are_read_with_their_exit_code_and_values_in_capitals(tmp_path: Path) -> None:
    assert [(one.exit_code, one.text) for one in _known(tmp_path, SOURCE)] == [
        (2, "PATH: is empty[ and short]. Name COMMAND"),
        (2, "FILE: TABLE.bits = VALUE: expected a few. (Use fewer. or Use more.)"),
        (2, "FILE: TABLE.name: missing in NAMES files. Write one."),
        (1, "x: expected a stage. Use: doit x"),
    ]


def test_a_printed_line_is_recognized(tmp_path: Path) -> None:
    first = _known(tmp_path, SOURCE)[0]
    assert first.matches("a/b.txt: is empty and short. Name Run: mlxflow build train")
    assert not first.matches("a/b.txt: is missing. Name Run: mlxflow build train")


@pytest.fixture(scope="module")
def known() -> list[KnownMessage]:
    return messages(source_files(REPOSITORY))


def test_mistakes_in_a_workflow_file_have_a_row(known: list[KnownMessage]) -> None:
    printed = [line for text in ONE_MISTAKE.values() for line in text.splitlines()]
    assert [line for line in printed if not any(message.matches(line) for message in known)] == []
    assert not any(message.matches("a file: x = 3: another line. Do it.") for message in known)


def test_the_page_has_every_kind_of_message() -> None:
    text = messages_page(REPOSITORY)
    assert "## The workflow file: exit code 2" in text
    assert "## A stage that failed: exit code 1" in text
    assert "`show TASK: --row = ROW: expected 0 to .... Name one of the training rows.`" in text
