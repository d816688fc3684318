"""Trials of a training step whose result is not kept: peak memory and seconds of a forward and backward pass."""

import time
from typing import NamedTuple

import mlx.core as mx

from mlxflow.data.token_file import Rows
from mlxflow.device import memory_errors, phase_peaks
from mlxflow.kernels.model_kernels import ModelKernels
from mlxflow.training import build
from mlxflow.training.precompile import restored


class StepTrial(NamedTuple):
    """A pass that was tried.

    Attributes:
        tokens: of the pass.
        peak_bytes: of MLX's arrays, with the model's weights and the optimizer's state.
        seconds: of the second pass: the first one compiles.
    """

    tokens: int
    peak_bytes: int
    seconds: float


def try_step(subject: build.Subject, kernels: ModelKernels, rows: Rows) -> StepTrial | None:
    """Compute the gradients of some rows twice; the model and MLX's random state are as before afterwards.

    Args:
        subject: the model and its settings.
        kernels: in use.
        rows: of one pass.

    Returns:
        what was measured; None if the device ran out of memory.
    """
    tokens, marks = mx.array(rows.tokens), mx.array(rows.marks)
    count = int(tokens.shape[0] * (tokens.shape[1] - 1))
    try:
        with restored(subject.model), build.ready_step(subject, kernels) as step, phase_peaks.followed() as peak:
            mx.eval(step.state, step.compute(tokens, marks))
            mx.synchronize()
            begin = time.perf_counter()
            mx.eval(step.compute(tokens, marks))
            mx.synchronize()
            seconds = time.perf_counter() - begin
        return StepTrial(count, peak.bytes, seconds)
    except RuntimeError as error:
        if memory_errors.out_of_memory_bytes(error) is None:
            raise
        memory_errors.settle(drops=True)
        return None
    finally:
        mx.clear_cache()


def part_of(rows: Rows, share: int) -> Rows:
    """Return fewer rows, or a beginning of one row: about one of `share` tokens."""
    if rows.num_rows >= share:
        return rows.head(rows.num_rows // share)
    length = 1 + max(1, (rows.tokens.shape[1] - 1) * rows.num_rows // share)
    return Rows(rows.tokens[:1, :length], rows.marks[:1, :length])
