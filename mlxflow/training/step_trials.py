"""Trials of a training step whose result is not kept: its peak memory, and the seconds of its parts."""

import time
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxflow.data.token_file import Rows
from mlxflow.device import memory_errors, memory_limit, phase_peaks
from mlxflow.kernels.model_kernels import ModelKernels
from mlxflow.training import build
from mlxflow.training.memory_threshold import first_threshold
from mlxflow.training.precompile import restored
from mlxflow.training.step import Step

# The most steps that a trial sends to the device together
_MOST_AHEAD = 5

# About the most seconds of these steps; there are at least two
_TRIAL_SECONDS = 20.0


class StepTrial(NamedTuple):
    """A pass that was tried.

    Attributes:
        tokens: of the pass.
        peak_bytes: of MLX's arrays, with the model's weights and the optimizer's state.
        pass_peak_bytes: the same in the forward and backward pass; the rest does not grow with the tokens.
        seconds: of a forward and backward pass.
        update_seconds: of an update.
        first_seconds: what the first pass and update took beyond the second ones: what is compiled in them.
        state_bytes: of a checkpoint after it.
        replaced_bytes: of the trained weights from before it, which are held beside the new ones to be restored; a
            training does not hold them.
    """

    tokens: int
    peak_bytes: int
    pass_peak_bytes: int
    seconds: float
    update_seconds: float
    first_seconds: float = 0.0
    state_bytes: int = 0
    replaced_bytes: int = 0


def try_step(
    subject: build.Subject, kernels: ModelKernels, rows: Rows, *, least_seconds: float = 0.0
) -> StepTrial | None:
    """Take a few steps on some rows; the model and MLX's random state are as before afterwards.

    The last ones are sent to the device together, as many as the trainer sends before it waits.

    Args:
        subject: the model and its settings.
        kernels: in use.
        rows: of one pass.
        least_seconds: more steps are taken until so many have passed, but no more than the training has; the mean of
            all is returned.

    Returns:
        what was measured; None if the device ran out of memory.
    """
    tokens, marks = mx.array(rows.tokens), mx.array(rows.marks)
    steps = subject.settings.num_steps
    replaced = sum(value.nbytes for _, value in tree_flatten(subject.model.trainable_parameters()))
    count = int(tokens.shape[0] * (tokens.shape[1] - 1))
    try:
        with (
            restored(subject.model),
            build.ready_step(subject, kernels) as step,
            memory_limit.lowered() as lower,
            phase_peaks.followed() as peak,
        ):
            lower(first_threshold(memory_limit.allowed_bytes()))  # as the trainer begins
            mx.eval(step.state)
            lone: list[float] = []
            for _ in range(2):
                begin_of_pass = time.perf_counter()
                with phase_peaks.followed() as of_pass:
                    gradients = step.compute(tokens, marks)
                    _wait(gradients)
                begin = time.perf_counter()
                _wait([step.update(gradients), step.state])
                update_seconds = time.perf_counter() - begin
                lone.append(time.perf_counter() - begin_of_pass)
                del gradients
            ahead = _num_ahead(subject.settings.lazy_eval_every, lone[-1])
            begin, taken = time.perf_counter(), 0
            while not taken or (taken < steps and time.perf_counter() - begin < least_seconds):
                for _ in range(ahead):
                    _send(step, tokens, marks)
                _wait(step.state)
                taken += ahead
            seconds = (time.perf_counter() - begin) / taken
            state_bytes = sum(value.nbytes for _, value in tree_flatten(step.whole_state()))
        of_step = max(0.0, seconds - update_seconds), update_seconds, max(0.0, lone[0] - lone[1])
        return StepTrial(count, peak.bytes, of_pass.bytes, *of_step, state_bytes, replaced)
    except RuntimeError as error:
        if memory_errors.out_of_memory_bytes(error) is None:
            raise
        memory_errors.settle(drops=True)
        return None
    finally:
        mx.clear_cache()


def _send(step: Step, tokens: mx.array, marks: mx.array) -> None:
    """Send a step to the device as the trainer does: the gradients, and then the update, which frees them."""
    gradients = step.compute(tokens, marks)
    mx.async_eval(gradients)
    outcome = step.update(gradients)
    del gradients
    mx.async_eval(outcome, step.state)


def _num_ahead(lazy_eval_every: int, seconds: float) -> int:
    """Return the number of steps that are sent together: as the trainer does it, fewer where a step takes long."""
    return max(2, min(_MOST_AHEAD, lazy_eval_every + 1, int(_TRIAL_SECONDS / max(seconds, 1e-9))))


def _wait(results: Any) -> None:
    mx.eval(results)
    mx.synchronize()


def part_of(rows: Rows, share: int) -> Rows:
    """Return fewer rows, or a beginning of one row: about one of `share` tokens."""
    if rows.num_rows >= share:
        return rows.head(rows.num_rows // share)
    length = 1 + max(1, (rows.tokens.shape[1] - 1) * rows.num_rows // share)
    return Rows(rows.tokens[:1, :length], rows.marks[:1, :length])
