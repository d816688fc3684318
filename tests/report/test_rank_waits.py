from typing import Any

from mlxflow.report.rank_waits import WaitSpan, wait_spans


def _record(step: object, seconds: object, waited: object) -> dict[str, Any]:
    return {"kind": "train", "step": step, "elapsed_seconds": seconds, "rank_waited_seconds": waited}


def test_each_record_says_how_much_of_the_time_since_the_last_one_a_rank_waited() -> None:
    spans = wait_spans(
        [
            _record(2, 4.0, [1.0, 2.0]),
            {"kind": "validation", "step": 2},
            _record(4, 6.0, [2.0, 2.5]),
            _record(6, 2.0, [0.5, 0.0, 1.0]),  # resumed on three ranks
        ]
    )
    assert spans == [
        WaitSpan(0, 2, (0.25, 0.5)),
        WaitSpan(2, 4, (0.5, 0.25)),
        WaitSpan(4, 6, (0.25, 0.0, 0.5)),
    ]
    assert [span.slowest for span in spans] == [0, 1, 1]


def test_records_without_ranks_or_with_damage_are_left_out() -> None:
    assert wait_spans([{"kind": "train", "step": 1, "elapsed_seconds": 1.0}]) == []
    damaged = [_record(1, 1.0, "x"), _record(1, 1.0, ["x", 1]), _record("x", 1.0, [1, 2]), _record(1, None, [1, 2])]
    assert wait_spans(damaged) == []
    assert wait_spans([_record(2, 1.0, [0.1, 0.2]), _record(2, 1.0, [0.1, 0.2])]) == [WaitSpan(0, 2, (0.1, 0.2))]
