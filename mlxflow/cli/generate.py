"""`mlxflow generate`: prompt a chat model, or let a model continue a text."""

import argparse
import math
from collections.abc import Iterable

from mlxflow.cli.arguments import user_path
from mlxflow.messages import terminal
from mlxflow.messages.errors import CallError

_MAX_TOKENS = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mlxflow generate`."""
    add_model(parser)
    parser.add_argument("--prompt", required=True, help="the question, or the text to continue")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--chat", action="store_true", help="ask through the folder's chat template; an error without one")
    how.add_argument(
        "--raw",
        "--no-chat-template",
        action="store_true",
        help="continue the text, even if the folder has a chat template",
    )
    add_sampling(parser, max_tokens=_MAX_TOKENS)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the folder of the model that generates."""
    parser.add_argument("model", type=user_path, help="a model folder, such as artifacts/train, or a GGUF file")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code of the folder; read it first")


def add_sampling(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    """Add the arguments of sampling.

    Args:
        parser: of the verb.
        max_tokens: default of `--max-tokens`.
    """
    parser.add_argument("--max-tokens", type=int, default=max_tokens, help=f"default: {max_tokens}")
    parser.add_argument("--temperature", type=float, default=0.0, help="default: 0, greedy")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")


def check_sampling(verb: str, parsed: argparse.Namespace, *, max_tokens: int) -> None:
    """Refuse sampling arguments for which mlx-lm would raise a traceback or never stop.

    Args:
        verb: of the command line, for the messages.
        parsed: its arguments.
        max_tokens: default of `--max-tokens`.

    Raises:
        CallError: a line for each.
    """
    count, temperature, seed = parsed.max_tokens, parsed.temperature, parsed.seed
    usual, zero = f"Use {max_tokens} (the default)", "Use 0 (the default)"
    checks = (
        ("--max-tokens", count, count > 0, "expected at least 1", usual),
        ("--temperature", temperature, 0 <= temperature < math.inf, "expected 0 or more", zero),
        ("--seed", seed, 0 <= seed < 2**64, "expected a number from 0 to 2^64 - 1", zero),
    )
    refuse_unfit(verb, checks)


def refuse_unfit(verb: str, arguments: Iterable[tuple[str, object, bool, str, str]]) -> None:
    """Raise an error with a line for each invalid argument.

    Args:
        verb: of the command line.
        arguments: for each argument its name, its value, whether it is valid, what is expected, and the advice.

    Raises:
        CallError: at least one argument is invalid.
    """
    lines = [
        f"{verb}: {name} = {value!r}: {expected}. {advice}."
        for name, value, fits, expected, advice in arguments
        if not fits
    ]
    if lines:
        raise CallError(*lines)


def is_utf8(text: str) -> bool:
    """Return whether a text of the command line or of a stream was valid UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def run(parsed: argparse.Namespace) -> None:
    """Print the generated text token by token.

    Raises:
        CallError: an argument has no valid value.
        ArtifactError: the folder holds no model.
    """
    refuse_unfit(
        "generate",
        (
            ("--prompt", parsed.prompt, bool(parsed.prompt), "expected a question or a text", "Write a word at least"),
            ("--prompt", parsed.prompt, is_utf8(parsed.prompt), "expected UTF-8", "Write it as UTF-8"),
        ),
    )
    check_sampling("generate", parsed, max_tokens=_MAX_TOKENS)
    from mlxflow.device import cpu_backend

    cpu_backend.prepare()
    from mlxflow.evaluation.text_generation import Sampling, generate
    from mlxflow.storage import remote_code

    sampling = Sampling(parsed.max_tokens, parsed.temperature, parsed.seed)
    with remote_code.trusting_code(parsed.trust_remote_code):
        is_chat, texts = generate(parsed.model, prompt=parsed.prompt, sampling=sampling, raw=parsed.raw)
        if parsed.chat and not is_chat:
            raise CallError(
                f"generate: --chat: {parsed.model} has no chat template. Remove --chat to continue the text, or train "
                'it on conversations with pretokenize.chat_template = "chatml".'
            )
    if is_chat:
        how = "asked through its chat template; --raw continues the text as it is"
    else:
        how = "the text is continued as it is" + (" (--raw)" if parsed.raw else "; it has no chat template")
    terminal.say(f"generate: {parsed.model}: {how}")
    for text in texts:
        terminal.stream(text)
    terminal.write("\n")
