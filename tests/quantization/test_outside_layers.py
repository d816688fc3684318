from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from benchmarks.architecture_configs import config_of
from mlxflow.models import model_folder
from mlxflow.quantization import outside_layers
from mlxflow.quantization.affine_grid import best_grid, round_on
from mlxflow.quantization.layer_inputs import other_weights
from mlxflow.quantization.outside_layers import round_outside
from mlxflow.quantization.settings import Setting

TOKENS = np.random.default_rng(0).integers(0, 128, (16, 32))


def _model(**table: Any) -> nn.Module:
    model = model_folder.build(config_of("llama") | table, seed=0)
    model.eval()
    return model


@pytest.mark.parametrize("ties", [True, False])
def test_the_logits_change_less_than_with_grids_alone(ties: bool) -> None:
    """Hidden states of a model with random weights are nearly uncorrelated: the head gets inputs that are not."""
    mixed = mx.random.normal((64, 64), key=mx.random.key(0)) / 8 + mx.eye(64) * 0.2

    def load() -> nn.Module:
        model = _model(tie_word_embeddings=ties)
        last = model.layers[-1].mlp.down_proj
        last.weight = 20 * mixed @ mixed @ last.weight
        return model

    path = "model.embed_tokens" if ties else "lm_head"
    setting = Setting("affine", 2, 32)
    made = round_outside(load, {path: setting}, TOKENS, name="quantize.method")
    model, tokens = load(), mx.array(TOKENS)
    weight = dict(model.named_modules())[path].weight
    exact = model(tokens)
    lost = []
    for rounded in (made[path][1], round_on(weight, setting, best_grid(weight, setting))):
        with other_weights(model, {path: rounded}):
            lost.append(float((model(tokens) - exact).square().mean()))
    assert lost[0] < (1.0 if ties else 0.95) * lost[1]


def test_modes_without_a_grid_are_rounded() -> None:
    made = round_outside(_model, {"lm_head": Setting("mxfp4", 4, 32)}, TOKENS, name="quantize.method")
    assert made["lm_head"][0].biases is None


def test_parts_of_the_rows_are_rounded_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = {"lm_head": Setting("affine", 3, 32)}
    whole = round_outside(_model, plan, TOKENS, name="quantize.method")["lm_head"]
    monkeypatch.setattr(outside_layers, "_NUMBERS_AT_ONCE", 64 * 50)
    parts = round_outside(_model, plan, TOKENS, name="quantize.method")["lm_head"]
    assert whole[0].weight.shape == parts[0].weight.shape
    assert mx.allclose(parts[1], whole[1], atol=1e-5)
