from pathlib import Path
from typing import Any

import pytest

from mlxflow.report.elements import Figure, Note, Table, Text
from mlxflow.report.load_run import Run
from mlxflow.report.sections import memory
from tests.report.runs import edit, read


def _texts(root: Path) -> list[tuple[str, str]]:
    blocks = memory.section([read(root)]).blocks
    return [(block.kind, block.text) for block in blocks if isinstance(block, Note | Text)]


@pytest.mark.parametrize(
    ("leak", "kind", "said"),
    [
        ({}, "text", "No leak: active memory at the steps' ends does not grow."),
        (
            {"verdict": "leak", "bytes_per_step": 2e6, "steps_until_limit": 40},
            "note",
            "A leak: active memory grows by 2 MB a step and meets the limit in 40 steps.",
        ),
        ({"verdict": "leak", "bytes_per_step": 2e6}, "note", "A leak: active memory grows by 2 MB a step."),
        ({"verdict": "bounded growth"}, "note", "Bounded growth: active memory grew, and stopped growing."),
    ],
)
def test_the_leak_test_is_a_sentence(root: Path, leak: dict[str, Any], kind: str, said: str) -> None:
    edit(root, "profile", lambda report: report["leak"].update(leak))
    assert _texts(root)[0] == (kind, said)


def test_a_leak_of_the_process_is_added_to_the_sentence(root: Path) -> None:
    edit(root, "profile", lambda report: report["leak"]["process"].update(verdict="leak", bytes_per_step=1.0))
    assert _texts(root)[0][1].endswith("does not grow. The process's memory, outside of MLX: leak.")


def test_the_parts_of_the_peak_are_shares_of_the_whole(root: Path) -> None:
    figures = [block for block in memory.section([read(root)]).blocks if isinstance(block, Figure)]
    (parts,) = [figure for figure in figures if figure.caption.startswith("What the")]
    assert parts.caption == ("What the 12 MB at the peak are made of: 9 MB of MLX's arrays, 3 MB beside them")
    assert parts.table is not None
    assert parts.table.rows[0] == ("weights", "4 MB", "33.3 %")
    assert parts.table.rows[-1] == ("all of it", "12 MB", "100 %")
    assert "update" not in [row[0] for row in parts.table.rows], "it has no bytes"


def test_suggestions_and_peaks_are_tables_if_there_are_any(root: Path) -> None:
    def captions() -> list[str]:
        return [block.caption for block in memory.section([read(root)]).blocks if isinstance(block, Table)]

    assert captions() == ["The highest peaks", "What would save memory, most first"]
    edit(root, "profile", lambda report: (report.update(peaks=[]), report.pop("suggestions")))
    assert captions() == []


def test_a_workflow_without_a_profile_has_a_note(tmp_path: Path) -> None:
    run: Run = read(tmp_path)._replace(stages=[])
    assert memory.section([run]).blocks == [Note("No memory profile to show: the workflow has no profile stage.")]
