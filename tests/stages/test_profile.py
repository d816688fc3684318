"""The profile stage's report, its budgets, and what fits."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from mlxflow.__main__ import main
from mlxflow.messages.errors import StageError
from mlxflow.profiling.suggestions import Suggestion
from mlxflow.report.stage_reports.profile import PeakFigures, ProfileReport, SuggestionFigures
from mlxflow.stages.profile import Config, Inputs, Outputs, _figures_of, _require_budgets, run, settings_of
from mlxflow.storage import report_structs
from mlxflow.storage.observed_inputs import ObservedInputs
from mlxflow.storage.report_files import read_report
from mlxflow.storage.run_context import Context
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
    digests=ObservedInputs(Path("digests.json")),
)


def test_the_report_has_phases_composition_leaks_peaks_and_trends(built: Path) -> None:
    report = read_report(built / "artifacts/profile/report.toml")
    phases = {phase["name"]: phase for phase in report["phases"]}
    assert phases["training_step"]["calls"] == 3
    inner = [phases[f"training_step/{name}"] for name in ("data", "forward_backward", "update")]
    assert max(phase["peak_memory_bytes"] for phase in inner) == phases["training_step"]["peak_memory_bytes"]
    parts = dict(report["composition"])
    assert parts.pop("total_bytes") == sum(parts.values())
    assert sum(parts.values()) - parts["cache_bytes"] - parts["other_bytes"] == report["peak_memory_bytes"]
    assert sum(parts.values()) <= 1.01 * max(report["peak_memory_bytes"], report["run"]["peak_rss_bytes"])
    assert report["leak"]["verdict"] == report["leak"]["process"]["verdict"] == "none"
    assert report["peaks"][0]["bytes"] == report["peak_memory_bytes"]
    assert report["settings"]["fused_loss"] is read_report(built / "artifacts/train/report.toml")["fused_loss"]
    assert report["memory_limit_bytes"] > 0
    assert report["cache_limit_bytes"] > 0
    assert np.isfinite(report["trend"]["rss_bytes_per_step"])


def test_profiled_steps_have_the_rows_per_step_of_training(built: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built / "artifacts/train", tmp_path / "train"))
    inputs = Inputs(model=folder / "model.safetensors")
    assert settings_of(Config(), inputs, CONTEXT).batch_size == 4
    assert settings_of(Config(batch_size=3), inputs, CONTEXT).batch_size == 3


def test_an_exceeded_budget_is_reported_with_the_phase_and_the_first_suggestion(built: Path) -> None:
    report = report_structs.read(built / "artifacts/profile/report.toml", ProfileReport, advice="").figures
    report = msgspec.structs.replace(
        report,
        peak_memory_bytes=500_000_000,
        peaks=(PeakFigures(bytes=500_000_000, step=7, phase="training_step/update"),),
        leak=msgspec.structs.replace(report.leak, bytes_per_step=4096.0),
        suggestions=(SuggestionFigures(key="train.fused_loss", value=True, saves_bytes=100_000_000, evidence=""),),
    )
    with pytest.raises(StageError) as caught:
        _require_budgets(Config(max_peak_memory="40%", max_leak_per_step="0 KB"), CONTEXT, report)
    assert str(caught.value).splitlines() == [
        'profile.max_peak_memory = "40%": step 7 in training_step/update took 500.000 MB. '
        "Set train.fused_loss = true, which is predicted to save 100.000 MB.",
        'profile.max_leak_per_step = "0 KB": arrays leak 0.004 MB a step. '
        "Look for arrays that are kept from step to step, or for sums that are never evaluated.",
    ]
    _require_budgets(Config(max_peak_memory="50%", max_leak_per_step="5 KB"), CONTEXT, report)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("fused_loss", "train:a.fused_loss"),
        ("packing", "pretokenize:b.packing"),
        ("cache_limit", "workflow.cache_limit"),
    ],
)
def test_a_suggestion_names_the_key_of_the_variant(name: str, key: str) -> None:
    config = Config(input="train:a", data="pretokenize:b")
    figures = _figures_of(Suggestion(name, True, 10, "measured"), config)
    assert figures == SuggestionFigures(key=key, value=True, saves_bytes=10, evidence="measured")


def test_a_stage_over_its_budget_fails_and_leaves_its_old_artifact(job_copy: Path) -> None:
    workflow = job_copy / "workflow.toml"
    workflow.write_text(workflow.read_text().replace("[profile]", '[profile]\nmax_peak_memory = "1 MB"', 1))
    before = (job_copy / "artifacts/profile/report.toml").read_bytes()
    result = mlxflow(job_copy, "run", "profile")
    assert result.returncode == 1
    assert result.stderr.startswith('profile.max_peak_memory = "1 MB": step ')
    assert "Traceback" not in result.stderr
    assert (job_copy / "artifacts/profile/report.toml").read_bytes() == before


def test_the_thread_samples_as_often_as_the_settings_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class MadeError(Exception):
        pass

    def make(*, samples_per_second: float, journal: Path) -> None:
        raise MadeError(samples_per_second, journal.parent)

    monkeypatch.setattr("mlxflow.profiling.profiler.MemoryProfiler", make)
    context = msgspec.structs.replace(CONTEXT, unfinished=tmp_path / "unfinished")
    with pytest.raises(MadeError) as caught:
        run(config=Config(samples_per_second=3.0), inputs=Inputs(), outputs=Outputs(), context=context)
    assert caught.value.args == (3.0, context.unfinished)


def test_a_killed_profile_leaves_its_readings_and_the_page_shows_them(
    job_copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workflow, unfinished = job_copy / "workflow.toml", job_copy / "artifacts/.mlxflow/unfinished/profile"
    assert not list(unfinished.glob("*")), "a run that came to its end leaves nothing"
    workflow.write_text(workflow.read_text().replace("num_steps = 3\n", "num_steps = 1000000\n", 1))
    environment = {**os.environ, "XDG_CACHE_HOME": str(job_copy.parent / "cache")}
    command = [sys.executable, "-m", "mlxflow", "run", "profile"]
    process = subprocess.Popen(command, cwd=job_copy, env=environment, stderr=subprocess.DEVNULL)
    monkeypatch.chdir(job_copy)

    def page() -> str:
        assert main(["report"]) == 0
        return re.sub(r"\s+", " ", (job_copy / "artifacts/index.html").read_text())

    try:
        while process.poll() is None and not any('"step",5,' in path.read_text() for path in unfinished.glob("*/*")):
            time.sleep(0.01)
        assert "The last run of profile is still running" in page()
    finally:
        process.kill()
        process.wait()
    (left,) = unfinished.glob("*/timeline.jsonl")
    steps = re.findall(r'^\["step",(\d+),.*\]$', left.read_text(), re.MULTILINE)
    shown = page()
    assert re.search(rf"The last run of profile was cut off (in \S+ )?after step {steps[-1]};", shown)
    assert "MLX&#39;s memory, at each step&#39;s end until then" in shown
    (job_copy / "artifacts/profile/report.toml").unlink()
    assert "at most until the profile ended: it was cut off" in page()
    assert capsys.readouterr().err == ""
