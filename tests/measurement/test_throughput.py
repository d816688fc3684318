from collections.abc import Callable

import pytest

from mlxflow.measurement import throughput


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still unless a step moves it."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return now


def _steps(clock: list[float], durations: list[float]) -> Callable[[], None]:
    remaining = iter(durations)

    def step() -> None:
        clock[0] += next(remaining)

    return step


def test_the_warmup_is_left_out(clock: list[float]) -> None:
    timing = throughput.time_steps(_steps(clock, [100, 50, 3, 1, 2]), num_steps=3, warmup_steps=2)
    assert timing.seconds == (3, 1, 2)
    assert (timing.median, timing.fastest, timing.slowest) == (2, 1, 3)


def test_steps_take_turns(clock: list[float]) -> None:
    order: list[str] = []
    first, second = throughput.interleave([lambda: order.append("a"), lambda: order.append("b")], num_rounds=3)
    assert order == ["a", "b"] * 3
    assert len(first.seconds) == len(second.seconds) == 3
