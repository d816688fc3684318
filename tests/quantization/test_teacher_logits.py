from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxflow.data.token_file import Rows
from mlxflow.ops import document_mask
from mlxflow.quantization.teacher_logits import TeacherLogits, cached_teacher, distillation_losses, teacher_bytes
from mlxflow.storage.tensor_reading import read_metadata
from tests.small_models import llama

TOKENS = np.random.default_rng(0).integers(0, 50, (40, 8))


def all_rows(tokens: Any) -> Rows:
    """Return rows whose inputs, without a last target, are some tokens of one document."""
    whole = np.pad(tokens, ((0, 0), (0, 1)))
    return Rows(whole, np.full(whole.shape, 3, np.uint8))


def _model() -> nn.Module:
    model, _ = llama()
    model.eval()
    return model


def _teacher(folder: Path, count: int, load: Any = _model, rows: Rows | None = None) -> TeacherLogits:
    return cached_teacher(
        load,
        all_rows(TOKENS) if rows is None else rows,
        masks_documents=rows is not None,
        num_likeliest=count,
        file=folder / f"{count}.safetensors",
        metadata={"teacher.model": "one"},
    )


def _kl(teacher: mx.array, student: mx.array) -> float:
    logs = [one - mx.logsumexp(one, axis=-1, keepdims=True) for one in (teacher, student)]
    return float((mx.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean())


def test_the_likeliest_tokens_of_every_position_and_the_rest_are_stored(tmp_path: Path) -> None:
    teacher = _teacher(tmp_path, 5)
    logits = np.array(_model()(mx.array(TOKENS)))
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = teacher.ids.astype(np.int64)
    assert teacher.ids.shape == teacher.logs.shape == (40, 8, 5)
    assert np.array_equal(np.sort(ids), np.sort(np.argsort(-logits)[..., :5]))
    assert np.allclose(teacher.logs, np.take_along_axis(logs, ids, -1), atol=5e-3)
    rest = 1 - np.exp(np.take_along_axis(logs, ids, -1)).sum(-1)
    assert np.allclose(np.exp(teacher.rest.astype(np.float64)), rest, rtol=5e-3)
    figures = teacher.figures()
    assert (figures.tokens, figures.likeliest, figures.file) == (320, 5, "5.safetensors")
    assert figures.probability == pytest.approx(1 - rest.mean(), rel=1e-3)


def test_the_file_is_as_large_as_predicted_and_says_where_it_is_from(tmp_path: Path) -> None:
    teacher = _teacher(tmp_path, 5)
    expected = teacher_bytes(40 * 8, num_likeliest=5, vocab_size=50)
    assert sum(array.nbytes for array in teacher.arrays) == expected
    assert expected < teacher.file.stat().st_size < expected + 1000
    assert read_metadata(teacher.file) == {"teacher.model": "one"}
    assert teacher_bytes(1, num_likeliest=5, vocab_size=1 << 17) == 32


def test_a_stored_file_is_read_and_the_model_is_not_opened_again(tmp_path: Path) -> None:
    first = _teacher(tmp_path, 5)

    def fail() -> nn.Module:
        raise AssertionError("opened")

    assert np.array_equal(first.ids, _teacher(tmp_path, 5, fail).ids)


def test_documents_of_a_row_are_kept_apart(tmp_path: Path) -> None:
    rows = all_rows(TOKENS)
    marks = rows.marks.copy()
    marks[:, 4:] = 5  # a second document
    teacher = _teacher(tmp_path, 50, rows=Rows(rows.tokens, marks))
    logits = document_mask.apply(_model(), mx.array(TOKENS), mx.array(marks[:, :-1]))
    logs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    assert np.allclose(teacher.logs, np.take_along_axis(logs, teacher.ids.astype(np.int64), -1), atol=5e-3)
    assert not np.array_equal(teacher.logs, _teacher(tmp_path / "whole", 50).logs)


@pytest.mark.parametrize("count", [50, 49, 8])
def test_the_loss_is_the_divergence_with_one_class_for_the_rest(tmp_path: Path, count: int) -> None:
    teacher = _teacher(tmp_path, count)
    exact = _model()(mx.array(TOKENS))
    student = exact + mx.random.normal(exact.shape, key=mx.random.key(0))
    losses = distillation_losses(student, *teacher.of(np.arange(40)))
    assert losses.shape == (40, 8)
    loss = float(losses.mean())
    if count >= 49:
        assert loss == pytest.approx(_kl(exact, student), rel=5e-3)
    else:
        assert 0 < loss < _kl(exact, student)
    assert float(distillation_losses(exact, *teacher.of(np.arange(40))).mean()) == pytest.approx(0, abs=1e-3)
