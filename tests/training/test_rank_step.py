import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxflow.distributed.rank import Rank
from mlxflow.distributed.team import Team
from mlxflow.training.rank_step import Packed, RankStep, Sums
from tests.distributed import two_ranks
from tests.training.small_training import make_trainer

TOKENS = np.random.default_rng(3).integers(0, 30, (4, 9))


class _Echo(Team):
    """Rank 0 of some ranks that send what it sends."""

    def __init__(self, size: int) -> None:
        super().__init__(Rank(0, size, "", "ordered"), None)

    def gather(self, array: mx.array) -> mx.array:
        return mx.concatenate([array] * self.size)

    def sum(self, array: mx.array) -> mx.array:
        return array * self.size


def _rank_step(size: int) -> RankStep:
    step = make_trainer(lambda record: None)._step
    return RankStep(step, step.packing(), _Echo(size))


def _gradients(rank_step: RankStep) -> Packed:
    marks = mx.ones(TOKENS.shape, mx.uint8) * 3
    packed = rank_step.compute((mx.array(TOKENS), marks))
    mx.eval(packed)
    return packed


def _numbers(sums: Sums) -> np.ndarray:
    return np.concatenate([np.array(piece) for pieces in sums for piece in pieces])


@pytest.mark.parametrize("count", [1, 3])
def test_rounds_of_passes_are_added_in_the_order_of_the_ranks(count: int) -> None:
    rank_step = _rank_step(3)
    mine = _gradients(rank_step)
    first = rank_step.add_in_rank_order(None, list(mine), 3)
    both = rank_step.add_in_rank_order(first, list(mine), count)
    one = np.concatenate([np.array(array) for array in mine])
    expected = np.zeros_like(one)
    for _ in range(3 + count):
        expected = expected + one
    assert np.array_equal(_numbers(both), expected)


def test_an_update_goes_on_from_sums_that_it_began_with() -> None:
    rank_step = _rank_step(2)
    mine = _gradients(rank_step)
    step = rank_step._step
    begun = step.add(None, mx.array(TOKENS), mx.ones(TOKENS.shape, mx.uint8) * 3)
    whole = rank_step.add_in_rank_order(rank_step.begun(begun), list(mine), 2)
    one = np.concatenate([np.array(array) for array in mine])
    packed = np.concatenate([np.array(array) for array in rank_step.pack(begun)])
    assert np.array_equal(_numbers(whole), (packed + one) + one)


def test_a_fast_sum_is_that_of_the_backend() -> None:
    rank_step = _rank_step(4)
    mine = _gradients(rank_step)
    one = np.concatenate([np.array(array) for array in mine])
    assert np.array_equal(_numbers(rank_step.sum_fast(list(mine))), 4 * one)


def test_sums_are_unpacked_as_the_update_takes_them() -> None:
    rank_step = _rank_step(2)
    mine = _gradients(rank_step)
    joined = rank_step.unpack([[array] for array in mine])
    outcome = rank_step._step.update(joined)
    assert bool(outcome.is_finite)
    assert float(outcome.loss) == pytest.approx(float(joined.total) / float(joined.targets), rel=1e-6)


@pytest.mark.parametrize("reduction", ["fast", "ordered"])
def test_gradients_are_freed_as_their_sums_arrive(reduction: str, tmp_path: Path) -> None:
    for output in two_ranks.outputs_of("memory_of_sums.py", reduction, tmp_path):
        sums, most = output.strip().rsplit(" ", 1)
        assert json.loads(sums) == [1, 3, 5, 7, 9, 11, 13, 15]
        # in bf16: the sums in fp32 are 2, and beside them are at most 3 of the 8 arrays
        assert 2 < float(most) < 2 + 3.5 / 8
