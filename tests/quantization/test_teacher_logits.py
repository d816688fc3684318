from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxflow.quantization.teacher_logits import cached_teacher, distillation_loss
from tests.small_models import llama

TOKENS = np.random.default_rng(0).integers(0, 50, (40, 8))


def _model() -> nn.Module:
    model, _ = llama()
    model.eval()
    return model


def _kl(teacher: mx.array, student: mx.array) -> float:
    logs = [one - mx.logsumexp(one, axis=-1, keepdims=True) for one in (teacher, student)]
    return float((mx.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean())


def test_the_likeliest_tokens_of_every_position_are_stored(tmp_path: Path) -> None:
    teacher = cached_teacher(_model, TOKENS, num_likeliest=5, folder=tmp_path, key="one")
    logits = np.array(_model()(mx.array(TOKENS)))
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert teacher.ids.shape == teacher.logs.shape == (40, 8, 5)
    assert np.array_equal(np.sort(teacher.ids), np.sort(np.argsort(-logits)[..., :5]))
    assert np.allclose(teacher.logs, np.take_along_axis(logs, teacher.ids.astype(np.int64), -1), atol=5e-3)


def test_the_cache_is_read_and_the_model_is_not_opened_again(tmp_path: Path) -> None:
    first = cached_teacher(_model, TOKENS, num_likeliest=5, folder=tmp_path, key="one")

    def fail() -> nn.Module:
        raise AssertionError("opened")

    again = cached_teacher(fail, TOKENS, num_likeliest=5, folder=tmp_path, key="one")
    assert np.array_equal(first.ids, again.ids)


@pytest.mark.parametrize("count", [50, 49, 8])
def test_the_loss_is_the_divergence_with_one_class_for_the_rest(tmp_path: Path, count: int) -> None:
    teacher = cached_teacher(_model, TOKENS, num_likeliest=count, folder=tmp_path, key=str(count))
    exact = _model()(mx.array(TOKENS))
    student = exact + mx.random.normal(exact.shape, key=mx.random.key(0))
    loss = float(distillation_loss(student, *teacher.of(np.arange(40))))
    if count >= 49:
        assert loss == pytest.approx(_kl(exact, student), rel=5e-3)
    else:
        assert 0 < loss < _kl(exact, student)
    assert float(distillation_loss(exact, *teacher.of(np.arange(40)))) == pytest.approx(0, abs=1e-3)
