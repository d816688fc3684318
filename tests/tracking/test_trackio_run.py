"""Runs in trackio's database, read back by trackio."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlxflow.tracking import request as requests
from tests.tracking.runs import SETTINGS, lines, losses, report, request_of, run_in

pytest.importorskip("trackio")

_READ = """
import json, sys
from trackio.sqlite_storage import SQLiteStorage
project, run = sys.argv[1:]
config = SQLiteStorage.get_run_config(project, run)
print(json.dumps([SQLiteStorage.get_runs(project), SQLiteStorage.get_logs(project, run), config]))
"""


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRACKIO_DIR", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)


def _read(folder: Path) -> Any:
    """Return the runs of a project, and rows and settings of one, in a process with the folder as trackio's own."""
    command = [sys.executable, "-c", _READ, "a-project", "train-0123456789ab"]
    environment = {"TRACKIO_DIR": str(folder), "HOME": str(folder)}
    return json.loads(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)


def test_a_run_that_is_reported_in_parts_has_each_point_once(tmp_path: Path) -> None:
    run = run_in(tmp_path, [10, 20])
    assert report(request_of(run, "trackio"), requests.INTERRUPTED)[1] == []
    (tmp_path / "metrics.jsonl").write_text(lines([10, 20, 30]))
    for _ in range(2):
        outcomes, said = report(request_of(run, "trackio"))
        assert said == []
    runs, rows, config = _read(tmp_path / "tracking" / "trackio")
    assert len(runs) == 1
    assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == losses([10, 20, 30])
    assert [(row["step"], row["final/run.seconds"]) for row in rows if "final/run.seconds" in row] == [(30, 2.5)]
    assert {name: config[name] for name in SETTINGS} == SETTINGS
    assert outcomes[0].where.endswith("trackio show --project a-project")


def test_a_folder_of_its_own_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "own"))
    report(request_of(run_in(tmp_path, [10]), "trackio"))
    assert len(_read(tmp_path / "own")[1]) >= 1
    assert not (tmp_path / "tracking" / "trackio").exists()
