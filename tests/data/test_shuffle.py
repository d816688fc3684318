import numpy as np
import pytest

from mlxflow.data.shuffle import Permutation


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 1000, 4096, 70_001])
def test_a_permutation_has_every_number_once(count: int) -> None:
    found = Permutation(count, seed=1, epoch=2)(np.arange(count))
    assert sorted(found.tolist()) == list(range(count))


def test_a_permutation_can_be_evaluated_at_single_positions() -> None:
    permutation = Permutation(1000, seed=3, epoch=0)
    whole = permutation(np.arange(1000))
    assert [int(permutation(np.array([place]))[0]) for place in range(0, 1000, 37)] == whole[::37].tolist()


def test_each_seed_and_epoch_has_its_own_reproducible_order() -> None:
    orders = {
        tuple(Permutation(50, seed=seed, epoch=epoch)(np.arange(50)).tolist())
        for seed in (0, 1, 2**63)
        for epoch in (0, 1, 10**6)
    }
    assert len(orders) == 9
    assert Permutation(10, seed=0, epoch=0)(np.arange(10)).tolist() == [8, 9, 7, 5, 4, 2, 1, 3, 6, 0]


def test_a_permutation_has_no_correlation_with_position_or_neighbours() -> None:
    count = 20_000
    found = Permutation(count, seed=0, epoch=0)(np.arange(count))
    assert abs(np.corrcoef(np.arange(count), found)[0, 1]) < 0.03
    assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 0.03
    halves = np.bincount((np.arange(count) * 8 // count) * 8 + found * 8 // count, minlength=64)
    assert halves.min() > 0.8 * count / 64  # a share of each part of the file in each part of the epoch
    assert halves.max() < 1.2 * count / 64


def test_the_last_rows_of_a_long_permutation_are_reached_quickly() -> None:
    places = np.array([0, 10**12 - 1, 10**9])
    assert len(set(Permutation(10**12, seed=0, epoch=0)(places).tolist())) == 3
