"""See also tests/distributed/test_runs.py, where real ranks train adapters beside split layers."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import msgspec
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxflow.distributed.rank import Rank
from mlxflow.distributed.team import Team
from mlxflow.training import adapters, frozen_shards
from mlxflow.training.frozen_shards import FrozenShards
from mlxflow.training.settings import AdapterShape
from tests.small_models import llama

_SHAPE = AdapterShape(method="lora", rank=4, scale=2.0, dropout=0.0, num_layers=0, keys=("*q_proj", "*down_proj"))


class _Rank(Team):
    """One of two ranks, which gets what the other one's layers hold."""

    def __init__(self, number: int, others: list[mx.array]) -> None:
        super().__init__(Rank(number, 2, "ring", shards_layers=True), None)
        self.sent: list[mx.array] = []
        self._others = others

    def gather_within(self, array: mx.array) -> mx.array:
        assert array.dtype == mx.uint8
        other = self._others[len(self.sent)]
        self.sent.append(array)
        both = [array, other]
        return mx.concatenate(both if self.rank.is_first else both[::-1])


def _model(bits: int, method: str) -> nn.Module:
    model, _ = llama(vocab_size=64, hidden_size=64, intermediate_size=96, num_heads=2, num_kv_heads=2)
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    adapters.add_adapters(model, msgspec.structs.replace(_SHAPE, method=method), seed=1, key="lora.keys")
    model.train()
    mx.eval(model.parameters())
    return model


def _leaves(tree: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(tree))


def _gradients(model: nn.Module) -> dict[str, mx.array]:
    tokens = mx.arange(12).reshape(2, 6)
    return _leaves(nn.value_and_grad(model, lambda: model(tokens).square().mean())()[1])


def _sent_by(number: int, bits: int, method: str) -> list[mx.array]:
    """Return what the layers of a rank gather, in their order."""
    team = _Rank(number, [])
    shards = FrozenShards(_model(bits, method), team)
    with shards.installed():
        for parts in shards._parts:
            team.sent.append(mx.concatenate([one.reshape(1, -1).view(mx.uint8) for one in parts.values()], axis=1))
    return team.sent


@pytest.mark.parametrize(("bits", "method"), [(0, "lora"), (0, "dora"), (8, "lora"), (8, "dora")])
def test_layers_compute_as_whole_ones_from_half_of_the_frozen_weights(
    bits: int, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_shards, "_FEW", 64)
    whole = _model(bits, method)
    before, expected = _leaves(whole.parameters()), _gradients(whole)
    model = _model(bits, method)
    team = _Rank(1, _sent_by(0, bits, method))
    with FrozenShards(model, team).installed() as shards:
        held = _leaves(model.parameters())
        split = {name for name, array in held.items() if array.shape != before[name].shape}
        assert {name for name in split if "layers.0.mlp.up_proj" in name} == {
            f"model.layers.0.mlp.up_proj.{kind}" for kind in (("weight", "scales", "biases") if bits else ("weight",))
        }
        assert not any("lora" in name or "embed" in name for name in split)
        for name in split:
            rows = len(before[name]) // 2
            assert np.array_equal(np.array(held[name]), np.array(before[name][rows:])), name
        found = _gradients(model)
        assert len(team.sent) == 2
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            assert np.array_equal(np.array(found[name]), np.array(array)), name
        assert {name: array.shape for name, array in _leaves(model.parameters()).items()} == {
            name: array.shape for name, array in held.items()
        }
        team.sent.clear()
        shards.make_whole()
        for name, array in _leaves(model.parameters()).items():
            assert np.array_equal(np.array(array), np.array(before[name])), name
        shards.split_again()
        assert {name: array.shape for name, array in _leaves(model.parameters()).items()} == {
            name: array.shape for name, array in held.items()
        }
