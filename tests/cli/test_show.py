from pathlib import Path

import pytest

from mlxflow.cli.command import main
from mlxflow.storage.report_files import read_report


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


def test_show_refuses_other_stages_and_rows_that_are_not_there(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read_report(built / "artifacts/pretokenize/report.toml")["train"]["rows"]
    assert _show(built, capsys, "train") == (
        2,
        "",
        "train: there is nothing to show of it. Name a pretokenize or a quantize stage.\n",
    )
    assert _show(built, capsys, "pretokenize", "--row", str(rows)) == (
        2,
        "",
        f"show pretokenize: --row = {rows}: expected 0 to {rows - 1:,}. Name one of the training rows.\n",
    )
