from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxflow.distributed.rank import Rank
from mlxflow.distributed.team import Team
from mlxflow.training.optimizer_shards import OptimizerShards
from mlxflow.training.update import Update


class _Rank(Team):
    """A rank that gets what the test says all ranks sent."""

    def __init__(self, number: int, size: int) -> None:
        super().__init__(Rank(number, size, "", "ordered", shards_optimizer=True), None)
        self.sent: list[list[mx.array]] = []

    def gather(self, array: mx.array) -> mx.array:
        everyone = self.sent.pop(0)
        assert everyone[self.rank.number].shape == array.reshape(-1).shape
        return mx.stack(everyone)


def _weights() -> dict[str, mx.array]:
    draw = np.random.default_rng(2).standard_normal
    return {
        "matrices_float32": mx.array(draw((1, 7001)).astype(np.float32)),
        "vectors_float32": mx.array(draw(50).astype(np.float32)),
    }


@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_parts_of_all_ranks_are_the_long_arrays(size: int) -> None:
    weights = _weights()
    ranks = [OptimizerShards(weights, _Rank(number, size)) for number in range(size)]
    parts = [rank.own(weights) for rank in ranks]
    matrices = [part["matrices_float32"] for part in parts]
    assert {array.shape for array in matrices} == {(1, -(-7001 // (1024 * size)) * 1024)}
    assert sum(array.size for array in matrices) < 7001 + 1024 * size
    assert all(part["vectors_float32"] is weights["vectors_float32"] for part in parts)  # too few to split
    for number, rank in enumerate(ranks):
        assert isinstance(rank._team, _Rank)
        rank._team.sent = [[array.reshape(-1) for array in matrices]]
        whole = rank.whole(parts[number])
        assert all(whole[name].shape == array.shape for name, array in weights.items())
        assert all(np.array_equal(np.array(whole[name]), np.array(array)) for name, array in weights.items())


def _updated(team: Team | None, clip: float) -> tuple[Update, Any, list[tuple[str, mx.array]]]:
    mx.random.seed(4)
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 8))
    mx.eval(model.parameters())
    optimizer = optim.AdamW(1e-2)
    update = (
        Update(model, optimizer, max_grad_norm=clip, has_masters=False)
        if team is None
        else Update(model, optimizer, max_grad_norm=clip, has_masters=False, team=team)
    )
    draw = np.random.default_rng(5).standard_normal
    gradients = [(path, mx.array(draw(w.shape).astype(np.float32))) for path, w in tree_flatten(model.parameters())]
    return update, model, gradients


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_ranks_update_their_parts_as_one_process_does_and_a_checkpoint_is_the_same(clip: float) -> None:
    from mlx.utils import tree_unflatten

    alone, model, gradients = _updated(None, clip)
    for _ in range(3):
        alone(mx.array(2.0), mx.array(3.0), alone.join(tree_unflatten(gradients)))
    expected = dict(tree_flatten(alone.state))
    weights = dict(tree_flatten(model.parameters()))
    teams = [_Rank(number, 2) for number in range(2)]
    updates = [_updated(team, clip)[:2] for team in teams]
    matrices = alone.state["weights"]["matrices_float32"].size
    for rank, (update, _) in enumerate(updates):
        moments = [array for path, array in tree_flatten(update.state["optimizer"]) if path.endswith(".m")]
        assert max(array.size for array in moments) == -(-matrices // 2048) * 1024, rank
    for _ in range(3):
        for team, (update, _) in zip(teams, updates, strict=True):
            team.sent = [[mx.zeros(-(-matrices // 2048) * 1024)] * 2]  # replaced below, when both are known
            update(mx.array(2.0), mx.array(3.0), update.join(tree_unflatten(gradients)))
        parts = [update.state["weights"]["matrices_float32"].reshape(-1) for update, _ in updates]
        for team, (update, _) in zip(teams, updates, strict=True):
            team.sent = [parts]
            update.publish()
    for team, (update, own) in zip(teams, updates, strict=True):
        found = dict(tree_flatten(own.parameters()))
        assert all(np.array_equal(np.array(found[path]), np.array(array)) for path, array in weights.items())
        flat = [[array.reshape(-1) for _, array in tree_flatten(one.state)] for one, _ in updates]
        team.sent = [list(pair) for pair in zip(*flat, strict=True) if pair[0].size == -(-matrices // 2048) * 1024]
        like = dict(tree_flatten(update.state_like()))
        assert {path: (array.shape, array.dtype) for path, array in like.items()} == {
            path: (array.shape, array.dtype) for path, array in expected.items()
        }
        whole = dict(tree_flatten(update.whole_state()))
        for path, array in expected.items():
            if team.rank.is_first:
                assert np.array_equal(np.array(whole[path]), np.array(array)), path
            else:
                assert whole[path].size == 0 or np.array_equal(np.array(whole[path]), np.array(array)), path


def test_a_rank_takes_its_part_of_a_checkpoint() -> None:
    from mlx.utils import tree_unflatten

    alone, model, gradients = _updated(None, 0.0)
    alone(mx.array(2.0), mx.array(3.0), alone.join(tree_unflatten(gradients)))
    team = _Rank(1, 2)
    update, own, _ = _updated(team, 0.0)
    whole = alone.state["weights"]["matrices_float32"]
    size = -(-whole.size // 2048) * 1024
    padded = mx.pad(whole.reshape(-1), (0, 2 * size - whole.size))
    team.sent = [[padded[:size], padded[size:]]]
    update.restore(alone.state)
    assert np.array_equal(np.array(update.state["weights"]["matrices_float32"][0]), np.array(padded[size:]))
    found = dict(tree_flatten(own.parameters()))
    for path, array in tree_flatten(model.parameters()):
        assert np.array_equal(np.array(found[path]), np.array(array)), path
