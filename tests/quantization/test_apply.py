from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model

from mlxflow.errors import CallError
from mlxflow.quantization.apply import quantize
from tests.small_models import llama


def _model(width: int) -> nn.Module:
    return nn.Sequential(nn.Embedding(10, width), nn.Linear(width, 32, bias=False), nn.LayerNorm(32))


def test_bits_per_weight_count_scales_and_biases() -> None:
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    done = quantize(model, {}, bits=4, group_size=64, mode="affine", key="quantize")
    assert done.bits_per_weight == 4 + 64 / 64  # fp32 scale and bias for each group of 64
    assert done.dense_bits_per_weight == 32
    assert done.layers == ["layers.0"]
    assert done.config["quantization"] == {"bits": 4, "group_size": 64, "mode": "affine"}


def test_a_layer_whose_width_does_not_divide_stays_dense_and_is_listed() -> None:
    model = nn.Sequential(nn.Linear(64, 48, bias=False), nn.Linear(48, 8, bias=False))
    done = quantize(model, {}, bits=8, group_size=64, mode="affine", key="quantize")
    assert (done.layers, done.dense_layers) == (["layers.0"], ["layers.1"])
    assert isinstance(model.layers[1], nn.Linear)


def test_a_group_size_that_divides_nothing_is_told() -> None:
    with pytest.raises(CallError) as caught:
        quantize(_model(48), {}, bits=4, group_size=128, mode="affine", key="quantize:q4")
    assert str(caught.value) == (
        "quantize:q4.group_size = 128: divides the width of no layer. Use a smaller one or wider layers."
    )


def _llama() -> tuple[nn.Module, dict[str, Any]]:
    return llama(vocab_size=60, hidden_size=128, num_layers=1, intermediate_size=96)


@pytest.mark.parametrize(
    ("bits", "group_size", "mode"),
    [
        *[(bits, 32, "affine") for bits in (2, 3, 4, 5, 6, 8)],
        (4, 64, "affine"),
        (4, 128, "affine"),
        (4, 32, "mxfp4"),
        (8, 32, "mxfp8"),
        (4, 16, "nvfp4"),
    ],
)
def test_every_setting_gives_the_tensors_and_the_config_of_mlx_lm(bits: int, group_size: int, mode: str) -> None:
    (ours, config), (theirs, their_config) = _llama(), _llama()
    done = quantize(ours, config, bits=bits, group_size=group_size, mode=mode, key="quantize")
    theirs, their_config = quantize_model(theirs, their_config, group_size, bits, mode)
    first, second = dict(tree_flatten(ours.parameters())), dict(tree_flatten(theirs.parameters()))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert mx.array_equal(value, second[name]), name
    assert done.config["quantization"] == their_config["quantization"]
    assert done.config["quantization_config"] == their_config["quantization_config"]
    packed = {path for path, module in ours.named_modules() if hasattr(module, "scales")}
    assert set(done.layers) == packed != set()


@pytest.mark.parametrize(("bits", "largest_error"), [(8, 0.01), (4, 0.15)])
def test_weights_come_back_within_the_step_of_their_bits(bits: int, largest_error: float) -> None:
    model = nn.Sequential(nn.Linear(64, 256, bias=False))
    dense = mx.random.normal((256, 64), key=mx.random.key(0))
    model.layers[0].weight = dense
    quantize(model, {}, bits=bits, group_size=64, mode="affine", key="quantize")
    packed = model.layers[0]
    restored = mx.dequantize(packed.weight, packed.scales, packed.biases, 64, bits)
    assert float(mx.linalg.norm(restored - dense) / mx.linalg.norm(dense)) < largest_error
