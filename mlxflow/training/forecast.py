"""What a training will take, before it begins: peak memory and seconds to the end, from its shapes and some trials.

If its predicted memory fits (`memory_forecast`), steps with all rows of a pass are timed, and their peak is measured:
how far the host is ahead of the device depends on the speed of both. Otherwise a quarter and a half of the rows are
tried, and the time of a pass is taken for linear in its tokens, as is its peak where none is predicted: what a trial is
off by, the result is off by up to three times as much. Where a pass has a single row, its beginning is tried, and time
that grows with the square of the length is underestimated. An update does not grow with the tokens. The trials compute
padding, which most passes of a training leave out: their time is that of the positions they compute.

Seconds to the end are those of the start, of opening the model and the one that was written, of the first step's trace,
of all steps, and of all validations; some rows are validated to know them. Kernels that are verified here, operations
that are compiled here and the predicted memory are kept for the training that follows, and their time is not counted.
Checkpoints and the model folder take what a sample of their bytes does.
"""

import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from mlxflow.data.row_widths import mean_width
from mlxflow.data.token_file import Rows, TokenFile
from mlxflow.evaluation.perplexity import measure_perplexity
from mlxflow.kernels.model_kernels import ModelKernels
from mlxflow.models import quantized_layers
from mlxflow.ops.overrides import replaced_in_evaluation
from mlxflow.storage import user_folders
from mlxflow.storage.run_context import Context
from mlxflow.training import build, job, kernel_selection
from mlxflow.training.batch_size import shrink_note
from mlxflow.training.checkpointing_choice import choose_checkpointing
from mlxflow.training.lora_config import decide_fuse
from mlxflow.training.memory_advice import memory_advice
from mlxflow.training.memory_forecast import MemoryForecast
from mlxflow.training.remembered_forecast import remembered_forecast
from mlxflow.training.settings import TrainingSettings
from mlxflow.training.step_trials import StepTrial, part_of, try_step
from mlxflow.training.writing_forecast import writing_seconds, written_bytes

# Steps with all rows are timed for at least so long: a few of them vary with other work
_TIMED_SECONDS = 10.0

# Validation rows, beginning with those of a pass, are doubled until their validation takes so long
_VALIDATED_SECONDS = 3.0


class Seconds(NamedTuple):
    """The seconds of the parts of a training.

    Attributes:
        start: of the process.
        opening: the model is opened; at the end that which was written, too.
        choosing: kernels are selected, and recomputed layers are chosen or the memory is predicted.
        first_step: what the first step takes beyond a later one where its operations were compiled before.
        step: of a step.
        steps: number of steps.
        validation: of a validation.
        validations: number of validations, with the one of the written model.
        writing: of all checkpoints, best weights and the model folder.
    """

    start: float
    opening: float
    choosing: float
    first_step: float
    step: float
    steps: int
    validation: float
    validations: int
    writing: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        computing = self.first_step + self.step * self.steps + self.validation * self.validations
        return self.start + 2 * self.opening + self.choosing + computing + self.writing


class Forecast(NamedTuple):
    """What a training will take.

    Attributes:
        peak_bytes: of MLX's arrays; None if not even a quarter of a pass fits into the memory.
        seconds: to the end.
        tokens: of a pass.
        note: what trials chose; empty if they chose nothing.
        advice: what to do if it does not fit.
        least_bytes: the peak if the host waits for the device, as it does to stay within the memory limit; where
            that is not known, the same.
        batch: what happens to the batch, a sentence; empty if it is kept.
    """

    peak_bytes: float | None
    seconds: Seconds
    tokens: int
    note: str = ""
    advice: str = ""
    least_bytes: float = 0.0
    batch: str = ""


def forecast(
    request: job.Job, tokens: TokenFile, validation: Rows, context: Context, *, before_seconds: float = 0.0
) -> Forecast:
    """Return what a training will take; nothing is trained or written.

    Args:
        request: the training.
        tokens: to train on.
        validation: all validation rows.
        context: of the stage.
        before_seconds: what this process took until now, as that of a training does.

    Raises:
        UserError: a setting does not fit the model.
    """
    subject, kernels, opening, selecting = _prepared(request, tokens, context)
    settings, note = subject.settings, ""
    rows = tokens.rows.head(settings.batch_size)
    choosing = time.perf_counter()
    if request.picks_checkpointing:
        choice = choose_checkpointing(subject, kernels, rows, limit_bytes=context.memory_limit_bytes)
        settings, note = choice.layers.applied_to(settings), choice.line
        subject = subject._replace(settings=settings)
    count = rows.num_rows * (rows.tokens.shape[1] - 1)
    chosen = time.perf_counter()
    traced = _traced(subject, kernels, rows)
    begin = time.perf_counter()
    if not request.picks_checkpointing:  # as the training does, which then reads what is remembered, if it can be
        _traced(subject, kernels, rows)
    selecting += chosen - choosing + time.perf_counter() - begin
    started = Seconds(before_seconds, opening, selecting, 0, 0, settings.num_steps, 0, 0)
    in_validation = traced is not None and traced.is_of_validation
    advice = memory_advice(settings, subject.names, rows=rows.num_rows, in_validation=in_validation)
    fits = traced is not None and traced.least_bytes <= context.memory_limit_bytes
    trials = _tried(subject, kernels, rows, fits=fits)
    if trials is None:
        return Forecast(None, started, count, note, advice)
    few, many = trials.few, trials.many
    marks = tokens.rows.marks
    share = mean_width(marks, settings.batch_size) / (marks.shape[1] - 1)  # of the positions, that a step computes
    pass_seconds = share * _at(count, few.tokens, few.seconds, many.tokens, many.seconds)
    seconds = started._replace(
        first_step=trials.first_seconds,
        step=pass_seconds * settings.grad_accum_steps + many.update_seconds,
        validation=_validation_seconds(subject, kernels, validation.head(settings.max_validation_rows)),
        validations=num_validations(settings) + 1,
        writing=_writing_seconds(request, subject, many.state_bytes, context),
    )
    peak, least = _peaks(traced, trials, count)
    limit = context.memory_limit_bytes
    batch = "" if in_validation else shrink_note(settings, subject.names, peak_bytes=peak, limit_bytes=limit)
    return Forecast(peak, seconds, count, note, advice, least, batch)


class _Trials(NamedTuple):
    """The trials of a forecast.

    Attributes:
        few: that of fewer rows.
        many: that of more; the same if all rows of a pass were tried.
        first_seconds: what the first step of a later process takes beyond a later one.
        is_whole: whether all rows were tried.
    """

    few: StepTrial
    many: StepTrial
    first_seconds: float
    is_whole: bool


def _tried(subject: build.Subject, kernels: ModelKernels, rows: Rows, *, fits: bool) -> _Trials | None:
    """Return the trials of steps; None if not even a quarter of the rows fits into the memory."""
    compiled = _num_compiled()
    whole = try_step(subject, kernels, rows, least_seconds=_TIMED_SECONDS) if fits else None
    if whole is not None:
        first = None if _num_compiled() == compiled else try_step(subject, kernels, rows)  # all is compiled by now
        return _Trials(whole, whole, (first or whole).first_seconds, is_whole=True)
    few, many = (try_step(subject, kernels, part_of(rows, share)) for share in (4, 2))
    if few is None:
        return None
    many = many or few
    return _Trials(few, many, many.first_seconds, is_whole=False)


def _peaks(traced: MemoryForecast | None, trials: _Trials, tokens: int) -> tuple[float, float]:
    """Return the peak of a training, and that with a host that waits."""
    peak = _peak(trials.few, trials.many, tokens)
    if traced is None:
        return peak, peak
    peak = max(peak, traced.validation_bytes) if trials.is_whole else traced.peak_bytes
    return peak, min(peak, traced.least_bytes)


def _prepared(
    request: job.Job, tokens: TokenFile, context: Context
) -> tuple[build.Subject, ModelKernels, float, float]:
    """Return what `job.prepare` does, and the seconds in which the model is opened and known kernels are selected."""
    opened: list[float] = []
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        kept_apart = request.kernels._replace(memory_file=Path(scratch) / "kernels.json")
        changed = request._replace(kernels=kept_apart)
        _, subject, kernels = job.prepare(changed, tokens, context, on_open=lambda: opened.append(time.perf_counter()))
        end = time.perf_counter()
        again = kept_apart._replace(memory_file=Path(scratch) / "again.json", begun=None)
        kernel_selection.select_kernels(again, subject, tokens.rows.head(subject.settings.batch_size))
        known_seconds = time.perf_counter() - end
    opening = opened[0] if opened else end
    return subject, kernels, opening - begin, min(end - opening, known_seconds)


def _num_compiled() -> int:
    """Return the number of files that MLX has compiled for this user: functions for the CPU, kernels for CUDA."""
    folders = {str(user_folders.prepare_compiled_folder()), os.environ.get("MLX_PTX_CACHE_DIR", "")}
    return sum(len(files) for folder in folders if folder for _, _, files in os.walk(folder))


def num_validations(settings: TrainingSettings) -> int:
    """Return how often a training that is not ended early validates: before it, at intervals and at its end."""
    steps, every = settings.num_steps, settings.eval_every
    return 2 + (steps - 1) // every if every else 2


def _writing_seconds(request: job.Job, subject: build.Subject, state_bytes: int, context: Context) -> float:
    """Return the seconds in which a training writes."""
    model, settings = subject.model, subject.settings
    fuse = decide_fuse(request.source.fuse, is_quantized=quantized_layers.is_quantized(model))
    count = num_validations(settings)
    size = written_bytes(model, settings, fuse=fuse, state_bytes=state_bytes, validations=count)
    return writing_seconds(size, context.state)


def _validation_seconds(subject: build.Subject, kernels: ModelKernels, rows: Rows) -> float:
    """Return the seconds of a validation; the first passes of it are measured, once they were compiled."""
    settings = subject.settings

    def measure(count: int) -> float:
        begin = time.perf_counter()
        some, masks = rows.head(count), settings.masks_documents
        with replaced_in_evaluation(build.overrides_of(settings, kernels)):
            measure_perplexity(subject.model, some, batch_size=settings.batch_size, masks_documents=masks)
        return time.perf_counter() - begin

    count = min(settings.batch_size, rows.num_rows)
    measure(count)
    while (seconds := measure(count)) < _VALIDATED_SECONDS and count < rows.num_rows:
        count = min(2 * count, rows.num_rows)
    return seconds * rows.num_rows / count


def _traced(subject: build.Subject, kernels: ModelKernels, rows: Rows) -> MemoryForecast | None:
    """Return the predicted peak; None if the model uses what MLX cannot export."""
    try:
        return remembered_forecast(subject, kernels, rows)
    except (ValueError, RuntimeError):
        return None


def _peak(few: StepTrial, many: StepTrial, tokens: int) -> float:
    """Return the peak of a step: that of its pass grows with the tokens, that of its update does not."""
    of_pass = _at(tokens, few.tokens, few.pass_peak_bytes, many.tokens, many.pass_peak_bytes)
    return max(of_pass, many.peak_bytes) - many.replaced_bytes


def _at(tokens: int, few: int, less: float, many: int, more: float) -> float:
    """Return the value on the line through two points, not below the larger one; in proportion if there is only one."""
    if many <= few:
        return less * tokens / few
    return max(more, less + (more - less) * (tokens - few) / (many - few))
