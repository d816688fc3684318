"""`mlxflow report`: write the HTML page of a run, finished or not, or of two runs side by side."""

import argparse
import webbrowser
from pathlib import Path
from typing import Any

import msgspec

from mlxflow.cli.arguments import add_workflow
from mlxflow.messages import terminal
from mlxflow.messages.errors import ArtifactError, CallError, UserError
from mlxflow.report.load_run import read_run
from mlxflow.report.render import render
from mlxflow.storage import atomic_folders, layout, paths, report_structs
from mlxflow.storage.digests import DigestCache
from mlxflow.storage.run_context import Member
from mlxflow.workflow.journal import read_records
from mlxflow.workflow.loader import load_workflow
from mlxflow.workflow.model import Workflow
from mlxflow.workflow.staleness import StaleStage, find_stale, record_of_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mlxflow report`."""
    parser.add_argument("--open", action="store_true", help="show it in the browser")
    parser.add_argument("--compare", type=Path, metavar="FOLDER", help="another run beside it: artifacts/compare.html")
    add_workflow(parser)


def run(parsed: argparse.Namespace) -> None:
    """Write the page and print its path."""
    page = report(load_workflow(parsed.workflow), compare=parsed.compare, opens=parsed.open)
    terminal.show(paths.shown(page))


def report(workflow: Workflow, *, compare: Path | None = None, opens: bool = False) -> Path:
    """Write the page of all existing reports and return its path.

    Args:
        workflow: the workflow.
        compare: another run, shown beside it: a workflow's folder or its artifacts folder.
        opens: whether to show the page in the browser.

    Raises:
        CallError: there is nothing to compare with.
        StageError: the page cannot be written.
    """
    page = workflow.artifacts / (layout.COMPARISON_PAGE if compare else layout.PAGE)
    if compare:
        other = _other_root(compare)
        name, members = _described(other)
        labels = [f"A: {paths.shown(workflow.root)}", f"B: {paths.shown(other)}"]
        runs = [read_run(workflow.root, _members(workflow), name=workflow.settings.name, label=labels[0])]
        runs.append(read_run(other, members, name=name, label=labels[1]))
    else:
        runs = [read_run(workflow.root, _members(workflow), name=workflow.settings.name)]
    with atomic_folders.writable(page):
        page.parent.mkdir(exist_ok=True)
        atomic_folders.write_whole(page, render(runs))
    if opens and not webbrowser.open(page.resolve().as_uri()):
        terminal.say(f"{paths.shown(page)}: no browser could be opened. Open the file yourself.")
    return page


def _other_root(compare: Path) -> Path:
    for root in (compare, compare.parent):
        if (root / layout.ARTIFACTS).is_dir() and (root == compare or compare.name == layout.ARTIFACTS):
            return root
    raise CallError(
        f"report: --compare = {str(compare)!r}: holds no {layout.ARTIFACTS}. Name a folder in which doit built a stage."
    )


def _described(root: Path) -> tuple[str, list[Member]]:
    """Return name and stages of another run: from its workflow file, else from its reports."""
    try:
        workflow = load_workflow(root / layout.WORKFLOW)
    except UserError:
        return root.resolve().name, _found(root)
    return workflow.settings.name, _members(workflow)


def _found(root: Path) -> list[Member]:
    folders = [path.parent.relative_to(root) for path in layout.report_files(root)]
    named = {":".join(folder.parts[1:]): folder for folder in folders if not folder.parts[1].startswith(".")}
    return [Member(task, folder) for task, folder in named.items() if task.partition(":")[0] != "report"]


def _members(workflow: Workflow) -> list[Member]:
    """Return every stage except `report`, with the reasons why it is stale."""
    nodes = [one.node() for one in workflow.stages]
    recorded = read_records(workflow.state / layout.JOURNAL)

    def record(task: str) -> dict[str, Any]:
        return recorded.get(task) or record_of_report(_provenance(workflow.root, task))

    cache = DigestCache(workflow.state / layout.DIGESTS)
    stale = {one.node.task: one for one in find_stale(nodes, record, cache)}
    cache.save()
    members = [member for member in workflow.members() if member.task.partition(":")[0] != "report"]
    return [member._replace(stale=_word(stale[member.task]) if member.task in stale else "") for member in members]


def _provenance(root: Path, task: str) -> dict[str, Any]:
    """Return the table `stage` of a stage's report; empty if it cannot be read."""
    report = root / layout.stage_folder(task) / layout.REPORT
    try:
        return msgspec.structs.asdict(report_structs.read_provenance(report, advice=f"Run: doit {task}"))
    except (ArtifactError, OSError):
        return {}


def _word(stale: StaleStage) -> str:
    if stale.own_reasons:
        return "; ".join(stale.own_reasons)
    return f"{stale.upstream[0]}, which it reads from, is out of date or not built"
