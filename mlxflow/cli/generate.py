"""`mlxflow generate`: asks a chat model, or lets a model continue a text."""

import argparse
from pathlib import Path

from mlxflow.errors import CallError
from mlxflow.system import terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mlxflow generate`."""
    parser.add_argument("model", type=Path, help="a model folder, such as artifacts/train")
    parser.add_argument("--prompt", required=True, help="the question, or the text to continue")
    parser.add_argument(
        "--raw",
        "--no-chat-template",
        action="store_true",
        help="continue the text, even if the folder has a chat template",
    )
    parser.add_argument("--max-tokens", type=int, default=100, help="default: 100")
    parser.add_argument("--temperature", type=float, default=0.0, help="default: 0, greedy")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code of the folder; read it first")


def _check(parsed: argparse.Namespace) -> None:
    """Refuse what mlx-lm would answer with a traceback, or without end."""
    wanted = (
        ("--prompt", parsed.prompt, bool(parsed.prompt), "expected a question or a text", "Write a word at least"),
        ("--prompt", parsed.prompt, _is_utf8(parsed.prompt), "expected UTF-8", "Write it as UTF-8"),
        ("--max-tokens", parsed.max_tokens, parsed.max_tokens > 0, "expected at least 1", "Use 100 (the default)"),
        ("--temperature", parsed.temperature, parsed.temperature >= 0, "expected 0 or more", "Use 0 (the default)"),
        (
            "--seed",
            parsed.seed,
            0 <= parsed.seed < 2**64,
            "expected a number from 0 to 2^64 - 1",
            "Use 0 (the default)",
        ),
    )
    lines = [
        f"generate: {name} = {value!r}: {said}. {advice}." for name, value, fits, said, advice in wanted if not fits
    ]
    if lines:
        raise CallError(*lines)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def run(parsed: argparse.Namespace) -> None:
    """Print what the model writes, as it writes it.

    Raises:
        CallError: an argument has no valid value.
        ArtifactError: the folder holds no model.
    """
    _check(parsed)
    from mlxflow.device import cpu_backend

    cpu_backend.prepare()
    from mlxflow.evaluation.text_generation import Sampling, generate
    from mlxflow.storage import remote_code

    sampling = Sampling(parsed.max_tokens, parsed.temperature, parsed.seed)
    with remote_code.trusting_code(parsed.trust_remote_code):
        is_chat, texts = generate(parsed.model, prompt=parsed.prompt, sampling=sampling, raw=parsed.raw)
    if is_chat:
        said = "asked through its chat template; --raw continues the text as it is"
    else:
        said = "the text is continued as it is" + (" (--raw)" if parsed.raw else "; it has no chat template")
    terminal.say(f"generate: {parsed.model}: {said}")
    for text in texts:
        terminal.stream(text)
    terminal.write("\n")
