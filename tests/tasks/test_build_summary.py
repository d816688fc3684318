"""The line of a finished stage and the closing summary."""

import os
import re
from pathlib import Path

import pytest

from mlxflow.storage import layout
from mlxflow.tasks.build_summary import closing_lines, key_figures, read_report
from mlxflow.workflow.stage_node import Node

TRAIN = {"steps": 1200, "first_validation_perplexity": 3393.0, "last_validation_perplexity": 8.126}
QUANTIZE = {"model_bytes": 18136, "bits_per_weight": 4.5}
QUALITY = {"dense_perplexity": 8.126, "perplexity": 12.04}


@pytest.mark.parametrize(
    ("task", "report", "line"),
    [
        ("train:base", TRAIN, "1,200 steps, held-out perplexity 3,393.0 -> 8.13"),
        ("quantize:q4", QUANTIZE, "18.1 kB, 4.50 bits per weight, quality not measured without data"),
        (
            "quantize:q4",
            QUANTIZE | {"quality": QUALITY},
            "18.1 kB, 4.50 bits per weight, held-out perplexity 12.0 (unquantized 8.13)",
        ),
        (
            "pretokenize",
            {"train": {"tokens": 26976}, "validation": {"tokens": 972}},
            "26,976 tokens to train on, 972 held out",
        ),
        ("profile", {"peak_memory_bytes": 1.5e9, "median_step_seconds": 0.01}, "peak memory 1.5 GB, 0.010 s a step"),
        (
            "benchmark",
            {"training": [{"name": "workflow", "tokens_per_second": 1234.5}], "models": [{}]},
            "training 1,234 tokens/s, 1 model measured",
        ),
        ("report", {}, ""),
        ("train", {}, ""),
        ("train", TRAIN | {"steps": "many"}, ""),
    ],
)
def test_key_figures(task: str, report: dict[str, object], line: str) -> None:
    assert key_figures(task, report) == line


def _node(root: Path, task: str, report: str) -> Node:
    folder = f"artifacts/{task}"
    (root / folder).mkdir(parents=True)
    (root / folder / layout.REPORT).write_text(report)
    return Node(task, "", root, folder, (), (), {}, (), bound_device=None)


def test_the_closing_summary_names_the_models_and_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train = _node(tmp_path, "train", "steps = 1")
    assert list(closing_lines([train], 2, 3.25)) == ["1 stage built in 3.2 s, 2 fresh"]
    measured = _node(
        tmp_path,
        "benchmark",
        '[[models]]\nmodel = "train"\nmodel_bytes = 81000\nperplexity = 1.88\ndecode_tokens_per_second = 1097.0\n'
        '[[models]]\nmodel = "quantize:q4"\nmodel_bytes = 18100\n',
    )
    (tmp_path / "artifacts" / layout.PAGE).touch()
    assert list(closing_lines([train, measured], 0, 3.25)) == [
        "2 stages built in 3.2 s",
        "train        81.0 kB  held-out perplexity 1.88  generates 1,097 tokens/s",
        "quantize:q4  18.1 kB  perplexity -              -",
        "page: artifacts/index.html  (mlxflow report --open shows it)",
    ]
    os.utime(tmp_path / "artifacts" / layout.PAGE, ns=(0, 0))  # as after a build of one stage
    assert list(closing_lines([train], 0, 3.25))[-1] == (
        "page: artifacts/index.html is older than this build  (mlxflow report --open writes a new one)"
    )


def test_a_report_that_cannot_be_read_has_no_figures(tmp_path: Path) -> None:
    node = _node(tmp_path, "train", "steps = ")
    assert read_report(node) == {}
    assert re.fullmatch(r"1 stage built in [\d.]+ s", next(closing_lines([node], 0, 1.0)))
