import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from mlxflow.messages.markdown_tables import table_of, write_markdown
from tests.conftest import REPOSITORY

TEXT = "On a CPU:\n\n| promise | measured | holds |\n|---|--:|---|\n| a \x1b[2J claim | 1.5 | yes |\n\nEnd.\n"


def test_markdown_stays_as_it_is_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    write_markdown(TEXT)
    assert capsys.readouterr().out == TEXT.replace("\x1b", "\\x1b")


@pytest.mark.parametrize("columns", [60, 120])
def test_a_table_is_drawn_on_a_terminal_within_its_width(columns: int, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    program = f"from mlxflow.messages.markdown_tables import write_markdown; write_markdown({TEXT * 2!r})"
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    environment |= {"TERM": "xterm", "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen([sys.executable, "-c", program], stdout=theirs, env=environment) as process:
        os.close(theirs)
        data = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # on Linux, the other end was closed
                break
            if not piece:
                break
            data += piece
    os.close(ours)
    assert process.returncode == 0
    shown = data.decode()
    assert shown.count("──") > 0
    assert "|" not in shown
    assert "\\x1b[2J" in shown
    assert "\x1b[2J" not in shown
    assert max(len(line) for line in shown.replace("\x1b[1m", "").replace("\x1b[0m", "").splitlines()) <= columns


def test_a_table_keeps_one_line_a_row_whatever_its_cells_hold() -> None:
    assert table_of(("layer", "bytes"), [("a|b\nc", "1,000")]) == (
        "| layer | bytes |\n| --- | --: |\n| a/b\\nc | 1,000 |\n"
    )
