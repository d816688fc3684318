from pathlib import Path

from tools.docs.links import anchors, broken_links, slugify


def test_broken_links_are_named_with_file_and_line(tmp_path: Path) -> None:
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("# A title\n\n## `[train]` and *more*, twice\n\n## `[train]` and *more*, twice\n")
    page.write_text(
        "# Page\n\n[a](other.md) [b](other.md#train-and-more-twice-1) [c](#page) [d](https://example.org/x)\n\n"
        "| cell |\n|---|\n| [e](missing.md) |\n| [f](other.md#nowhere) ![g](none.png) |\n\n    [h](code.md)\n"
    )
    assert broken_links([page, other]) == [
        f"{page}:7: missing.md: no such file",
        f"{page}:8: other.md#nowhere: no such heading",
        f"{page}:8: none.png: no such file",
    ]


def test_anchors_are_those_of_github(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# The first run, line by line\n\n## `mlxflow init`\n\n## `apply_plan`\n")
    assert anchors(page) == {"the-first-run-line-by-line", "mlxflow-init", "apply_plan"}
    assert slugify("`[train]`: why?") == "train-why"
