from pathlib import Path

from tests.report.pages import text_of
from tests.report.runs import edit


def test_warnings_and_rows_without_a_target_are_shown(root: Path) -> None:
    edit(root, "pretokenize", lambda report: report.update(warnings=["kept out of training: d/test.jsonl"]))
    text = text_of(root)
    assert "kept out of training: d/test.jsonl" in text
    assert "rows without a token to learn 4" in text
