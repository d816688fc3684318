import mlx.core as mx
import numpy as np
import pytest

from mlxflow.distributed import reduction
from mlxflow.distributed.rank import Rank
from mlxflow.distributed.team import Team


class _TeamWithArrays(Team):
    """Rank 0 of ranks whose arrays are known."""

    def __init__(self, arrays: list[list[mx.array]]) -> None:
        super().__init__(Rank(0, len(arrays), "", "ordered"), None)
        self._everyone = mx.stack([mx.concatenate([one.reshape(-1) for one in mine]) for mine in arrays])
        self.pieces: list[int] = []

    def gather(self, array: mx.array) -> mx.array:
        begin = sum(self.pieces)
        self.pieces.append(array.size)
        return self._everyone[:, begin : begin + array.size]

    def sum(self, array: mx.array) -> mx.array:
        return self.gather(array[None]).sum(axis=0)


def _arrays(seed: int) -> list[mx.array]:
    generator = np.random.default_rng(seed)
    shapes: list[tuple[int, ...]] = [(), (3, 5), (7,)]
    return [mx.array(generator.standard_normal(shape).astype(np.float32) * 10.0**seed) for shape in shapes]


@pytest.mark.parametrize(("piece", "pieces"), [(100, [23]), (10, [10, 10, 3]), (23, [23])])
def test_sums_have_the_bits_of_additions_in_rank_order(piece: int, pieces: list[int]) -> None:
    ranks = [_arrays(seed) for seed in range(3)]
    so_far = _arrays(4)
    team = _TeamWithArrays(ranks)
    sums = reduction.add_in_rank_order(team, so_far, ranks[0], count=3, piece=piece)
    assert team.pieces == pieces
    for found, begun, *terms in zip(sums, so_far, *ranks, strict=True):
        expected = np.array(begun)
        for term in terms:
            expected = expected + np.array(term)
        assert found.shape == begun.shape
        assert np.array_equal(np.array(found), expected)


def test_only_the_first_ranks_are_added() -> None:
    ranks = [_arrays(seed) for seed in range(3)]
    zeros = [mx.zeros_like(one) for one in ranks[0]]
    sums = reduction.add_in_rank_order(_TeamWithArrays(ranks), zeros, ranks[0], count=1)
    assert all(np.array_equal(np.array(one), np.array(other)) for one, other in zip(sums, ranks[0], strict=True))


def test_a_fast_sum_is_that_of_the_backend_in_fp32() -> None:
    ranks = [_arrays(seed) for seed in range(3)]
    halves = [one.astype(mx.bfloat16) for one in ranks[0]]
    for found, *terms in zip(reduction.sum_fast(_TeamWithArrays(ranks), halves, piece=10), *ranks, strict=True):
        assert found.dtype == mx.float32
        np.testing.assert_allclose(np.array(found), sum(np.array(term) for term in terms), rtol=1e-6)
