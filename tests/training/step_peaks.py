"""Measures the peak memory of training steps that are sent to the device as the trainer sends them."""

import mlx.core as mx

from mlxflow.data.token_file import Rows
from mlxflow.device import phase_peaks
from mlxflow.kernels.model_kernels import ModelKernels
from mlxflow.training import build


def peak_of_steps(subject: build.Subject, kernels: ModelKernels, rows: Rows, *, count: int) -> int:
    """Return MLX's peak in bytes in some steps, one sent after the other.

    The weights before them are not kept: `restored` would hold them beside those that are updated.
    """
    tokens, marks = mx.array(rows.tokens), mx.array(rows.marks)
    with build.ready_step(subject, kernels) as step:
        mx.eval(step.state)
        with phase_peaks.followed() as peak:
            for _ in range(count):
                gradients = step.compute(tokens, marks)
                mx.async_eval(gradients)
                outcome = step.update(gradients)
                del gradients
                mx.async_eval(outcome, step.state)
            mx.eval(step.state)
            mx.synchronize()
    return peak.bytes
