"""Building with `mlxflow build`, in a folder that has a workflow.toml and no dodo.py."""

from pathlib import Path

import pytest

from tests.conftest import doit, mlxflow, write_workflow

WORKFLOW = """
[pretokenize]
sources = ["notes"]
tokenizer = { vocab_size = 300 }
workers = 1
[train]
num_steps = 1
batch_size = 2
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project without dodo.py whose texts were pretokenized."""
    folder = tmp_path_factory.mktemp("build") / "project"
    folder.mkdir()
    write_workflow(folder, WORKFLOW)
    (folder / "dodo.py").rename(folder / "another.py")
    done = mlxflow(folder, "build", "pretokenize")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == ".  pretokenize: never built"
    return folder


def test_a_stage_that_was_built_is_fresh_to_doit(project: Path) -> None:
    for done in (mlxflow(project, "build", "pretokenize"), doit(project, "-f", "another.py", "pretokenize")):
        assert (done.returncode, done.stdout + done.stderr) == (0, "-- pretokenize\n")
    assert "pretokenize" in (project / "mlxflow.lock").read_text()


def test_the_plan_matches_doit(project: Path) -> None:
    ours, theirs = mlxflow(project, "build", "--plan", "train"), doit(project, "plan", "-f", "another.py", "train")
    assert ours.returncode == 0
    assert "train: never built" in ours.stdout
    assert (ours.stdout, ours.stderr) == (theirs.stdout, theirs.stderr)


def test_another_workflow_is_built_beside_it(project: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    path = write_workflow(folder, WORKFLOW)
    done = mlxflow(project, "build", "pretokenize", "--workflow", str(path))
    assert done.returncode == 0, done.stderr
    assert (folder / "artifacts/pretokenize/report.toml").is_file()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trian"], "trian: no such stage. Did you mean train?"),
        (["-n", "-3"], "-n -3: expected a number of processes. Use one such as 2."),
        (["--workflow", "no.toml"], "no.toml: missing. Write one (an empty file works), or name another."),
    ],
)
def test_an_invalid_command_line_is_one_error_line(project: Path, arguments: list[str], line: str) -> None:
    done = mlxflow(project, "build", *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{line}\n")
