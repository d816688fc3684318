from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map

from mlxflow.quantization import distillation
from mlxflow.quantization.distillation import distilling_objective
from mlxflow.quantization.teacher_logits import cached_teacher
from mlxflow.training.objective import distilling_objective as whole_objective
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
