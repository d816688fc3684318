import doctest
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model

import mlxflow
from mlxflow.messages.errors import CallError
from mlxflow.quantization import apply
from mlxflow.quantization.apply import apply_plan, bits_per_weight, quantize_model_for_inference
from mlxflow.quantization.codec import round_trip
from mlxflow.quantization.plan import resolve
from mlxflow.quantization.settings import Setting
from tests.small_models import llama


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
def test_every_setting_matches_the_tensors_and_config_of_mlx_lm(bits: int, group_size: int, mode: str) -> None:
    (ours, _), (theirs, their_config) = _llama(), _llama()
    plan = resolve(ours, default=Setting(mode, bits, group_size), rules=(), key="quantize")
    apply_plan(ours, plan.layers)
    theirs, their_config = quantize_model(theirs, their_config, group_size, bits, mode)
    first, second = dict(tree_flatten(ours.parameters())), dict(tree_flatten(theirs.parameters()))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert mx.array_equal(value, second[name]), name
    assert plan.config() == their_config["quantization"]
    packed = {path for path, module in ours.named_modules() if hasattr(module, "scales")}
    assert set(plan.layers) == packed != set()


@pytest.mark.parametrize(
    ("mode", "bits", "group_size"), [("affine", 4, 64), ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]
)
def test_a_mode_alone_quantizes_with_its_own_bits_and_group_size(mode: str, bits: int, group_size: int) -> None:
    model = nn.Sequential(nn.Linear(128, 32), nn.Linear(32, 64), nn.Linear(64, 8))
    rules: list[dict[str, Any]] = [{"match": "layers.2", "mode": "affine"}, {"match": "layers.1", "skip": True}]
    made = quantize_model_for_inference(model, mode=mode, layers=rules).layers
    assert (made[0].mode, made[0].bits, made[0].group_size) == (mode, bits, group_size)
    assert (made[2].mode, made[2].bits, made[2].group_size) == ("affine", 4, 64)


def test_bits_per_weight_count_scales_and_biases() -> None:
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    assert bits_per_weight(model) == 32
    quantize_model_for_inference(model)
    assert bits_per_weight(model) == 4 + 64 / 64  # fp32 scale and bias for each group of 64


def test_the_example_of_the_public_function_runs() -> None:
    found = doctest.DocTestFinder().find(apply.quantize_model_for_inference, "quantize", globs={})
    results = doctest.DocTestRunner().run(found[0])
    assert results.attempted == 6
    assert results.failed == 0


def test_a_model_computes_with_the_weights_its_codes_stand_for() -> None:
    model = nn.Sequential(nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 64))
    dense = model.layers[0].weight
    x = mx.random.normal((3, 128), key=mx.random.key(0))
    bias = model.layers[0].bias
    quantized = mlxflow.quantize_model_for_inference(
        model, bits=3, group_size=32, mode="symmetric", layers=[{"match": "layers.2", "skip": True}]
    )
    first, _, last = quantized.layers
    assert quantized is model
    assert isinstance(first, nn.QuantizedLinear)
    assert isinstance(last, nn.Linear)
    expected = x @ round_trip(dense, Setting("symmetric", 3, 32)).T + bias
    assert mx.allclose(first(x), expected, atol=1e-4)
    assert mx.array_equal(first.biases, first.scales * -4)  # the fixed zero point of 3 bits


_NAME = "quantize_model_for_inference"
_MODES = "affine, symmetric, mxfp4, mxfp8, nvfp4"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 1}, f'{_NAME}.bits = 1: mode "affine" needs one of 2, 3, 4, 5, 6, 8. Set bits = 4.'),
        ({"mode": "int4"}, f'mode = "int4": expected one of {_MODES}. Use mode = "affine" (the default).'),
        (
            {"group_size": 128, "mode": "nvfp4"},
            f'{_NAME}.group_size = 128: mode "nvfp4" needs group_size 16. Set group_size = 16.',
        ),
        (
            {"layers": [{"match": "*", "bit": 4}]},
            "layers: Rule.__new__() got an unexpected keyword argument 'bit'. "
            "A rule has match, bits, group_size, mode and skip.",
        ),
        (
            {"layers": [{"match": "*", "mode": "int4"}]},
            f'{_NAME}.layers[0].mode = "int4": expected one of {_MODES}. Use mode = "affine".',
        ),
    ],
)
def test_contradicting_arguments_are_an_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(CallError) as caught:
        quantize_model_for_inference(nn.Sequential(nn.Linear(64, 8)), **arguments)
    assert str(caught.value) == message
