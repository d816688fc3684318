import os

import pytest

from mlxflow.distributed import rank
from mlxflow.distributed.rank import ALONE, Rank


def test_a_rank_reads_the_place_that_its_launcher_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    written = Rank(3, 4, "ring", "fast", writing, shards_optimizer=True, shards_layers=True, too_many_rows=3)
    assert Rank.read(written.environment()) == written
    for name, value in written.environment().items():
        monkeypatch.setenv(name, value)
    assert rank.of_this_process.__wrapped__() == written
    assert not written.is_first
    assert written.environment().keys().isdisjoint(os.environ)  # its own child processes are no ranks
    os.close(reading)
    os.close(writing)


def test_a_process_without_a_launcher_is_alone() -> None:
    assert Rank.read({}) is None
    assert rank.of_this_process() == ALONE
    assert ALONE.is_first
