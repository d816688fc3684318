import mlx.core as mx
import numpy as np
import pytest

from mlxflow.distributed import reduction
from mlxflow.distributed.rank import Rank
from mlxflow.distributed.team import Team


class _TeamWithArrays(Team):
    """Rank 0 of ranks whose array is known; it is sent in pieces, one after another."""

    def __init__(self, arrays: list[mx.array]) -> None:
        super().__init__(Rank(0, len(arrays), "", "ordered"), None)
        self._everyone = mx.stack(arrays)
        self.pieces: list[int] = []

    def gather(self, array: mx.array) -> mx.array:
        begin = sum(self.pieces)
        self.pieces.append(array.size)
        return self._everyone[:, begin : begin + array.size]

    def sum(self, array: mx.array) -> mx.array:
        return self.gather(array).sum(axis=0, keepdims=True)


def _array(seed: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(23).astype(np.float32) * 10.0**seed)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("has_sums", [False, True])
@pytest.mark.parametrize(("piece", "pieces"), [(100, [23]), (10, [10, 10, 3]), (23, [23])])
def test_sums_have_the_bits_of_additions_in_rank_order(
    piece: int, pieces: list[int], has_sums: bool, count: int
) -> None:
    ranks = [_array(seed) for seed in range(3)]
    so_far = _array(4) if has_sums else None
    begun = None if so_far is None else [so_far[begin : begin + piece] for begin in range(0, 23, piece)]
    team = _TeamWithArrays(ranks)
    gathered = reduction.gather_pieces(team, ranks[0], piece=3 * piece)
    assert team.pieces == pieces
    expected = np.zeros(23, np.float32) if so_far is None else np.array(so_far)
    for term in ranks[:count]:
        expected = expected + np.array(term)
    found = reduction.added_in_rank_order(gathered, begun, count=count)
    assert np.array_equal(np.concatenate([np.array(part) for part in found]), expected)


def test_arrays_are_sent_in_their_own_dtype_and_added_in_fp32() -> None:
    ranks = [_array(seed).astype(mx.bfloat16) for seed in range(2)]
    team = _TeamWithArrays(ranks)
    (gathered,) = reduction.gather_pieces(team, ranks[0])
    assert gathered.dtype == mx.bfloat16
    (found,) = reduction.added_in_rank_order([gathered], count=2)
    assert found.dtype == mx.float32
    assert np.array_equal(np.array(found), sum(np.array(rank.astype(mx.float32)) for rank in ranks))


def test_the_backend_adds_pieces() -> None:
    ranks = [_array(seed) for seed in range(3)]
    summed = reduction.sum_pieces(_TeamWithArrays(ranks), ranks[0], piece=3 * 10)
    found = np.concatenate([np.array(part)[0] for part in summed])
    np.testing.assert_allclose(found, sum(np.array(rank) for rank in ranks), rtol=1e-6)
