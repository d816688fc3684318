from collections.abc import Callable

import pytest

from mlxflow.benchmarking.throughput import interleave


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still unless a step moves it."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return now


def _step(clock: list[float], durations: list[float]) -> Callable[[], None]:
    remaining = iter(durations)

    def step() -> None:
        clock[0] += next(remaining)

    return step


def test_each_step_is_timed_by_itself(clock: list[float]) -> None:
    first, second = interleave([_step(clock, [3, 1, 2]), _step(clock, [10, 30, 20])], num_rounds=3)
    assert first.seconds == (3, 1, 2)
    assert (first.median, first.fastest, first.slowest) == (2, 1, 3)
    assert second.median == 20


def test_steps_are_timed_alternately() -> None:
    order: list[str] = []
    interleave([lambda: order.append("a"), lambda: order.append("b")], num_rounds=3)
    assert order == ["a", "b"] * 3
