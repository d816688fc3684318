"""How the stages `train` and `quantize` train: kernels, steps, batch sizes, checkpoints, and the loop over them."""

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from mlxflow.device import compute_device
from mlxflow.errors import ArtifactError, WorkflowError
from mlxflow.storage import layout
from mlxflow.system import terminal
from mlxflow.workflow.config import toml_value
from mlxflow.workflow.stage import Context, derive_seed

if TYPE_CHECKING:
    from mlxflow.stages.train import Config, Inputs
    from mlxflow.training.trainer import Trainer


class Subject(NamedTuple):
    """What is trained.

    Attributes:
        model: in training mode, evaluated.
        tokens: the training tokens.
        masks: whether documents are kept apart.
        objective: takes whether the gradient of the loss is a kernel's; returns what is made small. It looks at the
            model's layers: to be called before these are given kernels.
    """

    model: Any
    tokens: Any
    masks: bool
    objective: Callable[[bool], Any]


def fit(
    config: "Config",
    inputs: "Inputs",
    metrics_file: Path,
    context: Context,
    *,
    subject: Subject,
    kernels: Any,
) -> Any:
    """Train a model that is there, from a checkpoint where there is one; return the loop's result.

    Args:
        config: the table; what says which model it is, is not looked at.
        inputs: of them the validation tokens and the batch sizes to replay.
        metrics_file: gets the learning curve.
        context: of the stage; the checkpoints are its own.
        subject: what is trained; its model is changed.
        kernels: which of our kernels serve: of `choose_kernels`.

    Raises:
        SystemExit: it was asked to stop; a checkpoint is saved.
        StageError: the loss stays without a finite value.
        UserError: no batch fits into the memory.
    """
    from mlxflow.benchmarking.recipe import checkpoint_every
    from mlxflow.ops import gradient_checkpointing
    from mlxflow.training import progress
    from mlxflow.training.stop_signals import heeding_signals
    from mlxflow.training.trainer import Stopped

    objective = subject.objective(kernels.serves_loss)
    checkpoints = _checkpoints(config, context)
    with (
        progress.show_progress(num_steps=config.num_steps) as show,
        metrics_file.open("w") as metrics,
        heeding_signals() as asked_to_stop,
        kernels.fitted(),
        gradient_checkpointing.recomputed(subject.model, every=checkpoint_every(config.checkpointing)),
    ):

        def log(record: dict[str, Any]) -> None:
            metrics.write(json.dumps(record) + "\n")
            metrics.flush()
            show(record)

        step = make_step(config, subject.model, objective, key=context.task, kernels=kernels)
        trainer = _trainer(
            config, inputs, context, subject, step=step, checkpoints=checkpoints, log=log, asked_to_stop=asked_to_stop
        )
        found = checkpoints.latest(trainer.unfit)
        if found is not None:
            _say(f"{context.task}: goes on from step {found.facts['step']} ({found.folder})")
            metrics.write(found.metrics)
        try:
            return trainer.run(found)
        except Stopped as stopped:
            _say(
                f"{context.task}: stopped after step {stopped.step}; {stopped.checkpoint} "
                "lets the next run go on from there"
            )
            raise SystemExit(128 + asked_to_stop.signal) from stopped


def _trainer(
    config: "Config", inputs: "Inputs", context: Context, subject: Subject, *, step: Any, **told: Any
) -> "Trainer":
    """Return the loop over a step.

    Args:
        config: the table.
        inputs: of them the validation tokens and the batch sizes to replay.
        context: of the stage.
        subject: what is trained.
        step: of its model.
        told: what else the loop takes: where checkpoints, records and the wish to stop are.
    """
    from mlxflow.data.token_file import TokenFile
    from mlxflow.training.trainer import Trainer

    return Trainer(
        model=subject.model,
        step=step,
        sizes=_batch_sizes(config, inputs, context),
        open_loader=lambda size, cursor: _loader(config, subject.tokens, context, size, cursor),
        validation_rows=TokenFile.open(inputs.validation).rows.head(config.max_validation_rows),
        plan=_plan(config, subject.masks, context),
        key=context.task,
        **told,
    )


def _rehearse(config: "Config", context: Context, subject: Subject, kernels: Any) -> None:
    """Let MLX compile what the first step and validation need."""
    from mlxflow.benchmarking.recipe import checkpoint_every
    from mlxflow.ops import gradient_checkpointing
    from mlxflow.training import precompile

    objective = subject.objective(kernels.serves_loss)
    with (
        kernels.fitted(),
        gradient_checkpointing.recomputed(subject.model, every=checkpoint_every(config.checkpointing)),
    ):
        precompile.rehearse(
            subject.model,
            lambda: make_step(config, subject.model, objective, key=context.task, kernels=kernels),
            subject.tokens.rows.head(config.batch_size),
            is_one_pass=config.grad_accum_steps == 1,
            masks_documents=subject.masks,
        )


def begin(kernels: str, device_asked_for: str) -> AbstractContextManager[Any]:
    """Start what proves our kernels before MLX is imported, where there may be a GPU on which none was ever proved.

    Args:
        kernels: of the table.
        device_asked_for: of the workflow: "auto", "gpu" or "cpu".

    Returns:
        what `begin_proof` looks for in the stage's context; the process ends with the block.
    """
    if kernels == "off" or device_asked_for == "cpu":
        return nullcontext()
    from mlxflow.kernels import early_start

    return early_start.begin_early()


def begin_proof(config: "Config", context: Context) -> AbstractContextManager[Any]:
    """Start what proves our kernels on a device of which nothing is known, while the model is built.

    Args:
        config: the table.
        context: of the stage.

    Returns:
        what `choose_kernels` takes; the process ends with the block.
    """
    if _uses_none(config, context) or _recorded_kernels(context) is not None:
        if context.begun is not None:
            context.begun.stop()
        return nullcontext()
    from mlxflow.kernels import model_kernels

    return model_kernels.begin_proof(context.begun)


def _uses_none(config: "Config", context: Context) -> bool:
    return config.kernels == "off" or (config.kernels == "auto" and context.device == "cpu")


def choose_kernels(config: "Config", context: Context, subject: Subject, ahead: Any = None) -> Any:
    """Return which of our kernels serve; what the first run of this configuration chose, where there was one.

    Args:
        config: the table.
        context: of the stage.
        subject: what is to be trained.
        ahead: of `begin_proof`.

    Raises:
        WorkflowError: all are required and one does not serve.
    """
    import mlx.core as mx

    from mlxflow.kernels import model_kernels
    from mlxflow.storage import artifact_files

    if _uses_none(config, context):
        return model_kernels.nothing()
    served = model_kernels.choose_for(
        subject.model,
        dtype=mx.float32 if config.precision == "fp32" else mx.bfloat16,
        precision=config.precision,
        sums_gradients=config.grad_accum_steps > 1 or config.dynamic_batch_size,
        context_length=subject.tokens.context_length,
        masks_documents=subject.masks,
        is_deterministic=config.deterministic,
        recorded=_recorded_kernels(context),
        ahead=ahead,
        rehearse=lambda expected: _rehearse(config, context, subject, expected),
    )
    if config.kernels == "require" and served.refused:
        raise WorkflowError(
            f'{context.task}.kernels = "require": {compute_device.name()} lacks {_lacking(served.refused)}. '
            f'Set {context.task}.kernels = "auto".'
        )
    kept = _kept_choice(context)
    kept.parent.mkdir(parents=True, exist_ok=True)
    artifact_files.write_whole(kept, json.dumps(served.serving).encode())
    return served


def _lacking(refused: Mapping[str, str]) -> str:
    """Return the kernels that do not serve, and why, each reason once."""
    reasons = dict.fromkeys(refused.values())
    names = {reason: [name for name, why in refused.items() if why == reason] for reason in reasons}
    return "; ".join(f"{', '.join(names[reason])} ({reason})" for reason in reasons)


def _kept_choice(context: Context) -> Path:
    return context.unfinished / "kernels.json"


def _recorded_kernels(context: Context) -> list[str] | None:
    """Return the kernels that served the run that is gone on with or built again."""
    from mlxflow.storage import artifact_files, state_files

    if context.published is not None:
        report = artifact_files.read_report(context.published / layout.REPORT)
        return list(report["kernels"]) if "kernels" in report else None
    try:
        names = state_files.parse_json(state_files.read_bytes(_kept_choice(context)))
    except (OSError, ValueError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


def masks_documents(config: "Config", tokens: Any, model: Any, task: str) -> bool:
    """Return whether a mask keeps the documents of a row apart.

    Raises:
        WorkflowError: they are to, and the model's architecture cannot tell documents apart.
    """
    from mlxflow.ops import document_mask

    wanted = tokens.has_conversations if config.document_mask == "auto" else config.document_mask
    if not wanted or document_mask.can_mask_documents(model, tokens.vocab_size):
        return bool(wanted)
    if tokens.packs_documents:
        raise WorkflowError(
            f"{task}.document_mask = {toml_value(config.document_mask)}: this architecture counts positions through "
            f"the whole row and cannot keep the documents in it apart. Set {task}.document_mask = false, or "
            'pretokenize.packing = "none".'
        )
    return False  # a row holds one document


def report_of(result: Any, kernels: Any, *, keeps_best: bool) -> dict[str, Any]:
    """Return the figures of a training run, for the report; perplexities are those of the model in memory.

    Args:
        result: of `fit`.
        kernels: of `choose_kernels`.
        keeps_best: whether the trained model has the weights of the best validation; else of the last.
    """
    from mlxflow.evaluation.perplexity import perplexity_of

    return {
        "steps": result.steps,
        "tokens": result.tokens,
        "skipped_steps": result.skipped_steps,
        "first_validation_perplexity": perplexity_of(result.first_validation_loss),
        "trained_validation_perplexity": perplexity_of(
            result.best_validation_loss if keeps_best else result.last_validation_loss
        ),
        "best_validation_perplexity": perplexity_of(result.best_validation_loss),
        "best_validation_step": result.best_step,
        "run": {
            "tokens_per_second": result.tokens_per_second,
            "training_seconds": result.seconds,
            "compile_seconds": result.compile_seconds,
            "data_wait_seconds": result.data_wait_seconds,
            "device_wait_seconds": result.device_wait_seconds,
            "training_peak_memory_bytes": result.peak_memory_bytes,
            "kernels_refused": [f"{name}: {reason}" for name, reason in kernels.refused.items()],
        },
    }


def make_step(config: "Config", model: Any, objective: Any, *, key: str, kernels: Any) -> Any:
    """Return the step that the table asks for.

    Args:
        config: the table.
        model: in training mode.
        objective: what is made small.
        key: of the table, for messages.
        kernels: which of our kernels serve: of `choose_kernels`.

    Raises:
        ArtifactError: an option that the optimizer does not know.
    """
    from mlxflow.ops.overrides import Arithmetic
    from mlxflow.training import optimizers
    from mlxflow.training.step import Step

    known = optimizers.options_of(config.optimizer)
    for name in config.optimizer_options:
        if name not in known or name in ("weight_decay", "betas"):
            others = sorted(set(known) - {"weight_decay", "betas"})
            raise ArtifactError(
                f"{key}.optimizer_options.{name}: unknown to {config.optimizer}. Known: {', '.join(others)}."
            )
    schedule = optimizers.make_schedule(
        name=config.schedule,
        learning_rate=config.learning_rate,
        final_learning_rate=config.final_learning_rate,
        num_steps=config.num_steps,
        warmup_steps=config.resolved_warmup_steps,
        decay_steps=config.resolved_decay_steps,
    )
    optimizer = optimizers.make_optimizer(name=config.optimizer, schedule=schedule, **optimizer_settings(config))
    update = optimizers.Update(
        model,
        optimizer,
        max_grad_norm=config.max_grad_norm,
        has_masters=config.precision == "bf16",
        serves=kernels.serves,
    )
    how = Arithmetic(is_deterministic=config.deterministic, attention=kernels.attention)
    return Step(model, update, objective, arithmetic=how)


def optimizer_settings(config: "Config") -> dict[str, Any]:
    """Return the optimizer's weight decay, and its options by MLX's names, every choice resolved."""
    from mlxflow.training import optimizers

    betas = {"betas": list(config.betas)} if "betas" in optimizers.options_of(config.optimizer) else {}
    return {
        "weight_decay": 0.1 if config.weight_decay == "auto" else config.weight_decay,
        "options": betas | config.optimizer_options,
    }


def _batch_sizes(config: "Config", inputs: "Inputs", context: Context) -> Any:
    from mlxflow.training.batch_size import BatchSizes, read_decisions

    is_constant = config.constant_tokens_per_step or not config.dynamic_batch_size
    return BatchSizes(
        batch_size=config.batch_size,
        max_batch_size=config.resolved_max_batch_size,
        rows_per_update=config.batch_size * config.grad_accum_steps if is_constant else None,
        grad_accum_steps=config.grad_accum_steps,
        grow_below=config.grow_below,
        shrink_above=config.shrink_above,
        is_fixed=not config.dynamic_batch_size,
        replay=read_decisions(inputs.replay[0], f"{context.task}.replay") if inputs.replay else (),
    )


def _loader(config: "Config", tokens: Any, context: Context, size: int, cursor: int) -> Any:
    from mlxflow.data.loader import Loader

    return Loader(
        tokens.rows,
        batch_size=size,
        seed=derive_seed(context.seed, "train.batches"),
        workers=config.workers,
        prefetch_batches=config.prefetch_batches,
        cursor=cursor,
        name_rows=tokens.name_rows,
    )


def _plan(config: "Config", masks: bool, context: Context) -> Any:
    from mlxflow.training.trainer import Plan

    return Plan(
        num_steps=config.num_steps,
        lazy_eval_every=config.lazy_eval_every,
        log_every=config.log_every,
        eval_every=config.eval_every,
        eval_batch_size=config.batch_size,
        masks_documents=masks,
        adjust_every=config.adjust_every,
        save_every=config.save_every,
        max_bad_steps=config.max_bad_steps,
        patience=config.patience,
        keeps_best=config.keep == "best",
        memory_limit_bytes=context.memory_limit_bytes,
    )


def _checkpoints(config: "Config", context: Context) -> Any:
    """Return where checkpoints go."""
    from mlxflow.stages.train import MANNER
    from mlxflow.training.checkpoints import CheckpointStore

    table = {name: value for name, value in msgspec.to_builtins(config).items() if name not in MANNER}
    told = dict(_flat(table, context.task))
    settings = told | {
        "seed": context.seed,
        "mlx": context.provenance["mlx"],
        "inputs": context.provenance["inputs_digest"],
    }
    return CheckpointStore(context.unfinished, keep=config.keep_checkpoints, settings=settings, say=_say)


def _flat(table: dict[str, Any], key: str) -> Any:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{key}.{name}")
        else:
            yield f"{key}.{name}", value


def _say(line: str) -> None:

    terminal.say(line)
