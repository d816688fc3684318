import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxflow.training.accumulation import Accumulator
from tests.training.small_training import make_trainer


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
