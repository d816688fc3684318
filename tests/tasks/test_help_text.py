"""The overview of `doit help` and `doit -h` where the graph is of stages."""

import subprocess
import sys
from pathlib import Path

import pytest
from doit.doit_cmd import DoitMain

from mlxflow.tasks.help_text import usage
from tests.chain import Chain


def test_the_overview_lists_our_commands_and_the_workflow_argument() -> None:
    commands = DoitMain().get_cmds().to_dict()
    text = "\n".join(usage(commands))
    assert "workflow=FILE" in text
    listed = {line.split()[1] for line in text.partition("Commands")[2].splitlines() if line.startswith("  doit ")}
    assert listed == {*commands, "help"} - {"reset-dep", "strace", "dumpdb"}
    assert "automation tool" not in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("call", ["help", "-h", "--help"])
def test_doit_prints_the_overview(call: str, tmp_path: Path) -> None:
    code, out, err = Chain(tmp_path).doit(call)
    assert (code, err) == (0, "")
    assert out.startswith("Build the stages of a workflow.toml")
    assert "doit plan " in out


def test_a_command_prints_its_options(tmp_path: Path) -> None:
    code, out, err = Chain(tmp_path).doit("list", "-h")
    assert (code, err) == (0, "")
    assert out.startswith("PURPOSE\n    list stages")
    assert "--status" in out


def test_doits_own_overview_is_printed_for_another_graph(tmp_path: Path) -> None:
    (tmp_path / "dodo.py").write_text("def task_hello():\n    return {'actions': ['true']}\n")
    command = [sys.executable, "-m", "doit", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("doit -- automation tool")
