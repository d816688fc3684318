from pathlib import Path

import pytest

from mlxflow.__main__ import main
from tests.conftest import mlxflow


def test_fit_refuses_other_stages_and_invalid_sizes(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(job)
    assert main(["fit", "train"]) == 2
    assert main(["fit", "--batch-sizes", "0"]) == 2
    assert main(["fit"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "train: expected a profile stage. Name one.",
        "fit: 0: expected a number of at least 1. Use one such as 32.",
        "artifacts/train/config.json: missing. Run: mlxflow build profile",
    ]


def test_fit_prints_the_predicted_peak_of_each_shape(built: Path) -> None:
    result = mlxflow(built, "fit", "--batch-sizes", "2", "4")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[2] == "| context_length | batch 2 | batch 4 | largest that fits |"
    assert [line.split()[1] for line in lines[4:7]] == ["8", "16", "32"]
    assert "predicted" in lines[-1]
