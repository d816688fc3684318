from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxflow.distributed.rank import Rank
from mlxflow.distributed.team import SOLO, Team, odd_rank
from mlxflow.messages.errors import StageError
from tests.distributed.two_ranks import outputs_of


class _ScriptedTeam(Team):
    """Rank 0 of some ranks; what the others send is a function of what it sends."""

    def __init__(self, others: list[dict[int, int]]) -> None:
        super().__init__(Rank(0, 1 + len(others), "", "ordered"), None)
        self._group = mx.distributed.init()  # a group of one, which `gather` below replaces
        self._others = others

    def gather(self, array: mx.array) -> mx.array:
        mine = np.array(array)
        rows = [mine]
        for changes in self._others:
            other = mine.copy()
            for place, value in changes.items():
                other[0, place] = value
            rows.append(other)
        return mx.array(np.concatenate(rows))


@pytest.mark.parametrize(
    ("values", "expected"),
    [([4, 4, 4], None), ([4, 5], 1), ([5, 4, 4], 0), ([4, 4, 5], 2), ([4, 5, 4, 5], 1), ([1], None)],
)
def test_the_odd_rank_is_the_one_that_differs_from_most(values: Sequence[int], expected: int | None) -> None:
    assert odd_rank(np.array(values)) == expected


def test_a_single_process_exchanges_with_itself() -> None:
    assert SOLO.exchange("anything", [3, 4]).tolist() == [[3, 4]]
    assert [part.tolist() for part in SOLO.take_turns([np.ones(2, np.float32)])] == [[1.0, 1.0]]
    assert SOLO.gather(mx.array([1.0])).tolist() == SOLO.sum(mx.array([1.0])).tolist() == [1.0]
    SOLO.require_equal({"weights": "a"}, task="train")


def test_numbers_of_all_ranks_come_by_rank() -> None:
    assert _ScriptedTeam([{2: 7}, {3: 2**40}]).exchange("x", [3, 4]).tolist() == [[3, 4], [7, 4], [3, 2**40]]


@pytest.mark.parametrize("place", [0, 1])
def test_a_rank_at_another_exchange_or_step_is_an_error(place: int) -> None:
    team = _ScriptedTeam([{}, {place: 9}])
    team.step = 4
    with pytest.raises(StageError) as caught:
        team.exchange("check", [3])
    at = 9 if place else 4
    assert str(caught.value) == (
        f"rank 2 is at step {at} where rank 0 is at step 4, or in another part of it (check, as rank 0 sees it). "
        "Run it again: it resumes from the last checkpoint."
    )


def test_each_difference_before_the_first_step_is_named() -> None:
    team = _ScriptedTeam([{2: 1, 4: 1}])
    with pytest.raises(StageError) as caught:
        team.require_equal({"code": "a", "settings": "b", "weights": "c"}, task="train")
    end = "than the other ranks. Every rank must run the same code on the same files."
    assert str(caught.value) == f"train: rank 1 has other code {end}\ntrain: rank 1 has other weights {end}"


def test_turns_interleave_the_arrays_of_the_ranks() -> None:
    class _Turns(_ScriptedTeam):
        def exchange(self, what: str, numbers: Sequence[int]) -> np.ndarray:
            return np.array([[2], [1]] if what == "number of parts" else [[2, 1], [3, -1]])

        def gather(self, array: mx.array) -> mx.array:
            return mx.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])

    parts = _Turns([{}]).take_turns([np.array([1, 2], np.float32), np.array([3], np.float32)])
    assert [part.tolist() for part in parts] == [[1, 2], [4, 5, 6], [3]]


@pytest.mark.parametrize("waits_for", ["numbers", "gradients"])
def test_what_a_dead_rank_did_not_send_is_an_error(waits_for: str, tmp_path: Path) -> None:
    assert outputs_of("lost_peer.py", waits_for, tmp_path) == ["[[7], [7]]\n[ring] connection to a peer was lost\n", ""]
