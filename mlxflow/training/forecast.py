"""What a training will take, before it begins: peak memory of a step and seconds to the end, from small trials.

A quarter and a half of the rows of a pass are tried. The time of a pass is taken for linear in its tokens, as it is for
rows of one length; where a pass has a single row, its beginning is tried, and time that grows with the square of the
length is underestimated. The peak is that of the traced step (`memory_forecast`), or of the larger trial if that is
more: an update does not grow with the tokens. If a step cannot be traced, its peak is taken for linear, too.
"""

import tempfile
from pathlib import Path
from typing import NamedTuple

from mlxflow.data.token_file import TokenFile
from mlxflow.storage.run_context import Context
from mlxflow.training import job
from mlxflow.training.checkpointing_choice import choose_checkpointing
from mlxflow.training.memory_forecast import forecast_memory
from mlxflow.training.step_trials import StepTrial, part_of, try_step


class Forecast(NamedTuple):
    """What a training will take.

    Attributes:
        peak_bytes: of MLX's arrays in a step; None if not even a quarter of a pass fits into the memory.
        seconds: of all steps, without validations and checkpoints.
        num_steps: of the training.
        tokens: of a pass.
        note: what trials chose; empty if they chose nothing.
    """

    peak_bytes: float | None
    seconds: float
    num_steps: int
    tokens: int
    note: str = ""


def forecast(request: job.Job, tokens: TokenFile, context: Context) -> Forecast:
    """Return what a training will take; nothing is trained or written.

    Args:
        request: the training.
        tokens: to train on.
        context: of the stage.

    Raises:
        UserError: a setting does not fit the model.
    """
    with tempfile.TemporaryDirectory() as scratch:
        kept_apart = request.kernels._replace(memory_file=Path(scratch) / "kernels.json")
        _, subject, kernels = job.prepare(request._replace(kernels=kept_apart), tokens, context)
    settings, note = subject.settings, ""
    rows = tokens.rows.head(settings.batch_size)
    if request.picks_checkpointing:
        choice = choose_checkpointing(subject, kernels, rows, limit_bytes=context.memory_limit_bytes)
        settings, note = settings.replace(checkpoint_every=choice.every), choice.line
        subject = subject._replace(settings=settings)
    count = rows.num_rows * (rows.tokens.shape[1] - 1)
    trials = [try_step(subject, kernels, part_of(rows, share)) for share in (4, 2)]
    few, many = trials
    if few is None:
        return Forecast(None, 0.0, settings.num_steps, count, note)
    many = many or few
    pass_seconds = _at(count, few.tokens, few.seconds, many.tokens, many.seconds)
    step_seconds = pass_seconds * settings.grad_accum_steps + many.update_seconds
    try:
        peak: float = max(many.peak_bytes, forecast_memory(subject, kernels, rows).peak_bytes)
    except (ValueError, RuntimeError):  # a model of other code may use what MLX cannot export
        peak = _peak(few, many, count)
    return Forecast(peak, step_seconds * settings.num_steps, settings.num_steps, count, note)


def _peak(few: StepTrial, many: StepTrial, tokens: int) -> float:
    """Return the peak of a step: that of its pass grows with the tokens, that of its update does not."""
    of_pass = _at(tokens, few.tokens, few.pass_peak_bytes, many.tokens, many.pass_peak_bytes)
    return max(of_pass, many.peak_bytes)


def _at(tokens: int, few: int, less: float, many: int, more: float) -> float:
    """Return the value on the line through two points, not below the larger one; in proportion if there is only one."""
    if many <= few:
        return less * tokens / few
    return max(more, less + (more - less) * (tokens - few) / (many - few))
