from typing import Any, cast

import pytest

from mlxflow.benchmarking.rank_efficiency import time_ranks
from mlxflow.storage.run_context import Context, RankSpeed


class _Timed:
    """A context of a workflow with two ranks."""

    task = "benchmark"

    def __init__(self, speeds: tuple[RankSpeed, ...]) -> None:
        self.asked: list[Any] = []
        self._speeds = speeds

    def time_ranks(self, *asked: Any) -> tuple[RankSpeed, ...]:
        self.asked.append(asked)
        return self._speeds


def test_the_efficiency_is_the_share_of_as_many_single_processes(capsys: pytest.CaptureFixture[str]) -> None:
    timed = _Timed((RankSpeed(1, "", 1000.0, ()), RankSpeed(2, "nccl", 1900.0, (0.5, 0.25))))
    figures = time_ranks(cast("Context", timed), "train", 3)
    assert figures
    assert (figures.ranks, figures.backend, figures.efficiency, figures.waited_seconds) == (
        2,
        "nccl",
        0.95,
        (0.5, 0.25),
    )
    assert timed.asked == [("train", 10)]
    assert capsys.readouterr().err == (
        "benchmark: 2 ranks (nccl) 1,900 tokens/s, one process 1,000 tokens/s: 1.90 times as fast, an efficiency of "
        "95%\n"
    )
    assert time_ranks(cast("Context", _Timed(())), "train", 30) is None
