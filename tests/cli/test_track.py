"""`mlxflow track`: stages that are built are reported, with the settings that they were built with."""

from pathlib import Path

import pytest

from mlxflow.cli import track
from mlxflow.workflow.loader import load_workflow
from tests.conftest import mlxflow, write_workflow

TEXT = """
[workflow]
name = "notes"
[pretokenize]
sources = ["notes"]
context_length = 16
tokenizer = { vocab_size = 300 }
"""

TRACKING = '[tracking]\nto = ["tensorboard"]\n'


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workflow with one stage, which is built."""
    folder = tmp_path_factory.mktemp("track") / "project"
    folder.mkdir()
    write_workflow(folder, TEXT)
    made = mlxflow(folder, "build", "pretokenize")
    assert made.returncode == 0, made.stderr
    return folder


def _track(folder: Path, *arguments: str, text: str = TEXT + TRACKING) -> tuple[int, list[str]]:
    (folder / "workflow.toml").write_text(text)
    ran = mlxflow(folder, "track", *arguments)
    assert ran.stdout == ""
    return ran.returncode, ran.stderr.splitlines()


@pytest.mark.matrix
def test_a_stage_is_reported_once_however_often_it_is_asked_for(built: Path) -> None:
    pytest.importorskip("tensorboardX")
    look = "Look: tensorboard --logdir artifacts/tracking/tensorboard"
    said = [f"tracking: tensorboard: pretokenize: 0 points sent. {look}"]
    assert _track(built) == (0, said)
    (run,) = (built / "artifacts/tracking/tensorboard").iterdir()
    files = list(run.iterdir())
    assert run.name.startswith("pretokenize-")
    assert len(files) == 1
    assert _track(built, "pretokenize") == (0, said)
    assert list(run.iterdir()) == files


@pytest.mark.matrix
def test_a_failing_tracker_is_one_line_and_exit_code_1(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (built / "tensorboardX.py").write_text("raise RuntimeError('out of order')")
    monkeypatch.setenv("PYTHONPATH", str(built))
    (built / "artifacts/logs").mkdir(exist_ok=True)
    code, said = _track(built, text=TEXT.replace('"notes"\n', '"other"\n', 1) + TRACKING + 'project = "other"\n')
    (built / "tensorboardX.py").unlink()
    assert code == 1
    assert said == ["tracking: pretokenize: tensorboard: out of order. Then: mlxflow track pretokenize"]


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("arguments", "text", "expected"),
    [
        (
            (),
            TEXT,
            'workflow.toml: tracking.to = []: expected trackers. Write [tracking] and to = ["tensorboard"] below it.',
        ),
        (
            ("train",),
            TEXT + TRACKING,
            "train: workflow.toml has no [train] table, and no stage reads from it. Add it: its keys have defaults.",
        ),
        (("train",), f"{TEXT}[train]\n{TRACKING}", "artifacts/train: missing. Run: mlxflow build train"),
    ],
)
def test_what_cannot_be_reported_is_one_line_and_exit_code_2(
    built: Path, arguments: tuple[str, ...], text: str, expected: str
) -> None:
    assert _track(built, *arguments, text=text) == (2, [expected])


@pytest.mark.matrix
def test_a_package_that_is_not_installed_is_known_by_check_and_before_a_stage_runs(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    write_workflow(project, TEXT + TRACKING)
    (project / "sitecustomize.py").write_text(
        "import mlxflow.tracking.table as table\ntable.PACKAGES['tensorboard'] = ('a_package_that_nobody_has',)\n"
    )
    expected = (
        'workflow.toml: tracking.to[0] = "tensorboard": needs a_package_that_nobody_has, which is not installed. '
        "Run: pip install 'mlxflow[tensorboard]'."
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(project))
        for command in (["check"], ["run", "pretokenize"], ["build", "pretokenize"], ["track"]):
            ran = mlxflow(project, *command)
            assert ran.returncode == 2, command
            assert expected in ran.stderr.splitlines()
    assert not (project / "artifacts" / "pretokenize").exists()


@pytest.mark.matrix
def test_settings_are_those_that_a_stage_was_built_with_from_the_lock_if_the_table_was_changed(built: Path) -> None:
    (built / "workflow.toml").write_text(TEXT.replace("16", "32") + TRACKING)
    workflow = load_workflow(built / "workflow.toml")
    settings = track._run_of(workflow, workflow.find("pretokenize")).settings
    assert settings["context_length"] == 16
    assert settings["tokenizer.vocab_size"] == 300
    assert settings["seed"] == "0"
