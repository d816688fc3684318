"""A run in MLflow: a server, a database or a folder, as MLFLOW_TRACKING_URI says; else a database beside the artifacts.

The run is found again by a tag, and the steps that it has are read from it, so that nothing is logged twice.
"""

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from mlxflow.storage import paths
from mlxflow.storage.locks import hold
from mlxflow.tracking.tracked_run import FINAL, CurvePoint, Scalar, TrackedRun, numbers_of

_RUN_TAG = "mlxflow.run"

# Limits of one request, and of the length of a parameter's and a tag's value
_MAX_METRICS, _MAX_PARAMS, _MAX_TAGS, _MAX_LENGTH = 500, 100, 100, 500

T = TypeVar("T")


class MlflowRun:
    """The open run of an experiment; see `mlxflow.tracking.trackers.OpenRun`."""

    known_of_all = -1

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # whoever names a folder wants one
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        from mlflow import entities
        from mlflow.tracking import MlflowClient

        self._entities: Any = entities
        self._run = run
        named = os.environ.get("MLFLOW_TRACKING_URI")
        folder = None if named else run.folder_of("mlflow")
        self._uri = named or f"sqlite:///{folder}/mlflow.db"
        self._shown = named or f"sqlite:///{paths.shown(folder)}/mlflow.db" if folder else self._uri
        with hold(run.folder_of("mlflow") / "open.lock", "", wait=True):  # two processes would make the tables twice
            self._client: Any = MlflowClient(self._uri)
            self._id, self._metrics = self._open(folder.as_uri() if folder else None)
        self.known = {
            name: max(one.step for one in self._client.get_metric_history(self._id, name))
            for name in self._metrics
            if not name.startswith(FINAL)
        }
        self._last_step = max(self.known.values(), default=0)

    def _open(self, artifacts: str | None) -> tuple[str, dict[str, float]]:
        """Return the id of the run, made if there is none, and the latest value of each of its metrics."""
        client, run = self._client, self._run
        experiment = client.get_experiment_by_name(run.project)
        number = (
            experiment.experiment_id
            if experiment
            else client.create_experiment(run.project, artifact_location=artifacts)
        )
        tags = {_RUN_TAG: run.run_id, "mlxflow.workflow": run.workflow, "mlxflow.stage": run.task}
        found = client.search_runs([number], filter_string=f"tags.`{_RUN_TAG}` = '{run.run_id}'", max_results=1)
        made = (
            found[0]
            if found
            else client.create_run(number, start_time=int(run.started * 1000), tags=tags, run_name=run.task)
        )
        if found and made.info.status != "RUNNING":
            client.update_run(made.info.run_id, status="RUNNING")
        settings = [
            self._entities.Param(_name(name), str(value)[:_MAX_LENGTH])
            for name, value in run.settings.items()
            if _name(name) not in made.data.params
        ]
        for params in _chunks(settings, _MAX_PARAMS):
            client.log_batch(made.info.run_id, params=params)
        return str(made.info.run_id), dict(made.data.metrics)

    def log(self, points: Sequence[CurvePoint]) -> None:
        """Log points in requests of bounded size."""
        now = time.time()
        metrics = [
            self._entities.Metric(
                _name(point.name),
                point.value,
                int(1000 * (now if point.seconds is None else self._run.started + point.seconds)),
                point.step,
            )
            for point in points
        ]
        self._last_step = max([self._last_step, *(point.step for point in points)])
        for chunk in _chunks(metrics, _MAX_METRICS):
            self._client.log_batch(self._id, metrics=chunk)

    def finish(self, figures: Mapping[str, Scalar] | None) -> str:
        """Log final figures, texts among them as tags, and end the run."""
        now = int(time.time() * 1000)
        numbers = {_name(f"{FINAL}{name}"): value for name, value in numbers_of(figures or {}).items()}
        metrics = [
            self._entities.Metric(name, value, now, self._last_step)
            for name, value in numbers.items()
            if self._metrics.get(name) != value
        ]
        for chunk in _chunks(metrics, _MAX_METRICS):
            self._client.log_batch(self._id, metrics=chunk)
        texts = {name: value for name, value in (figures or {}).items() if isinstance(value, str)}
        tags = [self._entities.RunTag(_name(name), value[:_MAX_LENGTH]) for name, value in texts.items()]
        for chunk in _chunks(tags, _MAX_TAGS):
            self._client.log_batch(self._id, tags=chunk)
        self._client.set_terminated(self._id, "KILLED" if figures is None else "FINISHED")
        return self._shown if "://" in self._uri and not self._uri.startswith("sqlite") else _shown_command(self._shown)


def _shown_command(uri: str) -> str:
    return f"mlflow ui --backend-store-uri {uri}"


def _name(text: str) -> str:
    """Return a name with the characters replaced that MLflow refuses."""
    return re.sub(r"[^\w./ -]", "_", text)[:250]


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]
