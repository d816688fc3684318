"""The table [tracking]: bad values, packages that are not installed."""

from pathlib import Path

import pytest

from mlxflow.messages.errors import WorkflowError
from mlxflow.tracking import table
from mlxflow.workflow import stage_tracking
from mlxflow.workflow.loader import load_workflow


def _mistakes(folder: Path, text: str) -> tuple[str, ...]:
    path = folder / "workflow.toml"
    path.write_text(text)
    with pytest.raises(WorkflowError) as caught:
        stage_tracking.require_trackers(load_workflow(path))
    return tuple(line.replace(str(path), "workflow.toml") for line in caught.value.problems)


def test_an_unknown_tracker_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    assert _mistakes(tmp_path, '[tracking]\nto = ["tensorbord"]\n') == (
        'workflow.toml: tracking.to[0] = "tensorbord": expected one of "tensorboard", "wandb", "mlflow", "trackio". '
        'Did you mean "tensorboard"?',
    )


def test_a_name_that_is_near_to_none_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    assert _mistakes(tmp_path, '[tracking]\nto = ["tensorboard", "zzz"]\n') == (
        'workflow.toml: tracking.to[1] = "zzz": expected one of "tensorboard", "wandb", "mlflow", "trackio". '
        "Use one of them, or remove it.",
    )


def test_a_tracker_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    assert _mistakes(tmp_path, '[tracking]\nto = ["wandb", "wandb"]\n') == (
        'workflow.toml: tracking.to[1] = "wandb": named twice. Remove one.',
    )


def test_a_misspelled_table_is_refused_with_its_name(tmp_path: Path) -> None:
    assert _mistakes(tmp_path, "[traking]\n") == ("workflow.toml: traking: unknown key. Did you mean tracking?",)


def test_a_package_that_is_not_installed_is_refused_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(table.PACKAGES, "wandb", ("a_package_that_nobody_has",))
    assert _mistakes(tmp_path, '[tracking]\nto = ["wandb"]\n') == (
        'workflow.toml: tracking.to[0] = "wandb": needs a_package_that_nobody_has, which is not installed. '
        "Run: pip install 'mlxflow[wandb]'.",
    )


def test_a_folder_with_the_name_of_a_package_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_folder_of_runs").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not table.is_installed("a_folder_of_runs")
    assert table.is_installed("msgspec")
