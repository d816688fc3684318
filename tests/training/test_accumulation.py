from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxflow.training.accumulation import Accumulator
from mlxflow.training.gradient_packing import Gradients
from mlxflow.training.step import Step
from tests.training.small_training import make_trainer, padded_rows


@pytest.fixture
def accumulator() -> Accumulator:
    accumulator = make_trainer(lambda record: None, accum=3, dynamic_batch_size=False)._accumulator
    assert isinstance(accumulator, Accumulator)
    return accumulator


def test_a_shape_is_new_once(accumulator: Accumulator) -> None:
    assert accumulator.take_batch()
    accumulator.accumulate(waits=False)
    assert not accumulator.take_batch()
    accumulator._parts.batches.close()


def test_an_interrupted_update_continues_with_the_rows_that_are_left(accumulator: Accumulator) -> None:
    class _EndedError(Exception):
        pass

    def stop() -> None:
        raise _EndedError

    accumulator.take_batch()
    whole = accumulator.accumulate(waits=True)
    accumulator._parts.batches.close()
    accumulator._parts.state.rows_done = 0
    accumulator.stop_requested, accumulator._stop = lambda: True, stop
    accumulator.take_batch()
    with pytest.raises(_EndedError):
        accumulator.accumulate(waits=True)
    assert accumulator._parts.state.rows_done == 8
    assert accumulator.partial is not None
    accumulator._parts.batches.close()
    accumulator.stop_requested = lambda: False
    accumulator.take_batch()
    rest = accumulator.accumulate(waits=True)
    accumulator._parts.batches.close()
    assert accumulator.partial is None
    assert (rest.targets, rest.cursor) == (whole.targets, whole.cursor) == (rest.targets, 24)
    expected, sums = (dict(tree_flatten(summed.gradients.tree)) for summed in (whole, rest))
    for name in expected:
        assert np.array_equal(np.array(expected[name]), np.array(sums[name])), name
    assert float(rest.gradients.targets) == rest.targets
    assert mx.isfinite(rest.gradients.total)


@pytest.mark.parametrize(("accum", "kind"), [(1, "compute"), (3, "add")])
def test_padding_after_the_longest_row_of_a_pass_is_not_computed(
    monkeypatch: pytest.MonkeyPatch, accum: int, kind: str
) -> None:
    widths: list[int] = []
    plain = getattr(Step, kind)

    def noted(step: Step, *given: Any) -> Any:
        widths.append(given[-1].shape[1] - 1)
        assert given[-1].shape == given[-2].shape
        return plain(step, *given)

    monkeypatch.setattr(Step, kind, noted)
    rows = padded_rows()
    accumulator = make_trainer(lambda record: None, rows=rows, accum=accum, dynamic_batch_size=False)._accumulator
    assert isinstance(accumulator, Accumulator)
    expected, news = [], []
    for number in range(6):
        news.append(accumulator.take_batch(is_whole=number == 5))
        batch = accumulator._batch
        assert batch is not None
        ends = [int(np.flatnonzero(row)[-1]) for row in np.array(batch.marks)]  # the place of the last target
        passes = [max(ends[first : first + 8]) for first in range(0, len(ends), 8)]
        expected += [96 if number == 5 else min(96, -(-end // 32) * 32) for end in passes]
        summed = accumulator.accumulate(waits=True)
        assert float(summed.gradients.targets) == batch.targets
        accumulator._parts.state.rows_done = 0
    accumulator._parts.batches.close()
    assert widths == expected
    assert min(widths) < 96
    assert news[0]
    assert sum(news) <= len(set(widths))  # each width once


def test_sums_without_padding_are_those_with_it() -> None:
    """In fp32 a sum of 96 products in another order differs by less than 96 roundings of its largest part."""
    sums = []
    for is_whole in (False, True):
        trainer = make_trainer(lambda record: None, rows=padded_rows(), accum=3, dynamic_batch_size=False)
        accumulator = trainer._accumulator
        accumulator.take_batch(is_whole=is_whole)
        sums.append(accumulator.accumulate(waits=True))
        trainer._batches.close()
    cut, whole = sums
    assert isinstance(cut.gradients, Gradients)
    assert isinstance(whole.gradients, Gradients)
    assert cut.targets == whole.targets == float(cut.gradients.targets) == float(whole.gradients.targets)
    assert float(cut.gradients.total) == pytest.approx(float(whole.gradients.total), rel=1e-6)
    for (name, found), (_, expected) in zip(
        tree_flatten(cut.gradients.tree), tree_flatten(whole.gradients.tree), strict=True
    ):
        off = float(mx.abs(found - expected).max())
        assert off <= 96 * 2**-24 * max(1.0, float(mx.abs(expected).max())), name
