"""The work of the stage `train`: open the model, select kernels, train, write the model folder."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mlx.utils import tree_flatten

from mlxflow.data.token_file import TokenFile
from mlxflow.distributed.team import of_this_process
from mlxflow.kernels.model_kernels import ModelKernels
from mlxflow.messages import terminal
from mlxflow.messages.errors import reason_of
from mlxflow.models import model_folder, quantized_layers
from mlxflow.storage.run_context import Context, ModelFolder
from mlxflow.training import (
    build,
    checkpointing_choice,
    kernel_selection,
    model_artifact,
    model_choices,
    run,
    run_warnings,
    starting_model,
    weight_dtypes,
)
from mlxflow.training.batch_size import shrink_note
from mlxflow.training.kernel_selection import KernelRequest
from mlxflow.training.lora_config import decide_fuse
from mlxflow.training.remembered_forecast import remembered_forecast
from mlxflow.training.run_state import Result
from mlxflow.training.settings import SettingNames, TrainingSettings


class Job(NamedTuple):
    """The request for a training.

    Attributes:
        settings: of the training; choices that depend on the model are still open.
        names: of the settings, for messages.
        source: origin of the model.
        kernels: the requested kernels.
        masks_documents: as written, see `model_choices.with_model_choices`.
        fused_loss: as written, see there.
        picks_checkpointing: whether trials choose the layers that are recomputed.
        outline: of the run, for warnings; of trained weights it may know no number.
        model_seed: of initial weights.
        data_seed: of the order of the rows.
    """

    settings: TrainingSettings
    names: SettingNames
    source: starting_model.ModelSource
    kernels: KernelRequest
    masks_documents: model_choices.Choice
    fused_loss: model_choices.Choice
    picks_checkpointing: bool
    outline: run_warnings.RunOutline
    model_seed: int
    data_seed: int


class Trained(NamedTuple):
    """The result of a training.

    Attributes:
        settings: all resolved.
        kernels: in use.
        result: the figures of the run.
        fuse: how trained adapters were saved; "" if all weights were trained.
        parameters: of the written model, without adapters beside it.
        warnings: printed before the first step.
    """

    settings: TrainingSettings
    kernels: ModelKernels
    result: Result
    fuse: str
    parameters: int
    warnings: tuple[str, ...]


def run_job(
    job: Job,
    tokens: TokenFile,
    files: run.RunFiles,
    *,
    outputs: ModelFolder,
    tokenizer: tuple[Path, ...],
    context: Context,
) -> Trained:
    """Train a model and write its folder.

    Args:
        job: the request.
        tokens: to train on.
        files: of the run.
        outputs: of the folder; config and weights are written.
        tokenizer: the files to copy into it.
        context: of the stage.

    Raises:
        StageError: the loss stays without a finite value.
        SystemExit: a signal ended the run; a checkpoint is saved.
        UserError: a setting does not fit the model, or no batch fits into the memory.
    """
    start, subject, kernels = prepare(job, tokens, context)
    if job.picks_checkpointing:
        layers = checkpointing_choice.resolve_checkpointing(
            subject,
            kernels,
            tokens.rows.head(subject.settings.batch_size),
            limit_bytes=context.memory_limit_bytes,
            memory_file=context.unfinished / "checkpointing.json",
            published=context.published,
        )
        subject = subject._replace(settings=layers.applied_to(subject.settings))
    _say_whether_it_fits(subject, kernels, tokens, context)
    warnings = _warn(job, start)
    settings = subject.settings.replace(kernels=tuple(kernels.selected))
    result = run.train(
        subject._replace(settings=settings),
        kernels,
        files,
        task=context.task,
        data_seed=job.data_seed,
        memory_limit_bytes=context.memory_limit_bytes,
        if_interrupted=context.if_interrupted,
    )
    fuse = decide_fuse(job.source.fuse, is_quantized=quantized_layers.is_quantized(start.model))
    weight_dtypes.widen_scales(start.model, settings)
    model = model_artifact.write_model(
        outputs, context, trained=start, source=job.source._replace(fuse=fuse), tokenizer=tokenizer
    )
    parameters = model_folder.num_parameters(model)
    return Trained(settings, kernels, result, fuse if start.adapter_config else "", parameters, warnings)


def prepare(
    job: Job, tokens: TokenFile, context: Context, *, on_open: Callable[[], object] = lambda: None
) -> tuple[starting_model.StartingModel, build.Subject, ModelKernels]:
    """Open the model, resolve the settings that depend on it, and select the kernels.

    Args:
        job: the request.
        tokens: to train on.
        context: of the stage.
        on_open: called when the model is open, before its kernels are selected.

    Raises:
        UserError: a setting does not fit the model.
    """
    names = job.names
    with kernel_selection.begin_verification(job.kernels) as ahead:
        start = starting_model.make_model(
            job.source,
            job.settings,
            tokens,
            seed=job.model_seed,
            memory_limit_bytes=context.memory_limit_bytes,
            names=names,
        )
        settings = model_choices.with_model_choices(
            job.settings,
            start.model,
            tokens,
            masks_documents=job.masks_documents,
            fused_loss=job.fused_loss,
            names=names,
        )
        names = model_choices.adjustable_names(names, settings, start.model, tokens, fused_loss=job.fused_loss)
        subject = build.Subject(start.model, settings, tokens.vocab_size, tokens.context_length, names)
        subject = subject._replace(has_head=settings.fused_loss)  # found for this model
        on_open()
        kernels = kernel_selection.select_kernels(job.kernels, subject, tokens.rows.head(settings.batch_size), ahead)
    return start, subject, kernels


def _say_whether_it_fits(subject: build.Subject, kernels: ModelKernels, tokens: TokenFile, context: Context) -> None:
    """Print the predicted peak of a step beside the memory limit; rank 0 does it for all ranks."""
    rank, rows = of_this_process().rank, tokens.rows.head(subject.settings.batch_size)
    if not rank.is_first or rank.shards_optimizer:  # of shards a rank has a part, which is not predicted
        return
    try:
        expected = remembered_forecast(subject, kernels, rows)
    except (ValueError, RuntimeError) as error:  # a model of other code may use what MLX cannot export
        line = f"the peak memory of a step is not predicted ({reason_of(error)})"
    else:
        limit = context.memory_limit_bytes
        line = expected.line(limit, advice=expected.advice(subject, rows))
        if expected.least_bytes <= limit and not expected.is_of_validation:
            note = shrink_note(subject.settings, subject.names, peak_bytes=expected.peak_bytes, limit_bytes=limit)
            line += f". {note}" if note else ""
    terminal.say(f"{context.task}: {line}")


def _warn(job: Job, start: starting_model.StartingModel) -> tuple[str, ...]:
    """Print what a user should know before the first step, and return the lines."""
    outline = job.outline
    if outline.is_adapter or job.source.folder is None:
        trained = sum(value.size for _, value in tree_flatten(start.model.trainable_parameters()))
        outline = outline._replace(trained_weights=trained)
    lines = tuple(one.line for one in run_warnings.before(outline, task=job.names.table))
    terminal.say(*lines)
    return lines
