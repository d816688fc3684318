import math

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxflow import models
from mlxflow.data.token_file import Rows
from mlxflow.training.step import compile_step, steps_on, warmup_cosine


def _model(seed: int = 0) -> nn.Module:
    config = models.llama_config(
        vocab_size=50,
        context_length=8,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        intermediate_size=16,
        tie_word_embeddings=True,
        rope_theta=1e4,
        end_of_text=0,
    )
    return models.build(config, seed=seed)


def _marks(*shape: int) -> mx.array:
    """Return marks of rows of one document each; the first token of each is no target."""
    return mx.full(shape, 3, dtype=mx.uint8)


def _weights(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def _plain_loss(model: nn.Module, batch: mx.array) -> mx.array:
    losses: mx.array = nn.losses.cross_entropy(model(batch[:, :-1]), batch[:, 1:], reduction="mean")
    return losses


def test_the_learning_rate_rises_linearly_and_falls_along_a_cosine() -> None:
    schedule = warmup_cosine(learning_rate=2.0, num_steps=100, warmup_steps=10)
    rates = [float(schedule(mx.array(step))) for step in range(100)]
    for step, rate in enumerate(rates):
        expected = 2.0 / 11 + (2.0 - 2.0 / 11) * step / 10 if step < 10 else 1.0 + math.cos(math.pi * (step - 10) / 90)
        assert rate == pytest.approx(expected, abs=1e-5)


def test_without_warmup_the_first_update_is_the_largest() -> None:
    schedule = warmup_cosine(learning_rate=2.0, num_steps=100, warmup_steps=0)
    assert float(schedule(mx.array(0))) == 2.0


def test_a_compiled_step_does_what_the_operations_do_one_by_one() -> None:
    batch = mx.random.randint(0, 50, (4, 9), key=mx.random.key(3))
    ours, theirs = _model(), _model()
    optimizer = optim.AdamW(1e-2)
    optimizer.init(ours.trainable_parameters())
    step, state = compile_step(ours, optimizer, max_grad_norm=0.5, masks_documents=False)
    plain = optim.AdamW(1e-2)
    for _ in range(3):
        loss, norm = step(batch, _marks(4, 9))
        mx.eval(state)
        expected, gradients = nn.value_and_grad(theirs, _plain_loss)(theirs, batch)
        gradients, expected_norm = optim.clip_grad_norm(gradients, 0.5)
        plain.update(theirs, gradients)
        assert float(loss) == pytest.approx(float(expected), rel=1e-4)
        assert float(norm) == pytest.approx(float(expected_norm), rel=1e-3)
    before = _weights(_model())
    for name, value in _weights(ours).items():
        assert mx.allclose(value, _weights(theirs)[name], atol=1e-4), name
        assert not mx.array_equal(value, before[name]), name


def test_a_gradient_of_a_larger_norm_is_scaled_down_to_it() -> None:
    batch = mx.random.randint(0, 50, (4, 9), key=mx.random.key(3))
    moved = []
    for max_grad_norm in (1e9, 0.01):
        model = _model()
        optimizer = optim.SGD(1.0)
        optimizer.init(model.trainable_parameters())
        before = {name: mx.array(value) for name, value in _weights(model).items()}
        step, state = compile_step(model, optimizer, max_grad_norm=max_grad_norm, masks_documents=False)
        _, norm = step(batch, _marks(4, 9))
        mx.eval(norm, state)
        squares = [float(mx.square(value - before[name]).sum()) for name, value in _weights(model).items()]
        moved.append((math.sqrt(sum(squares)), float(norm)))
    (free, whole), (clipped, told) = moved
    assert whole == pytest.approx(told) == pytest.approx(free, rel=1e-3)
    assert whole > 0.1
    assert clipped == pytest.approx(0.01, rel=1e-2)


def test_a_step_learns_rows_by_heart() -> None:
    model = _model()
    table = np.random.default_rng(0).integers(0, 50, (4, 9)).astype(np.uint16)
    optimizer = optim.AdamW(2e-2)
    optimizer.init(model.trainable_parameters())
    step, state = compile_step(model, optimizer, max_grad_norm=1.0, masks_documents=False)
    losses = []
    for _ in range(60):
        loss, _ = step(mx.array(table), _marks(4, 9))
        mx.eval(loss, state)
        losses.append(float(loss))
    assert losses[0] > 3
    assert losses[-1] < 0.5


def test_a_measured_step_really_trains() -> None:
    model = _model()
    before = {name: mx.array(value) for name, value in _weights(model).items()}
    table = np.random.default_rng(0).integers(0, 50, (10, 9)).astype(np.uint16)
    with steps_on(
        model, Rows(table, np.full((10, 9), 3, np.uint8)), batch_size=4, masks_documents=False, seed=0
    ) as step:
        assert step() == 4 * 8
    assert all(not mx.array_equal(value, before[name]) for name, value in _weights(model).items())


def test_the_same_seed_is_the_same_model() -> None:
    assert all(mx.array_equal(value, _weights(_model())[name]) for name, value in _weights(_model()).items())
    assert not mx.array_equal(
        _weights(_model(1))["model.embed_tokens.weight"], _weights(_model())["model.embed_tokens.weight"]
    )
