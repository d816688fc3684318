"""Runs in MLflow: a folder, a database, a server on this machine."""

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlxflow.tracking import request as requests
from tests.tracking.runs import SETTINGS, lines, losses, report, request_of, run_in

pytest.importorskip("mlflow")
pytestmark = pytest.mark.filterwarnings("ignore")  # mlflow's own, of its packages and its store of files


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


@contextmanager
def _server(folder: Path) -> Iterator[str]:
    """Start `mlflow server` on 127.0.0.1 and yield its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/server.db",
        "--artifacts-destination",
        str(folder / "files"),
    ]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            assert server.poll() is None, (folder / "server.log").read_text()
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5):  # noqa: S310
                    break
            except OSError:
                time.sleep(0.2)
        yield address
    finally:
        import os
        import signal

        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _runs(uri: str) -> list[Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("a project")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def _history(uri: str, run: Any, name: str) -> list[tuple[int, float]]:
    from mlflow.tracking import MlflowClient

    history = MlflowClient(uri).get_metric_history(run.info.run_id, name)
    return sorted((one.step, one.value) for one in history)


def _report_in_three_parts(folder: Path) -> None:
    """Report a run that is cut off, goes on, and is reported once more."""
    run = run_in(folder, [10, 20])
    assert report(request_of(run, "mlflow"), requests.INTERRUPTED)[1] == []
    (folder / "metrics.jsonl").write_text(lines([10, 20, 30]))
    for _ in range(2):
        assert report(request_of(run, "mlflow"))[1] == []


def _check(uri: str) -> None:
    (run,) = _runs(uri)
    assert (run.info.run_name, run.info.status) == ("train", "FINISHED")
    assert run.data.params == {name: str(value) for name, value in SETTINGS.items()}
    assert (run.data.tags["mlxflow.run"], run.data.tags["warnings.0"]) == ("train-0123456789ab", "a warning")
    assert _history(uri, run, "train/loss") == losses([10, 20, 30])
    assert _history(uri, run, "validation/perplexity") == [(10, 2.0), (20, 2.0), (30, 2.0)]
    assert _history(uri, run, "final/models.quantize_q4.perplexity") == [(30, 5.5)]


def test_a_folder_has_each_point_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = (tmp_path / "mlruns").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    _report_in_three_parts(tmp_path)
    _check(uri)
    assert not (tmp_path / "tracking" / "mlflow" / "mlflow.db").exists()


@pytest.mark.matrix
def test_without_an_address_a_database_beside_the_artifacts_has_each_point_once(tmp_path: Path) -> None:
    _report_in_three_parts(tmp_path)
    _check(f"sqlite:///{tmp_path}/tracking/mlflow/mlflow.db")


@pytest.mark.matrix
def test_a_server_has_each_point_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _server(tmp_path) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        _report_in_three_parts(tmp_path)
        _check(address)


def test_a_run_that_was_cut_off_says_so(tmp_path: Path) -> None:
    report(request_of(run_in(tmp_path, [10]), "mlflow"), requests.INTERRUPTED)
    (run,) = _runs(f"sqlite:///{tmp_path}/tracking/mlflow/mlflow.db")
    assert run.info.status == "KILLED"


def test_a_server_that_is_not_there_is_one_line_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    outcomes, said = report(request_of(run_in(tmp_path, [10]), "mlflow"))
    assert len(said) == 1
    assert said[0].startswith("tracking: train: mlflow: ")
    assert said[0].endswith(". Then: mlxflow track train")
    assert "secret" not in said[0]
    assert outcomes[0].problem


def test_a_server_that_never_answers_is_cut_off_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        request = request_of(run_in(tmp_path, [10]), "mlflow", timeout_seconds=1)
        _, said = report(request)
    assert said == ["tracking: train: mlflow: no answer for 1 s: ended. Later: mlxflow track train"]
