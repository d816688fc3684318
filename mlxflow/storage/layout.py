"""The names of all files and folders that mlxflow writes below a workflow's folder.

    workflow.toml
    mlxflow.lock                            inputs and settings of each artifact, to be committed
    artifacts/
        index.html, compare.html            the page of one run, and of several side by side
        train/, quantize/q4/ ...            one folder for each stage or variant, with its report.toml
        logs/train.log                      output of the stage's last run
        tracking/tensorboard/ ...           local files of experiment trackers
        .mlxflow/                           state; removing it only costs time
            state.jsonl                     doit's records
            graph.json                      the workflow, resolved
            digests.json                    digests of files, by path
            lock                            held by the process that uses these artifacts
            shards/                         tokenized shards, by content
            unfinished/train/0123456789ab/  checkpoints of an interrupted run
            ranks/train/1/                  what a rank of a running distributed training writes, and no one reads
            tracking/                       requests to report running stages to trackers
            reproduce-*/                    builds of `doit reproduce`

No other module spells these names.
"""

from collections.abc import Iterator
from pathlib import Path

from mlxflow.storage import paths

WORKFLOW = "workflow.toml"
LOCKFILE = "mlxflow.lock"
ARTIFACTS = "artifacts"

#: Files of an artifact; the card describes a model to people.
REPORT, METRICS, PAGE, CARD = "report.toml", "metrics.jsonl", "index.html", "README.md"
TIMELINE, TIMELINE_JOURNAL = "timeline.safetensors", "timeline.jsonl"

#: The page of several runs side by side.
COMPARISON_PAGE = "compare.html"

STATE, LOGS = ".mlxflow", "logs"

#: Files and folders of the state.
JOURNAL, GRAPH, DIGESTS, LOCK = "state.jsonl", "graph.json", "digests.json", "lock"
SHARDS, UNFINISHED, RANKS = "shards", "unfinished", "ranks"

#: The folder of trackers' local files in the artifacts folder, and of requests in the state.
TRACKING = "tracking"

#: Prefixes of the names of folders in which a stage is built again.
REPRODUCTION_PREFIX = "reproduce-"

#: Suffixes of the names of temporary folders and files, and of locks.
TEMPORARY_ENDINGS = (".partial", ".partial.old", ".unfinished", ".tmp", ".lock")


def named_workflow(path: Path) -> str:
    """Return a workflow file as commands have to name it; empty for the one that they use by default.

    Args:
        path: the file, relative to the current folder or absolute.
    """
    shown = paths.shown(path)
    return "" if shown == WORKFLOW else shown


def artifacts_folder(root: Path) -> Path:
    """Return the folder of all artifacts of the workflow in a folder."""
    return root / ARTIFACTS


def state_folder(root: Path) -> Path:
    """Return the folder for state that is kept between runs of the workflow in a folder."""
    return root / ARTIFACTS / STATE


def stage_folder(task: str) -> Path:
    """Return the artifact folder of `stage` or `stage:variant`, relative to the workflow's folder."""
    return Path(ARTIFACTS, *task.split(":"))


def log_file(root: Path, task: str) -> Path:
    """Return the log file of the last run of `stage` or `stage:variant`."""
    return root / ARTIFACTS / LOGS / f"{task.replace(':', '-')}.log"


def report_files(root: Path) -> Iterator[Path]:
    """Yield the report in every artifact folder, including variants, of the workflow in a folder, sorted."""
    artifacts = artifacts_folder(root)
    yield from sorted([*artifacts.glob(f"*/{REPORT}"), *artifacts.glob(f"*/*/{REPORT}")])
