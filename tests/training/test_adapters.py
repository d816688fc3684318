"""Adapters: what is trained with them, which layers get them, and that mlx-lm opens what is saved."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import msgspec
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.utils import load_adapters

from mlxflow.messages.errors import WorkflowError
from mlxflow.training.adapters import add_adapters, ensure_adapters, save_adapters
from mlxflow.training.settings import AdapterShape
from tests.small_models import llama

SHAPE = AdapterShape(method="lora", rank=4, scale=2.0, dropout=0.0, num_layers=0, keys=("self_attn.[qv]_proj",))
TOKENS = mx.array([[1, 2, 3, 4]])


def _model() -> nn.Module:
    model, _ = llama(vocab_size=64, context_length=16, hidden_size=32, seed=3)
    return model


def _trained(model: nn.Module) -> list[str]:
    return sorted(name for name, _ in tree_flatten(model.trainable_parameters()))


@pytest.mark.parametrize(("num_layers", "blocks"), [(0, [0, 1]), (1, [1])])
def test_only_the_adapters_beside_the_named_layers_of_the_last_blocks_are_trained(
    num_layers: int, blocks: list[int]
) -> None:
    model = _model()
    before = model(TOKENS)
    config = add_adapters(model, msgspec.structs.replace(SHAPE, num_layers=num_layers), seed=1, key="train.lora.keys")
    layers = ("self_attn.q_proj", "self_attn.v_proj")
    names = [
        f"model.layers.{block}.{layer}.{side}" for block in blocks for layer in layers for side in ("lora_a", "lora_b")
    ]
    assert _trained(model) == sorted(names)
    assert config["lora_parameters"]["keys"] == list(layers)
    assert config["num_layers"] == len(blocks)
    assert mx.array_equal(model(TOKENS), before)  # one of the two factors begins with zeros


def test_a_pattern_without_a_layer_is_refused_with_those_there_are() -> None:
    known = "mlp.down_proj, mlp.gate_proj, mlp.up_proj, self_attn.k_proj, self_attn.o_proj, self_attn.q_proj, "
    line = f'train.lora.keys: "attention.*" names no layer. Known: {known}self_attn.v_proj.'
    with pytest.raises(WorkflowError) as caught:
        add_adapters(_model(), msgspec.structs.replace(SHAPE, keys=("attention.*",)), seed=1, key="train.lora.keys")
    assert str(caught.value) == line


def test_existing_adapters_are_trained_further_and_none_are_added() -> None:
    model = _model()
    add_adapters(model, SHAPE, seed=1, key="")
    trained = _trained(model)
    weights = dict(tree_flatten(model.parameters()))
    model.unfreeze()
    ensure_adapters(model, SHAPE, seed=2, key="")
    assert _trained(model) == trained
    assert all(mx.array_equal(value, weights[name]) for name, value in tree_flatten(model.parameters()))


def test_mlx_lm_opens_the_saved_adapters(tmp_path: Path) -> None:
    model = _model()
    config = add_adapters(model, SHAPE, seed=1, key="")
    model.update(tree_map(lambda value: value + 0.1, model.trainable_parameters()))
    files = {"weights_file": tmp_path / "adapters.safetensors", "config_file": tmp_path / "adapter_config.json"}
    save_adapters(model, config, **files, provenance={})
    assert json.loads(files["config_file"].read_text()) == config
    opened = load_adapters(_model(), str(tmp_path))
    assert mx.array_equal(opened(TOKENS), model(TOKENS))
    assert not mx.array_equal(opened(TOKENS), _model()(TOKENS))
