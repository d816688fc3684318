import argparse
from pathlib import Path

import pytest

from mlxflow.cli.arguments import add_workflow, read_stage
from mlxflow.cli.command import main
from mlxflow.messages.errors import CallError


def _parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("stage")
    add_workflow(parser)
    return parser.parse_args(arguments)


def test_the_workflow_is_workflow_toml_unless_it_is_named() -> None:
    assert _parse("train").workflow == Path("workflow.toml")
    assert _parse("train", "--workflow", "a/b.toml").workflow == Path("a/b.toml")


def test_read_stage_returns_the_named_stage_of_the_named_workflow(tmp_path: Path) -> None:
    (tmp_path / "b.toml").write_text('[[quantize]]\nname = "q4"\n')
    workflow, stage = read_stage(_parse("quantize:q4", "--workflow", str(tmp_path / "b.toml")))
    assert workflow.path == tmp_path / "b.toml"
    assert stage.task == "quantize:q4"
    with pytest.raises(CallError, match="quantize:q8: no such stage"):
        read_stage(_parse("quantize:q8", "--workflow", str(tmp_path / "b.toml")))


def test_a_tilde_in_a_path_of_the_command_line_is_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "project").mkdir()
    (tmp_path / "project/workflow.toml").write_text('[workflow]\nname = "at home"\n')
    assert main(["check", "--workflow=~/project/workflow.toml"]) == 0
    assert 'name = "at home"' in capsys.readouterr().out
    assert main(["generate", "~/none", "--prompt", "a"]) == 2
    assert capsys.readouterr().err.startswith(f"{tmp_path / 'none'}: missing.")
    assert main(["compare", "~/project", "~/project"]) == 2
    assert "~/project: no benchmark's report in it" in capsys.readouterr().err
    assert main(["init", "~/another"]) == 0
    assert (tmp_path / "another/workflow.toml").is_file()
