"""The page by hand: whatever there is of a run, whether or not all of it was built; of two runs, side by side."""

import webbrowser
from pathlib import Path

from mlxflow.device import compute_device
from mlxflow.errors import CallError, UserError
from mlxflow.report.load_run import Member, read_run, read_toml, table
from mlxflow.report.render import render
from mlxflow.storage import artifact_files, layout
from mlxflow.storage.digests import DigestCache
from mlxflow.system import terminal
from mlxflow.workflow import stage
from mlxflow.workflow.loader import Stage, Workflow, load_workflow, shown_path


def report(workflow: Workflow, *, compare: Path | None = None, opens: bool = False) -> Path:
    """Write the page of what is there and return its path.

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
        labels = [f"A: {shown_path(workflow.root)}", f"B: {shown_path(other)}"]
        runs = [read_run(workflow.root, _members(workflow), name=workflow.settings.name, label=labels[0])]
        runs.append(read_run(other, members, name=name, label=labels[1]))
    else:
        runs = [read_run(workflow.root, _members(workflow), name=workflow.settings.name)]
    with artifact_files.writable(page):
        page.parent.mkdir(exist_ok=True)
        artifact_files.write_whole(page, render(runs))
    if opens and not webbrowser.open(page.resolve().as_uri()):
        terminal.say(f"{shown_path(page)}: no browser could be opened. Open the file yourself.")
    return page


def _other_root(compare: Path) -> Path:
    for root in (compare, compare.parent):
        if (root / layout.ARTIFACTS).is_dir() and (root == compare or compare.name == layout.ARTIFACTS):
            return root
    raise CallError(
        f"report: --compare = {str(compare)!r}: holds no {layout.ARTIFACTS}. Name a folder in which doit built a stage."
    )


def _described(root: Path) -> tuple[str, list[Member]]:
    """Return name and stages of another run: as its workflow file tells, else from the reports that are there."""
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
    """Return the stages but for the page's own, with what makes them stale."""
    cache = DigestCache(workflow.state / layout.DIGESTS)
    makers = {path: one.task for one in workflow.stages for path in one.outputs}
    stale: set[str] = set()
    members = []
    for one, made in zip(workflow.stages, workflow.members(), strict=True):
        if one.name == "report":
            continue
        above = next((makers[path] for path in one.input_files if makers.get(path) in stale), None)
        reason = _staleness(workflow, one, cache) or (
            f"{above}, which it reads from, is out of date or not built" if above else ""
        )
        if reason:
            stale.add(one.task)
        members.append(Member(*made, stale=reason))
    cache.save()
    return members


def _staleness(workflow: Workflow, one: Stage, cache: DigestCache) -> str:
    """Return what makes a built stage stale, empty where nothing does; as doit does, but from its report alone."""
    about = table(read_toml(workflow.root / one.folder / layout.REPORT)[0], "stage")
    if about.get("settings_digest") != stage.settings_digest(
        one.settings() | compute_device.environment(one.bound_device)
    ):
        return "its settings, its code or MLX changed"
    try:
        read = one.files_read(workflow.root)
        identities = {name: cache.digests(workflow.root / path).identity for name, path in read.items()}
        identities |= one.corpus_identities(cache)
    except (OSError, ValueError):
        return "an input is missing or damaged"
    return "" if about.get("inputs_digest") == stage.settings_digest(dict(identities)) else "an input changed"
