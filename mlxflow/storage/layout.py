"""The names of all files and folders that mlxflow writes below a workflow's folder.

    workflow.toml
    mlxflow.lock                            what each stage was made of, to be committed
    artifacts/
        index.html, compare.html            the page of one run, and of two side by side
        train/, quantize/q4/ ...            one folder for each stage or variant, with its report.toml
        logs/train.log                      what the stage's last run printed
        .mlxflow/                           state: removed, it costs time and nothing else
            state.jsonl                     what doit remembers
            graph.json                      the workflow, resolved
            digests.json                    digests of files, by path
            lock                            held by the process that works on these artifacts
            shards/                         tokenized shards, by content
            unfinished/train/0123456789ab/  what an interrupted run left for the next one
            reproduce-*/                    builds of `doit reproduce`

Every other module takes these names from here.
"""

from collections.abc import Iterator
from pathlib import Path

WORKFLOW = "workflow.toml"
LOCKFILE = "mlxflow.lock"
ARTIFACTS = "artifacts"

#: Files of an artifact.
REPORT, METRICS, PAGE = "report.toml", "metrics.jsonl", "index.html"
TIMELINE, TIMELINE_JOURNAL = "timeline.safetensors", "timeline.jsonl"

#: The page of two runs side by side.
COMPARISON_PAGE = "compare.html"

STATE, LOGS = ".mlxflow", "logs"

#: Files and folders of the state.
JOURNAL, GRAPH, DIGESTS, LOCK = "state.jsonl", "graph.json", "digests.json", "lock"
SHARDS, UNFINISHED = "shards", "unfinished"

#: How the names of folders begin in which a stage is built again.
REPRODUCTION_PREFIX = "reproduce-"

#: How the names of temporary folders and files end, and those of locks.
TEMPORARY_ENDINGS = (".partial", ".partial.old", ".unfinished", ".tmp", ".lock")


def artifacts_folder(root: Path) -> Path:
    """Return the folder of all artifacts of the workflow in a folder."""
    return root / ARTIFACTS


def state_folder(root: Path) -> Path:
    """Return the folder for what mlxflow remembers between runs of the workflow in a folder."""
    return root / ARTIFACTS / STATE


def stage_folder(task: str) -> Path:
    """Return the artifact folder of `stage` or `stage:variant`, relative to the workflow's folder."""
    return Path(ARTIFACTS, *task.split(":"))


def log_file(root: Path, task: str) -> Path:
    """Return the file that holds what the last run of `stage` or `stage:variant` printed."""
    return root / ARTIFACTS / LOGS / f"{task.replace(':', '-')}.log"


def report_files(root: Path) -> Iterator[Path]:
    """Yield the report in every artifact folder of the workflow in a folder, of variants too, sorted."""
    artifacts = artifacts_folder(root)
    yield from sorted([*artifacts.glob(f"*/{REPORT}"), *artifacts.glob(f"*/*/{REPORT}")])
