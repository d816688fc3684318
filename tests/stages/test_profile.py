"""The profile stage's report, its budgets, and what fits."""

from pathlib import Path

import numpy as np
import pytest

from mlxflow.__main__ import main
from mlxflow.artifact import read_report
from mlxflow.errors import StageError
from mlxflow.stage import Context
from mlxflow.stages.profile import Config, _require_budgets
from tests.conftest import mlxflow

CONTEXT = Context(
    task="profile",
    seed=0,
    device="cpu",
    memory_limit_bytes=10**9,
    provenance={},
    root=Path(),
    state=Path(),
    tasks=(),
    members=(),
    name="tiny",
    folder=Path(),
    unfinished=Path(),
)


def test_the_report_tells_phases_composition_leaks_peaks_and_trends(built: Path) -> None:
    report = read_report(built / "artifacts/profile/report.toml")
    phases = {phase["name"]: phase for phase in report["phases"]}
    assert phases["training_step"]["calls"] == 3
    inner = [phases[f"training_step/{name}"] for name in ("data", "forward_backward", "update")]
    assert max(phase["peak_memory_bytes"] for phase in inner) == phases["training_step"]["peak_memory_bytes"]
    parts = dict(report["composition"])
    assert parts.pop("total_bytes") == sum(parts.values())
    assert report["leak"]["verdict"] == report["leak"]["process"]["verdict"] == "none"
    assert report["peaks"][0]["bytes"] == report["peak_memory_bytes"]
    assert report["settings"]["fused_loss"] is read_report(built / "artifacts/train/report.toml")["fused_loss"]
    assert np.isfinite(report["trend"]["rss_bytes_per_step"])


def test_a_budget_that_is_exceeded_is_told_with_the_phase_and_the_first_suggestion() -> None:
    figures = {
        "peak_memory_bytes": 500_000_000,
        "peaks": [{"bytes": 500_000_000, "step": 7, "phase": "training_step/update"}],
    }
    first = {"key": "train.fused_loss", "value": True, "saves_bytes": 100_000_000, "evidence": ""}
    parts = {"leak": {"bytes_per_step": 4096.0}, "suggestions": [first]}
    with pytest.raises(StageError) as caught:
        _require_budgets(Config(max_peak_memory="40%", max_leak_per_step="0 KB"), CONTEXT, figures, parts)
    assert str(caught.value).splitlines() == [
        'profile.max_peak_memory = "40%": step 7 in training_step/update took 500.000 MB. '
        "Set train.fused_loss = true, which is predicted to save 100.000 MB.",
        'profile.max_leak_per_step = "0 KB": arrays leak 0.004 MB a step. '
        "Look for arrays that are kept from step to step, or for sums that are never evaluated.",
    ]
    _require_budgets(Config(max_peak_memory="50%", max_leak_per_step="5 KB"), CONTEXT, figures, parts)


def test_a_stage_over_its_budget_fails_and_leaves_its_old_artifact(job_copy: Path) -> None:
    workflow = job_copy / "workflow.toml"
    workflow.write_text(workflow.read_text().replace("[profile]", '[profile]\nmax_peak_memory = "1 MB"', 1))
    before = (job_copy / "artifacts/profile/report.toml").read_bytes()
    result = mlxflow(job_copy, "run", "profile")
    assert result.returncode == 1
    assert result.stderr.startswith('profile.max_peak_memory = "1 MB": step ')
    assert "Traceback" not in result.stderr
    assert (job_copy / "artifacts/profile/report.toml").read_bytes() == before


def test_fit_refuses_what_is_no_profile_stage_and_what_is_no_size(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(job)
    assert main(["fit", "train"]) == 2
    assert main(["fit", "--batch-sizes", "0"]) == 2
    assert main(["fit"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "train: what fits is told for the steps of a profile stage. Name one.",
        "fit: 0: expected a number of at least 1. Use one such as 32.",
        "artifacts/train/config.json: missing. Run: doit profile",
    ]


def test_fit_prints_what_fits(built: Path) -> None:
    result = mlxflow(built, "fit", "--batch-sizes", "2", "4")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[1].split()[:5] == ["context_length", "batch", "2", "batch", "4"]
    assert [line.split()[0] for line in lines[2:5]] == ["8", "16", "32"]
    assert "predicted" in lines[-1]
