"""A file of a project that is named like one of Python's own modules is not imported in its place."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlxflow.kernels import early_start
from mlxflow.tasks.search_path import search_project_last

NAMES = ("tokenize", "random", "queue", "tempfile", "selectors", "secrets", "copy", "heapq", "argparse", "xxhash")

COMMANDS = {
    "doit": ["-P", "-m", "doit", "pretokenize"],  # as the script `doit` does
    "mlxflow": ["-m", "mlxflow", "run", "pretokenize"],
    "check": ["-m", "mlxflow", "check"],
    "the process that verifies kernels": list(early_start.COMMAND[1:]),
}


@pytest.fixture
def project(job: Path) -> Path:
    for name in NAMES:
        (job / f"{name}.py").write_text(
            f"from pathlib import Path\nPath('imported').touch()\nraise SystemExit({name!r})"
        )
    return job


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_project_file_does_not_shadow_a_python_module(project: Path, command: list[str]) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(project / "cache")}
    result = subprocess.run(
        [sys.executable, *command], cwd=project, capture_output=True, text=True, env=environment, check=False, input=""
    )
    assert result.returncode == 0, result.stderr
    assert not (project / "imported").exists()


def test_project_modules_come_last_on_the_search_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), "/usr/lib/python", "", "/packages"])
    search_project_last()
    assert sys.path == ["/usr/lib/python", "/packages", str(tmp_path)]
    search_project_last()
    assert sys.path == ["/usr/lib/python", "/packages", str(tmp_path)]
