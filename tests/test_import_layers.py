import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


def _lint(folder: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("lint-imports")
    command = [str(program), "--no-cache"]
    environment = {"PYTHONPATH": str(folder), "PATH": ""}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    shutil.copytree(REPOSITORY / "mlxflow", tmp_path / "mlxflow", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    return tmp_path


def test_modules_import_only_from_lower_floors(copied: Path) -> None:
    result = _lint(copied)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("mlxflow/storage/tensor_writing.py", "import mlxflow.workflow.loader"),
        ("mlxflow/data/loader.py", "import mlxflow.training.trainer"),
        ("mlxflow/messages/errors.py", "import mlxflow.storage.toml_tables"),
        ("mlxflow/tasks/creator.py", "import numpy"),
    ],
)
def test_an_import_from_above_is_found(copied: Path, module: str, line: str) -> None:
    with (copied / module).open("a") as file:
        file.write(f"\n{line}\n")
    result = _lint(copied)
    assert result.returncode == 1
    assert line.split()[1] in result.stdout
