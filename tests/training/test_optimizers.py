import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxflow.training.optimizers import make_optimizer, make_schedule, options_of
from mlxflow.training.update import Update

NAMES = ["adamw", "adam", "sgd", "rmsprop", "adagrad", "adadelta", "adamax", "lion", "adafactor", "muon"]


def _schedule(name: str, **changes: Any) -> list[float]:
    settings = {"final_learning_rate": 0.2, "num_steps": 100, "warmup_steps": 10, "decay_steps": 20} | changes
    schedule = make_schedule(name=name, learning_rate=2.0, **settings)
    return [float(schedule(mx.array(step, mx.uint64))) for step in range(101)]


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd"])
def test_the_learning_rate_rises_linearly_over_the_warm_up(name: str) -> None:
    assert _schedule(name)[:10] == pytest.approx([2.0 * (step + 1) / 11 for step in range(10)], rel=1e-5)
    assert _schedule(name, warmup_steps=0)[0] == pytest.approx(2.0)


def test_each_schedule_decays_by_its_formula() -> None:
    done = [max(0, step - 10) / 90 for step in range(101)]
    expected = {
        "constant": [2.0] * 101,
        "linear": [0.2 + 1.8 * (1 - share) for share in done],
        "cosine": [0.2 + 1.8 * (1 + math.cos(math.pi * share)) / 2 for share in done],
        "wsd": [0.2 + 1.8 * min(1, (100 - step) / 20) for step in range(101)],
    }
    for name, rates in expected.items():
        assert _schedule(name)[10:] == pytest.approx(rates[10:], abs=1e-5), name


class Tiny(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.matrix = mx.random.normal((4, 3), key=mx.random.key(0))
        self.vector = mx.random.normal((3,), key=mx.random.key(1))


def _updated(name: str, weight_decay: float, **options: Any) -> dict[str, np.ndarray[Any, Any]]:
    model = Tiny()
    optimizer = make_optimizer(name=name, schedule=lambda _: mx.array(0.1), weight_decay=weight_decay, options=options)
    update = Update(model, optimizer, max_grad_norm=1e9, has_masters=False)
    gradients = {"matrix": mx.full((4, 3), 0.5), "vector": mx.full((3,), 0.5)}
    mx.eval(update(mx.array(1.0), mx.array(1.0), update.join(gradients)), model.state, update.state)
    return {key: np.array(value) for key, value in tree_flatten(model.parameters())}


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_of_mlx_moves_every_weight(name: str) -> None:
    before = {key: np.array(value) for key, value in tree_flatten(Tiny().parameters())}
    for key, value in _updated(name, 0.0).items():
        assert np.isfinite(value).all()
        assert (value != before[key]).all(), key


def test_every_optimizer_of_mlx_is_supported() -> None:
    known = {key.lower() for key, value in vars(optim).items() if isinstance(value, type)}
    assert known - {"optimizer", "multioptimizer", "module"} >= set(NAMES)
    assert {name for name in known if hasattr(vars(optim).get(name), "apply_single")} <= set(NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if "weight_decay" in options_of(name)])
def test_weight_decay_spares_norms_and_biases(name: str) -> None:
    plain, decayed = _updated(name, 0.0), _updated(name, 0.3)
    assert not np.array_equal(plain["matrix"], decayed["matrix"])
    assert np.array_equal(plain["vector"], decayed["vector"])


def test_an_option_reaches_the_optimizer() -> None:
    assert not np.array_equal(
        _updated("sgd", 0.0)["matrix"], _updated("sgd", 0.0, momentum=0.9, dampening=0.5)["matrix"]
    )
