from pathlib import Path

import pytest

from mlxflow.__main__ import main
from mlxflow.storage import report_files


def test_promises_prints_each_target_with_its_figure(
    built: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    promises = report_files.read_report(built / "artifacts/benchmark/report.toml")["promises"]
    monkeypatch.chdir(built)
    code = main(["promises"])
    out = capsys.readouterr().out
    assert code == (0 if all(promise["holds"] for promise in promises.values()) else 1)
    assert len(promises) == 4
    for promise in promises.values():
        assert f"| {promise['promise']} | {promise['figure']} | {'yes' if promise['holds'] else 'no'} |" in out


def test_promises_need_a_benchmark(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(job)
    assert main(["promises"]) == 2
    assert capsys.readouterr().err == "artifacts/benchmark/report.toml: missing. Run: mlxflow build benchmark\n"
    assert main(["promises", "--stage", "train"]) == 2
    assert capsys.readouterr().err == (
        "promises: --stage = train: expected a benchmark stage. Use benchmark (the default).\n"
    )
