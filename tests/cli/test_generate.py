from pathlib import Path

import pytest

from tests.conftest import mlxflow


def test_generate_prints_the_prompt_and_its_continuation(built: Path) -> None:
    arguments = ("generate", "artifacts/quantize/q8", "--prompt", "note 3 line", "--max-tokens", "8")
    first, second = mlxflow(built, *arguments), mlxflow(built, *arguments)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("note 3 line")
    assert len(first.stdout.strip()) > len("note 3 line")
    assert first.stdout == second.stdout


def test_generate_refuses_a_folder_without_a_model(built: Path) -> None:
    result = mlxflow(built, "generate", "notes", "--prompt", "x")
    assert result.returncode == 2
    assert result.stderr == "notes: has no config.json. Name a model folder.\n"


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--prompt", "", "generate: --prompt = '': expected a question or a text. Write a word at least."),
        ("--max-tokens", "0", "generate: --max-tokens = 0: expected at least 1. Use 100 (the default)."),
        ("--max-tokens", "-3", "generate: --max-tokens = -3: expected at least 1. Use 100 (the default)."),
        ("--temperature", "-1", "generate: --temperature = -1.0: expected 0 or more. Use 0 (the default)."),
        ("--temperature", "nan", "generate: --temperature = nan: expected 0 or more. Use 0 (the default)."),
        ("--seed", "-1", "generate: --seed = -1: expected a number from 0 to 2^64 - 1. Use 0 (the default)."),
    ],
)
def test_generate_refuses_invalid_arguments(built: Path, option: str, value: str, said: str) -> None:
    arguments = {"--prompt": "note", option: value}
    call = [f"{name}={given}" for name, given in arguments.items()]
    result = mlxflow(built, "generate", "artifacts/train", *call)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"{said}\n")


def test_generate_without_a_tokenizer_is_one_line(job_copy: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (job_copy / "artifacts/train" / name).unlink()
    result = mlxflow(job_copy, "generate", "artifacts/train", "--prompt", "note")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("artifacts/train: its tokenizer cannot be opened (")


def test_generate_chat_refuses_a_model_without_a_template(built: Path) -> None:
    result = mlxflow(built, "generate", "artifacts/train", "--chat", "--prompt", "x")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == (
        "generate: --chat: artifacts/train has no chat template. Remove --chat to continue the text, or train it on "
        'conversations with pretokenize.chat_template = "chatml".\n'
    )
