from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import pytest

from mlxflow.profiling import profiled_step
from mlxflow.profiling.profiled_step import logits_bytes, num_bytes, profiled_steps
from mlxflow.training import build
from mlxflow.training.settings import TrainingSettings
from tests.small_models import llama
from tests.training.small_training import small_rows

SETTINGS = TrainingSettings(batch_size=4, optimizer_options={}, workers=1, prefetch_batches=1)


def _subject(settings: TrainingSettings = SETTINGS) -> build.Subject:
    model, _ = llama()
    build.prepare_model(model, settings, adapter_seed=0)
    return build.Subject(model, settings, 50, 8)


def test_a_step_has_the_phases_data_passes_and_update() -> None:
    phases: list[str] = []

    @contextmanager
    def noted(name: str) -> Iterator[None]:
        phases.append(name)
        yield

    subject = _subject(SETTINGS.replace(grad_accum_steps=2))
    with profiled_steps(subject, small_rows(), seed=0, phases=noted) as steps:
        losses = [float(steps.run()) for _ in range(3)]
    assert phases == ["data", "forward_backward", "update"] * 3
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("changes", "moments", "gradients"),
    [
        ({}, 2.0, 1.0),
        ({"optimizer": "lion"}, 1.0, 1.0),
        ({"precision": "bf16"}, 6.0, 1.0),  # fp32 moments and fp32 copies of weights in half of their size
        ({"precision": "bf16", "grad_accum_steps": 2}, 6.0, 2.0),  # gradients are summed in fp32
    ],
)
def test_bytes_of_a_steps_arrays_follow_from_the_settings(
    changes: dict[str, object], moments: float, gradients: float
) -> None:
    settings = SETTINGS.replace(**changes)
    subject = _subject(settings)
    with profiled_steps(subject, small_rows(), seed=0, phases=contextmanager(lambda name: iter([None]))) as steps:
        steps.run()
        sizes = steps.tree_bytes()
    weights = num_bytes(subject.model.parameters())
    assert sizes.weights == weights
    assert sizes.gradients == gradients * weights
    # beside the moments: a step number and a learning rate
    assert moments * weights <= sizes.optimizer <= moments * weights + 64
    assert sizes.data == 2 * settings.rows_per_step * 9 * 5


def test_bytes_of_a_tree_are_those_of_its_arrays() -> None:
    assert num_bytes({"a": mx.zeros((3, 2)), "b": [mx.zeros((4,), mx.bfloat16), 7]}) == 24 + 8


def test_logits_take_the_memory_of_head_and_loss() -> None:
    plain = logits_bytes(_subject(SETTINGS.replace(fused_loss=False)))
    assert plain >= 4 * 8 * 50 * 4  # (B, L, V) in fp32


def test_logits_of_an_unknown_head_are_taken_for_two_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiled_step, "find_head", lambda model, vocab_size: None)
    assert logits_bytes(_subject()) == 2 * (4 * 8) * 50 * 4
