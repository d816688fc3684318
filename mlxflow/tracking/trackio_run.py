"""A run in trackio's own database: beside the artifacts, or where TRACKIO_DIR, TRACKIO_SERVER_URL and such say."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlxflow.storage import paths
from mlxflow.tracking.tracked_run import FINAL, CurvePoint, Scalar, TrackedRun, numbers_of

_REMOTE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


class TrackioRun:
    """The run of a project; see `mlxflow.tracking.trackers.OpenRun`.

    A local run's database says which steps it has. Of a run on a server or a Space that is a file beside the
    artifacts, so that a process that is killed may log its last second again.
    """

    known_of_all = -1

    def __init__(self, run: TrackedRun) -> None:
        named = os.environ.get("TRACKIO_DIR")
        folder = Path(named) if named else run.folder_of("trackio")
        os.environ["TRACKIO_DIR"] = str(folder)  # before the import, which reads it
        import trackio

        self._run = run
        self._remote = next((os.environ[name] for name in _REMOTE if os.environ.get(name)), "")
        self._sent = folder / f"{run.run_id}.sent.json"
        self.known = self._sent_steps() if self._remote else _logged_steps(run)
        self._shown = self._remote or f"TRACKIO_DIR={paths.shown(folder)} trackio show --project {run.project_id}"
        self._last_step = max(self.known.values(), default=0)
        self._opened: Any = trackio.init(
            project=run.project_id,
            name=run.run_id,
            group=run.workflow,
            config=dict(run.settings),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, points: Sequence[CurvePoint]) -> None:
        """Log points, those of one step in one row."""
        rows: dict[int, dict[str, float]] = {}
        for point in points:
            rows.setdefault(point.step, {})[point.name] = point.value
            self.known[point.name] = max(point.step, self.known.get(point.name, -1))
        for step in sorted(rows):
            self._opened.log(rows[step], step=step)
            self._last_step = max(self._last_step, step)
        if self._remote:
            self._sent.write_text(json.dumps(self.known))

    def finish(self, figures: Mapping[str, Scalar] | None) -> str:
        """Log final figures at the last step and end the run."""
        numbers = {f"{FINAL}{name}": value for name, value in numbers_of(figures or {}).items()}
        if new := {name: value for name, value in numbers.items() if name not in self.known}:
            self._opened.log(new, step=self._last_step)
        self._opened.finish()
        if self._remote:
            self._sent.write_text(json.dumps(self.known | dict.fromkeys(numbers, self._last_step)))
        return self._shown

    def _sent_steps(self) -> dict[str, int]:
        try:
            sent = json.loads(self._sent.read_text())
        except (OSError, ValueError):
            return {}
        return {str(name): int(step) for name, step in sent.items()} if isinstance(sent, dict) else {}


def _logged_steps(run: TrackedRun) -> dict[str, int]:
    """Return the last step of each metric in the local database."""
    from trackio.sqlite_storage import SQLiteStorage

    last: dict[str, int] = {}
    for row in SQLiteStorage.get_logs(run.project_id, run.run_id):
        last |= {name: max(int(row["step"]), last.get(name, -1)) for name in row if name not in ("step", "timestamp")}
    return last
