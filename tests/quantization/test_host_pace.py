import time

import numpy as np
import pytest

from mlxflow.quantization.host_pace import HostWork, host_pace


def test_each_part_of_the_work_has_its_own_pace() -> None:
    assert HostWork(6e9, 8e9, 3e6).seconds(HostWork(3e9, 2e9, 1e6)) == pytest.approx(2 + 4 + 3)


def test_the_trials_count_products_and_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))  # a call takes a second by this clock
    pace = host_pace()
    assert pace.factoring == 2 * 1024 * 1024 * 256
    assert pace.compensating / pace.factoring in (1, 2, 3, 4)
    assert pace.rounding == 4 * 1024 * 32
    monkeypatch.undo()
    assert all(0 < one < np.inf for one in host_pace())
