"""`mlxflow schema`, and the schema as the TOML language server taplo reads it in a new project."""

import shutil
import subprocess
from pathlib import Path

import pytest

from mlxflow.cli.command import main
from mlxflow.cli.init import SCHEMA_FILE, TEMPLATES
from tests.conftest import REPOSITORY

TAPLO = shutil.which("taplo")
needs_taplo = pytest.mark.skipif(TAPLO is None, reason="taplo is not installed")


def lint(*paths: Path) -> str:
    """Return what taplo says about files; each names its schema in its first line."""
    command = [str(TAPLO), "lint", "--no-auto-config", *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"RUST_LOG": "warn"})
    assert bool(done.returncode) == bool(done.stderr)
    return done.stderr


def test_the_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert capsys.readouterr().out == (REPOSITORY / "mlxflow/cli/workflow.schema.json").read_text()


@needs_taplo
def test_taplo_finds_every_template_and_example_valid_with_the_schema_that_it_names(tmp_path: Path) -> None:
    for template in TEMPLATES:
        assert main(["init", str(tmp_path / template), "--template", template]) == 0
    ours = [REPOSITORY / "workflow.toml", *(tmp_path / template / "workflow.toml" for template in TEMPLATES)]
    assert [path for path in ours if not path.read_text().startswith("#:schema ./")] == []
    assert lint(*ours) == ""
    shipped = REPOSITORY / "mlxflow/cli/workflow.schema.json"
    for number, example in enumerate(sorted((REPOSITORY / "examples").rglob("workflow.toml"))):
        copy = tmp_path / f"{number}.toml"
        copy.write_text(f"#:schema {shipped.as_uri()}\n{example.read_text()}")
        assert lint(copy) == ""


@needs_taplo
def test_taplo_marks_a_mistake_and_accepts_infinity(tmp_path: Path) -> None:
    shutil.copy(REPOSITORY / "mlxflow/cli/workflow.schema.json", tmp_path / SCHEMA_FILE)
    workflow = tmp_path / "workflow.toml"
    start = f"#:schema ./{SCHEMA_FILE}\n[quantize]\nmax_kl = inf\n"
    workflow.write_text(start)
    assert lint(workflow) == ""
    workflow.write_text(start + 'batch_size = "a"\n')
    assert '"a" is not of type "integer"' in lint(workflow)
