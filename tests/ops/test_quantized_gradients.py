"""Gradients through frozen quantized layers, by every way of multiplying, against the dense layer in float64.

Ways: MLX's packed product; a dense copy; a dense copy in slices; LoRA's group product through either. Formats: all that
MLX has, and symmetric codes in affine storage.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from numpy.typing import NDArray

from mlxflow.ops import adapter_products, quantized_matmul
from mlxflow.ops.quantized_matmul import Format, IsFasterDense
from mlxflow.quantization.codec import pack, unpack
from mlxflow.quantization.settings import Setting

INPUTS, OUTPUTS = 128, 48

SETTINGS = [
    *[
        Setting(mode=mode, bits=bits, group_size=size)
        for mode in ("affine", "symmetric")
        for bits in (2, 3, 4, 5, 6, 8)
        for size in (32, 64, 128)
    ],
    Setting(mode="mxfp4", bits=4, group_size=32),
    Setting(mode="mxfp8", bits=8, group_size=32),
    Setting(mode="nvfp4", bits=4, group_size=16),
]

#: One row, the last that MLX multiplies by itself and the first that it does not, and many.
ROWS = (1, 15, 16, 5000)


class _Layer(NamedTuple):
    """A quantized layer, and the numbers that it stands for."""

    module: nn.QuantizedLinear
    weight: "NDArray[np.float64]"  # (N, D)
    bias: "NDArray[np.float64]"


def _layer(setting: Setting, *, has_bias: bool, dtype: mx.Dtype = mx.float32) -> _Layer:
    packed = pack(mx.random.normal((OUTPUTS, INPUTS), key=mx.random.key(0)).astype(dtype), setting)
    module = nn.QuantizedLinear(
        INPUTS,
        OUTPUTS,
        has_bias,
        setting.group_size,
        setting.bits,
        "affine" if setting.mode == "symmetric" else setting.mode,
    )
    module.weight, module.scales = packed.weight, packed.scales
    if packed.biases is not None:
        module.biases = packed.biases
    if has_bias:
        module.bias = mx.random.normal((OUTPUTS,), key=mx.random.key(1)).astype(dtype)
    bias = np.array(module.bias.astype(mx.float32), np.float64) if has_bias else np.zeros(OUTPUTS)
    return _Layer(module, np.array(unpack(packed, setting, mx.float32), np.float64), bias)


def _packed(layer: nn.QuantizedLinear, x: mx.array) -> mx.array:
    return _call(layer, x, lambda *_: False)


def _through_dense(layer: nn.QuantizedLinear, x: mx.array) -> mx.array:
    return _call(layer, x, lambda *_: True)


def _call(layer: nn.QuantizedLinear, x: mx.array, is_faster_dense: IsFasterDense) -> mx.array:
    with quantized_matmul.replaced(is_faster_dense):
        result: mx.array = layer(x)
    return result


def _in_group(layer: nn.QuantizedLinear, x: mx.array, is_faster_dense: IsFasterDense) -> mx.array:
    """Return the output of a LoRA layer whose adapter is zero: that of its base."""
    from mlx_lm.tuner.lora import LoRALinear

    adapted = LoRALinear.from_base(layer, r=2)
    with adapter_products.replaced_adapters([(adapted,)], is_faster_dense):
        result: mx.array = adapted(x)
    return result


WAYS: dict[str, Callable[[nn.QuantizedLinear, mx.array], mx.array]] = {
    "packed": _packed,
    "dense copy": _through_dense,
    "group, packed": lambda layer, x: _in_group(layer, x, lambda *_: False),
    "group, dense copy": lambda layer, x: _in_group(layer, x, lambda *_: True),
}


@pytest.fixture(autouse=True)
def _on_cpu() -> Any:
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


def _require_close(
    found: mx.array,
    exact: "NDArray[np.float64]",
    terms: "NDArray[np.float64]",
    num_terms: int,
    *,
    of_factors: float = 0.0,
) -> None:
    """Check sums in fp32, in any order: a rounding of the largest partial sum for each term.

    Args:
        found: the sums.
        exact: in float64.
        terms: the sums of the terms' sizes.
        num_terms: of each sum.
        of_factors: the relative error that rounded factors give each term.
    """
    of_result = 0.0 if found.dtype == mx.float32 else 2.0**-8 * (np.abs(exact) + of_factors * terms)
    allowed = ((num_terms + 4) * 2.0**-24 + of_factors) * terms + of_result + 1e-30
    assert (np.abs(np.array(found.astype(mx.float32), np.float64) - exact) <= allowed).all()


@pytest.mark.parametrize(
    ("way", "has_bias"),
    [("packed", False), ("packed", True), ("dense copy", False), *((way, True) for way in [*WAYS][1:])],
)
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda one: f"{one.mode}-{one.bits}-{one.group_size}")
def test_outputs_and_gradients_match_the_dense_layer(setting: Setting, has_bias: bool, way: str) -> None:
    layer = _layer(setting, has_bias=has_bias)
    for rows in ROWS if not has_bias or setting.bits in (4, 8) else ROWS[:3]:
        x = mx.random.normal((1, rows, INPUTS), key=mx.random.key(2))
        incoming = mx.random.normal((1, rows, OUTPUTS), key=mx.random.key(3))
        (output,), (dx,) = mx.vjp(lambda x: WAYS[way](layer.module, x), [x], [incoming])
        x64, g64 = np.array(x, np.float64), np.array(incoming, np.float64)
        exact, size = x64 @ layer.weight.T + layer.bias, np.abs(x64) @ np.abs(layer.weight).T + np.abs(layer.bias)
        _require_close(output, exact, _with_offsets(layer, size, np.abs(x64).sum(-1, keepdims=True)), INPUTS)
        most = _with_offsets(layer, np.abs(g64) @ np.abs(layer.weight), np.abs(g64).sum(-1, keepdims=True))
        _require_close(dx, g64 @ layer.weight, most, OUTPUTS)


def _with_offsets(layer: _Layer, size: "NDArray[np.float64]", sums: "NDArray[np.float64]") -> "NDArray[np.float64]":
    """Return the size of the terms of a product that adds codes and biases of the groups separately, as MLX does."""
    biases = layer.module.get("biases")
    return size if biases is None else size + 2 * float(mx.abs(biases).max()) * sums


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda one: f"{one.mode}-{one.bits}-{one.group_size}")
def test_outputs_and_gradients_match_the_dense_layer_on_a_gpu(setting: Setting, way: str, dtype: mx.Dtype) -> None:
    """CUDA rounds factors in fp32 to TF32, 11 significant bits; in bf16 the weight is rounded, and so are its parts."""
    mx.set_default_device(mx.gpu)
    layer = _layer(setting, has_bias=True, dtype=dtype)
    of_factors = 2 * 2.0**-11 if dtype == mx.float32 else 3 * 2.0**-9
    for rows in ROWS:
        x = mx.random.normal((1, rows, INPUTS), key=mx.random.key(2)).astype(dtype)
        incoming = mx.random.normal((1, rows, OUTPUTS), key=mx.random.key(3)).astype(dtype)
        (output,), (dx,) = mx.vjp(lambda x: WAYS[way](layer.module, x), [x], [incoming])
        x64, g64 = (np.array(one.astype(mx.float32), np.float64) for one in (x, incoming))
        exact, size = x64 @ layer.weight.T + layer.bias, np.abs(x64) @ np.abs(layer.weight).T + np.abs(layer.bias)
        most = _with_offsets(layer, size, np.abs(x64).sum(-1, keepdims=True))
        _require_close(output, exact, most, INPUTS, of_factors=of_factors)
        most = _with_offsets(layer, np.abs(g64) @ np.abs(layer.weight), np.abs(g64).sum(-1, keepdims=True))
        _require_close(dx, g64 @ layer.weight, most, OUTPUTS, of_factors=of_factors)


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("rows", ROWS)
def test_slices_of_a_large_weight_give_the_same_product(
    transpose: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_matmul, "SLICE_ROWS", 20)  # the last slice is shorter
    for setting in (SETTINGS[7], SETTINGS[-3], SETTINGS[-1]):
        layer = _layer(setting, has_bias=False)
        parts = [layer.module.get(name) for name in ("weight", "scales", "biases")]
        weight = tuple(part for part in parts if part is not None)
        x = mx.random.normal((rows, INPUTS if transpose else OUTPUTS), key=mx.random.key(2))
        form = Format(setting.group_size, setting.bits, setting.mode)
        found = quantized_matmul.dense_product(x, weight, form, transpose=transpose)
        x64, dense = np.array(x, np.float64), layer.weight.T if transpose else layer.weight
        _require_close(found, x64 @ dense, np.abs(x64) @ np.abs(dense), dense.shape[0])
