"""Train a language model on the token files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import msgspec
from msgspec import Meta

from mlxflow import device
from mlxflow.config import Problem
from mlxflow.errors import ArtifactError, StageError, WorkflowError
from mlxflow.stage import Artifacts, Context, ModelFolder, derive_seed

VERSION = 4

#: Keys that say how the work is done and change nothing of what comes out.
MANNER = ("workers", "prefetch_batches", "save_every", "keep_checkpoints", "lazy_eval_every")

_OPTIMIZERS = Literal["adamw", "adam", "sgd", "rmsprop", "adagrad", "adadelta", "adamax", "lion", "adafactor", "muon"]


class LoraConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[train.lora]` table: low-rank adapters, for the methods "lora" and "dora"."""

    rank: Annotated[int, Meta(ge=1, description="columns of the low-rank factors")] = 8
    scale: Annotated[float, Meta(gt=0, description="what their product is multiplied by")] = 20.0
    dropout: Annotated[float, Meta(ge=0, lt=1, description="share of an adapter's inputs zeroed in training")] = 0.0
    num_layers: Annotated[int, Meta(ge=0, description="the last so many blocks get adapters; 0: all")] = 0
    keys: Annotated[
        tuple[str, ...], Meta(min_length=1, description='patterns of layers within a block, such as "self_attn.*"')
    ] = ("*",)


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[train.model]` table: the model's shape, or the model to go on from."""

    from_: Annotated[
        str, Meta(description="a model folder or a hub id to go on from; empty: a new model of the shape below")
    ] = msgspec.field(default="", name="from")
    architecture: Annotated[Literal["llama"], Meta(description="the model's kind, from mlx-lm")] = "llama"
    hidden_size: Annotated[int, Meta(ge=8, description="width of the residual stream")] = 128
    num_layers: Annotated[int, Meta(ge=1, description="transformer blocks")] = 2
    num_heads: Annotated[int, Meta(ge=1, description="attention heads")] = 2
    num_kv_heads: Annotated[int, Meta(ge=1, description="heads of keys and values")] = 2
    intermediate_size: Annotated[int, Meta(ge=8, description="width inside the gated MLP")] = 256
    tie_word_embeddings: Annotated[bool, Meta(description="whether the head shares the embedding's weights")] = True
    rope_theta: Annotated[float, Meta(gt=0, description="base of the rotary embedding")] = 10_000.0

    def problems(self) -> Any:
        """Yield what does not divide."""
        if self.hidden_size % (2 * self.num_heads):
            yield Problem(
                "hidden_size",
                self.hidden_size,
                f"expected a multiple of twice num_heads = {self.num_heads}",
                "Change one of the two.",
            )
        if self.num_heads % self.num_kv_heads:
            yield Problem(
                "num_kv_heads",
                self.num_kv_heads,
                f"expected a divisor of num_heads = {self.num_heads}",
                "Change one of the two.",
            )


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[train]` table."""

    input: Annotated[str, Meta(description="the token files: a pretokenize stage")] = "pretokenize"
    num_steps: Annotated[int, Meta(ge=1, description="optimizer updates")] = 240
    batch_size: Annotated[int, Meta(ge=1, description="rows in one forward pass, to begin with")] = 32
    grad_accum_steps: Annotated[int, Meta(ge=1, description="forward passes of batch_size rows an update sums")] = 1
    dynamic_batch_size: Annotated[bool, Meta(description="whether batch_size follows the memory")] = True
    max_batch_size: Annotated[int, Meta(ge=1, description="rows it may grow to; it may shrink to half")] = 64
    constant_tokens_per_step: Annotated[
        bool, Meta(description="whether an update sums the same rows whatever the batch size")
    ] = True
    grow_below: Annotated[float, Meta(ge=0, le=1, description="share of the memory limit under which it grows")] = 0.5
    shrink_above: Annotated[float, Meta(gt=0, le=1, description="share of the limit over which it shrinks")] = 0.8
    adjust_every: Annotated[int, Meta(ge=1, description="steps between two looks at the memory")] = 50
    replay: Annotated[str, Meta(description="the metrics.jsonl of a run whose batch sizes are followed")] = ""

    optimizer: Annotated[_OPTIMIZERS, Meta(description="one of mlx.optimizers")] = "adamw"
    optimizer_options: Annotated[dict[str, Any], Meta(description="its other options, by MLX's names")] = {}
    learning_rate: Annotated[float, Meta(gt=0, description="at its highest, after the warm-up")] = 1.5e-2
    final_learning_rate: Annotated[float, Meta(ge=0, description="at the last step, where it falls")] = 0.0
    schedule: Annotated[
        Literal["cosine", "linear", "constant", "wsd"],
        Meta(description="of the learning rate; wsd: constant, then linear over the last decay_steps"),
    ] = "cosine"
    warmup_steps: Annotated[
        int, Meta(ge=0, description="steps over which the learning rate rises; at most half of num_steps")
    ] = 20
    decay_steps: Annotated[int, Meta(ge=0, description="last steps, over which wsd falls")] = 48
    weight_decay: Annotated[
        Literal["auto"] | Annotated[float, Meta(ge=0)],
        Meta(description="of matrices; auto: 0.1 where the optimizer knows it"),
    ] = "auto"
    betas: Annotated[
        tuple[Annotated[float, Meta(ge=0, lt=1)], Annotated[float, Meta(ge=0, lt=1)]],
        Meta(description="of optimizers that have them: how slowly their two moments follow the gradient"),
    ] = (0.9, 0.95)
    max_grad_norm: Annotated[
        float, Meta(ge=0, description="gradients of a larger norm are scaled down to it; 0: none, nor is it measured")
    ] = 1.0
    max_bad_steps: Annotated[
        int, Meta(ge=1, description="steps in a row skipped for a loss or gradient that is not finite; then it ends")
    ] = 10

    precision: Annotated[
        Literal["fp32", "bf16", "bf16-pure"],
        Meta(description="bf16 keeps weights and moments in fp32 beside the bf16 model; bf16-pure does not"),
    ] = "fp32"
    checkpointing: Annotated[
        Literal["none", "layers"] | Annotated[int, Meta(ge=1)],
        Meta(description="whether activations are computed anew in the backward pass: of layers, of every k-th one"),
    ] = "none"
    fused_loss: Annotated[
        Literal["auto"] | bool, Meta(description="whether head and loss are one, without the whole logits")
    ] = "auto"
    kernels: Annotated[
        Literal["auto", "off", "require"],
        Meta(description="our own GPU kernels: where they prove right and faster; never; or an error where one lacks"),
    ] = "auto"
    lazy_eval_every: Annotated[int, Meta(ge=1, description="steps between two waits for the device")] = 4

    log_every: Annotated[int, Meta(ge=1, description="steps between two lines of metrics.jsonl")] = 10
    eval_every: Annotated[int, Meta(ge=0, description="steps between two validations; 0: first and last only")] = 100
    max_validation_rows: Annotated[int, Meta(ge=1, description="validation rows used")] = 256
    patience: Annotated[int, Meta(ge=0, description="validations without a better one that end it; 0: none do")] = 0
    keep: Annotated[
        Literal["last", "best"], Meta(description="the weights that come out: the last, or of the best validation")
    ] = "last"
    save_every: Annotated[int, Meta(ge=0, description="steps between two checkpoints; 0: only when stopped")] = 100
    keep_checkpoints: Annotated[int, Meta(ge=1, description="checkpoints kept while it runs")] = 2
    document_mask: Annotated[
        Literal["auto"] | bool,
        Meta(description="whether a token sees only its own document; auto: where there are conversations"),
    ] = "auto"
    workers: Annotated[int, Meta(ge=1, le=64, description="threads that gather batches")] = 8
    prefetch_batches: Annotated[int, Meta(ge=1, le=64, description="batches gathered ahead")] = 4
    method: Annotated[
        Literal["full", "lora", "dora"], Meta(description="what is trained: all weights, or adapters beside them")
    ] = "full"
    model: Annotated[ModelConfig, Meta(description="the model's shape, or where it comes from")] = ModelConfig()
    lora: Annotated[LoraConfig, Meta(description="the adapters, for lora and dora")] = LoraConfig()

    def problems(self) -> Any:
        """Yield what does not fit together."""
        if self.grow_below >= self.shrink_above:
            yield Problem(
                "grow_below",
                self.grow_below,
                f"expected less than shrink_above = {self.shrink_above}",
                "Change one of the two.",
            )
        if self.final_learning_rate > self.learning_rate:
            yield Problem(
                "final_learning_rate",
                self.final_learning_rate,
                f"expected at most learning_rate = {self.learning_rate}",
                "Change one of the two.",
            )
        if self.method != "full" and not self.model.from_:
            yield Problem(
                "method",
                self.method,
                "adapters need a model beside which to lie",
                'Set train.model.from, or method = "full".',
            )
        if self.weight_decay not in ("auto", 0) and self.optimizer in _WITHOUT_DECAY:
            yield Problem(
                "weight_decay",
                self.weight_decay,
                f"the optimizer {self.optimizer!r} knows none",
                'Set weight_decay = 0, or optimizer = "adamw".',
            )


_WITHOUT_DECAY = ("adam", "rmsprop", "adagrad", "adadelta", "adamax")


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """Token files and tokenizer, and what training goes on from."""

    train: Path = Path()
    validation: Path = Path()
    tokenizer: tuple[Path, ...] = ()
    base: tuple[Path, ...] = ()
    replay: tuple[Path, ...] = ()

    @classmethod
    def of(cls, config: Config, artifacts: Artifacts) -> Self:
        """Take tokens from a pretokenize stage; base and replay from where they are said to be."""
        folder = artifacts.folder(config.input, "input")
        return cls(
            train=folder / "train.safetensors",
            validation=folder / "validation.safetensors",
            tokenizer=(folder / "tokenizer.json", folder / "tokenizer_config.json"),
            base=artifacts.model(config.model.from_, "model.from") if config.model.from_ else (),
            replay=artifacts.files((config.replay,), "replay") if config.replay else (),
        )


class Outputs(ModelFolder, frozen=True, kw_only=True):
    """A model folder and the learning curve; beside them the adapter, where one was trained."""

    metrics: Path = Path("metrics.jsonl")
    adapters: tuple[Path, ...] = ()

    @classmethod
    def of(cls, config: Config) -> Self:
        """Name the adapter's files where there are some."""
        folder = Path("adapters")
        made = () if config.method == "full" else (folder / "adapters.safetensors", folder / "adapter_config.json")
        return cls(adapters=made)


def run(*, config: Config, inputs: Inputs, outputs: Outputs, context: Context) -> dict[str, Any]:
    """Train and write the model folder.

    Raises:
        SourceError: there are fewer rows than one batch holds.
        StageError: the loss stays without a finite value.
        UserError: a setting does not fit the model, or no batch fits into the memory.
    """
    from mlxflow import models
    from mlxflow.data.token_file import TokenFile
    from mlxflow.training.objective import choose_objective

    tokens = TokenFile.open(inputs.train)
    tokens.full_rows(config.batch_size, f"{context.task}.batch_size")
    model, model_config, adapter_config = _make_model(config, inputs, tokens, context)
    masks = masks_documents(config, tokens, model, context.task)
    kernels = choose_kernels(config, model, context)
    fused, objective = choose_objective(
        model,
        fused=None if config.fused_loss == "auto" else config.fused_loss,
        vocab_size=tokens.vocab_size,
        tokens=config.batch_size * tokens.context_length,
        masks_documents=masks,
        uses_kernel=kernels.serves_loss,
    )
    result = fit(
        config,
        inputs,
        outputs.metrics,
        context,
        model=model,
        objective=objective,
        tokens=tokens,
        masks=masks,
        kernels=kernels,
    )
    if adapter_config:
        _save_adapters(model, adapter_config, outputs, context)
    models.save(
        model=model,
        config=model_config,
        config_file=outputs.config,
        model_file=outputs.model,
        provenance=context.provenance,
    )
    models.copy_tokenizer(inputs.tokenizer, context.folder)
    facts = {
        "parameters": models.num_parameters(model),
        "document_mask": masks,
        "fused_loss": fused,
        "kernels": kernels.serving,
    }
    report = report_of(result, kernels)
    return facts | report | {"settings": settings_of(config, context, masks=masks, fused=fused)}


def fit(
    config: Config,
    inputs: Inputs,
    metrics_file: Path,
    context: Context,
    *,
    model: Any,
    objective: Any,
    tokens: Any,
    masks: bool,
    kernels: Any,
) -> Any:
    """Train a model that is there, from a checkpoint where there is one; return the loop's result.

    Args:
        config: the table; what says which model it is, is not looked at.
        inputs: of them the validation tokens and the batch sizes to replay.
        metrics_file: gets the learning curve.
        context: of the stage; the checkpoints are its own.
        model: in training mode, evaluated; changed.
        objective: what is made small.
        tokens: the training tokens.
        masks: whether documents are kept apart in validation.
        kernels: which of our kernels serve: of `choose_kernels`.

    Raises:
        SystemExit: it was asked to stop; a checkpoint is saved.
        StageError: the loss stays without a finite value.
        UserError: no batch fits into the memory.
    """
    from mlxflow.data.token_file import TokenFile
    from mlxflow.training import progress, recompute
    from mlxflow.training.interrupt import heeding_signals
    from mlxflow.training.loop import Stopped, Trainer

    every = config.checkpointing if isinstance(config.checkpointing, int) else int(config.checkpointing == "layers")
    checkpoints = _checkpoints(config, context)
    found = checkpoints.latest()
    if found is not None:
        _say(f"{context.task}: goes on from step {found.facts['step']} ({found.folder})")
    with (
        progress.show_progress(num_steps=config.num_steps) as show,
        metrics_file.open("w") as metrics,
        heeding_signals() as asked_to_stop,
        kernels.fitted(),
        recompute.recomputed(model, every=every),
    ):

        def log(record: dict[str, Any]) -> None:
            metrics.write(json.dumps(record) + "\n")
            metrics.flush()
            show(record)

        trainer = Trainer(
            model=model,
            step=make_step(config, model, objective, key=context.task, serves=kernels.serves),
            sizes=_batch_sizes(config, inputs, context),
            open_loader=lambda size, cursor: _loader(config, tokens, context, size, cursor),
            validation_rows=TokenFile.open(inputs.validation).rows.head(config.max_validation_rows),
            plan=_plan(config, masks, context),
            checkpoints=checkpoints,
            log=log,
            asked_to_stop=asked_to_stop,
            key=context.task,
        )
        if found is not None:
            metrics.write(found.metrics)
        try:
            return trainer.run(found)
        except Stopped as stopped:
            _say(
                f"{context.task}: stopped after step {stopped.step}; {stopped.checkpoint} "
                "lets the next run go on from there"
            )
            raise SystemExit(128 + asked_to_stop.signal) from stopped


def choose_kernels(config: Config, model: Any, context: Context) -> Any:
    """Return which of our kernels serve; what the first run of this configuration chose, where there was one.

    Args:
        config: the table.
        model: as it is trained, evaluated.
        context: of the stage.

    Raises:
        WorkflowError: all are required and one does not serve.
    """
    import mlx.core as mx

    from mlxflow import artifact
    from mlxflow.training import serving

    if config.kernels == "off" or (config.kernels == "auto" and context.device == "cpu"):
        return serving.nothing()
    kept = context.unfinished / "kernels.json"
    served = serving.choose_for(
        model,
        dtype=mx.float32 if config.precision == "fp32" else mx.bfloat16,
        precision=config.precision,
        sums_gradients=config.grad_accum_steps > 1 or config.dynamic_batch_size,
        recorded=_recorded_kernels(kept, context),
    )
    if config.kernels == "require" and served.refused:
        raise WorkflowError(
            f'{context.task}.kernels = "require": {device.name()} lacks {_lacking(served.refused)}. '
            f'Set {context.task}.kernels = "auto".'
        )
    kept.parent.mkdir(parents=True, exist_ok=True)
    artifact.write_whole(kept, json.dumps(served.serving).encode())
    return served


def _lacking(refused: Mapping[str, str]) -> str:
    """Return the kernels that do not serve, and why, each reason once."""
    reasons = dict.fromkeys(refused.values())
    names = {reason: [name for name, why in refused.items() if why == reason] for reason in reasons}
    return "; ".join(f"{', '.join(names[reason])} ({reason})" for reason in reasons)


def _recorded_kernels(kept: Path, context: Context) -> list[str] | None:
    """Return the kernels that served the run that is gone on with or built again."""
    from mlxflow import artifact

    if context.published is not None:
        report = artifact.read_report(context.published / "report.toml")
        return list(report["kernels"]) if "kernels" in report else None
    try:
        names = json.loads(kept.read_text())
    except (OSError, ValueError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


def _save_adapters(model: Any, adapter_config: dict[str, Any], outputs: Outputs, context: Context) -> None:
    """Write the adapters and fuse them into the model."""
    from mlxflow.training import adapters

    weights_file, config_file = outputs.adapters
    weights_file.parent.mkdir()
    adapters.save_adapters(
        model,
        adapter_config,
        weights_file=weights_file,
        config_file=config_file,
        provenance=context.provenance,
    )
    adapters.fuse_adapters(model)


def settings_of(config: Config, context: Context, *, masks: bool, fused: bool) -> dict[str, Any]:
    """Return how the steps were done, every choice resolved, for the stages that do such steps again."""
    from mlxflow.training import optimizers

    betas = {"betas": list(config.betas)} if "betas" in optimizers.options_of(config.optimizer) else {}
    is_own = context.device == "cpu" and config.precision == "fp32"
    return {
        "arithmetic": "own" if is_own else "mlx",
        "method": config.method,
        "batch_size": config.batch_size,
        "grad_accum_steps": config.grad_accum_steps,
        "precision": config.precision,
        "checkpointing": config.checkpointing,
        "fused_loss": fused,
        "masks_documents": masks,
        "workers": config.workers,
        "prefetch_batches": config.prefetch_batches,
        "lazy_eval_every": config.lazy_eval_every,
        "optimizer": config.optimizer,
        "options": betas | config.optimizer_options,
        "weight_decay": 0.1 if config.weight_decay == "auto" else config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "learning_rate": config.learning_rate,
    } | ({} if config.method == "full" else {"lora": _adapter_shape(config)._asdict()})


def report_of(result: Any, kernels: Any) -> dict[str, Any]:
    """Return what a training run came to, for the report.

    Args:
        result: of `fit`.
        kernels: of `choose_kernels`.
    """
    from mlxflow.measurement.perplexity import perplexity_of

    return {
        "steps": result.steps,
        "tokens": result.tokens,
        "skipped_steps": result.skipped_steps,
        "first_validation_perplexity": perplexity_of(result.first_validation_loss),
        "last_validation_perplexity": perplexity_of(result.last_validation_loss),
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


def _say(line: str) -> None:
    import sys

    print(line, file=sys.stderr, flush=True)


def _make_model(config: Config, inputs: Inputs, tokens: Any, context: Context) -> tuple[Any, dict[str, Any], Any]:
    """Return the model in training mode, its `config.json`, and its adapters' where it has some."""
    import mlx.core as mx

    from mlxflow import models
    from mlxflow.training import adapters

    seed = derive_seed(context.seed, "train.model")
    dtype = mx.float32 if config.precision == "fp32" else mx.bfloat16
    if config.model.from_:
        model, model_config = _base_model(config, inputs, tokens, context)
    else:
        model_config = shape_config(config.model, tokens.vocab_size, tokens.context_length, tokens.end_of_text)
        model = models.build(model_config, seed=seed)
    adapter_config = None
    if config.method != "full":
        key = f"{context.task}.lora.keys"
        adapter_config = adapters.add_adapters(model, _adapter_shape(config), seed=seed, key=key)
    model.set_dtype(dtype)
    for name in {"torch_dtype", "dtype"} & set(model_config):
        model_config[name] = str(dtype).rpartition(".")[2]
    model.train()
    mx.eval(model.parameters())
    return model, model_config, adapter_config


def _adapter_shape(config: Config) -> Any:
    from mlxflow.training.adapters import AdapterShape

    return AdapterShape(
        method=config.method,
        rank=config.lora.rank,
        scale=config.lora.scale,
        dropout=config.lora.dropout,
        num_layers=config.lora.num_layers,
        keys=config.lora.keys,
    )


def _base_model(config: Config, inputs: Inputs, tokens: Any, context: Context) -> tuple[Any, dict[str, Any]]:
    """Return the model to go on from and its `config.json`.

    Raises:
        ArtifactError: it is none, does not know the tokens, or is quantized where all weights are to be trained.
    """
    from mlxflow import hub, models

    key = f"{context.task}.model.from"
    folder = context.root / config.model.from_
    if not inputs.base:
        folder = hub.fetch(config.model.from_, patterns=models.HUB_FILES, key=key)
    model, model_config = models.load(folder)
    tokens.require_vocabulary(models.vocab_size(folder), key)
    models.require_tokenizer(folder, inputs.tokenizer[0], key)
    positions = int(model_config.get("max_position_embeddings") or 2**62)
    if tokens.context_length > positions:
        raise ArtifactError(
            f"{key}: {folder} is made for {positions:,} positions, the rows have {tokens.context_length:,}. "
            "Lower pretokenize.context_length."
        )
    if config.method == "full" and "quantization" in model_config:
        raise ArtifactError(f'{key}: {folder} is quantized. Set {context.task}.method = "lora", or name a dense model.')
    return model, model_config


def make_step(config: Config, model: Any, objective: Any, *, key: str, serves: Any) -> Any:
    """Return the step that the table asks for.

    Args:
        config: the table.
        model: in training mode.
        objective: what is made small.
        key: of the table, for messages.
        serves: tells of the name of a kernel whether it may be used.

    Raises:
        ArtifactError: an option that the optimizer does not know.
    """
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
        warmup_steps=min(config.warmup_steps, config.num_steps // 2),
        decay_steps=config.decay_steps,
    )
    betas = {"betas": list(config.betas)} if "betas" in known else {}
    optimizer = optimizers.make_optimizer(
        name=config.optimizer,
        schedule=schedule,
        weight_decay=0.1 if config.weight_decay == "auto" else config.weight_decay,
        options=betas | config.optimizer_options,
    )
    update = optimizers.Update(
        model,
        optimizer,
        max_grad_norm=config.max_grad_norm,
        has_masters=config.precision == "bf16",
        serves=serves,
    )
    return Step(model, update, objective)


def _batch_sizes(config: Config, inputs: Inputs, context: Context) -> Any:
    from mlxflow.training.batch_size import BatchSizes, read_decisions

    is_constant = config.constant_tokens_per_step or not config.dynamic_batch_size
    return BatchSizes(
        batch_size=config.batch_size,
        max_batch_size=config.max_batch_size,
        rows_per_update=config.batch_size * config.grad_accum_steps if is_constant else None,
        grad_accum_steps=config.grad_accum_steps,
        grow_below=config.grow_below,
        shrink_above=config.shrink_above,
        is_fixed=not config.dynamic_batch_size,
        replay=read_decisions(inputs.replay[0], f"{context.task}.replay") if inputs.replay else (),
    )


def _loader(config: Config, tokens: Any, context: Context, size: int, cursor: int) -> Any:
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


def _plan(config: Config, masks: bool, context: Context) -> Any:
    from mlxflow.training.loop import Plan

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


def _checkpoints(config: Config, context: Context) -> Any:
    """Return where checkpoints go."""
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


def masks_documents(config: Config, tokens: Any, model: Any, task: str) -> bool:
    """Return whether tokens see only their own document.

    Raises:
        StageError: they are to, and the model's architecture cannot tell documents apart.
    """
    from mlxflow import packed

    wanted = tokens.has_conversations if config.document_mask == "auto" else config.document_mask
    if wanted and not packed.can_mask_documents(model, tokens.vocab_size):
        raise StageError(
            f"{task}.document_mask: this architecture counts positions through the whole row and cannot keep the "
            f'documents in it apart. Set {task}.document_mask = false, or pretokenize.packing = "none".'
        )
    return bool(wanted)


def shape_config(shape: ModelConfig, vocab_size: int, context_length: int, end_of_text: int) -> dict[str, Any]:
    """Return the `config.json` of a new model of a shape."""
    from mlxflow import models

    return models.llama_config(
        vocab_size=vocab_size,
        context_length=context_length,
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        intermediate_size=shape.intermediate_size,
        tie_word_embeddings=shape.tie_word_embeddings,
        rope_theta=shape.rope_theta,
        end_of_text=end_of_text,
    )
