"""What is printed: control characters in texts of others are escaped, and nothing is printed past the one door."""

import ast
import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlxflow.messages import terminal
from mlxflow.messages.errors import SourceError
from mlxflow.messages.terminal import Foreign, escaped, foreign, one_line
from tests.conftest import REPOSITORY, doit, mlxflow

#: What retitles a terminal, rings, reorders what follows and begins a line that looks like ours.
HOSTILE = "a\x1b]0;title\x07\u202e\nb"
SHOWN = r"a\x1b]0;title\x07\u202e\nb"

#: What may stand in an output beside printable characters: line ends, and colors and bars of rich.
_FITTING = re.compile(r"[\r\n\t]|\x1b\[[0-9;]*[ABCDGKm]|\x1b\[\?25[hl]")


def _is_fit(output: str) -> bool:
    return escaped(rest := _FITTING.sub("", output)) == rest


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, übermäßig, 日本語, 👩\u200d👧", None),
        ("two\n\tlines", None),
        ("\x1b[31m\x1b]0;t\x07", r"\x1b[31m\x1b]0;t\x07"),
        ("a\rb\x08c\x7f\x00", r"a\rb\x08c\x7f\x00"),
        ("\x9b31m\x85", r"\x9b31m\x85"),
        ("\u202eabc\u2069\u200f\u061c", r"\u202eabc\u2069\u200f\u061c"),
        ("a\u2028b\u2029\ufeff\u200b", r"a\u2028b\u2029\ufeff\u200b"),
        ("\U000e0041", r"\U000e0041"),
        ("name \udcff\ud800", r"name \xff\ud800"),
    ],
)
def test_control_characters_are_escaped(text: str, shown: str | None) -> None:
    assert escaped(text) == (text if shown is None else shown)
    assert escaped(escaped(text)) == escaped(text)


def test_line_breaks_within_a_line_are_escaped() -> None:
    assert one_line(HOSTILE + "\tc") == SHOWN + r"\tc"
    assert str(SourceError(f"{HOSTILE}: no text.", "x: y.")) == f"{SHOWN}: no text.\nx: y."


def test_output_of_another_program_keeps_only_colors_and_progress_bars() -> None:
    bar = "\r\x1b[2K\x1b[1A\x1b[1;32m10/20\x1b[0m\x1b[?25l\x1b[?25h\n"
    assert foreign(bar) == bar
    others = "\x1b]0;t\x07\x1b[2J\x1b[6n\x1bP1\x1b\\\x1b[?1049h\x1b[5B\x1bc"
    assert foreign(others) == r"\x1b]0;t\x07\x1b[2J\x1b[6n\x1bP1\x1b\\x1b[?1049h" + "\x1b[5B" + r"\x1bc"


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_escaping_does_not_depend_on_how_the_output_is_split(size: int) -> None:
    data = "ü \x1b[1;32mgreen\x1b[0m \x1b]0;t\x07\n".encode() + b"\xff\xc3" + "日\u202e\x1b[".encode()
    shown, pieces = Foreign(), [data[begin : begin + size] for begin in range(0, len(data), size)]
    result = b"".join(shown.feed(piece) for piece in pieces) + shown.feed(b"", ends=True)
    assert result.decode() == "ü \x1b[1;32mgreen\x1b[0m \\x1b]0;t\\x07\n\\xff\\xc3日\\u202e\\x1b["


def test_characters_missing_from_the_encoding_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    terminal.show("ü\udcff", HOSTILE)
    terminal.write("two\nlines\x1b")
    output.seek(0)
    assert output.read() == f"\\xfc\\xff\n{SHOWN}\ntwo\nlines\\x1b"


def test_closed_streams_print_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    with terminal.guarded():
        terminal.say("x")
        terminal.show("x")
        terminal.stream("x")


def test_output_of_other_libraries_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.guarded():
        print(HOSTILE)  # as doit does
        sys.stderr.writelines([HOSTILE, "\n"])
        terminal.stream("as it is \u202e\n")  # in a pipe
    kept = SHOWN.replace(r"\n", "\n")
    assert tuple(capsys.readouterr()) == (f"{kept}\nas it is \u202e\n", f"{kept}\n")


def test_rich_consoles_interpret_no_markup_or_controls() -> None:
    from rich.progress import Progress
    from rich.table import Table
    from rich.text import Text

    output = io.StringIO()
    console = terminal.console(file=output, width=80, force_terminal=True, soft_wrap=True)
    table = Table()
    table.add_column(f"[red]{HOSTILE}")
    table.add_row(f"[/] {HOSTILE}")
    console.print(table)
    console.print(Text(HOSTILE, "bold"), HOSTILE)
    with Progress(terminal.text_column(f"{{task}} {HOSTILE}"), terminal.text_column(), console=console) as bars:
        bars.add_task(f"[/] {HOSTILE}")
    assert _is_fit(output.getvalue())
    assert "[red]a\\x1b]0;title\\x07\\u202e" in output.getvalue()
    assert f"{{task}} {SHOWN} [/] a\\x1b" in output.getvalue()


_PRINTERS = {"pprint", "print_exc", "print_exception", "print_stack", "Console", "TextColumn"}


def _bypasses(source: str) -> list[int]:
    """Return the lines on which a module prints past the door."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            writes = re.fullmatch(r"(sys\.)?(__)?std(out|err)(__)?(\.buffer)?\.write(lines)?", called)
            is_raw = called == "os.write" and ast.unparse(node.args[0]) in ("1", "2")
            if called in ("print", "rich.print") or called.split(".")[-1] in _PRINTERS or writes or is_raw:
                lines.append(node.lineno)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [f"{getattr(node, 'module', None)}.{alias.name}" for alias in node.names]
            names += [alias.name for alias in node.names]
            if {"rich.print", "tqdm"} & {*names}:
                lines.append(node.lineno)
    return lines


@pytest.mark.parametrize(
    "line",
    [
        "print('x')",
        "sys.stderr.write('x')",
        "sys.stdout.buffer.write(b'x')",
        "sys.__stdout__.writelines([])",
        "os.write(2, b'x')",
        "traceback.print_exc()",
        "Console(stderr=True)",
        "rich.console.Console()",
        "from rich import print",
        "TextColumn('x')",
        "from tqdm import tqdm",
    ],
)
def test_the_scan_finds_every_way_to_print_directly(line: str) -> None:
    assert _bypasses(line) == [1]


def test_all_output_goes_through_terminal() -> None:
    found = {
        f"{path.relative_to(REPOSITORY)}:{line}"
        for folder in ("mlxflow", "tasks")
        for path in sorted((REPOSITORY / folder).rglob("*.py"))
        for line in _bypasses(path.read_text())
    }
    # Their lines are for the process that started them; what a stage prints is escaped as it comes out of the pipe
    allowed = (
        *("mlxflow/messages/terminal.py", "mlxflow/kernels/verification.py", "tasks/stage_process.py"),
        "mlxflow/workflow/remote_agent.py",
    )
    assert {line for line in found if not line.startswith(allowed)} == set()
    assert len([line for line in found if line.startswith("tasks/stage_process.py")]) == 1


def test_untrusted_texts_are_escaped_on_the_terminal(job: Path) -> None:
    title = "\x1b]0;t\x07\u202e"
    (job / f"notes/a{title}\n.jsonl").write_text('{"te\\u001bxt": "a"}\n')
    text = (job / "workflow.toml").read_text()
    (job / "bad.toml").write_text(text + '\n["key\\u001b\\nx"]\n[quantize."q\\u001b"]\n')
    for command in (
        [doit, "list", "--all", "--deps"],
        [doit, "info", "pretokenize"],
        [doit, "plan"],
        [doit, "pretokenize"],
        [doit, f"train{title}"],
        [doit, "unpack", f"file{title}"],
        [doit, "workflow=bad.toml"],
        [mlxflow, "run", f"train{title}"],
        [mlxflow, "check", "--workflow", "bad.toml"],
        [mlxflow, "run", "pretokenize"],
    ):
        run, *arguments = command
        result = run(job, *arguments)  # type: ignore[operator]
        assert _is_fit(result.stdout + result.stderr), arguments
        assert "Traceback" not in result.stderr
        assert result.stdout + result.stderr


def test_a_stages_output_is_escaped_on_a_terminal_and_in_its_log(tmp_path: Path) -> None:
    stage = "import sys; print('bar \\x1b[32m1\\x1b[0m'); print(sys.argv[1]); sys.stdout.buffer.write(b'\\xff\\n')"
    script = (
        "import sys; from pathlib import Path; from mlxflow.tasks.stage_process import run_process; "
        f"run_process([sys.executable, '-c', {stage!r}, {HOSTILE!r}], Path('log'))"
    )
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stderr=theirs)
    os.close(theirs)
    output = b""
    try:
        while data := os.read(ours, 4096):
            output += data
    except OSError:  # Linux: the other end was closed
        pass
    finally:
        os.close(ours)
    assert process.wait() == 0
    shown = SHOWN.replace(r"\n", "\n")
    expected = f"bar \x1b[32m1\x1b[0m\n{shown}\n\\xff\n"
    assert (tmp_path / "log").read_text() == expected
    assert output.decode().replace("\r", "") == expected
