"""Floating-point modes through block-wise learning and distillation: both lose less than rounding."""

from typing import Any

import pytest

from tests.stages.test_quantize import Job
from tests.stages.test_quantize import job as job  # a fixture

_METHODS: dict[str, dict[str, Any]] = {
    "block": {"method": "block", "block_steps": 24, "calibration_rows": 48},
    "distillation": {"method": "qat", "distill": True, "num_steps": 48, "batch_size": 8},
}


@pytest.mark.matrix
@pytest.mark.parametrize("method", _METHODS)
@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
def test_a_mode_diverges_less_when_it_is_learned(mode: str, method: str, job: Job) -> None:
    rounded = job.run(mode=mode, max_validation_rows=64)
    learned = job.run(mode=mode, max_validation_rows=64, **_METHODS[method])
    assert learned["bits_per_weight"] == rounded["bits_per_weight"]
    assert learned["quality"]["kl"] < 0.9 * rounded["quality"]["kl"]
