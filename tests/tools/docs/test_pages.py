from pathlib import Path

import pytest

from tools.docs import __main__ as command
from tools.docs.pages import differing, write


def test_a_page_that_is_missing_or_differs_is_written(tmp_path: Path) -> None:
    pages = {"docs/a.md": "a", "docs/deep/b.md": "b", "docs/c.md": "c"}
    write({"docs/a.md": "a", "docs/c.md": "old"}, tmp_path)
    assert differing(pages, tmp_path) == ["docs/deep/b.md", "docs/c.md"]
    write(pages, tmp_path)
    assert differing(pages, tmp_path) == []
    assert (tmp_path / "docs/c.md").read_text() == "c"


def test_check_names_what_is_out_of_date_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "generated_pages", lambda: {"docs/reference/none.md": "new"})
    written: list[object] = []
    monkeypatch.setattr(command, "write", written.append)
    assert command.main(["--check"]) == 1
    assert capsys.readouterr().out == "docs/reference/none.md: out of date. Run: python -m tools.docs\n"
    assert written == []
    assert command.main([]) == 0
    assert written == [{"docs/reference/none.md": "new"}]
