"""`mlxflow chat` as a user runs it: in a pipe and in a terminal."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlxflow.data.chatml import CHATML
from mlxflow.evaluation.chat_session import ChatSession
from mlxflow.evaluation.text_generation import Sampling, Writer
from tests.evaluation.test_chat_session import write_chat_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a chat model in `model` and one without a template in `plain`."""
    path = tmp_path_factory.mktemp("chat")
    write_chat_model(path / "model", special=["<|im_start|>", "<|im_end|>"], template=CHATML)
    write_chat_model(path / "plain", special=[], template=None)
    return path


def _run(folder: Path, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mlxflow", "chat", *arguments]
    return subprocess.run(command, cwd=folder, input=text, capture_output=True, text=True, check=False)


def test_each_line_of_a_pipe_is_answered_with_the_conversation_so_far(folder: Path) -> None:
    lines = ["who are you?", "", "why?", "/reset", "who are you?", "/exit", "not read"]
    done = _run(folder, "model", "--max-tokens", "6", text="\n".join(lines))
    session = ChatSession(Writer(folder / "model"))
    sampling = Sampling(6, 0.0, 0)
    first, second = ("".join(session.answer(text, sampling)) for text in ("who are you?", "why?"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{first}\n{second}\n{first}\n"


def _read_until(terminal: int, pattern: str) -> str:
    """Return what a terminal shows from now on, until a pattern matches all of it or the program ends."""
    shown = ""
    while not re.search(pattern, shown, re.DOTALL):
        try:
            shown += os.read(terminal, 4096).decode()
        except OSError:  # the program has ended
            break
    return shown


def test_a_terminal_shows_help_and_a_prompt_and_ends_at_ctrl_d(folder: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "mlxflow", "chat", "model", "--max-tokens", "2"]
    with subprocess.Popen(command, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = _read_until(ours, "> $")
        os.write(ours, b"/nothing\n")
        shown += _read_until(ours, r"ends\..*> $")
        os.write(ours, b"\x04")
        _read_until(ours, "(?!)")
        assert process.wait() == 0
    os.close(ours)
    assert shown.startswith("/reset begins a new conversation")
    assert "/nothing: no such command." in shown


def test_a_model_without_a_template_is_prompted_with_chatml_and_a_notice(folder: Path) -> None:
    done = _run(folder, "plain", "--max-tokens", "2", text="why?\n")
    assert done.returncode == 0
    assert done.stderr == (
        "chat: plain: has no chat template, ChatML is used; a model that was not trained on conversations only "
        "continues them\n"
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["model", "--max-tokens", "0"], "chat: --max-tokens = 0: expected at least 1. Use 1000 (the default)."),
        (["model", "--system", "\udcff"], "chat: --system = '\\udcff': expected UTF-8. Write it as UTF-8."),
        (["model", "--temperature", "inf"], "chat: --temperature = inf: expected 0 or more. Use 0 (the default)."),
    ],
)
def test_an_invalid_command_line_is_one_error_line(folder: Path, arguments: list[str], line: str) -> None:
    done = _run(folder, *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{line}\n")


def test_a_message_that_is_not_utf_8_is_one_line_after_the_earlier_answers(folder: Path) -> None:
    command = [sys.executable, "-m", "mlxflow", "chat", "model", "--max-tokens", "2"]
    done = subprocess.run(command, cwd=folder, input=b"why?\n\xff\n", capture_output=True, check=False)
    answer = "".join(ChatSession(Writer(folder / "model")).answer("why?", Sampling(2, 0.0, 0)))
    assert (done.returncode, done.stdout.decode()) == (2, f"{answer}\n")
    assert done.stderr == b"chat: '\\udcff': expected UTF-8. Write it as UTF-8.\n"


def test_a_closed_input_ends_the_chat(folder: Path) -> None:
    command = ["sh", "-c", '"$0" -m mlxflow chat model <&-', sys.executable]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
