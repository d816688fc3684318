"""Runs to report: a metrics file, a report, and the request for both."""

import json
from collections.abc import Iterable
from pathlib import Path

from mlxflow.tracking import request as requests
from mlxflow.tracking.reporting import report_run
from mlxflow.tracking.table import TrackerName
from mlxflow.tracking.tracked_run import Scalar, TrackedRun

SETTINGS: dict[str, Scalar] = {"learning_rate": 0.01, "model.hidden_size": 64, "sources": '["a|b"]', "fuse": True}

REPORT = """
warnings = ["a warning"]
last_validation_perplexity = 4.5
[stage]
seed = "0"
[settings]
batch_size = 4
[run]
seconds = 2.5
device_name = "a processor"
files = ["config.json"]
[[models]]
model = "quantize:q4"
perplexity = 5.5
"""


def lines(steps: Iterable[int]) -> str:
    """Return the lines of a metrics file for some steps; the loss is 10 - step / 10."""
    text = ""
    for step in steps:
        train = {"kind": "train", "step": step, "loss": 10 - step / 10, "gradient_norm": None, "seconds": step * 0.5}
        validation = {"kind": "validation", "step": step, "loss": 9 - step / 10, "perplexity": 2.0}
        text += f"{json.dumps(train)}\n{json.dumps(validation)}\n"
    return text


def losses(steps: Iterable[int]) -> list[tuple[int, float]]:
    """Return steps with the losses that `lines` writes."""
    return [(step, 10 - step / 10) for step in steps]


def run_in(folder: Path, steps: Iterable[int], task: str = "train", **changed: str) -> TrackedRun:
    """Write the files of a run and return it."""
    (folder / "metrics.jsonl").write_text(lines(steps))
    (folder / "report.toml").write_text(REPORT)
    facts = {"key": "0123456789ab", "project": "a project", "workflow": "notes"} | changed
    return TrackedRun(
        task=task,
        folder=str(folder / "tracking"),
        started=1_700_000_000.0,
        settings=SETTINGS,
        metrics=(str(folder / "metrics.jsonl"),),
        report=str(folder / "report.toml"),
        **facts,
    )


def request_of(run: TrackedRun, *to: TrackerName, timeout_seconds: float = 120.0) -> requests.TrackingRequest:
    """Return the request to report a run."""
    return requests.TrackingRequest(
        run=run,
        to=to,
        timeout_seconds=timeout_seconds,
        logs=str(Path(run.folder).parent / "logs"),
        advice=f"mlxflow track {run.task}",
        ends_soon=True,
    )


def report(
    request: requests.TrackingRequest, ending: bytes = requests.FINISHED
) -> tuple[list[requests.TrackerOutcome], list[str]]:
    """Report a run, and return the outcomes and the lines that were said."""
    said: list[str] = []
    path = request.write(Path(request.run.folder).parent / "state")
    outcomes = report_run(path, request, ending, said.append)
    return outcomes, said
