"""The stages section: a graph, and a table of state, time and artifact."""

from collections.abc import Sequence

from mlxflow.report import graph
from mlxflow.report.elements import Block, Figure, Note, Section, Table
from mlxflow.report.formatting import UNKNOWN, show_bytes, show_seconds
from mlxflow.report.load_run import LoadedStage, Run
from mlxflow.report.sections import beside

#: Each state in words.
WORDS = {"fresh": "built", "stale": "out of date", "missing": "not built", "damaged": "damaged", "running": "running"}


def section(runs: Sequence[Run]) -> Section:
    """Return the section."""
    return Section("stages", "Stages", beside(runs, _blocks))


def _blocks(run: Run) -> list[Block]:
    boxes = [graph.Box(stage.task, stage.member.reads, stage.state, _lines(stage)) for stage in run.stages]
    states = [f"{one.task}: {WORDS[one.state]}" for one in run.stages]
    label = f"The stages and what each reads from. {'; '.join(states)}."
    drawn = Figure("What reads from what", graph.draw(boxes, label), wide=True) if boxes else Note("There is no stage.")
    notes: list[Block] = [Note(one.said) for one in run.stages if one.said]
    return [drawn, *notes, _table(run)]


def _lines(stage: LoadedStage) -> tuple[str, ...]:
    if stage.state in ("missing", "damaged", "running"):
        return (WORDS[stage.state],)
    seconds = show_seconds(stage.report.run.seconds if stage.report else None)
    return (WORDS[stage.state], f"{seconds} \N{MIDDLE DOT} {show_bytes(stage.size_bytes)}")


def _table(run: Run) -> Table:
    rows = []
    for one in run.stages:
        about = one.report.run if one.report else None
        rows.append(
            (
                one.task,
                WORDS[one.state],
                ", ".join(one.member.reads) or UNKNOWN,
                show_seconds(about.seconds if about else None),
                (about.device if about else None) or UNKNOWN,
                one.member.folder.as_posix(),
                show_bytes(one.size_bytes) if one.report else UNKNOWN,
            )
        )
    head = ("Stage", "State", "Reads from", "Time", "Device", "Artifact", "Size")
    return Table("Each stage", head, rows, words=(0, 1, 2, 4, 5))
