"""A run in Weights & Biases: online, or in files that `wandb sync` uploads (WANDB_MODE=offline).

The run's id is made of its stage and key. Online, wandb continues the run of that id and drops steps that it has;
offline, the files of earlier processes say which steps they have.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlxflow.messages.errors import CallError
from mlxflow.storage import paths
from mlxflow.tracking import wandb_files
from mlxflow.tracking.tracked_run import FINAL, CurvePoint, Scalar, TrackedRun

_FINISHED = f"{FINAL}is_finished"


class WandbRun:
    """The run of a project; see `mlxflow.tracking.trackers.OpenRun`.

    Raises:
        CallError: wandb is switched off, or there is no login.
    """

    known: dict[str, int]
    known_of_all = -1

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._run = run
        self._opened: Any = None
        self._top = Path(os.environ.get("WANDB_DIR") or run.folder)
        mode = str(wandb.setup().settings.mode)  # by variables and wandb's own files
        if mode == "disabled":
            raise CallError("WANDB_MODE is disabled. Remove it, or wandb from tracking.to")
        self._is_offline = mode in ("offline", "dryrun")
        self._earlier = wandb_files.LoggedRun([], {}, {}, has_ended=False)
        if self._is_offline:
            logs = sorted((self._top / "wandb").glob(f"offline-run-*-{run.run_id}/run-{run.run_id}.wandb"))
            self._earlier = wandb_files.read_run(logs)
            self.known = self._earlier.last_steps()
        else:
            opened = self._init()
            if opened.resumed:
                self.known_of_all = int(opened.step) - 1
            self.known = {}

    def _init(self) -> Any:
        """Return wandb's run, begun at the first call: a process with nothing new makes no files."""
        if self._opened is None:
            import wandb

            Path(self._top).mkdir(parents=True, exist_ok=True)
            settings = wandb.Settings(
                console="off", silent=True, disable_git=True, save_code=False, x_disable_stats=True,
                x_disable_machine_info=True,
            )  # fmt: skip
            try:
                self._opened = wandb.init(
                    project=self._run.project_id,
                    id=self._run.run_id,
                    name=self._run.task,
                    group=self._run.workflow[:128],
                    job_type=self._run.kind,
                    config=dict(self._run.settings),
                    dir=str(self._top),
                    resume=None if self._is_offline else "allow",
                    settings=settings,
                )
            except wandb.errors.UsageError as error:
                if "API key" not in str(error):
                    raise
                raise CallError("no login. Run: wandb login, or set WANDB_MODE=offline") from error
        return self._opened

    def log(self, points: Sequence[CurvePoint]) -> None:
        """Log points, those of one step in one row."""
        rows: dict[int, dict[str, float]] = {}
        for point in points:
            rows.setdefault(point.step, {})[point.name] = point.value
        for step in sorted(rows):
            self._init().log(rows[step], step=step)

    def finish(self, figures: Mapping[str, Scalar] | None) -> str:
        """Set final figures in the summary and end the run."""
        summary = {f"{FINAL}{name}": value for name, value in (figures or {}).items()}
        summary[_FINISHED] = figures is not None
        is_known = all(self._earlier.summary.get(name) == value for name, value in summary.items())
        if self._opened is not None or not is_known:
            self._init().summary.update(summary)
            self._init().finish(exit_code=0 if figures is not None else 1)
        if self._is_offline:
            return f"wandb sync {paths.shown(self._top)}/wandb/offline-run-*"
        return str(self._opened.project_url)
