"""Runs in wandb's offline files, read back."""

import os
from pathlib import Path

import pytest

from mlxflow.tracking import request as requests
from tests.tracking.runs import SETTINGS, lines, losses, report, request_of, run_in

pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)  # no settings of a folder above


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("tracking/wandb/offline-run-*/run-train-0123456789ab.wandb"))


def test_a_run_that_is_reported_in_parts_has_each_point_once(tmp_path: Path) -> None:
    from mlxflow.tracking import wandb_files

    run = run_in(tmp_path, [10, 20])
    assert report(request_of(run, "wandb"), requests.INTERRUPTED)[1] == []
    (tmp_path / "metrics.jsonl").write_text(lines([10, 20, 30]))
    for _ in range(2):
        outcomes, said = report(request_of(run, "wandb"))
        assert said == []
    assert outcomes[0].points == 0
    files = _files(tmp_path)
    assert len(files) == 2  # the last report had nothing to add
    logged = wandb_files.read_run(files)
    assert [(row["_step"], row["train/loss"]) for row in logged.rows if "train/loss" in row] == losses([10, 20, 30])
    assert [row["_step"] for row in logged.rows if "validation/loss" in row] == [10, 20, 30]
    assert {name: logged.config[name] for name in SETTINGS} == SETTINGS
    assert logged.summary["final/last_validation_perplexity"] == 4.5
    assert logged.summary["final/run.device_name"] == "a processor"
    assert logged.summary["final/is_finished"] is True
    assert outcomes[0].where == "wandb sync tracking/wandb/offline-run-*"


def test_a_file_that_was_cut_off_has_what_is_whole_and_the_rest_is_reported(tmp_path: Path) -> None:
    from mlxflow.tracking import wandb_files

    run = run_in(tmp_path, [10, 20, 30])
    report(request_of(run, "wandb"))
    (path,) = _files(tmp_path)
    data = path.read_bytes()
    torn = next(size for size in range(len(data)) if wandb_files.records(data[:size]) and _steps(data[:size]) == [10])
    path.write_bytes(data[: torn + 5])
    report(request_of(run, "wandb"))
    logged = wandb_files.read_run(_files(tmp_path))
    assert [row["_step"] for row in logged.rows if "train/loss" in row] == [10, 20, 30]


def _steps(data: bytes) -> list[int]:
    """Return the steps of the rows in the content of a file."""
    from wandb.proto import wandb_internal_pb2

    from mlxflow.tracking import wandb_files

    found = [wandb_internal_pb2.Record.FromString(one) for one in wandb_files.records(data)]
    return [one.history.step.num for one in found if one.WhichOneof("record_type") == "history"]


def test_without_a_login_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    _, said = report(request_of(run_in(tmp_path, [10]), "wandb"))
    advice = "Run: wandb login, or set WANDB_MODE=offline. Then: mlxflow track train"
    assert said == [f"tracking: train: wandb: no login. {advice}"]


def test_wandb_that_is_switched_off_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    _, said = report(request_of(run_in(tmp_path, [10]), "wandb"))
    advice = "Remove it, or wandb from tracking.to. Then: mlxflow track train"
    assert said == [f"tracking: train: wandb: WANDB_MODE is disabled. {advice}"]
