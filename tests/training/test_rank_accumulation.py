from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxflow.distributed.rank import Rank
from mlxflow.distributed.team import Team
from mlxflow.messages.errors import StageError
from mlxflow.training import trainer
from mlxflow.training.gradient_packing import Gradients, Joined
from mlxflow.training.rank_accumulation import RankAccumulator, _Status
from mlxflow.training.step import Step
from tests.late_device import LateDevice
from tests.training.small_training import make_trainer


class _TeamOfTwins(Team):
    """Two ranks of which the other one does what this one does, with changes."""

    def __init__(self, reduction: str = "ordered") -> None:
        super().__init__(Rank(0, 2, "", reduction), None)
        self.changes: dict[str, int] = {}

    def exchange(self, what: str, numbers: Sequence[int]) -> np.ndarray:
        other = _Status(*numbers)._replace(**self.changes) if isinstance(numbers, _Status) else numbers
        return np.array([numbers, other], np.int64)

    def gather(self, array: mx.array) -> mx.array:
        return mx.concatenate([array, array])

    def sum(self, array: mx.array) -> mx.array:
        return array + array


def _accumulator(team: Team, monkeypatch: pytest.MonkeyPatch) -> RankAccumulator:
    session = trainer.Session
    monkeypatch.setattr("tests.training.small_training.Session", lambda *given: session(*given)._replace(team=team))
    accumulator = make_trainer(lambda record: None, accum=4, dynamic_batch_size=False)._accumulator
    assert isinstance(accumulator, RankAccumulator)
    return accumulator


def _joined(step: Step, gradients: Gradients) -> Any:
    """Return gradients as the update of a step takes them."""
    return step.of_update.join(gradients.tree)


@pytest.fixture
def team() -> _TeamOfTwins:
    return _TeamOfTwins()


@pytest.fixture
def accumulator(team: _TeamOfTwins, monkeypatch: pytest.MonkeyPatch) -> RankAccumulator:
    return _accumulator(team, monkeypatch)


def test_each_round_adds_a_pass_of_each_rank(accumulator: RankAccumulator) -> None:
    assert accumulator.take_batch()
    assert [(one.number, one.begin, one.end) for one in accumulator._passes] == [(0, 0, 8), (2, 8, 16)]
    batch = accumulator._batch
    assert batch is not None
    assert batch.tokens.shape == (16, 9)
    step = accumulator._parts.step
    passes = [step.compute(batch.tokens[begin : begin + 8], batch.marks[begin : begin + 8]) for begin in (0, 8)]
    summed = accumulator.accumulate(waits=True)
    accumulator._parts.batches.close()
    assert isinstance(summed.gradients, Joined)
    own_passes = [tree_flatten(_joined(step, one)) for one in passes]
    for (name, found), *own in zip(tree_flatten(summed.gradients.arrays), *own_passes, strict=True):
        first, second = (gradient for _, gradient in own)
        expected = (((mx.zeros_like(first) + first) + first) + second) + second
        assert np.array_equal(np.array(found), np.array(expected)), name
    assert summed.targets == 2 * batch.targets == int(summed.gradients.targets)
    assert summed.cursor == 32


def test_a_fast_reduction_adds_each_rank_first(monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = _accumulator(_TeamOfTwins("fast"), monkeypatch)
    accumulator.take_batch()
    batch = accumulator._batch
    assert batch is not None
    step = accumulator._parts.step
    own = step.add(step.add(None, *batch.part(0, 8)), *batch.part(8, 16))
    summed = accumulator.accumulate(waits=False)
    accumulator._parts.batches.close()
    assert isinstance(summed.gradients, Joined)
    expected = tree_flatten(_joined(step, own))
    for (name, found), (_, mine) in zip(tree_flatten(summed.gradients.arrays), expected, strict=True):
        assert np.array_equal(np.array(found), np.array(mine + mine)), name


def test_a_signal_to_any_rank_stops_all_after_the_update(team: _TeamOfTwins, accumulator: RankAccumulator) -> None:
    accumulator.take_batch()
    assert not accumulator.stop_requested()
    team.changes = {"stops": 1}
    accumulator.accumulate(waits=False)
    accumulator._parts.batches.close()
    assert accumulator.stop_requested()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"weights": 5},
            "other weights than the other ranks after step 0. Run it again: it resumes from the last checkpoint.",
        ),
        ({"batch_size": 6}, "a batch size of its own in step 1: [8 6]."),
        ({"passes": 1}, "a number of passes of its own in step 1: [4 1]."),
    ],
)
def test_a_rank_that_differs_ends_the_run_with_its_name(
    team: _TeamOfTwins, accumulator: RankAccumulator, change: dict[str, int], message: str
) -> None:
    accumulator.take_batch()
    accumulator.after_update(compares=True)
    team.changes = change
    with pytest.raises(StageError) as caught:
        accumulator.accumulate(waits=False)
    accumulator._parts.batches.close()
    assert str(caught.value) == f"train: rank 1 has {message}"


def test_an_error_of_earlier_work_is_raised_and_not_taken_for_a_batch_that_is_too_large(
    accumulator: RankAccumulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Metal out of memory is raised later than it happens: the weights of the last update may be lost."""
    device = LateDevice(monkeypatch)
    accumulator.take_batch()
    device.calls_left = 1
    with pytest.raises(RuntimeError, match="Insufficient Memory"):
        accumulator.accumulate(waits=False)
    assert [one.reason for one in accumulator._parts.sizes.decisions] == ["begin"]
    accumulator._parts.batches.close()
