from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlxflow.device import phase_peaks
from mlxflow.quantization import distillation, teacher_logits
from mlxflow.quantization.aware_training import _rounded
from mlxflow.quantization.distillation import distilling_objective
from mlxflow.quantization.plan import quantizable_layers
from mlxflow.quantization.settings import Setting
from mlxflow.quantization.teacher_logits import cached_teacher, distillation_losses, losses_and_gradient
from mlxflow.training.objective import distilling_objective as whole_objective
from mlxflow.training.output_head import Head, find_head
from tests.quantization.test_teacher_logits import TOKENS, all_rows
from tests.small_models import llama
from tests.stages.test_quantize import Job
from tests.stages.test_quantize import job as job  # a fixture


def _model(factor: float = 1.0) -> nn.Module:
    model, _ = llama()
    model.update(tree_map(lambda value: value * factor, model.parameters()))
    model.eval()
    return model


@pytest.mark.matrix
def test_the_loss_with_all_tokens_listed_is_that_of_the_running_teacher(tmp_path: Any) -> None:
    rows, file = all_rows(TOKENS), tmp_path / "teacher.safetensors"
    rows.marks[:, 5] = 2  # no target
    teacher = cached_teacher(
        _model, rows, masks_documents=False, num_likeliest=50, file=file, metadata={"format": "mlx"}
    )
    student, tokens, marks = _model(1.5), mx.array(rows.tokens), mx.array(rows.marks)
    total, count = distilling_objective(masks_documents=False)(student, tokens, marks, *teacher.of(np.arange(40)))
    expected, targets = whole_objective(_model(), masks_documents=False)(student, tokens, marks)
    own, _ = whole_objective(_model(), masks_documents=False)(_model(), tokens, marks)  # its entropy
    assert int(count) == int(targets) == 40 * 7
    assert float(total) == pytest.approx(float(expected) - float(own), rel=2e-2)
    assert float(total) > 1


@pytest.mark.matrix
def test_too_large_distributions_are_computed_in_every_step(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"method": "qat", "bits": 2, "distill": True, "num_steps": 8, "batch_size": 4, "max_validation_rows": 32}
    cached = job.run(**table)
    assert cached["teacher"]["likeliest"] == 64
    assert cached["teacher"]["tokens"] == 8 * 4 * 16
    monkeypatch.setattr(distillation, "_MOST_BYTES", 100)
    running = job.run(**table)
    assert "teacher" not in running
    assert running["quality"]["kl"] == pytest.approx(cached["quality"]["kl"], rel=0.1)


def test_variants_with_weights_of_other_dtypes_have_distributions_of_their_own(job: Job) -> None:
    table = {"method": "qat", "bits": 2, "distill": True, "num_steps": 2, "batch_size": 4, "max_validation_rows": 4}
    counts = []
    for dtype in ("fp32", "bf16", "fp32"):
        job.run(**table, dtype=dtype)
        counts.append(len(list(job.folder.rglob(f"{distillation.FOLDER}/*.safetensors"))))
    assert counts == [1, 2, 2]


def _taught(vocab_size: int, positions: int, listed: int) -> list[mx.array]:
    """Return distinct ids of a teacher's likeliest tokens with their log-probabilities, those of the rest, weights."""
    random = np.random.default_rng(0)
    ids = np.stack([random.permutation(vocab_size)[:listed] for _ in range(positions)]).astype(np.uint16)
    probabilities = random.dirichlet(np.ones(listed + 1), positions).astype(np.float32)
    logs = np.maximum(np.log(probabilities), -30).astype(np.float16)
    weights = random.integers(0, 2, positions).astype(np.float32)
    return [mx.array(one) for one in (ids, logs[:, :-1], logs[:, -1], weights)]


@pytest.mark.parametrize("size", [0.1, 3.0, 40.0])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_gradient_of_the_divergence_is_that_of_mlx(size: float, dtype: mx.Dtype) -> None:
    ids, logs, rest, weights = _taught(300, 12, 8)
    logits = mx.array(np.random.default_rng(1).normal(0, size, (12, 300)).astype(np.float32))
    logits[3, ids[3]] += 60  # the student gives the listed tokens everything: the rest has its least probability
    logits = logits.astype(dtype)

    def total(logits: mx.array) -> mx.array:
        return (distillation_losses(logits, ids, logs, rest) * weights).sum()

    expected, gradient = mx.value_and_grad(total)(logits)
    value, own = losses_and_gradient(logits, ids, logs, rest, weights)
    assert own.dtype == dtype
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    # sums of 300 exponentials, each of which is as wrong as its exponent: up to 60 and four standard deviations
    rounding = max(2.0**-8 if dtype == mx.bfloat16 else 0.0, (300 + 2 * (60 + 4 * size)) * 2.0**-24)
    assert float(mx.abs(own - gradient).max()) <= rounding * float(mx.abs(gradient).max())


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("trains", ["scales", "all", "weights", "body"])
def test_logits_of_some_positions_at_a_time_have_the_gradients_of_all(
    is_tied: bool, trains: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_logits, "_CHUNK_BYTES", 1)  # 64 positions, the fewest
    model, _ = llama(hidden_size=32, intermediate_size=32, tie_word_embeddings=is_tied)
    model.train()
    plan = {path: Setting("affine", 4, 32) for path in quantizable_layers(model)}
    tokens = mx.random.randint(0, 50, (20, 9), key=mx.random.key(0))
    marks = mx.ones(tokens.shape, mx.uint8)
    teacher = [one.reshape(20, 8, *one.shape[1:]) for one in _taught(50, 20 * 8, 6)[:3]]

    def gradients(head: Head | None) -> dict[str, mx.array]:
        objective = distilling_objective(masks_documents=False, head=head)
        value, found = nn.value_and_grad(model, lambda *batch: objective(model, *batch)[0])(tokens, marks, *teacher)
        return {"": value} | dict(tree_flatten(found))

    with _rounded(model, plan, None, "scales" if trains == "body" else trains):
        if trains == "body":
            (model.model.embed_tokens if is_tied else model.lm_head).freeze()
        head = find_head(model, 50)
        assert head is not None
        expected, own = gradients(None), gradients(head)
    assert own.keys() == expected.keys()
    for name, value in expected.items():
        # sums over 160 positions in another order; those of one sign are at most a hundred times those of both
        assert mx.abs(own[name] - value).max() <= 160 * 2.0**-24 * 100 * mx.abs(value).max(), name


def test_few_logits_are_held() -> None:
    model, _ = llama(vocab_size=1 << 16, hidden_size=32, intermediate_size=32)
    model.freeze()
    model.model.norm.unfreeze()
    tokens = mx.zeros((128, 9), mx.int32)
    marks = mx.ones(tokens.shape, mx.uint8)
    teacher = [one.reshape(128, 8, *one.shape[1:]) for one in _taught(1 << 16, 128 * 8, 4)[:3]]
    peaks = []
    for head in (None, find_head(model, 1 << 16)):
        objective = distilling_objective(masks_documents=False, head=head)
        mx.eval(model.parameters(), tokens, marks, teacher)
        with phase_peaks.followed() as peak:
            mx.eval(
                nn.value_and_grad(model, lambda *batch, own=objective: own(model, *batch)[0])(tokens, marks, *teacher)
            )
        peaks.append(peak.bytes)
    assert head is not None
    assert peaks[1] < 5 * teacher_logits._CHUNK_BYTES < 128 * 8 * (1 << 16) * 4 * 2 < peaks[0]
