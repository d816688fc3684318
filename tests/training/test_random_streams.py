from collections.abc import Callable
from typing import cast

import mlx.core as mx
import pytest

from mlxflow.training.random_streams import RandomStream


def _draw(times: int) -> list[float]:
    """Draw as a forward pass does; return what was drawn."""
    return [float(mx.random.uniform()) for _ in range(times)]


def _state() -> list[int]:
    return cast("list[mx.array]", mx.random.state)[0].tolist()  # type: ignore[return-value]


def _train(updates: int, passes: list[int], draw: Callable[[], list[float]]) -> dict[tuple[int, int], list[float]]:
    """Draw in some passes of each update of four, as a rank does; return what each pass drew."""
    stream, drawn = RandomStream(), {}
    for update in range(updates):
        stream.begin_update()
        for number in passes:
            stream.begin_pass(number)
            drawn[update, number] = draw()
            if stream.draws < 0 and stream.count_draws():
                stream.begin_pass(number)
                drawn[update, number] = draw()
        stream.draws = max(stream.draws, 0) if not passes else stream.draws
        stream.end_update(4)
    return drawn


@pytest.mark.parametrize("times", [0, 1, 3])
def test_ranks_draw_the_numbers_of_one_process(times: int) -> None:
    mx.random.seed(5)
    alone = {(update, number): _draw(times) for update in range(3) for number in range(4)}
    after = _state()
    shared: dict[tuple[int, int], list[float]] = {}
    for passes in ([0, 2], [1, 3]):
        mx.random.seed(5)
        shared |= _train(3, passes, lambda: _draw(times))
        assert _state() == after
    assert shared == alone
