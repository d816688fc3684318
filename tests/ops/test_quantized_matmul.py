"""Products of many rows with quantized weights on the CPU: as exact as MLX's, and the same gradients."""

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from numpy.typing import NDArray

from mlxflow.ops import patching, quantized_matmul

PLAIN: Callable[..., mx.array] = mx.quantized_matmul

#: Rounding of each type, relative: half of the distance to the next number.
ROUNDING = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}

#: Mode, bits and group size of every kind of weight that MLX quantizes.
FORMATS = [
    *[("affine", bits, size) for bits in (2, 3, 4, 5, 6, 8) for size in (32, 64, 128)],
    ("mxfp4", 4, 32),
    ("mxfp8", 8, 32),
    ("nvfp4", 4, 16),
]


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    quantized_matmul.install()
    yield
    quantized_matmul.uninstall()
    mx.set_default_device(before)


@pytest.fixture
def dense_products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the weights that were dequantized."""
    shapes: list[tuple[int, ...]] = []
    plain = quantized_matmul.dequantize

    def dequantize(weight: tuple[mx.array, ...], form: quantized_matmul.Format) -> mx.array:
        shapes.append(tuple(weight[0].shape))
        return plain(weight, form)

    monkeypatch.setattr(quantized_matmul, "dequantize", dequantize)
    return shapes


def _normal(shape: tuple[int, ...], seed: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def _multiply(*arrays: mx.array, **how: Any) -> mx.array:
    matmul: Callable[..., mx.array] = mx.quantized_matmul  # as a layer of MLX looks it up
    return matmul(*arrays, **how)


def _numpy(x: mx.array) -> "NDArray[np.float64]":
    return np.array(x.astype(mx.float32), np.float64)


_dequantize: Callable[..., mx.array] = mx.dequantize


def _close(found: mx.array, rows: "NDArray[np.float64]", weight: "NDArray[np.float64]", dtype: mx.Dtype) -> None:
    """Check a product: a rounding to the type, and fp32's over the sum and the dequantized weight."""
    exact, most = rows @ weight, np.abs(rows) @ np.abs(weight)
    allowed = ROUNDING[dtype] * np.abs(exact) + (weight.shape[0] + 2) * ROUNDING[mx.float32] * most
    assert (np.abs(_numpy(found) - exact) <= 1.01 * allowed).all()


@pytest.mark.parametrize("rows", [16, 300])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("mode", "bits", "group_size"), FORMATS)
def test_products_and_their_gradients_match_float64(
    mode: str, bits: int, group_size: int, dtype: mx.Dtype, rows: int
) -> None:
    how: dict[str, Any] = {"mode": mode, "bits": bits, "group_size": group_size}
    codes, *scales = mx.quantize(_normal((40, 128), 0, dtype), **how)
    dense = _numpy(_dequantize(codes, *scales, **how))
    x, g = _normal((2, rows // 2, 128), 1, dtype), _normal((2, rows // 2, 40), 2, dtype)
    (found,), (dx,) = mx.vjp(lambda x: _multiply(x, codes, *scales, transpose=True, **how), [x], [g])
    assert (found.dtype, dx.dtype) == (dtype, dtype)
    _close(found, _numpy(x), dense.T, dtype)
    _close(dx, _numpy(g), dense, dtype)
    turned = _multiply(g, codes, *scales, transpose=False, **how)
    assert mx.array_equal(turned, dx)


@pytest.mark.parametrize(
    ("shape", "dtype", "is_dense"),
    [
        ((16, 128), mx.float32, True),
        ((2, 8, 128), mx.float32, True),
        ((15, 128), mx.float32, False),
        ((1, 1, 128), mx.float32, False),
        ((2, 128), mx.bfloat16, True),
        ((1, 128), mx.bfloat16, False),
        ((128,), mx.bfloat16, False),
    ],
)
def test_few_rows_are_multiplied_by_the_codes(
    shape: tuple[int, ...], dtype: mx.Dtype, is_dense: bool, dense_products: list[tuple[int, ...]]
) -> None:
    codes, *scales = mx.quantize(_normal((40, 128), 0, dtype))
    x = _normal(shape, 1, dtype)
    found = _multiply(x, codes, *scales)
    assert bool(dense_products) == is_dense
    if not is_dense:
        assert mx.array_equal(found, PLAIN(x, codes, *scales))


def test_gradients_of_scales_match_those_of_mlx() -> None:
    codes, scales, biases = mx.quantize(_normal((40, 128), 0))
    x, g = _normal((20, 128), 1), _normal((20, 40), 2)

    def gradients(matmul: Callable[..., mx.array]) -> list[mx.array]:
        return mx.vjp(lambda s, b: matmul(x, codes, s, b), [scales, biases], [g])[1]

    for found, expected in zip(gradients(_multiply), gradients(PLAIN), strict=True):
        # each sums 20 rows of products over 64 columns, of numbers near 1 and codes up to 15
        assert float(mx.abs(found - expected).max()) <= 20 * 64 * 15 * ROUNDING[mx.float32] * 10


def test_a_quantized_layer_uses_dense_products_and_several_matrices_do_not(
    dense_products: list[tuple[int, ...]],
) -> None:
    layer = nn.QuantizedLinear(128, 40, bias=True)
    x = _normal((3, 20, 128), 0)
    weight = mx.dequantize(layer.weight, layer.scales, layer.biases, group_size=64, bits=4)
    _close(layer(x) - layer.bias, _numpy(x), _numpy(weight).T, mx.float32)
    assert dense_products == [layer.weight.shape]
    codes, *scales = mx.quantize(_normal((2, 40, 128), 1))
    assert _multiply(_normal((2, 20, 128), 2), codes, *scales).shape == (2, 20, 40)
    assert len(dense_products) == 1


def test_a_compiled_step_does_not_hold_the_dense_model() -> None:
    width, layers = 512, 24
    weights = [mx.quantize(_normal((width, width), seed)) for seed in range(layers)]

    def loss(x: mx.array) -> mx.array:
        for codes, scales, biases in weights:
            x = _multiply(x, codes, scales, biases) / width**0.5
        return x.sum()

    gradient = mx.compile(mx.grad(loss))
    x = _normal((32, width), 99)
    mx.eval(x, weights, gradient(x))
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(gradient(x))
    assert mx.get_peak_memory() - held < layers / 2 * width * width * 4


def test_it_is_installed_once_and_undone() -> None:
    quantized_matmul.install()
    assert patching.Replacement("mlx.core.quantized_matmul", quantized_matmul.__name__, True) in patching.active()
    quantized_matmul.uninstall()
    assert mx.quantized_matmul is PLAIN


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("mode", "bits", "group_size"), FORMATS)
def test_a_dequantized_weight_has_the_bits_of_mlx(mode: str, bits: int, group_size: int, dtype: mx.Dtype) -> None:
    how: dict[str, Any] = {"mode": mode, "bits": bits, "group_size": group_size}
    weight = tuple(mx.quantize(_normal((40, 256), 0, dtype), **how))
    form = quantized_matmul.Format(group_size, bits, mode)
    for compiled in (False, True):
        ours, theirs = (
            mx.compile(function) if compiled else function
            for function in (
                lambda *parts: quantized_matmul.dequantize(parts, form),
                lambda *parts: _dequantize(*parts, **how),
            )
        )
        found, expected = ours(*weight), theirs(*weight)
        assert found.dtype == expected.dtype
        assert mx.array_equal(found, expected)


def test_a_dequantized_weight_takes_no_more_memory_than_its_own() -> None:
    weight = tuple(mx.quantize(_normal((4096, 512), 0)))
    form = quantized_matmul.Format(64, 4, "affine")
    dequantize = mx.compile(lambda *parts: quantized_matmul.dequantize(parts, form))
    mx.eval(weight, dequantize(*weight))
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    dense = dequantize(*weight)
    mx.eval(dense)
    assert mx.get_peak_memory() - held < 1.1 * dense.nbytes
