"""Build a stage again and compare the result with its artifact."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlxflow.messages import terminal
from mlxflow.storage import layout
from mlxflow.storage.digests import digest_file, tensor_digests
from mlxflow.tasks.report_device import read_device
from mlxflow.tasks.stage_process import run_process
from mlxflow.workflow.outputs import files_in, may_hold
from mlxflow.workflow.stage_node import Node
from mlxflow.workflow.staleness import observe_settings

#: Files about the run itself, with times and rates; they are not compared.
_ABOUT_THE_RUN = frozenset({layout.METRICS, layout.REPORT})


def reproduce(node: Node, record: dict[str, Any]) -> int:
    """Build a stage in a scratch folder beside the artifacts, print what differs, and return the exit code.

    Args:
        node: the stage.
        record: of its last run.
    """
    state = layout.state_folder(node.root)
    state.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=layout.REPRODUCTION_PREFIX, dir=state) as scratch:
        into = Path(scratch, "artifact")
        handover = node.handover(observe_settings(node), None)
        code = run_process([*node.command, "--into", str(into)], Path(scratch, "log"), handover)
        if code:
            return code
        differences = list(differing(node, into))
        threads = read_device(into / layout.REPORT).threads if "threads" in record else None
    if line := other_threads_message(node.task, record, threads, "this build by"):
        terminal.show(line)
    for line in differences:
        terminal.show(f"{node.task}: {line}")
    if not differences:
        terminal.show(f"{node.task}: reproduced, every tensor is equal")
    return int(bool(differences))


def other_threads_message(task: str, record: dict[str, Any], threads: int | None, other: str) -> str:
    """Return a line if an artifact was computed by another number of threads, else an empty text.

    Args:
        task: the stage.
        record: of its last run.
        threads: the other number; None if the CPU does not compute.
        other: the subject of the other number, for the line.
    """
    known = record.get("threads")
    if known is None or threads is None or known == threads:
        return ""
    return (
        f"{task}: the artifact was computed by {known} threads, {other} {threads}, so last bits may differ. "
        f"Set workflow.threads = {known} for equal ones."
    )


def differing(node: Node, folder: Path) -> Iterator[str]:
    """Yield a line for each file of a stage that differs in another folder, with the first differing tensor.

    Args:
        node: the stage.
        folder: contains the other files under the same names.
    """
    again = replace(node, root=folder, folder=".", outputs=())
    theirs_alone = [f"{node.folder}/{name.removeprefix('./')}" for name in files_in(again)]
    for name in dict.fromkeys([*node.outputs, *files_in(node), *theirs_alone]):
        path = Path(name)
        if path.name in _ABOUT_THE_RUN or not may_hold(node, name):
            continue
        ours, theirs = node.root / path, folder / path.relative_to(node.folder)
        if ours.exists() != theirs.exists():
            yield f"{name} exists in only one of the two"
        elif path.suffix == ".safetensors":
            yield from _differing_tensor(name, ours, theirs)
        elif digest_file(ours) != digest_file(theirs):
            yield f"{name} differs"


def _differing_tensor(name: str, ours: Path, theirs: Path) -> Iterator[str]:
    first, second = tensor_digests(ours), tensor_digests(theirs)
    for tensor in sorted({*first, *second}):
        if first.get(tensor) != second.get(tensor):
            yield f"{name}: tensor {tensor} differs"
            return
