"""The completion scripts, run by the shells that are installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlxflow.cli.command import VERBS, main
from mlxflow.cli.completion import SHELLS, script
from tests.conftest import REPOSITORY

STAGES = ["pretokenize", "train", "quantize", "quantize:q4", "quantize:q8"]

# Calls the completion function as readline does, and prints what it found
BASH = """
words=({words} "{last}"); COMP_WORDS=("${{words[@]}}"); COMP_CWORD=$(( ${{#words[@]}} - 1 ))
COMP_LINE="${{words[*]}}"; COMP_POINT=${{#COMP_LINE}}
_shtab_mlxflow mlxflow "{last}" "${{words[COMP_CWORD-1]}}"; printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a workflow of two quantized variants, and a command `mlxflow` on its search path."""
    (tmp_path / "workflow.toml").write_text('[[quantize]]\nname = "q4"\n[[quantize]]\nname = "q8"\nbits = 8\n')
    commands = tmp_path / "bin"
    commands.mkdir()
    command = commands / "mlxflow"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m mlxflow "$@"\n')
    command.chmod(0o755)
    return tmp_path


def _complete(shell: str, project: Path, words: str, last: str) -> list[str]:
    """Return what a shell completes the last word of a command line with."""
    file = project / f"completion.{shell}"
    file.write_text(script(shell))
    calls = {
        "bash": ["bash", "--norc", "-c", f"source {file}{BASH.format(words=words, last=last)}"],
        "fish": ["fish", "--no-config", "-c", f"source {file}; complete -C '{words} {last}'"],
    }
    path = f"{project / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(REPOSITORY), "HOME": str(project)}
    done = subprocess.run(calls[shell], cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return sorted(line.partition("\t")[0] for line in done.stdout.splitlines() if line)


def _needs(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_a_shell_completes_commands_options_stages_and_files(shell: str, project: Path) -> None:
    _needs(shell)
    assert _complete(shell, project, "mlxflow", "co") == ["compare", "completion"]
    assert _complete(shell, project, "mlxflow build", "quantize:") == ["quantize:q4", "quantize:q8"]
    assert _complete(shell, project, "mlxflow build", "--pl") == ["--plan"]
    assert _complete(shell, project, "mlxflow check --workflow", "work") == ["workflow.toml"]


def test_zsh_accepts_the_script(project: Path) -> None:
    _needs("zsh")
    call = ["zsh", "-f", "-c", 'autoload -U compinit; compinit -u; eval "$1"; whence -w _mlxflow_stages', "zsh"]
    environment = os.environ | {"HOME": str(project)}
    done = subprocess.run([*call, script("zsh")], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "_mlxflow_stages: function\n", "")


def test_stages_are_listed_when_the_key_is_pressed(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    assert main(["completion", "--stages"]) == 0
    assert capsys.readouterr().out.splitlines() == STAGES
    (project / "workflow.toml").write_text("[trian]\n")
    assert main(["completion", "--stages"]) == 0
    assert tuple(capsys.readouterr()) == ("", "")
    for shell in SHELLS:
        assert "mlxflow completion --stages" in script(shell)
        assert "quantize:q8" not in script(shell)
        assert [verb for verb in VERBS if verb not in script(shell)] == []


@pytest.mark.parametrize(("arguments", "shown"), [([], ""), (["csh"], "csh: ")])
def test_another_shell_is_one_error_line(arguments: list[str], shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", *arguments]) == 2
    expected = f"mlxflow completion: {shown}expected one of bash, zsh, fish. Name your shell.\n"
    assert tuple(capsys.readouterr()) == ("", expected)
