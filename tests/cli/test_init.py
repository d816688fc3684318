"""New projects: every template is a workflow that is valid as written, and no file is overwritten."""

import json
import tomllib
from pathlib import Path

import pytest

from mlxflow.cli.command import main
from mlxflow.cli.init import TEMPLATES
from mlxflow.workflow.loader import load_workflow
from tests.conftest import REPOSITORY, mlxflow


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_is_valid_once_the_files_that_it_names_are_there(
    template: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", "--template", template]) == 0
    assert capsys.readouterr().err == ""
    for name in ("notes", "corpus"):
        (project / name).mkdir()
        (project / name / "a.txt").write_text("a text\n")
    (project / "chats.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "?"}]}) + "\n")
    (project / "model").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (project / "model" / name).write_text("{}")
    workflow = load_workflow(Path("workflow.toml"))
    assert {one.name for one in workflow.stages} >= {"quantize"}
    assert "mlxflow.tasks.dodo" in (project / "dodo.py").read_text()


def test_the_files_are_named_with_the_next_commands(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "my notes", "--template", "notes"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "wrote my notes/workflow.toml, my notes/dodo.py, my notes/.gitignore, my notes/.workflow.schema.json",
        "Put your texts into the folder notes, or name another in my notes/workflow.toml: pretokenize.sources",
        "Next:",
        "    cd 'my notes'",
        "    mlxflow build --plan",
        "    mlxflow build",
        "    mlxflow report --open",
    ]


def test_nothing_is_overwritten_and_nothing_written_beside_it(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "dodo.py").write_text("mine")
    (project / "notes.txt").write_text("mine")
    assert main(["init"]) == 2
    expected = "mlxflow init: dodo.py: exists already, and nothing was written. Name another folder.\n"
    assert capsys.readouterr().err == expected
    assert sorted(path.name for path in project.iterdir()) == ["dodo.py", "notes.txt"]
    assert (project / "dodo.py").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--template", "notse"],
            "mlxflow init: --template notse: expected one of hello, notes, chat, quantize, pretrain, ci. "
            "Use one of them.",
        ),
        (["a.txt"], "mlxflow init: a.txt: is no folder. Name another one."),
    ],
)
def test_an_invalid_command_line_is_one_error_line(
    arguments: list[str], line: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "a.txt").touch()
    assert main(["init", *arguments]) == 2
    assert capsys.readouterr().err == f"{line}\n"
    assert [path.name for path in project.iterdir()] == ["a.txt"]


def test_the_ci_template_uses_the_actions_of_this_repository(project: Path) -> None:
    main(["init", "--template", "ci"])
    ours = (REPOSITORY / ".github/workflows/ci.yml").read_text()
    used = [
        line.split("uses: ")[1]
        for line in (project / ".github/workflows/mlxflow.yml").read_text().splitlines()
        if "uses:" in line
    ]
    assert len(used) == 4
    assert not [action for action in used if action not in ours]


def test_the_version_is_that_of_the_project() -> None:
    done = mlxflow(REPOSITORY, "--version")
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    assert (done.returncode, done.stdout) == (0, f"mlxflow {version}\n")
