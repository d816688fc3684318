"""The wheel: `mlxflow` is the only name it installs, and it works beside a project's own `tasks.py`."""

import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, write_workflow


def _copy_sources(folder: Path) -> Path:
    """Copy what a build reads, with `mlxflow/tasks` as a text file, as unpacking an archive can leave the link."""
    for name in ("mlxflow", "tasks"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / name, folder / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder)
    assert (folder / "mlxflow/tasks").is_symlink()
    (folder / "mlxflow/tasks").unlink()
    (folder / "mlxflow/tasks").write_text("../tasks")
    return folder


def _build(kind: str, sources: Path, output: Path) -> Path:
    """Build an sdist or a wheel with the tools of this environment."""
    output.mkdir(exist_ok=True)
    program = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    subprocess.run([sys.executable, "-c", program, str(output)], cwd=sources, check=True, capture_output=True)
    return next(output.iterdir())


def _modules() -> set[str]:
    """Return every source file of the repository under the name that it has in the wheel."""
    ours = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "mlxflow").rglob("*.py")}
    return ours | {f"mlxflow/tasks/{path.name}" for path in (REPOSITORY / "tasks").glob("*.py")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that was built from an sdist."""
    folder = tmp_path_factory.mktemp("build")
    sources = folder / "sources"
    sources.mkdir()
    sdist = _build("sdist", _copy_sources(sources), folder / "sdist")
    shutil.unpack_archive(sdist, folder / "unpacked", filter="data")
    return _build("wheel", next((folder / "unpacked").iterdir()), folder / "wheel")


def test_the_wheel_has_every_module_and_no_other_top_level_name(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name for name in names if name.endswith(".py")} == _modules()
    assert {name.split("/")[0] for name in names} == {"mlxflow"}
    assert "mlxflow/py.typed" in names
    assert "mlxflow/cli/templates/hello.toml" in names
    assert "mlxflow/cli/workflow.schema.json" in names


def test_an_installed_wheel_runs_a_workflow_beside_a_tasks_py_of_the_project(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    venv.create(environment)
    python = environment / "bin/python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-index", "--no-deps"]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # else pip finds a checkout
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True, env=clean)
    packages = next(environment.glob("lib/python*/site-packages"))
    others = [place for place in sys.path if "site-packages" in place] or site.getsitepackages()
    (packages / "others.pth").write_text("\n".join(others))  # the dependencies; this project itself comes first
    project = tmp_path / "project"
    project.mkdir()
    write_workflow(project)
    (project / "tasks.py").write_text("raise SystemExit('the tasks.py of the project was imported')")

    def run(*arguments: str) -> str:
        command = [str(python), "-P", "-m", *arguments]  # -P: as the scripts `doit` and `mlxflow` do
        done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False, env=clean)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("doit", "pretokenize")
    assert (project / "artifacts/pretokenize/report.toml").is_file()
    assert "U pretokenize" in run("doit", "list", "--status")
    run("mlxflow", "check")
    script = "import mlxflow.tasks.run; print(mlxflow.tasks.run.__file__)"
    shown = subprocess.run(
        [str(python), "-P", "-c", script], cwd=project, capture_output=True, text=True, check=True, env=clean
    )
    assert Path(shown.stdout.strip()) == packages / "mlxflow/tasks/run.py"
