from typing import Any

import pytest

from mlxflow.training.progress import show_progress

TRAIN = {
    "kind": "train",
    "step": 10,
    "loss": 2.3456,
    "learning_rate": 1e-3,
    "tokens_per_second": 12345.6,
    "peak_memory_bytes": 1.5e9,
}


@pytest.mark.parametrize(
    ("record", "line"),
    [
        (TRAIN, "step     10  loss 2.346  lr 1.0e-03  12,346 learned tokens/s  1.50 GB"),
        (TRAIN | {"loss": None}, "step     10  loss -  lr 1.0e-03  12,346 learned tokens/s  1.50 GB"),
        ({"kind": "validation", "step": 0, "perplexity": 1234.56}, "step      0  perplexity 1,234.6"),
        ({"kind": "batch_size", "step": 7, "batch_size": 16}, "step      7  batch 16"),
    ],
)
def test_a_record_is_one_line_where_there_is_no_terminal(
    record: dict[str, Any], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with show_progress(num_steps=20) as log:
        log(record)
    assert line in "".join(capsys.readouterr()).splitlines()
