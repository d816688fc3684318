import threading
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
import pytest

from mlxflow.device.numpy_blas import single_threaded
from mlxflow.quantization import error_compensation
from mlxflow.quantization.affine_grid import round_on
from mlxflow.quantization.codec import mlx_grid, round_trip
from mlxflow.quantization.error_compensation import Compensation, Compensations, Rounding
from mlxflow.quantization.grids import nearest
from mlxflow.quantization.settings import Setting


def _nearest(bits: int) -> Rounding:
    return nearest(Setting("affine", bits, 32))


def _case(width: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Return a matrix, and inputs whose channels are correlated and of different sizes."""
    random = np.random.default_rng(0)
    mixed = random.normal(size=(width, width)) * 0.3 + np.eye(width)
    inputs = random.normal(size=(1000, width)) @ mixed * np.exp(random.normal(size=width))
    return random.normal(size=(96, width)).astype(np.float32), inputs.astype(np.float32)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_compensated_weights_lose_less_of_their_products(bits: int) -> None:
    weight, inputs = _case()
    setting = Setting("affine", bits, 32)
    grid = mlx_grid(mx.array(weight), setting)
    made = Compensation(inputs.T @ inputs).applied(weight, np.array(grid), nearest=_nearest(bits))
    rounded = np.array(round_on(mx.array(made), setting, grid))

    def lost(matrix: np.ndarray) -> float:
        return float(np.square(inputs @ (matrix - weight).T).sum())

    assert lost(rounded) < 0.6 * lost(np.array(round_trip(mx.array(weight), setting)))


def test_without_correlated_inputs_the_weights_are_unchanged() -> None:
    weight, _ = _case()
    setting = Setting("affine", 3, 32)
    grid = np.array(mlx_grid(mx.array(weight), setting))
    identity = np.eye(128, dtype=np.float32)
    for inputs in (identity, np.full_like(identity, np.inf), identity * 0):
        assert np.allclose(Compensation(inputs).applied(weight, grid, nearest=_nearest(3)), weight, atol=1e-5)


def test_experts_and_inputs_without_rank_are_compensated_too() -> None:
    weight, inputs = _case()
    setting = Setting("affine", 4, 32)
    grid = np.array(mlx_grid(mx.array(weight), setting))
    few = inputs[:5].T @ inputs[:5]
    made = Compensation(few).applied(weight, grid, nearest=_nearest(4))
    assert np.isfinite(made).all()
    experts = Compensation(few).applied(weight.reshape(4, 24, 128), grid.reshape(2, 4, 24, 4), nearest=_nearest(4))
    assert np.array_equal(experts.reshape(96, 128), made)


def test_parts_of_the_rows_are_compensated_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = _case()
    grid = np.array(mlx_grid(mx.array(weight), Setting("affine", 3, 32)))
    compensation = Compensation(inputs.T @ inputs)
    whole = compensation.applied(weight, grid, nearest=_nearest(3))
    monkeypatch.setattr(error_compensation, "_NUMBERS_AT_ONCE", 128 * 40)  # parts of 10 rows
    assert np.allclose(compensation.applied(weight, grid, nearest=_nearest(3)), whole, atol=1e-4)


@pytest.mark.parametrize("count", [1, 3, 64])
def test_the_number_of_threads_changes_no_bit(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = _case(320)  # two panels
    grid = np.array(mlx_grid(mx.array(weight), Setting("affine", 3, 32)))
    compensation = Compensation(inputs.T @ inputs)
    monkeypatch.setattr(error_compensation, "_ROWS_AT_ONCE", 20)
    whole = compensation.applied(weight, grid, nearest=_nearest(3))
    used = set()

    def nearest_in_thread(positions: np.ndarray) -> np.ndarray:
        used.add(threading.get_ident())
        rounded: np.ndarray = _nearest(3)(positions)
        return rounded

    @contextmanager
    def with_threads() -> Iterator[int]:
        with single_threaded():
            yield count

    monkeypatch.setattr(error_compensation, "single_threaded", with_threads)
    assert np.array_equal(compensation.applied(weight, grid, nearest=nearest_in_thread), whole)
    assert 1 <= len(used) <= min(count, 4)


def _failing(positions: np.ndarray) -> np.ndarray:
    raise ZeroDivisionError


def test_an_error_in_a_thread_is_raised() -> None:
    weight, inputs = _case()
    grid = np.array(mlx_grid(mx.array(weight), Setting("affine", 3, 32)))
    with pytest.raises(ZeroDivisionError):
        Compensation(inputs.T @ inputs).applied(weight, grid, nearest=_failing)


def _as_published(weight: np.ndarray, grid: np.ndarray, inputs: np.ndarray, bits: int) -> np.ndarray:
    """Return what GPTQ's own formulas give in fp64, with the inverse of the inputs, columns of large inputs first."""
    order = np.argsort(-np.diag(inputs), kind="stable")
    damped = inputs[order][:, order].astype(np.float64)
    damped += np.eye(len(damped)) * 0.01 * np.mean(np.diag(damped))
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T
    columns = weight.T[order].astype(np.float64)
    for place, column in enumerate(order):
        scale, bias = (part[:, column // 32].astype(np.float64) for part in grid)
        rounded = _nearest(bits)((columns[place] - bias) / scale) * scale + bias
        columns[place + 1 :] -= np.outer(factor[place, place + 1 :], (columns[place] - rounded) / factor[place, place])
    result = np.empty_like(columns)
    result[order] = columns
    return result.T


@pytest.mark.parametrize("num_inputs", [5, 1000])
def test_the_triangle_gives_the_weights_of_the_inverse(num_inputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(error_compensation, "_COLUMNS_AT_ONCE", 48)
    monkeypatch.setattr(error_compensation, "_UPDATED_AT_ONCE", 56)
    monkeypatch.setattr(error_compensation, "_COLUMNS_ALONE", 5)
    monkeypatch.setattr(error_compensation, "_TILE", 30)
    monkeypatch.setattr(error_compensation, "_PANEL", 24)
    monkeypatch.setattr(error_compensation, "_STRIPE", 40)
    weight, inputs = _case()
    products = inputs[:num_inputs].T @ inputs[:num_inputs]
    grid = np.array(mlx_grid(mx.array(weight), Setting("affine", 3, 32)))
    made = Compensation(products).applied(weight, grid, nearest=_nearest(3))
    assert np.abs(made - _as_published(weight, grid, products, 3)).max() < 2e-3


def test_layers_with_the_same_inputs_share_a_compensation_and_the_inputs_are_freed() -> None:
    _, inputs = _case()
    one, other = mx.array(inputs.T @ inputs), mx.eye(128)
    products = {"q": one, "k": one, "o": other}
    compensations = Compensations(products)
    q = compensations.take("q")
    assert q is not None
    assert list(products) == ["o"]
    assert compensations.take("k") is q
    assert compensations.take("o") not in (None, q)
    assert compensations.take("v") is None
    assert not products
