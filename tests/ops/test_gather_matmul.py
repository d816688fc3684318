"""Products with the experts' matrices in every type, on every device."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchGLU
from mlx_lm.tuner.lora import LoRASwitchLinear
from numpy.typing import NDArray

from mlxflow.ops import gather_matmul

INDICES = [[0, 1], [1, 2], [3, 0], [2, 2], [1, 1], [0, 3]]

#: Rounding of each type, relative: half of the distance to the next number.
ROUNDING = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}


@pytest.fixture(autouse=True)
def _installed() -> None:
    gather_matmul.install()


def _arrays(dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    keys = mx.random.split(mx.random.key(0), 2)
    x, weight = mx.random.normal((6, 1, 1, 32), key=keys[0]), mx.random.normal((4, 8, 32), key=keys[1])
    return x.astype(dtype), weight.astype(dtype)


def _numpy(x: mx.array) -> "NDArray[np.float64]":
    return np.array(x.astype(mx.float32), np.float64)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_each_row_is_multiplied_by_the_matrix_of_its_expert(dtype: mx.Dtype) -> None:
    x, weight = _arrays(dtype)
    made = mx.gather_mm(x, weight.swapaxes(-1, -2), rhs_indices=mx.array(INDICES))
    assert made.dtype == dtype
    rows, matrices = _numpy(x)[:, 0, 0], _numpy(weight)
    for row, experts in enumerate(INDICES):
        for place, expert in enumerate(experts):
            exact = matrices[expert] @ rows[row]
            # one rounding to the type, and fp32's over a sum of 32 products
            most = np.abs(matrices[expert]) @ np.abs(rows[row])
            allowed = ROUNDING[dtype] * np.abs(exact) + 32 * ROUNDING[mx.float32] * most
            assert (np.abs(_numpy(made)[row, place, 0] - exact) <= allowed).all()


@pytest.mark.parametrize("dtype", ROUNDING)
def test_gather_matmul_gradients_match_separate_products(dtype: mx.Dtype) -> None:
    x, weight = _arrays(dtype)
    incoming = mx.random.normal((6, 2, 1, 8), key=mx.random.key(3)).astype(dtype)

    def summed(x: mx.array, weight: mx.array) -> mx.array:
        made = mx.gather_mm(x, weight.swapaxes(-1, -2), rhs_indices=mx.array(INDICES))
        return (made * incoming).astype(mx.float32).sum()

    by_x, by_weight = mx.grad(summed, argnums=(0, 1))(x, weight)
    assert (by_x.dtype, by_weight.dtype) == (dtype, dtype)
    rows, matrices, given = _numpy(x)[:, 0, 0], _numpy(weight), _numpy(incoming)[:, :, 0]
    exact = [np.zeros_like(rows), np.zeros_like(matrices)]
    sizes = [np.zeros_like(rows), np.zeros_like(matrices)]
    for row, experts in enumerate(INDICES):
        for place, expert in enumerate(experts):
            for sums, size in ((exact, lambda array: array), (sizes, np.abs)):
                sums[0][row] += size(given[row, place]) @ size(matrices[expert])
                sums[1][expert] += np.outer(size(given[row, place]), size(rows[row]))
    for made, wanted, most in zip((_numpy(by_x)[:, 0, 0], _numpy(by_weight)), exact, sizes, strict=True):
        assert (np.abs(made - wanted) <= 12 * ROUNDING[dtype] * most).all()  # at most 12 roundings on the way


def test_an_expert_layer_with_an_adapter_gives_the_same_result_in_bf16_and_fp32() -> None:
    layer = SwitchGLU(32, 16, 4)
    layer.up_proj = LoRASwitchLinear.from_base(layer.up_proj, r=4, scale=2.0)
    layer.up_proj.lora_b = mx.random.normal(layer.up_proj.lora_b.shape, key=mx.random.key(5))
    layer.set_dtype(mx.bfloat16)
    x = mx.random.normal((2, 40, 32), key=mx.random.key(6)).astype(mx.bfloat16)  # enough tokens to be sorted by expert
    indices = mx.random.randint(0, 4, (2, 40, 2), key=mx.random.key(7))
    made = layer(x, indices)
    layer.set_dtype(mx.float32)
    exact = layer(x.astype(mx.float32), indices)
    assert made.dtype == mx.bfloat16
    # five products in a row, each rounded, and an activation between them
    assert float(mx.abs(made - exact).max()) <= 10 * ROUNDING[mx.bfloat16] * float(mx.abs(exact).max())


def test_installing_twice_changes_nothing() -> None:
    before = mx.gather_mm
    gather_matmul.install()
    assert mx.gather_mm is before
