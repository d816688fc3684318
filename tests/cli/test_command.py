import argparse
import importlib
import inspect
from pathlib import Path

import pytest

from mlxflow.__main__ import main
from mlxflow.cli.command import VERBS
from mlxflow.messages import terminal


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_a_module_that_adds_arguments_and_runs(verb: str) -> None:
    module = importlib.import_module(f"mlxflow.cli.{verb}")
    module.add_arguments(argparse.ArgumentParser())
    assert list(inspect.signature(module.run).parameters) == ["parsed"]


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"{verb} {line}" in text for verb, line in VERBS.items())


def test_help_of_a_verb_names_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["show", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: mlxflow show [-h] [--row ROW] [--workflow WORKFLOW] stage\n")


def test_an_unknown_verb_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["brew"])
    assert ended.value.code == 2
    assert "mlxflow: error: argument COMMAND: invalid choice: 'brew'" in capsys.readouterr().err


def test_advice_names_the_workflow_file_of_the_command_line(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(job)
    (job / "workflow.toml").rename(job / "other.toml")
    said: list[str] = []
    monkeypatch.setattr(terminal, "say_error", lambda error: said.append(str(error)))
    assert main(["show", "pretokenize", "--workflow", "other.toml"]) == 2
    missing = "artifacts/pretokenize/train.safetensors: missing. Run: mlxflow build pretokenize --workflow other.toml"
    assert said == [missing]
    (job / "other.toml").rename(job / "workflow.toml")
    assert main(["show", "pretokenize"]) == 2
    assert said[1] == "artifacts/pretokenize/train.safetensors: missing. Run: mlxflow build pretokenize"
