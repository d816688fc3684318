"""`mlxflow compare`, `mlxflow promises` and the baseline of a workflow, on the report of a real benchmark."""

import subprocess
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mlxflow.__main__ import main
from mlxflow.benchmarking.baseline import REPETITIONS, hold_against
from mlxflow.benchmarking.report_comparison import training_name
from mlxflow.benchmarking.time_budget import AskedAmounts, lowered
from mlxflow.errors import ArtifactError, StageError
from mlxflow.stages import benchmark
from mlxflow.storage import report_files
from mlxflow.workflow.stage import Context


@pytest.fixture
def report(built: Path) -> dict[str, Any]:
    return report_files.read_report(built / "artifacts/benchmark/report.toml")


def _write(path: Path, report: dict[str, Any], *, speed: float = 1.0, **changes: Any) -> Path:
    """Write a report in which training runs so many times as fast, in no noise at all."""
    for row in report["training"]:
        for name in ("tokens_per_second", "low_tokens_per_second", "high_tokens_per_second"):
            row[name] = row["tokens_per_second"] * (speed if name == "tokens_per_second" else 1)
        for name in ("low_relative_tokens_per_second", "high_relative_tokens_per_second"):
            row[name] = row["tokens_per_second"]
    report_files.write_report(path, report | changes)
    return path


def test_equal_reports_differ_only_within_noise(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifacts = built / "artifacts"
    assert main(["compare", str(artifacts / "benchmark/report.toml"), str(built)]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) > 20
    assert all(line.endswith("| +0.0% | noise |") for line in lines)


def test_a_slower_run_is_reported_figure_by_figure(
    report: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fast = _write(tmp_path / "fast.toml", report, speed=2.0)
    slow = _write(tmp_path / "slow.toml", report, speed=0.5)
    assert main(["compare", str(fast), str(slow)]) == 0
    out = capsys.readouterr().out
    assert "| workflow, 4 rows | tokens_per_second |" in out
    assert out.count("| -50.0% | worse |") == len(report["training"])


def test_a_saved_report_is_read_from_its_commit(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "saved.toml", report)
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.invalid", "-c", "commit.gpgsign=false")
    for command in (("init", "-q"), ("add", "saved.toml"), (*identity, "commit", "-qm", "one")):
        subprocess.run(["git", *command], check=True)
    assert main(["compare", "HEAD:saved.toml", "saved.toml"]) == 0
    assert "noise" in capsys.readouterr().out
    assert main(["compare", "HEAD:other.toml", "saved.toml"]) == 2
    assert capsys.readouterr().err.startswith("HEAD:other.toml: git has no such file (")


def test_another_version_is_refused_by_name(
    report: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _write(tmp_path / "old.toml", report, version=3)
    assert main(["compare", str(path), str(path)]) == 2
    assert capsys.readouterr().err == (
        f"{path}: version = 3: expected {benchmark.VERSION}. "
        "Measure it again with this version of mlxflow: doit benchmark\n"
    )


def test_a_file_that_is_no_benchmark_report_is_refused_by_name(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = built / "artifacts/train/report.toml"
    assert main(["compare", str(path), str(path)]) == 2
    assert capsys.readouterr().err == f"{path}: no benchmark's report (it has no training and models). Name one.\n"
    assert main(["compare", str(tmp_path), str(path)]) == 2
    assert capsys.readouterr().err == f"{tmp_path}: no benchmark's report in it. Run: doit benchmark\n"
    empty = tmp_path / "empty.toml"
    whole = report_files.read_report(built / "artifacts/benchmark/report.toml")
    report_files.write_report(empty, whole | {"training": [], "models": []})
    assert main(["compare", str(empty), str(empty)]) == 2
    assert capsys.readouterr().err == (
        f"compare: {empty} and {empty} have no row in common. Measure the same batch sizes and models.\n"
    )


def test_different_devices_are_compared_only_with_force(
    report: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = {"kind": "gpu", "name": "Another", "processor": "one"}
    here, there = _write(tmp_path / "a.toml", report), _write(tmp_path / "b.toml", report, device=device)
    assert main(["compare", str(here), str(there)]) == 2
    own = report["device"]
    assert capsys.readouterr().err == (
        f"compare: {here} on {own['name']} ({own['kind']}), {there} on Another (gpu): different devices. "
        "Add --force to compare them nevertheless.\n"
    )
    assert main(["compare", str(here), str(there), "--force"]) == 0


# --- the baseline of a workflow


def _context(folder: Path) -> Context:
    return msgspec.convert(
        {
            "task": "benchmark",
            "seed": 0,
            "device": "cpu",
            "memory_limit_bytes": 1,
            "provenance": {},
            "tasks": [],
            "members": [],
            "name": "tiny",
            "digests": str(folder / "digests.json"),
            **{name: str(folder) for name in ("root", "state", "folder", "unfinished")},
        },
        Context,
        dec_hook=lambda kind, value: kind(value),
    )


def _hold(before: Any, after: Any, again: Any, *, max_regression: float = 0.05) -> dict[str, Any]:
    return hold_against(before, after, again, name="before.toml", max_regression=max_regression, task="benchmark")


def test_a_regression_beyond_the_noise_fails_the_stage(report: dict[str, Any], tmp_path: Path) -> None:
    before = report_files.read_report(_write(tmp_path / "before.toml", report, speed=2.0))
    after = report_files.read_report(_write(tmp_path / "after.toml", report, speed=0.5))
    asked: list[set[str]] = []

    def again(report: dict[str, Any]) -> Callable[[Set[str]], dict[str, Any]]:
        def measure_again(names: Set[str]) -> dict[str, Any]:
            asked.append({*names})
            return report

        return measure_again

    with pytest.raises(StageError) as raised:
        _hold(before, after, again(after))
    names = {training_name(row) for row in report["training"]}
    assert asked == [names] * REPETITIONS, "no more than so often"
    first, *lines = str(raised.value).splitlines()
    assert first == (
        "benchmark: worse than before.toml beyond the noise and benchmark.max_regression = 0.05, in 4 runs:"
    )
    assert len(lines) == len(report["training"])
    assert lines[0].startswith("baseline, 2 rows: tokens_per_second -50.0% (")
    asked.clear()
    _hold(after, before, again(after))  # faster is no regression
    assert _hold(before, after, again(after), max_regression=0.6)["compared"] is True
    assert not asked
    found = _hold(before, after, again(before))
    assert asked == [names], "what is not there again is noise between runs"
    assert found["repetitions"] == 1
    assert len(found["noise_between_runs"]) == len(names)


def test_a_baseline_of_another_device_is_reported_and_not_compared(
    report: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = {"kind": "gpu", "name": "Another", "processor": "one"}
    before = report_files.read_report(_write(tmp_path / "before.toml", report, speed=9.0, device=device))
    found = _hold(before, report, lambda _: {})
    assert found == {"baseline": "before.toml", "compared": False}
    assert capsys.readouterr().err == (
        'benchmark.baseline = "before.toml": not compared, it was measured on Another, this on '
        f"{report['device']['name']}. mlxflow compare --force compares them.\n"
    )


def test_a_baseline_of_another_version_is_refused_before_anything_is_measured(
    report: dict[str, Any], tmp_path: Path
) -> None:
    path = _write(tmp_path / "before.toml", report, version=1)
    inputs = benchmark.Inputs(baseline=(path,))
    with pytest.raises(ArtifactError, match="version = 1: expected"):
        benchmark.run(
            config=benchmark.Config(baseline="before.toml"),
            inputs=inputs,
            outputs=benchmark.Outputs(),
            context=_context(tmp_path),
        )


def test_parts_skipped_for_lack_of_time_are_named() -> None:
    asked = AskedAmounts(num_steps=100, convergence_steps=50, max_validation_rows=64, max_seconds=60)
    whole: dict[str, Any] = {
        "training": [{"num_steps": 100}],
        "convergence": [{"steps": [1, 50]}],
        "models": [{"validation_rows": 64, "has_fewer_rows": False}],
    }
    assert list(lowered(whole, asked)) == []
    less: dict[str, Any] = {
        "training": [{"num_steps": 15}, {"error": "not measured: max_seconds = 60 did not suffice"}],
        "convergence": [{"steps": [1, 5]}, {"steps": [1, 5]}],
        "models": [{"validation_rows": 8, "has_fewer_rows": True}, {"error": "does not fit"}],
    }
    because = "max_seconds = 60 did not suffice for more"
    assert list(lowered(less, asked)) == [
        f"15 of 100 training steps timed: {because}",
        f"1 ways of training left out: {because}",
        f"5 of 50 steps of convergence: {because}",
        f"perplexity of 8 of 64 validation rows: {because}",
    ]


# --- what the stage reports


def test_every_optimization_of_the_workflow_is_switched_off_at_its_own_batch_size(report: dict[str, Any]) -> None:
    rows = [(row["name"], row["batch_size"]) for row in report["training"]]
    assert rows[:4] == [("baseline", 2), ("workflow", 2), ("baseline", 4), ("workflow", 4)]
    assert {name for name, _ in rows[4:]} >= {"without compile", "without run-ahead", "without fused_loss"}
    assert {size for _, size in rows[4:]} == {4}
    for row in report["training"]:
        assert ("workflow_speedup" in row) == (row["name"] != "workflow")
        assert row["low_tokens_per_second"] <= row["tokens_per_second"] <= row["high_tokens_per_second"]
        assert row["peak_memory_bytes"] > 0 <= row["compile_seconds"]


def test_curves_bottleneck_device_and_speeds_are_reported(report: dict[str, Any]) -> None:
    assert [curve["name"] for curve in report["convergence"]] == ["baseline", "workflow"]
    assert all(curve["steps"] == [1, 2, 3, 4] for curve in report["convergence"])
    shares = [report["bottleneck"][f"{part}_share"] for part in ("data", "graph", "compute", "synchronize")]
    assert sum(shares) == pytest.approx(1)
    for reached in ("flops_per_second", "decode_bytes_per_second"):
        assert report["bottleneck"][reached] > 0
        assert report["bottleneck"][f"ceiling_{reached.removeprefix('decode_')}"] > 0
    assert report["bottleneck"]["advice"]
    assert report["drift"]["name"] == "baseline"
    for row in report["models"]:
        assert [one["prompt_tokens"] for one in row["prefill"]] == [4, 8, 16]
        assert row["compression_ratio_fp32"] == pytest.approx(2 * row["compression_ratio_bf16"])
        assert row["peak_memory_bytes"] > 0.9 * row["model_bytes"]
        assert row["decode_tokens_per_second"] > 0


def test_parts_out_of_memory_are_left_out_and_other_failures_are_raised(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(said: str) -> None:
        raise RuntimeError(said)

    assert benchmark._if_it_fits(lambda: 3) == 3
    assert benchmark._if_it_fits(lambda: fail("[malloc] Unable to allocate 5 bytes.")) is None
    assert capsys.readouterr().err == (
        "benchmark: left out, it does not fit into the memory ([malloc] Unable to allocate 5 bytes.)\n"
    )
    with pytest.raises(RuntimeError, match="a mistake"):
        benchmark._if_it_fits(lambda: fail("a mistake"))


def test_the_train_report_has_every_setting_resolved(built: Path) -> None:
    settings = report_files.read_report(built / "artifacts/train/report.toml")["settings"]
    assert settings["fused_loss"] is True  # "auto" on the CPU
    assert settings["weight_decay"] == 0.1  # "auto" with AdamW
    assert settings["optimizer_options"] == {"betas": [0.9, 0.95]}
    assert (settings["batch_size"], settings["masks_documents"], settings["precision"]) == (4, False, "fp32")


# --- reports that others wrote


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda report: report.pop("device"), "device: missing"),
        (lambda report: report.update(device=[]), "device: expected `object`, got `array`"),
        (lambda report: report["training"][0].pop("name"), "training[0].name: missing"),
        (lambda report: report["training"][0].update(gain=1), "training[0].gain: unknown key"),
        (
            lambda report: report["training"][0].pop("low_tokens_per_second"),
            "training[0]: expected `low_tokens_per_second` or `error`",
        ),
        (
            lambda report: report["training"][0].update(tokens_per_second=0.0),
            "training[0].tokens_per_second: expected `float` > 0.0",
        ),
        (
            lambda report: report["models"][0]["prefill"][0].update(tokens_per_second="fast"),
            "models[0].prefill[0].tokens_per_second: expected `float`, got `str`",
        ),
        (
            lambda report: report["models"][0].pop("perplexity_standard_error"),
            "models[0]: `perplexity` without `perplexity_standard_error`",
        ),
        (
            lambda report: report["training"][0].update(processed_tokens_per_second=float("inf")),
            "training[0].processed_tokens_per_second = inf: expected a finite number",
        ),
    ],
)
def test_a_benchmark_of_another_form_is_not_compared(
    built: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], object],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good, bad = built / "artifacts/benchmark/report.toml", tmp_path / "bad.toml"
    report = report_files.read_report(good)
    change(report)
    report_files.write_report(bad, report)
    for order in ((good, bad), (bad, good)):
        assert main(["compare", *map(str, order)]) == 2
        assert tuple(capsys.readouterr()) == ("", f"{bad}: {said}. Run: doit benchmark\n")
