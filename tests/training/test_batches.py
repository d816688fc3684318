import numpy as np
import pytest

from mlxflow.training import build
from mlxflow.training.batches import Batches
from mlxflow.training.run_state import RunState
from mlxflow.training.settings import TrainingSettings
from tests.training.small_training import small_rows


@pytest.fixture
def state() -> RunState:
    return RunState()


@pytest.fixture
def batches(state: RunState) -> Batches:
    settings = TrainingSettings(workers=1, prefetch_batches=2)
    return Batches(build.make_data(small_rows(), small_rows(4), settings, seed=0), state)


def test_other_rows_continue_after_those_that_the_run_has_used(batches: Batches, state: RunState) -> None:
    eight = np.array(batches.take(8).tokens)
    assert batches.cursor == 8
    batches.close()
    small = np.array(batches.take(4).tokens)  # the update of the first eight rows was not done
    assert np.array_equal(small, eight[:4])
    state.cursor = 4
    rest = np.array(batches.take(4, np.array([2, 0], np.int64)).tokens)
    assert np.array_equal(rest, eight[[6, 4]])
    assert batches.cursor == 8
    batches.close()


def test_the_time_of_waiting_continues_from_a_restored_state(batches: Batches, state: RunState) -> None:
    state.data_wait_seconds = 100.0
    batches.restore()
    batches.take(4)
    batches.close()
    batches.take(8)
    batches.close()
    assert 100.0 <= state.data_wait_seconds < 200.0
