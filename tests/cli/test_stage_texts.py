import re
from pathlib import Path

import pytest

from mlxflow.cli.command import main
from mlxflow.cli.stage_texts import _curve


@pytest.mark.parametrize(
    ("task", "first", "last"),
    [
        ("train", "| step | loss | held-out loss | held-out perplexity | learning rate |", r"held-out perplexity \d"),
        ("profile", "| phase | calls | seconds | peak | growth in bytes |", r"profile: peak memory [\d.]+ MB of"),
        ("benchmark", "| training | rows | tokens learned from/s |", r"\| quantize:"),
        ("report", r"train: ", r"report: .*/artifacts/report/index.html, [\d.]+ KB, \d+ samples$"),
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


def test_a_long_learning_curve_is_thinned_and_keeps_its_ends() -> None:
    records = [{"kind": "train", "step": step, "loss": 2.0, "learning_rate": 0.1} for step in range(1, 101)]
    lines = _curve([{"kind": "validation", "step": 0, "loss": 3.0, "perplexity": 20.1}, *records]).splitlines()
    assert lines[2] == "| 0 | - | 3 | 20.1 | - |"
    assert lines[-1] == "| 100 | 2 | - | - | 0.1 |"
    assert len(lines) < 25
