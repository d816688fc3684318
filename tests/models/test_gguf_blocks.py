"""Blocks of GGUF's types: MLX's codes in them, and matrices encoded again."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gguf import GGMLQuantizationType, dequantize

from mlxflow.models import gguf_blocks
from mlxflow.models.gguf_blocks import Encoding
from mlxflow.quantization.codec import pack
from mlxflow.quantization.settings import Setting


def _layer(mode: str, bits: int, group_size: int, dtype: mx.Dtype = mx.float16) -> nn.Module:
    """Return a quantized layer of random weights, packed as a quantize stage does."""
    weight = mx.random.normal((48, 256), key=mx.random.key(bits)).astype(dtype)
    packed = pack(weight, Setting(mode, bits, group_size))
    stored = "affine" if mode == "symmetric" else mode
    layer = nn.QuantizedLinear(256, 48, bias=False, group_size=group_size, bits=bits, mode=stored)
    layer.weight, layer.scales = packed.weight, packed.scales
    if packed.biases is not None:
        layer.biases = packed.biases
    return layer


def _fp32(layer: Any) -> np.ndarray[Any, Any]:
    if layer.mode != "affine":
        dense = mx.dequantize(layer.weight, layer.scales, group_size=32, bits=4, mode=layer.mode)
        return np.array(dense.astype(mx.float32))
    scales, biases = layer.scales.astype(mx.float32), layer.biases.astype(mx.float32)
    return np.array(mx.dequantize(layer.weight, scales, biases, group_size=layer.group_size, bits=layer.bits))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("mode", "bits", "group_size", "kind"),
    [
        ("affine", 3, 32, "q4_1"),
        ("affine", 4, 32, "q4_1"),
        ("affine", 4, 128, "q4_1"),
        ("affine", 5, 64, "q5_1"),
        ("symmetric", 2, 64, "q4_0"),
        ("symmetric", 3, 64, "q4_0"),
        ("symmetric", 4, 64, "q4_0"),
        ("symmetric", 5, 32, "q5_0"),
        ("symmetric", 6, 64, "q8_0"),
        ("symmetric", 8, 32, "q8_0"),
        ("mxfp4", 4, 32, "mxfp4"),
    ],
)
def test_a_type_holds_the_codes_of_a_layer_exactly(
    mode: str, bits: int, group_size: int, kind: str, dtype: mx.Dtype
) -> None:
    layer = _layer(mode, bits, group_size, dtype)
    encoding = gguf_blocks.choose(layer, "auto", is_outer=False, outer="auto")
    assert encoding == Encoding(kind, keeps_codes=True)
    order = np.random.default_rng(0).permutation(48)
    for rows in (None, order):
        blocks = gguf_blocks.encode(layer, encoding, rows)
        found = dequantize(blocks, GGMLQuantizationType[kind.upper()])
        assert np.array_equal(found, _fp32(layer) if rows is None else _fp32(layer)[rows])


@pytest.mark.parametrize(("mode", "bits", "group_size"), [("affine", 6, 64), ("affine", 8, 32), ("nvfp4", 4, 16)])
def test_codes_that_no_type_holds_are_encoded_again(mode: str, bits: int, group_size: int) -> None:
    layer = _layer(mode, bits, group_size)
    assert gguf_blocks.choose(layer, "auto", is_outer=False, outer="auto") == Encoding("q8_0", keeps_codes=False)


def test_scales_beyond_fp16_are_not_kept() -> None:
    layer = _layer("affine", 4, 32, mx.float32)
    layer.scales = layer.scales.at[0, 0].multiply(1e6)
    assert gguf_blocks.choose(layer, "auto", is_outer=False, outer="auto") == Encoding("q8_0", keeps_codes=False)


@pytest.mark.parametrize(
    ("requested", "width", "expected"),
    [
        ("auto", 64, "bf16"),
        ("q4_0", 64, "q4_0"),
        ("q4_0", 40, "f16"),
        ("q6_k", 256, "q6_k"),
        ("q6_k", 320, "q8_0"),
        ("f32", 40, "f32"),
    ],
)
def test_a_dense_layer_gets_a_type_whose_blocks_fit_its_width(requested: str, width: int, expected: str) -> None:
    layer = nn.Linear(width, 8, bias=False)
    layer.set_dtype(mx.bfloat16)
    chosen = gguf_blocks.choose(layer, requested, is_outer=False, outer="auto")
    assert chosen == Encoding(expected, keeps_codes=False)


def test_embedding_and_head_keep_eight_bits_unless_set() -> None:
    layer = nn.Linear(64, 8, bias=False)
    assert gguf_blocks.choose(layer, "q4_0", is_outer=True, outer="auto").type == "q8_0"
    assert gguf_blocks.choose(layer, "q4_0", is_outer=True, outer="q5_1").type == "q5_1"
    assert gguf_blocks.choose(layer, "f16", is_outer=True, outer="auto").type == "f16"


def test_six_bit_super_blocks_have_the_error_of_six_bits() -> None:
    weight = np.random.default_rng(1).normal(size=(16, 512)).astype(np.float32)
    weight[0], weight[1, :16] = 0, 0
    found = dequantize(gguf_blocks.encode_floats(weight, "q6_k"), GGMLQuantizationType.Q6_K)
    assert not found[0].any()
    assert not found[1, :16].any()
    error = np.linalg.norm(found - weight) / np.linalg.norm(weight)
    # a step of 1/32 of the largest of 16 normal numbers, about 1.8, rounds by its 12th root of two: 0.016
    assert 0.01 < error < 0.02
