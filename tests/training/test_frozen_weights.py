"""With frozen weights a step computes no gradient of them: none is in the graph that MLX evaluates."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxflow.data.token_file import Rows
from mlxflow.kernels import model_kernels, rms_norm
from mlxflow.ops.graph_trace import trace
from mlxflow.training import build
from mlxflow.training.memory_forecast import _trace_pass
from mlxflow.training.settings import AdapterShape, TrainingSettings
from tests.small_models import llama

VOCAB, WIDTH, LENGTH = 96, 32, 8


def _shapes_in_a_pass(adapters: AdapterShape | None) -> set[tuple[int, ...]]:
    """Return the shapes of all arrays but views of weights that a forward and backward pass computes."""
    model, _ = llama(vocab_size=VOCAB, hidden_size=WIDTH, num_heads=2, num_layers=2, intermediate_size=48, seed=0)
    settings = TrainingSettings(batch_size=2, warmup_steps=0, fused_loss=True)
    settings = settings if adapters is None else settings.replace(adapters=adapters)
    build.prepare_model(model, settings, adapter_seed=0)
    subject = build.Subject(model, settings, VOCAB, LENGTH)
    tokens = np.ones((2, LENGTH + 1), np.int32)
    with build.ready_step(subject, model_kernels.no_kernels()) as step:
        weights = dict(tree_flatten(model.parameters()))
        traced, _ = _trace_pass(step, model, weights, Rows(tokens, np.full(tokens.shape, 3, np.uint8)))
    computed = [operation for operation in traced.operations if operation.name not in ("Transpose", "Broadcast")]
    return {value.shape for operation in computed for value in operation.outputs}


def test_adapters_alone_have_gradients() -> None:
    shape = AdapterShape(method="lora", rank=3, scale=1.0, dropout=0.0, num_layers=0, keys=("self_attn.*", "mlp.*"))
    trained, frozen = _shapes_in_a_pass(None), _shapes_in_a_pass(shape)
    of_weights = {(VOCAB, WIDTH), (48, WIDTH), (WIDTH, 48), (WIDTH,)}  # the embedding's, the matrices', the norms'
    assert of_weights <= trained
    assert not of_weights & frozen
    assert {(3, WIDTH), (WIDTH, 3)} & frozen


@pytest.mark.parametrize("is_frozen", [False, True])
def test_the_sum_of_a_frozen_norm_s_shares_is_not_computed(is_frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's gradient of the weight is a second launch, here a cosine, which only a trained weight needs."""

    def launch(kind: Callable[[mx.array], mx.array]) -> Any:
        def launched(self: Any, inputs: Any, *, shapes: Any, dtypes: Any, **_: Any) -> list[mx.array]:
            return [kind(mx.zeros(shape, dtype) + inputs[0].sum()) for shape, dtype in zip(shapes, dtypes, strict=True)]

        return launched

    monkeypatch.setattr(rms_norm, "FORWARD", _Source(launch(mx.sin)))
    monkeypatch.setattr(rms_norm, "BACKWARD", _Source(launch(mx.tan)))
    monkeypatch.setattr(rms_norm, "ADD_SHARES", _Source(launch(mx.cos)))
    monkeypatch.setattr(rms_norm, "gpu_cores", lambda: 4)
    norm = rms_norm.rms_norm(1e-5, mx.float32)
    x, weight = mx.ones((4, 64)), mx.ones(64)

    def step(x: mx.array, weight: mx.array) -> list[mx.array]:
        if is_frozen:
            return list(mx.vjp(lambda x: norm(x, weight), [x], [x])[1])
        return list(mx.vjp(norm, [x, weight], [x])[1])

    names = {operation.name for operation in trace(step, [x, weight], prefix="").operations}
    assert "Tan" in names
    assert ("Cos" in names) != is_frozen


class _Source:
    """A kernel that computes something else, on any device."""

    def __init__(self, launch: Any) -> None:
        self._launch = launch

    def launch(self, inputs: Any, **named: Any) -> Any:
        return self._launch(self, inputs, **named)
