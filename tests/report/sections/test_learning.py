import json
from pathlib import Path

from mlxflow.report.render import render
from tests.report.pages import text_of
from tests.report.runs import read


def test_an_unreadable_line_of_the_learning_curve_is_counted(root: Path) -> None:
    with (root / "artifacts/train/metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert "train/metrics.jsonl: 1 of its lines cannot be read and are left out." in text_of(root)


def test_the_waiting_of_each_rank_is_drawn_with_the_slowest_one(root: Path) -> None:
    path = root / "artifacts/train/metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    updates = [record for record in records if record["kind"] == "train"]
    for number, record in enumerate(updates, 1):  # rank 1 waits for rank 0 in every step but the last
        waited = (
            [0.1 * number, 0.5 * number] if number < len(updates) else [0.1 * (number - 1) + 0.4, 0.5 * (number - 1)]
        )
        record |= {"rank_waited_seconds": waited, "elapsed_seconds": float(number)}
    assert len(updates) > 2
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    text = text_of(root)
    assert "Share of the time that each rank waited for the others" in text
    assert "Rank Waited Steps as the slowest 0 " in text
    assert "Tokens learned from per second, by all ranks" in text
    page = render([read(root)]).decode()
    assert page.index("slowest: rank 0") < page.index("slowest: rank 1")


def test_a_training_on_one_process_has_no_waiting(root: Path) -> None:
    assert "waited for the others" not in text_of(root)
