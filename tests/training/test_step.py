import math

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxflow.data.token_file import Rows
from mlxflow.evaluation.perplexity import measure_perplexity
from mlxflow.ops.overrides import OperationOverrides
from mlxflow.ops.quantized_matmul import Format
from mlxflow.training.gradient_packing import Gradients
from mlxflow.training.objective import plain_objective
from mlxflow.training.step import Step
from mlxflow.training.update import Update
from tests.ops.test_module_caches import Caching
from tests.small_models import llama
from tests.training.small_training import make_trainer


def _model(seed: int = 0) -> nn.Module:
    return llama(seed=seed)[0]


def _step(model: nn.Module, optimizer: optim.Optimizer, *, max_grad_norm: float, has_masters: bool = False) -> Step:
    update = Update(model, optimizer, max_grad_norm=max_grad_norm, has_masters=has_masters)
    return Step(model, update, plain_objective(masks_documents=False))


def _marks(*shape: int) -> mx.array:
    """Return marks of rows of one document each; the first token of each is no target."""
    return mx.full(shape, 3, dtype=mx.uint8)


def _weights(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def _plain_loss(model: nn.Module, batch: mx.array) -> mx.array:
    losses: mx.array = nn.losses.cross_entropy(model(batch[:, :-1]), batch[:, 1:], reduction="mean")
    return losses


def test_a_compiled_step_matches_the_uncompiled_operations() -> None:
    batch = mx.random.randint(0, 50, (4, 9), key=mx.random.key(3))
    ours, theirs = _model(), _model()
    step = _step(ours, optim.AdamW(1e-2), max_grad_norm=0.5)
    plain = optim.AdamW(1e-2)
    for _ in range(3):
        loss, norm, *_ = step.update(step.compute(batch, _marks(4, 9)))
        mx.eval(step.state)
        expected, gradients = nn.value_and_grad(theirs, _plain_loss)(theirs, batch)
        gradients, expected_norm = optim.clip_grad_norm(gradients, 0.5)
        plain.update(theirs, gradients)
        assert float(loss) == pytest.approx(float(expected), rel=1e-4)
        assert float(norm) == pytest.approx(float(expected_norm), rel=1e-3)
    before = _weights(_model())
    for name, value in _weights(ours).items():
        assert mx.allclose(value, _weights(theirs)[name], atol=1e-4), name
        assert not mx.array_equal(value, before[name]), name


def test_gradients_are_clipped_to_max_grad_norm() -> None:
    batch = mx.random.randint(0, 50, (4, 9), key=mx.random.key(3))
    moved = []
    for max_grad_norm in (1e9, 0.01):
        model = _model()
        before = {name: mx.array(value) for name, value in _weights(model).items()}
        step = _step(model, optim.SGD(1.0), max_grad_norm=max_grad_norm)
        norm = step.update(step.compute(batch, _marks(4, 9))).norm
        mx.eval(norm, step.state)
        squares = [float(mx.square(value - before[name]).sum()) for name, value in _weights(model).items()]
        moved.append((math.sqrt(sum(squares)), float(norm)))
    (free, whole), (clipped, told) = moved
    assert whole == pytest.approx(told) == pytest.approx(free, rel=1e-3)
    assert whole > 0.1
    assert clipped == pytest.approx(0.01, rel=1e-2)


def test_repeated_steps_overfit_a_few_rows() -> None:
    model = _model()
    table = np.random.default_rng(0).integers(0, 50, (4, 9)).astype(np.uint16)
    step = _step(model, optim.AdamW(2e-2), max_grad_norm=1.0)
    losses = []
    for _ in range(60):
        loss = step.update(step.compute(mx.array(table), _marks(4, 9))).loss
        mx.eval(loss, step.state)
        losses.append(float(loss))
    assert losses[0] > 3
    assert losses[-1] < 0.5


def test_the_same_seed_gives_the_same_model() -> None:
    assert all(mx.array_equal(value, _weights(_model())[name]) for name, value in _weights(_model()).items())
    assert not mx.array_equal(
        _weights(_model(1))["model.embed_tokens.weight"], _weights(_model())["model.embed_tokens.weight"]
    )


# --- any number of forward passes


def _difference(one: Gradients, other: Gradients) -> float:
    """Return the largest relative difference of any tensor's gradient, by its norm."""
    wanted = dict(tree_flatten(other.tree))
    return max(
        float(mx.linalg.norm(gradient - wanted[name]) / mx.linalg.norm(wanted[name]))
        for name, gradient in tree_flatten(one.tree)
    )


@pytest.mark.parametrize("size", [32, 16, 24, 7])
def test_any_split_of_the_rows_gives_the_same_gradient(size: int) -> None:
    tokens = mx.random.randint(0, 50, (64, 9), key=mx.random.key(3))
    lengths = mx.random.randint(1, 9, (64, 1), key=mx.random.key(4))  # each row with another number of targets
    marks = mx.where(mx.arange(9) <= lengths, 3, 2)
    step = _step(_model(), optim.SGD(1.0), max_grad_norm=1.0)
    whole = step.compute(tokens, marks)
    parts = None
    for begin in range(0, 64, size):
        parts = step.add(parts, tokens[begin : begin + size], marks[begin : begin + size])
    assert parts is not None
    assert float(parts.targets) == float(whole.targets) == float(lengths.sum())
    assert _difference(parts, whole) < 1e-6
    assert float(parts.total) == pytest.approx(float(whole.total), rel=1e-6)


def test_computing_gradients_leaves_the_model_unchanged() -> None:
    model = _model()
    step = _step(model, optim.SGD(1.0), max_grad_norm=1.0)
    batch = mx.random.randint(0, 50, (4, 9), key=mx.random.key(3))
    mx.eval(step.compute(batch, _marks(4, 9)), step.add(None, batch, _marks(4, 9)))
    assert all(mx.array_equal(value, _weights(_model())[name]) for name, value in _weights(model).items())


def test_a_step_with_a_non_finite_gradient_changes_nothing() -> None:
    model = _model()
    step = _step(model, optim.AdamW(1e-2), max_grad_norm=1.0)
    batch = mx.random.randint(0, 50, (4, 9), key=mx.random.key(3))
    mx.eval(step.update(step.compute(batch, _marks(4, 9))), step.state)
    before = {name: np.array(value) for name, value in tree_flatten(step.state[:2])}
    gradients = step.compute(batch, _marks(4, 9))
    poisoned = gradients._replace(total=mx.array(float("nan")))
    outcome = step.update(poisoned)
    mx.eval(outcome, step.state)
    assert not bool(outcome.is_finite)
    after = dict(tree_flatten(step.state[:2]))
    assert before.keys() == after.keys()
    assert all(np.array_equal(value, np.array(after[name])) for name, value in before.items())
    assert bool(step.update(gradients).is_finite)


def test_master_weights_keep_updates_that_pure_bf16_rounds_away() -> None:
    batch = mx.random.randint(0, 50, (4, 9), key=mx.random.key(3))
    moved = {}
    for has_masters in (False, True):
        model = _model()
        model.set_dtype(mx.bfloat16)
        before = {name: mx.array(value) for name, value in _weights(model).items()}
        step = _step(model, optim.SGD(1e-4), max_grad_norm=1e9, has_masters=has_masters)
        for _ in range(300):
            mx.eval(step.update(step.compute(batch, _marks(4, 9))), step.state)
        assert all(value.dtype == mx.bfloat16 for value in _weights(model).values())
        moved[has_masters] = sum(int((value != before[name]).sum()) for name, value in _weights(model).items())
    masters = step.state[1]["weights"]
    assert all(value.dtype == mx.float32 for value in masters.values())
    numbers = mx.concatenate([value.reshape(-1) for value in masters.values()]).astype(mx.bfloat16).astype(mx.float32)
    shown = [value.reshape(-1).astype(mx.float32) for value in _weights(model).values()]
    assert mx.array_equal(mx.sort(numbers), mx.sort(mx.concatenate(shown)))
    assert moved[True] > 1.2 * moved[False]


class _CachingModel(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 4)
        self.norm = Caching()
        self.head = nn.Linear(4, 50)
        self.layers: list[nn.Module] = []

    def __call__(self, tokens: mx.array) -> mx.array:
        result: mx.array = self.head(self.norm(self.embedding(tokens)))
        return result


def test_a_model_that_keeps_arrays_of_frozen_weights_can_be_trained() -> None:
    model = _CachingModel()
    model.norm.freeze()
    make_trainer(lambda record: None, model=model).run()
    assert mx.array_equal(model.norm(mx.ones(4)), mx.full(4, 2.0))


def test_a_validation_multiplies_quantized_weights_as_the_step_does() -> None:
    """On a GPU MLX's products with packed codes take several times as long for the rows of a validation."""
    asked: list[int] = []

    def is_faster_dense(x: mx.array, codes: mx.array, transpose: bool, form: Format) -> bool:
        asked.append(math.prod(x.shape[:-1]))
        return True

    model = llama(hidden_size=32, intermediate_size=32)[0]
    nn.quantize(model, group_size=32, bits=4)
    update = Update(model, optim.AdamW(1e-2), max_grad_norm=0.5, has_masters=False)
    plain = plain_objective(masks_documents=False)
    step = Step(model, update, plain, overrides=OperationOverrides(is_faster_dense=is_faster_dense))
    tokens = np.random.default_rng(0).integers(0, 50, (2, 9)).astype(np.int32)
    rows = Rows(tokens, np.full(tokens.shape, 3, np.uint8))
    before = measure_perplexity(model, rows, batch_size=2)
    assert not asked
    with step.evaluating():
        inside = measure_perplexity(model, rows, batch_size=2)
    assert 16 in asked
    assert inside.loss == pytest.approx(before.loss, rel=1e-5)
