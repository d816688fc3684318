import re
import shutil
from pathlib import Path

import pytest

from mlxflow.cli.command import main
from mlxflow.cli.stage_texts import _curve, _peak_of, text_of
from mlxflow.report.stage_reports.evaluate import EvaluateReport, EvaluateRun
from mlxflow.storage import report_files
from mlxflow.training.figures import TrainingRun


@pytest.mark.parametrize(
    ("task", "first", "last"),
    [
        ("train", "| step | loss | held-out loss | held-out perplexity | learning rate |", r"held-out perplexity \d"),
        ("profile", "| phase | calls | seconds | peak | growth in bytes |", r"profile: peak memory [\d.]+ MB of"),
        ("benchmark", "| training | rows | tokens learned from/s |", r"\| quantize:"),
        ("report", r"train: ", r"report: .*/artifacts/report/index.html, [\d.]+ kB, \d+ samples$"),
    ],
)
def test_show_prints_the_figures_of_every_other_stage(
    built: Path, capsys: pytest.CaptureFixture[str], task: str, first: str, last: str
) -> None:
    assert main(["show", task, "--workflow", str(built / "workflow.toml")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(first)
    assert re.match(last, out.splitlines()[-1])


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (None, "peak 9.29 GB"),
        (9_300_000_000, "peak 9.29 GB with a memory limit of 9.30 GB"),
        (9_000_000_000, "peak 9.29 GB with a memory limit of 9 GB, which was exceeded"),
    ],
)
def test_the_peak_of_a_training_is_shown_beside_its_limit(limit: int | None, expected: str) -> None:
    run = TrainingRun(
        tokens_per_second=1.0,
        training_seconds=1.0,
        compile_seconds=0.0,
        data_wait_seconds=0.0,
        device_wait_seconds=0.0,
        training_peak_memory_bytes=9_290_000_000,
        training_memory_limit_bytes=limit,
        kernels_refused=(),
    )
    assert _peak_of(run) == expected


def test_a_long_learning_curve_is_thinned_and_keeps_its_ends() -> None:
    records = [{"kind": "train", "step": step, "loss": 2.0, "learning_rate": 0.1} for step in range(1, 101)]
    lines = _curve([{"kind": "validation", "step": 0, "loss": 3.0, "perplexity": 20.1}, *records]).splitlines()
    assert lines[2] == "| 0 | - | 3 | 20.1 | - |"
    assert lines[-1] == "| 100 | 2 | - | - | 0.1 |"
    assert len(lines) < 25


def test_show_prints_the_efficiency_of_ranks(built: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(built, root)
    path = root / "artifacts/benchmark/report.toml"
    speeds = {"alone_tokens_per_second": 10.0, "tokens_per_second": 19.0, "efficiency": 0.95}
    ranks = {"ranks": 2, "backend": "ring"} | speeds
    report_files.write_report(path, report_files.read_report(path) | {"ranks": ranks})
    assert main(["show", "benchmark", "--workflow", str(root / "workflow.toml")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "2 ranks (ring) 19 tokens/s, one process 10 tokens/s: 1.90 times as fast, an efficiency of 95%"
    )


def test_warnings_of_an_evaluation_are_shown() -> None:
    report = EvaluateReport(
        confidence=0.95, accuracies=(), warnings=("asked otherwise",), run=EvaluateRun(computed=0, known=2)
    )
    assert text_of(report, Path(), "evaluate").splitlines()[-2:] == [
        "evaluate: 0 results, 2 of them known from an earlier run",
        "asked otherwise",
    ]
