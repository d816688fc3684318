"""`mlxflow compare` on the report of a real benchmark."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxflow.__main__ import main
from mlxflow.stages import benchmark
from mlxflow.storage import report_files


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


def _commit(*names: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.invalid", "-c", "commit.gpgsign=false")
    for command in (("add", "-f", *names), (*identity, "commit", "-qm", "one")):
        subprocess.run(["git", *command], check=True)


def test_a_saved_report_is_read_from_its_commit(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project = tmp_path / "a project"
    (project / "artifacts/benchmark").mkdir(parents=True)
    monkeypatch.chdir(project)
    _write(Path("artifacts/benchmark/report.toml"), report)
    subprocess.run(["git", "init", "-q", ".."], check=True)
    _commit("artifacts/benchmark/report.toml")
    places = (".", "artifacts", "artifacts/benchmark", "artifacts/benchmark/report.toml", "a project/artifacts", "")
    for place in places:  # from the root of the repository, or from the folder that the command runs in
        assert main(["compare", f"HEAD:{place}", "artifacts"]) == 0, place
        assert "noise" in capsys.readouterr().out
    assert main(["compare", ":artifacts", "artifacts"]) == 0  # from git's index


def test_an_uncommitted_report_is_refused_with_the_command_that_commits_it(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("LC_ALL", "C")

    def refused(name: str) -> str:
        assert main(["compare", name, "artifacts"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line.removeprefix(f"{name}: ")

    commit = 'git add -f artifacts/benchmark/report.toml && git commit -m "Benchmark"'
    assert refused("HEAD:artifacts") == (
        "git cannot be asked (fatal: not a git repository (or any of the parent directories): .git). "
        f"Name a report or a folder, or run: git init && mlxflow build benchmark && {commit}"
    )
    subprocess.run(["git", "init", "-q"], check=True)
    assert refused("HEAD:artifacts") == f"nothing is committed yet. Run: mlxflow build benchmark && {commit}"
    Path("artifacts/benchmark").mkdir(parents=True)
    _write(Path("artifacts/benchmark/report.toml"), report)
    assert refused("HEAD:artifacts/benchmark") == f"nothing is committed yet. Run: {commit}"
    Path("mlxflow.lock").write_text("")
    _commit("mlxflow.lock")
    known = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    assert refused("HEAD:.") == f"not in commit {known.strip()}. Commit the report once, then compare: {commit}"
    assert refused("HEAD:mlxflow.lock") == (
        "a lock holds no figures. Name a benchmark's report: HEAD:artifacts/benchmark/report.toml"
    )
    assert refused("v1:.") == "git knows no such commit. Name one that `git log` shows"
    assert refused(":artifacts") == f"not in git's index. Run: {commit}"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refused("HEAD:.") == "compare: git is not installed. Install it, or name a report or a folder."


def test_another_version_is_refused_by_name(
    report: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _write(tmp_path / "old.toml", report, version=3)
    assert main(["compare", str(path), str(path)]) == 2
    assert capsys.readouterr().err == (
        f"{path}: version = 3: expected {benchmark.VERSION}. "
        "Measure it again with this version of mlxflow: mlxflow build benchmark\n"
    )


def test_a_file_that_is_no_benchmark_report_is_refused_by_name(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = built / "artifacts/train/report.toml"
    assert main(["compare", str(path), str(path)]) == 2
    assert capsys.readouterr().err == f"{path}: no benchmark's report (it has no training and models). Name one.\n"
    assert main(["compare", str(tmp_path), str(path)]) == 2
    assert capsys.readouterr().err == f"{tmp_path}: no benchmark's report in it. Run: mlxflow build benchmark\n"
    assert main(["compare", str(tmp_path / "none"), str(path)]) == 2
    assert capsys.readouterr().err == f"{tmp_path / 'none'}: missing. Run: mlxflow build benchmark\n"
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
        assert tuple(capsys.readouterr()) == ("", f"{bad}: {said}. Run: mlxflow build benchmark\n")
