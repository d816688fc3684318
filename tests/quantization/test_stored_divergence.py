"""Divergences of codes in files equal those of models in memory, and the dense model runs once."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map

from mlxflow.data.token_file import Rows
from mlxflow.evaluation.kl_divergence import measure_divergence
from mlxflow.quantization.codec import pack, unpack
from mlxflow.quantization.plan import quantizable_layers
from mlxflow.quantization.settings import Setting
from mlxflow.quantization.stored_divergence import StoredDivergence
from tests.small_models import llama

_TOKENS = np.random.default_rng(0).integers(0, 60, (4, 17)).astype(np.uint16)
_ROWS = Rows(_TOKENS, np.full(_TOKENS.shape, 3, np.uint8))


def _load() -> nn.Module:
    model, _ = llama(vocab_size=60, hidden_size=64, num_layers=2, intermediate_size=128)
    model.eval()
    return model


def test_the_divergence_is_that_of_the_model_with_these_codes(tmp_path: Path) -> None:
    measured = StoredDivergence(_load, _ROWS, tmp_path)
    found = []
    for setting in (Setting("affine", 2, 64), Setting("affine", 4, 32)):
        exact, rounded = _load(), _load()
        plan = dict.fromkeys(quantizable_layers(exact), setting)
        packed = {path: pack(layer.weight, setting) for path, layer in quantizable_layers(exact).items()}
        for path, layer in quantizable_layers(rounded).items():
            layer.weight = unpack(packed[path], setting, mx.float32)
        expected = measure_divergence(exact, rounded, _ROWS, batch_size=8, masks_documents=False).kl
        stored = measured.store(packed.items())
        found.append(measured.of(_load, plan, stored))
        assert found[-1] == pytest.approx(expected, rel=1e-5)
        stored.remove()
    assert found[0] > 2 * found[1] > 0
    assert [one.name for one in tmp_path.iterdir()] == ["dense.safetensors"]


def test_the_dense_model_runs_once_for_all_of_its_comparisons(tmp_path: Path) -> None:
    dense_loads: list[nn.Module] = []

    def load_dense() -> nn.Module:
        dense_loads.append(_load())
        return dense_loads[-1]

    measured = StoredDivergence(load_dense, _ROWS, tmp_path)
    setting = Setting("affine", 4, 64)
    layers = quantizable_layers(_load())
    stored = measured.store((path, pack(layer.weight, setting)) for path, layer in layers.items())
    count = len(dense_loads)
    first = measured.of(_load, dict.fromkeys(layers, setting), stored)
    for model in dense_loads:  # only embedding and head are still used
        for block in model.layers:
            block.update(tree_map(mx.zeros_like, block.parameters()))
    assert measured.of(_load, dict.fromkeys(layers, setting), stored) == first
    assert len(dense_loads) == count
