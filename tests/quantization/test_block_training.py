import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxflow.device import phase_peaks
from mlxflow.quantization.affine_grid import best_grid
from mlxflow.quantization.block_training import BlockRows, TrainedBlock, relative_error, train_block
from mlxflow.quantization.settings import Setting
from mlxflow.quantization.trained_grid import GridLayer

FP32 = (mx.float32, mx.float32)


class _Block(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = x + self.down(nn.silu(self.up(self.norm(x))))
        return y


def _trained(*, num_steps: int) -> tuple[TrainedBlock, float]:
    """Return a trained block of 2 bits, and its error on rows that it was not trained on."""
    mx.random.seed(0)
    block, setting = _Block(), Setting("affine", 2, 32)
    hidden = mx.random.normal((48, 8, 32)) * 0.3
    targets = block(hidden)
    mx.eval(targets)
    pairs = {
        path: GridLayer.begin(layer.weight, setting, best_grid(layer.weight, setting), dtypes=FP32)
        for path, layer in (("up", block.up), ("down", block.down))
    }
    layers = {path: pair[0] for path, pair in pairs.items()}
    rows = BlockRows(32, lambda numbers: (hidden[mx.array(numbers)], targets[mx.array(numbers)]))
    made = train_block(
        block,
        lambda block, x: block(x),
        layers,
        {path: pair[1] for path, pair in pairs.items()},
        rows,
        num_steps=num_steps,
        batch_size=8,
        seed=0,
    )
    for path, layer in layers.items():
        assert not getattr(block, path).weight.any()  # the dense one is not held
        getattr(block, path).weight = layer.weight(made.trained[path])
    return made, float(relative_error(block(hidden[32:]), targets[32:]))


def test_training_lowers_the_error_on_other_rows() -> None:
    none, before = _trained(num_steps=0)
    assert (none.first_error, none.last_error) == (0.0, 0.0)
    made, after = _trained(num_steps=100)
    assert made.last_error < 0.85 * made.first_error
    assert after < 0.85 * before


def test_training_twice_gives_the_same_numbers() -> None:
    one, other = (_trained(num_steps=5)[0] for _ in range(2))
    assert one.last_error == other.last_error
    for path, arrays in one.trained.items():
        for name, array in arrays.items():
            assert mx.array_equal(array, other.trained[path][name])


def test_the_error_of_a_token_is_relative_to_its_size() -> None:
    targets = mx.array(np.array([[[1.0, 0.0], [1000.0, 0.0]]], np.float32))
    assert float(relative_error(targets * 1.1, targets)) == pytest.approx(0.01, rel=1e-4)


def test_only_dimensions_far_larger_than_others_count_less() -> None:
    signs = np.random.default_rng(0).choice([-1, 1], (2, 64, 8))
    targets = mx.array((signs * [1000.0, 2, *[1] * 6]).astype(np.float32))
    assert float(relative_error(targets, targets)) == 0.0
    wrong = {place: targets * mx.array([1.1 if place == one else 1.0 for one in range(8)]) for place in range(8)}
    errors = {place: float(relative_error(one, targets)) for place, one in wrong.items()}
    assert errors[1] / errors[2] == pytest.approx(4 * 9 / 12, rel=1e-3)  # by its square, over itself and 8 medians
    assert errors[0] / errors[2] == pytest.approx(9, rel=1e-3)
    assert np.isfinite(float(relative_error(mx.ones((1, 2, 4)), mx.zeros((1, 2, 4)))))


def test_training_holds_24_bytes_a_weight() -> None:
    setting, count = Setting("affine", 4, 64), 12
    block = nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(count)])
    layers, arrays = {}, {}
    for path, layer in block.named_modules():
        if isinstance(layer, nn.Linear):
            grid = best_grid(layer.weight, setting)
            layers[path], arrays[path] = GridLayer.begin(layer.weight, setting, grid, dtypes=FP32)
    x = mx.random.normal((2, 4, 512))
    mx.eval(x, arrays)
    rows = BlockRows(2, lambda numbers: (x[mx.array(numbers)], x[mx.array(numbers)]))
    with phase_peaks.followed() as peak:
        train_block(block, lambda block, x: block(x), layers, arrays, rows, num_steps=2, batch_size=2, seed=0)
    assert peak.bytes < 27 * count * 512**2
