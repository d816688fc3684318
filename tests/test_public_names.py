"""The public names of the package: which there are, and what they are."""

import ast
import importlib
import inspect
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mlxflow
from tests.conftest import REPOSITORY

NAMES = [
    "CheckpointStore",
    "Loader",
    "MemoryProfiler",
    "MlxflowError",
    "Session",
    "Subject",
    "TokenFile",
    "Trainer",
    "TrainingData",
    "TrainingSettings",
    "__version__",
    "apply_plan",
    "load_workflow",
    "make_data",
    "perplexity",
    "prepare_model",
    "profile_memory",
    "quantize_model_for_inference",
    "ready_step",
    "ready_trainer",
    "run_stage",
]


def test_all_lists_the_exported_names() -> None:
    assert mlxflow.__all__ == NAMES
    assert set(NAMES) <= set(dir(mlxflow))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "__version__"])
def test_public_names_match_what_type_checkers_see_and_have_docstrings(name: str) -> None:
    """Type checkers read the imports under TYPE_CHECKING; at run time the table of homes is used."""
    seen = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in ast.walk(ast.parse((REPOSITORY / "mlxflow/__init__.py").read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlxflow.")
        for alias in node.names
    }
    assert seen[name] == mlxflow._HOMES[name]
    assert inspect.getdoc(getattr(mlxflow, name))


def test_the_version_is_that_of_the_project() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert mlxflow.__version__ == project["version"]


def test_run_stage_takes_the_locks_of_doit(job_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlxflow.workflow import execution

    monkeypatch.chdir(job_copy)
    held: list[bool] = []
    monkeypatch.setattr(execution, "execute_stage", lambda workflow, one, into: held.append(_is_held(job_copy)))
    workflow = mlxflow.load_workflow(Path("workflow.toml"))
    mlxflow.run_stage(workflow, workflow.find("train"))
    assert held == [True]
    assert not _is_held(job_copy)


def _is_held(folder: Path) -> bool:
    program = (
        "import sys; from pathlib import Path; from mlxflow.storage.locks import LockedError, hold\n"
        "try:\n    hold(Path(sys.argv[1]), '', wait=False).__enter__()\n"
        "except LockedError:\n    sys.exit(7)"
    )
    lock = folder / "artifacts/.mlxflow/lock"
    return subprocess.run([sys.executable, "-c", program, str(lock)], check=False).returncode == 7


def test_the_example_trains_in_under_25_lines(built: Path, tmp_path: Path) -> None:
    example = REPOSITORY / "examples/train.py"
    assert len(example.read_text().splitlines()) < 25
    shutil.copytree(built / "artifacts/pretokenize", tmp_path / "artifacts/pretokenize")
    done = subprocess.run([sys.executable, str(example)], cwd=tmp_path, capture_output=True, text=True, check=True)
    *records, last = done.stdout.splitlines()
    losses = [ast.literal_eval(line)["loss"] for line in records if "'validation'" in line]
    assert len(losses) == 3
    assert losses[-1] < losses[0] / 2
    assert last.startswith(f"Perplexity(loss={losses[-1]}, ")


def _entry_points() -> list[str]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    groups = [project["scripts"], *project["entry-points"].values()]
    return sorted(place for group in groups for place in group.values())


@pytest.mark.parametrize("place", _entry_points())
def test_every_entry_point_can_be_imported(place: str) -> None:
    module, _, name = place.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
