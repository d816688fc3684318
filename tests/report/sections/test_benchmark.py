from pathlib import Path

from tests.report.pages import text_of
from tests.report.runs import edit


def test_a_row_out_of_memory_says_so_and_the_others_are_shown(root: Path) -> None:
    failed = [{"model": "quantize:q2", "model_bytes": 10, "error": "does not fit: 5 bytes more may not be had"}]
    edit(root, "benchmark", lambda report: report["models"].extend(failed))
    big = {"name": "workflow", "batch_size": 64, "error": "does not fit"}
    edit(root, "benchmark", lambda report: report["training"].append(big))
    text = text_of(root)
    assert "quantize:q2: does not fit: 5 bytes more may not be had" in text
    assert "workflow, 64 rows: does not fit" in text
    assert "stage 49.1 kB 7.10 5.60" in text


def test_a_device_that_slowed_down_is_named(root: Path) -> None:
    edit(root, "benchmark", lambda report: report["drift"].update(ratio=1.21, is_noticed=True))
    assert "took 1.21 times as long a step. The device slowed down meanwhile." in text_of(root)


def test_the_speed_on_several_ranks_is_shown_with_its_efficiency(root: Path) -> None:
    assert "Training on several ranks" not in text_of(root)
    ranks = {
        "ranks": 2,
        "backend": "ring",
        "alone_tokens_per_second": 1000.0,
        "tokens_per_second": 1900.0,
        "efficiency": 0.95,
        "waited_seconds": [0.5, 2.0],
    }
    edit(root, "benchmark", lambda report: report.update(ranks=ranks))
    text = text_of(root)
    assert "1 process 1,000" in text
    assert "2 ranks (ring) 1,900 95.0 % 500 ms, 2 s" in text
