import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.tuner.dora import DoRALinear

from mlxflow.ops import wide_scales

_FORMAT = {"group_size": 32, "bits": 4}


def _with_scales(layer: nn.Module, dtype: mx.Dtype) -> nn.Module:
    layer.scales, layer.biases = (one.astype(mx.bfloat16).astype(dtype) for one in (layer.scales, layer.biases))
    return layer


def _embedding(dtype: mx.Dtype) -> nn.Module:
    mx.random.seed(0)
    return _with_scales(nn.QuantizedEmbedding(10, 64, **_FORMAT), dtype)


def _linear(dtype: mx.Dtype) -> nn.Module:
    mx.random.seed(0)
    return _with_scales(nn.QuantizedLinear(64, 8, **_FORMAT), dtype)


@pytest.mark.parametrize("tokens", [[3], [[1, 2, 2]]])
def test_a_marked_embedding_looks_up_the_numbers_of_widened_scales(tokens: list[int] | list[list[int]]) -> None:
    layer, numbers = _embedding(mx.bfloat16), mx.array(tokens)
    wide_scales.mark(layer)
    expected = _embedding(mx.float32)(numbers)
    assert mx.array_equal(layer(numbers), expected)
    assert layer(numbers).dtype == mx.float32
    assert not mx.array_equal(_embedding(mx.bfloat16)(numbers), expected), "another layer rounds as before"
    wide_scales.unmark(layer)
    assert layer(numbers).dtype == mx.bfloat16


@pytest.mark.parametrize(("mode", "group_size", "bits"), [("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)])
def test_a_marked_embedding_of_float_codes_gives_its_numbers_in_fp32(mode: str, group_size: int, bits: int) -> None:
    mx.random.seed(0)
    layer, numbers = nn.QuantizedEmbedding(10, 64, group_size, bits, mode=mode), mx.array([[1, 2, 2]])
    rows = layer(numbers)
    assert rows.dtype == mx.bfloat16, "MLX gives fp32 itself: nothing is to be marked"
    wide_scales.mark(layer)
    assert layer(numbers).dtype == mx.float32
    assert mx.array_equal(layer(numbers), rows.astype(mx.float32))


def test_a_dora_layer_around_a_marked_one_has_the_numbers_of_widened_scales() -> None:
    wide_scales.install_in_dora()
    base, x = _linear(mx.bfloat16), mx.random.normal((5, 64))
    wide_scales.mark(base)
    mx.random.seed(1)
    layer = DoRALinear.from_base(base)
    mx.random.seed(1)
    expected = DoRALinear.from_base(_linear(mx.float32))
    assert mx.array_equal(layer.m, expected.m)
    assert mx.array_equal(layer(x), expected(x))
    assert mx.array_equal(layer.fuse(dequantize=True).weight, expected.fuse(dequantize=True).weight)
    assert not mx.array_equal(DoRALinear.from_base(_linear(mx.bfloat16)).m, expected.m)
    dense = DoRALinear.from_base(nn.Linear(64, 8))
    assert dense(x).shape == (5, 8)
