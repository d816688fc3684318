"""Trials of a training step whose result is not kept: its peak memory, and the seconds of its parts."""

import time
from typing import Any, NamedTuple

import mlx.core as mx

from mlxflow.data.token_file import Rows
from mlxflow.device import memory_errors, phase_peaks
from mlxflow.kernels.model_kernels import ModelKernels
from mlxflow.training import build
from mlxflow.training.precompile import restored

# The most steps that a trial sends to the device together
_MOST_AHEAD = 5


class StepTrial(NamedTuple):
    """A pass that was tried.

    Attributes:
        tokens: of the pass.
        peak_bytes: of MLX's arrays, with the model's weights and the optimizer's state.
        pass_peak_bytes: the same in the forward and backward pass; the rest does not grow with the tokens.
        seconds: of a forward and backward pass.
        update_seconds: of an update.
    """

    tokens: int
    peak_bytes: int
    pass_peak_bytes: int
    seconds: float
    update_seconds: float


def try_step(subject: build.Subject, kernels: ModelKernels, rows: Rows) -> StepTrial | None:
    """Take a few steps on some rows; the model and MLX's random state are as before afterwards.

    The last ones are sent to the device together, as many as the trainer sends before it waits.

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
            mx.eval(step.state)
            for _ in range(2):
                with phase_peaks.followed() as of_pass:
                    gradients = step.compute(tokens, marks)
                    _wait(gradients)
                begin = time.perf_counter()
                _wait([step.update(gradients), step.state])
                update_seconds = time.perf_counter() - begin
                del gradients
            ahead = min(_MOST_AHEAD, subject.settings.lazy_eval_every + 1)
            begin = time.perf_counter()
            for _ in range(ahead):  # as the trainer sends them
                mx.async_eval(step.update(step.compute(tokens, marks)), step.state)
            _wait(step.state)
            seconds = (time.perf_counter() - begin) / ahead
        return StepTrial(count, peak.bytes, of_pass.bytes, max(0.0, seconds - update_seconds), update_seconds)
    except RuntimeError as error:
        if memory_errors.out_of_memory_bytes(error) is None:
            raise
        memory_errors.settle(drops=True)
        return None
    finally:
        mx.clear_cache()


def _wait(results: Any) -> None:
    mx.eval(results)
    mx.synchronize()


def part_of(rows: Rows, share: int) -> Rows:
    """Return fewer rows, or a beginning of one row: about one of `share` tokens."""
    if rows.num_rows >= share:
        return rows.head(rows.num_rows // share)
    length = 1 + max(1, (rows.tokens.shape[1] - 1) * rows.num_rows // share)
    return Rows(rows.tokens[:1, :length], rows.marks[:1, :length])
