"""`mlxflow report`: write the HTML page of a run, finished or not, or of two runs side by side."""

import argparse
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from mlxflow.cli.arguments import add_workflow, user_path
from mlxflow.messages import terminal
from mlxflow.messages.advice import advise_build
from mlxflow.messages.errors import ArtifactError, CallError, UserError
from mlxflow.report.live_server import LivePage, PageServer
from mlxflow.report.load_run import Run, read_run
from mlxflow.report.render import render
from mlxflow.report.run_changes import stamps
from mlxflow.storage import atomic_folders, layout, paths, report_structs
from mlxflow.storage.digests import DigestCache
from mlxflow.storage.run_context import Member
from mlxflow.workflow.journal import read_records
from mlxflow.workflow.loader import load_workflow
from mlxflow.workflow.model import Workflow
from mlxflow.workflow.staleness import StaleStage, find_stale, record_of_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mlxflow report`."""
    parser.add_argument(
        "runs",
        nargs="*",
        type=user_path,
        metavar="FOLDER",
        help="two or more runs to compare, such as . ../other: artifacts/compare.html of the first",
    )
    parser.add_argument("--open", action="store_true", help="show it in the browser")
    parser.add_argument(
        "--watch", action="store_true", help="show it on 127.0.0.1 and follow the run until Ctrl-C; no file is written"
    )
    parser.add_argument("--port", type=int, default=0, help="of --watch; default: a free one")
    add_workflow(parser)


def run(parsed: argparse.Namespace) -> None:
    """Write the page and print its path, or follow the run until Ctrl-C."""
    if parsed.port and not (parsed.watch and 0 < parsed.port < 2**16):
        raise CallError(
            f"report: --port = {parsed.port}: expected 1 to 65535, with --watch. Add --watch or leave it out."
        )
    if parsed.watch:
        watch(parsed.runs, parsed.workflow, port=parsed.port, opens=parsed.open)
        return
    page = compare(parsed.runs) if parsed.runs else report(load_workflow(parsed.workflow))
    if parsed.open and not webbrowser.open(page.resolve().as_uri()):
        terminal.say(f"{paths.shown(page)}: no browser could be opened. Open the file yourself.")
    terminal.show(paths.shown(page))


def report(workflow: Workflow) -> Path:
    """Write the page of all existing reports and return its path.

    Args:
        workflow: the workflow.

    Raises:
        StageError: the page cannot be written.
    """
    page = workflow.artifacts / layout.PAGE
    _write(page, [read(workflow)])
    return page


def read(workflow: Workflow) -> Run:
    """Return the run of a workflow, as far as it has come."""
    return read_run(workflow.root, _members(workflow), name=workflow.settings.name)


def watch(folders: Sequence[Path], workflow: Path, *, port: int, opens: bool) -> None:
    """Answer requests for the page on 127.0.0.1 until the process is interrupted.

    Args:
        folders: of the runs to compare; empty for the run of the workflow alone.
        workflow: the workflow file.
        port: to listen on; 0 for a free one.
        opens: whether to show the page in the browser.

    Raises:
        UserError: the workflow file has mistakes, a folder holds no artifacts, or the port cannot be used.
    """
    roots = [_root(folder) for folder in folders] or [workflow.parent]

    def draw() -> bytes:
        runs = _read_all(folders) if folders else [read(load_workflow(workflow))]
        return render(runs, is_live=True)

    page = LivePage(draw, lambda: [stamps(root) for root in roots])
    page.current()  # a mistake is named before an address is printed
    with PageServer(page, port) as server:
        terminal.show(server.url)
        terminal.say("The page follows the run. Ctrl-C ends it.")
        if opens and not webbrowser.open(server.url):
            terminal.say(f"{server.url}: no browser could be opened. Open the address yourself.")
        server.serve_forever(poll_interval=0.2)


def compare(folders: Sequence[Path]) -> Path:
    """Write the page of several runs side by side, in the artifacts of the first, and return its path.

    Args:
        folders: of each run: a workflow's folder or its artifacts folder.

    Raises:
        CallError: there are fewer than two, or one holds no artifacts.
        StageError: the page cannot be written.
    """
    runs = _read_all(folders)
    page = layout.artifacts_folder(_root(folders[0])) / layout.COMPARISON_PAGE
    _write(page, runs)
    return page


def _read_all(folders: Sequence[Path]) -> list[Run]:
    """Return the runs in folders, labelled A, B, ...

    Raises:
        CallError: there are fewer than two, or one holds no artifacts.
    """
    if len(folders) < 2:
        raise CallError(f"report: {str(folders[0])!r}: expected two or more runs. Use: mlxflow report . {folders[0]}")
    runs = []
    for index, root in enumerate([_root(folder) for folder in folders]):
        name, members = _described(root)
        runs.append(read_run(root, members, name=name, label=f"{_letters(index)}: {paths.shown(root)}"))
    return runs


def _write(page: Path, runs: Sequence[Run]) -> None:
    with atomic_folders.writable(page):
        page.parent.mkdir(exist_ok=True)
        atomic_folders.write_whole(page, render(runs))


def _letters(index: int) -> str:
    """Return A, B, ... Z, AA, AB, ... for 0, 1, ..."""
    letters = ""
    index += 1
    while index:
        index, digit = divmod(index - 1, 26)
        letters = chr(ord("A") + digit) + letters
    return letters


def _root(folder: Path) -> Path:
    """Return the workflow's folder of a run.

    Raises:
        CallError: it holds no artifacts.
    """
    for root in (folder, folder.parent):
        if (root / layout.ARTIFACTS).is_dir() and (root == folder or folder.name == layout.ARTIFACTS):
            return root
    raise CallError(f"report: {str(folder)!r}: holds no {layout.ARTIFACTS}. Name a folder in which a stage was built.")


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
    nodes = [stage.node() for stage in workflow.stages]
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
        return msgspec.structs.asdict(report_structs.read_provenance(report, advice=advise_build(task)))
    except (ArtifactError, OSError):
        return {}


def _word(stale: StaleStage) -> str:
    if stale.own_reasons:
        return "; ".join(stale.own_reasons)
    return f"{stale.upstream[0]}, which it reads from, is out of date or not built"
