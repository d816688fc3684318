import math

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxflow.training.optimizers import make_optimizer
from mlxflow.training.update import Update
from tests.training.test_optimizers import NAMES, Tiny


@pytest.mark.parametrize("name", NAMES)
def test_an_update_matches_mlx_s_optimizer_on_each_array(name: str) -> None:
    model, plain = Tiny(), Tiny()
    ours, theirs = (
        make_optimizer(name=name, schedule=lambda _: mx.array(0.1), weight_decay=0.2, options={}) for _ in range(2)
    )
    update = Update(model, ours, max_grad_norm=0.0, has_masters=False)
    for step in range(4):
        gradients = {
            key: mx.random.normal(value.shape, key=mx.random.key(step)) for key, value in plain.parameters().items()
        }
        mx.eval(update(mx.array(1.0), mx.array(1.0), update.join(gradients)), model.state, update.state)
        theirs.update(plain, gradients)
    for key, value in tree_flatten(plain.parameters()):
        assert np.allclose(np.array(value), np.array(model[key]), rtol=1e-6, atol=1e-7), key


def test_the_gradient_is_the_mean_over_tokens_with_its_norm_clipped() -> None:
    model = Tiny()
    update = Update(
        model,
        make_optimizer(name="sgd", schedule=lambda _: mx.array(1.0), weight_decay=0.0, options={}),
        max_grad_norm=0.5,
        has_masters=False,
    )
    before = {key: np.array(value) for key, value in tree_flatten(model.parameters())}
    gradients = {"matrix": mx.full((4, 3), 10.0), "vector": mx.full((3,), 10.0)}
    outcome = update(mx.array(30.0), mx.array(10.0), update.join(gradients))
    loss, norm, rate, is_finite = (value.item() for value in outcome)
    assert (loss, rate, is_finite) == (3.0, 1.0, True)
    assert norm == pytest.approx(math.sqrt(15))
    moved = [np.square(np.array(value) - before[key]).sum() for key, value in tree_flatten(model.parameters())]
    assert math.sqrt(sum(moved)) == pytest.approx(0.5, rel=1e-4)
