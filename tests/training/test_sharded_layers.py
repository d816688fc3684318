"""See also tests/distributed/test_runs.py, where real ranks train with split layers."""

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlxflow.distributed.rank import Rank
from mlxflow.distributed.team import Team
from mlxflow.training.gradient_packing import Gradients
from mlxflow.training.sharded_layers import ShardedLayers
from mlxflow.training.update import Update


class _Model(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 64)
        self.layers = [nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)) for _ in range(2)]

    def __call__(self, ids: mx.array) -> mx.array:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return cast("mx.array", self.embed.as_linear(x))


class _Rank(Team):
    """One of two ranks, which gets what the test says both sent."""

    def __init__(self, number: int) -> None:
        super().__init__(Rank(number, 2, "", "fast", shards_layers=True), None)
        self.other: dict[tuple[int, ...], list[mx.array]] = {}
        self.summed: list[mx.array] = []

    def gather_within(self, array: mx.array) -> mx.array:
        both = [array, self.other[array.shape].pop(0)]
        return mx.concatenate(both if self.rank.is_first else both[::-1])

    def sum_part_within(self, rows: mx.array) -> mx.array:
        self.summed.append(rows)
        return rows[self.rank.number : self.rank.number + 1]


def _model() -> _Model:
    mx.random.seed(4)
    model = _Model()
    mx.eval(model.parameters())
    return model


def _leaves(tree: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(tree))


def test_each_rank_keeps_half_of_the_layers_and_the_whole_embedding() -> None:
    whole = _leaves(_model().parameters())
    halves = []
    for number in range(2):
        model = _model()
        layers = ShardedLayers(model, _Rank(number))
        assert layers.paths == {f"layers.{layer}.layers.{at}.weight" for layer in range(2) for at in (0, 2)}
        with layers.installed():
            halves.append(_leaves(model.trainable_parameters()))
    for path, array in whole.items():
        if path in layers.paths:
            assert np.array_equal(np.array(mx.concatenate([half[path] for half in halves])), np.array(array))
        else:  # short vectors of the layers too
            assert all(np.array_equal(np.array(half[path]), np.array(array)) for half in halves)


@pytest.mark.parametrize("number", [0, 1])
def test_a_layer_computes_with_gathered_weights_and_scatters_its_gradients(number: int) -> None:
    ids = mx.arange(12).reshape(2, 6)

    def loss(model: nn.Module, ids: mx.array) -> mx.array:
        return cast("mx.array", model(ids).square().sum())

    expected, gradients = nn.value_and_grad(reference := _model(), loss)(reference, ids)
    model, team = _model(), _Rank(number)
    layers = ShardedLayers(model, team)
    with layers.installed():
        for layer in reference.layers:
            parts = [one.reshape(2, -1) for one in (layer.layers[0].weight, layer.layers[2].weight)]
            rows = mx.concatenate(parts, axis=1)
            team.other.setdefault((1, rows.shape[1]), []).append(rows[1 - number : 2 - number])
        found, own = nn.value_and_grad(model, loss)(model, ids)
        assert found.item() == expected.item()
        wanted = _leaves(gradients)
        for path, array in _leaves(own).items():
            count = wanted[path].shape[0] // 2
            part = wanted[path][number * count : (number + 1) * count] if path in layers.paths else wanted[path]
            assert np.array_equal(np.array(array), np.array(part)), path
        assert {rows.dtype for rows in team.summed} == {mx.float32}
        assert len(team.summed) == 2
    assert type(model.layers[0]) is nn.Sequential


def _update(model: nn.Module, layers: ShardedLayers | None) -> Update:
    return Update(model, optim.AdamW(1e-2), max_grad_norm=0.0, has_masters=False, layers=layers)


def test_a_checkpoint_has_whole_arrays_that_every_number_of_ranks_reads() -> None:
    alone_model = _model()
    alone = _update(alone_model, None)
    draw = np.random.default_rng(5).standard_normal
    gradients = [(path, mx.array(draw(leaf.shape).astype(np.float32))) for path, leaf in tree_flatten(alone_model)]
    alone(mx.array(2.0), mx.array(3.0), alone.join(tree_unflatten(gradients)))
    expected = _leaves(alone.state)
    models, teams = [_model(), _model()], [_Rank(0), _Rank(1)]
    split = [ShardedLayers(model, team) for model, team in zip(models, teams, strict=True)]
    with split[0].installed(), split[1].installed():
        updates = [_update(model, layers) for model, layers in zip(models, split, strict=True)]
        for update in updates:
            update.restore(alone.state)
            assert {path: (array.shape, array.dtype) for path, array in _leaves(update.state_like()).items()} == {
                path: (array.shape, array.dtype) for path, array in expected.items()
            }
        moments = [sum(array.size for _, array in tree_flatten(one.state)) for one in (alone, updates[0])]
        assert moments[1] == moments[0] - 3 * (2 * 2 * 64 * 96) // 2
        teams[0].other = _sent_by(updates[1])
        whole = _leaves(updates[0].whole_state())
    assert whole.keys() == expected.keys()
    for path, array in expected.items():
        assert np.array_equal(np.array(whole[path]), np.array(array)), path


def _sent_by(update: Update) -> dict[tuple[int, ...], list[mx.array]]:
    """Return by shape what a rank sends for a checkpoint: its parts of the weights, then of each moment."""
    layout, layers = update.layout, update.layers
    assert layout is not None
    assert layers is not None
    sent: dict[tuple[int, ...], list[mx.array]] = {}
    for kind in ("weights", "m", "v"):
        state = update.state[kind if kind == "weights" else "optimizer"]
        arrays = state if kind == "weights" else {name: state[name][kind] for name in layout.places}
        for path, part in layout.leaves(arrays).items():
            if path in layers.paths:
                sent.setdefault((1, part.size), []).append(part.reshape(1, -1))
    return sent


def test_sums_that_one_process_began_are_added_once() -> None:
    model = _model()
    tree = model.trainable_parameters()
    found = []
    for number in range(2):
        layers = ShardedLayers(_model(), _Rank(number))
        found.append(layers.own_sums(Gradients(mx.array(3.0), mx.array(5.0), tree)))
    assert [(one.total.item(), one.targets.item()) for one in found] == [(3.0, 5.0), (0.0, 0.0)]
    first, second = (_leaves(one.tree) for one in found)
    for path, array in _leaves(tree).items():
        together = mx.concatenate([first[path], second[path]]) if path in layers.paths else first[path] + second[path]
        assert np.array_equal(np.array(together), np.array(array)), path
