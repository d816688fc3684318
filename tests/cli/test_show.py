import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxflow.cli.command import main
from mlxflow.storage.report_files import read_report, write_report


def _show(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["show", *arguments, "--workflow", str(folder / "workflow.toml")])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_show_pretokenize_prints_a_summary_and_rows(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _show(built, capsys, "pretokenize")
    report = read_report(built / "artifacts/pretokenize/report.toml")
    assert code == 0
    assert out.startswith(f"train: {report['train']['documents']:,} documents, {report['train']['tokens']:,} tokens (")
    row = _show(built, capsys, "pretokenize", "--row", "1")[1]
    assert row.strip()
    assert row in out


def test_show_refuses_missing_rows_and_rows_of_other_stages(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read_report(built / "artifacts/pretokenize/report.toml")["train"]["rows"]
    assert _show(built, capsys, "train", "--row", "0") == (
        2,
        "",
        "show train: --row = 0: only pretokenize has rows. Remove the option.\n",
    )
    assert _show(built, capsys, "pretokenize", "--row", str(rows)) == (
        2,
        "",
        f"show pretokenize: --row = {rows}: expected 0 to {rows - 1:,}. Name one of the training rows.\n",
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda report: report.pop("layers"), "layers: missing"),
        (lambda report: report.update(layers=3), "layers: expected `array`, got `int`"),
        (lambda report: report.update(layers=[3]), "layers[0]: expected `object`, got `int`"),
        (lambda report: report["layers"][0].pop("bits"), "layers[0].bits: missing"),
        (lambda report: report["layers"][0].update(bits="4"), "layers[0].bits: expected `int`, got `str`"),
        (lambda report: report["layers"][0].update(path=["x"]), "layers[0].path: expected `str`, got `array`"),
        (lambda report: report.update(parameters=-1), "parameters: expected `int` >= 0"),
        (lambda report: report.update(quality=[]), "quality: expected `object | null`, got `array`"),
        (lambda report: report["quality"].pop("kl"), "quality.kl: missing"),
        (
            lambda report: report["layers"][0].update(relative_error=float("nan")),
            "layers[0].relative_error = nan: expected a finite number",
        ),
    ],
)
def test_a_report_of_another_form_is_not_printed(
    built: Path,
    job: Path,
    change: Callable[[dict[str, Any]], object],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = read_report(built / "artifacts/quantize/q4/report.toml")
    change(report)
    path = job / "artifacts/quantize/q4/report.toml"
    path.parent.mkdir(parents=True)
    write_report(path, report)
    command = f"mlxflow build quantize:q4 --workflow {job}/workflow.toml"
    assert _show(job, capsys, "quantize:q4") == (2, "", f"{path}: {said}. Run: {command}\n")


def test_warnings_are_shown_and_that_the_quality_was_not_measured(
    built: Path, job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "quality not measured" not in _show(built, capsys, "quantize:q4")[1]
    shutil.copytree(built / "artifacts", job / "artifacts")
    path = job / "artifacts/quantize/q4/report.toml"
    report = read_report(path)
    del report["quality"]
    write_report(path, report | {"warnings": ["it is worse"]})
    assert _show(job, capsys, "quantize:q4")[1].splitlines()[-2:] == [
        "quality not measured without data: name a pretokenize stage in its key data",
        "it is worse",
    ]
    path = job / "artifacts/pretokenize/report.toml"
    write_report(path, read_report(path) | {"warnings": ["there is little text"]})
    assert "there is little text\n" in _show(job, capsys, "pretokenize")[1]


def test_odd_names_are_printed_without_control_characters(
    built: Path, job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = read_report(built / "artifacts/quantize/q4/report.toml")
    report["layers"][0] |= {"path": "[red]\x1b]0;t\x07\nx", "relative_error": 7, "bytes": 0}
    path = job / "artifacts/quantize/q4/report.toml"
    path.parent.mkdir(parents=True)
    write_report(path, report)
    code, shown, _ = _show(job, capsys, "quantize:q4")
    assert code == 0
    assert "[red]\\x1b]0;t\\x07" in shown
    assert "\x1b" not in shown
