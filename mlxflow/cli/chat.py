"""`mlxflow chat`: a conversation with a model folder in the terminal."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from mlxflow.cli.generate import add_model, add_sampling, check_sampling, is_utf8, refuse_unfit
from mlxflow.messages import terminal
from mlxflow.messages.errors import CallError

if TYPE_CHECKING:
    from mlxflow.evaluation.chat_session import ChatSession
    from mlxflow.evaluation.text_generation import Sampling

_HELP = (
    "/reset begins a new conversation, /system TEXT one with a system message; Ctrl-C stops an answer, "
    "/exit or Ctrl-D ends"
)
_MAX_TOKENS = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mlxflow chat`."""
    add_model(parser)
    parser.add_argument("--system", default="", metavar="TEXT", help="a system message")
    add_sampling(parser, max_tokens=_MAX_TOKENS)


def run(parsed: argparse.Namespace) -> None:
    """Answer each line of standard input, with all earlier messages as context, until its end.

    Raises:
        CallError: an argument has no valid value, or the template refuses the conversation.
        ArtifactError: the folder holds no model.
    """
    system = ("--system", parsed.system, is_utf8(parsed.system), "expected UTF-8", "Write it as UTF-8")
    refuse_unfit("chat", [system])
    check_sampling("chat", parsed, max_tokens=_MAX_TOKENS)
    from mlxflow.device import cpu_backend

    cpu_backend.prepare()
    from mlxflow.evaluation.chat_session import ChatSession
    from mlxflow.evaluation.text_generation import Sampling, Writer
    from mlxflow.storage import remote_code

    with remote_code.trusting_code(parsed.trust_remote_code):
        writer = Writer(parsed.model)
        if not writer.has_template:
            terminal.say(
                f"chat: {parsed.model}: has no chat template, ChatML is used; a model that was not trained on "
                "conversations only continues them"
            )
        session = ChatSession(writer, parsed.system)
        _talk(session, Sampling(parsed.max_tokens, parsed.temperature, parsed.seed))


def _talk(session: "ChatSession", sampling: "Sampling") -> None:
    source: Any = sys.stdin
    if source is None:  # standard input was closed
        return
    source.reconfigure(errors="surrogateescape")
    is_terminal = bool(source.isatty())
    if is_terminal:
        import readline  # noqa: F401  # input() has a history and keys to edit with it

        terminal.say(_HELP)
    while (line := _next_line(is_terminal)) is not None:
        command, _, rest = line.strip().partition(" ")
        if command in ("/exit", "/quit"):
            return
        if command in ("/reset", "/system"):
            session.reset(rest.strip())
        elif command.startswith("/"):
            terminal.say(f"{command}: no such command. {_HELP}.")
        elif line.strip():
            _answer(session, line.strip(), sampling, is_terminal=is_terminal)


def _next_line(is_terminal: bool) -> str | None:
    """Return the next message, or None at the end of the input."""
    if not is_terminal:
        return sys.stdin.readline() or None
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        terminal.write("\n")
        return None


def _answer(session: "ChatSession", text: str, sampling: "Sampling", *, is_terminal: bool) -> None:
    try:
        if not is_utf8(text):
            raise CallError(f"chat: {text!r}: expected UTF-8. Write it as UTF-8.")
        for piece in session.answer(text, sampling):
            terminal.stream(piece)
    except KeyboardInterrupt:
        if not is_terminal:
            raise
    except CallError as error:
        if not is_terminal:
            raise
        terminal.say_error(error)
    terminal.write("\n")
