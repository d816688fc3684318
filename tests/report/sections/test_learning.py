from pathlib import Path

from tests.report.pages import text_of


def test_an_unreadable_line_of_the_learning_curve_is_counted(root: Path) -> None:
    with (root / "artifacts/train/metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert "train/metrics.jsonl: 1 of its lines cannot be read and are left out." in text_of(root)
