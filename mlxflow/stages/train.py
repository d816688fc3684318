"""Train a language model on the token files."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import msgspec
from msgspec import Meta

from mlxflow.device import compute_device
from mlxflow.messages import terminal
from mlxflow.models.new_model import ModelConfig
from mlxflow.storage import layout
from mlxflow.storage.model_files import ADAPTERS, adapters_folder
from mlxflow.storage.run_context import Context, ModelFolder
from mlxflow.storage.toml_tables import MAX_ROWS, MAX_STEPS, Problem, limit
from mlxflow.training import defaults, length, setting_checks
from mlxflow.training.lora_config import LoraConfig, decide_fuse
from mlxflow.training.optimizer_options import DEFAULT_BETAS, Optimizer, optimizer_problems
from mlxflow.training.table_settings import most_ranks as most_ranks
from mlxflow.training.table_settings import trains_adapters as trains_adapters
from mlxflow.workflow import products
from mlxflow.workflow.stage import MEMORY_LIMIT_KEY, Artifacts, Beside
from mlxflow.workflow.stage_references import model_inputs, note_other_model

if TYPE_CHECKING:
    from mlxflow.report.stage_reports.train import TrainReport
    from mlxflow.training.run import RunFiles
    from mlxflow.training.settings import SettingNames
    from mlxflow.training.table_job import TableJob

VERSION = 15  # on a CPU attention of 16 bits, and of documents kept apart, is computed by blocks in fp32

#: Keys that do not affect the artifact.
EXECUTION_ONLY_KEYS = ("workers", "prefetch_batches", "save_every", "keep_checkpoints", "lazy_eval_every")

LATER_KEYS = {"num_epochs": "auto", "require_improvement": False, "model.args": {}}


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[train]` table."""

    input: Annotated[str, Meta(description="the token files: a pretokenize stage")] = "pretokenize"
    num_steps: Annotated[
        Literal["auto"] | Annotated[int, Meta(ge=1, le=MAX_STEPS)],
        Meta(description="optimizer updates; auto: 240 for a new model, else as many as num_epochs takes"),
    ] = "auto"
    num_epochs: Annotated[
        Literal["auto"] | Annotated[float, Meta(gt=0, le=MAX_STEPS)],
        Meta(description="passes over the training rows, instead of num_steps; auto: 3 with model.from, else none"),
    ] = "auto"
    batch_size: Annotated[
        Literal["auto"] | Annotated[int, Meta(ge=1, le=MAX_ROWS)],
        Meta(description="rows in one forward pass, initially; auto: 32, or 4 with model.from, or all rows if fewer"),
    ] = "auto"
    grad_accum_steps: Annotated[
        int, Meta(ge=1, le=MAX_ROWS, description="forward passes of batch_size rows per update")
    ] = 1
    dynamic_batch_size: Annotated[bool, Meta(description="whether batch_size adapts to the memory in use")] = True
    max_batch_size: Annotated[
        Literal["auto"] | Annotated[int, Meta(ge=1, le=MAX_ROWS)],
        Meta(description="largest batch size; auto: 64, or batch_size if larger; the smallest is half of batch_size"),
    ] = "auto"
    constant_tokens_per_step: Annotated[
        bool, Meta(description="whether an update keeps its number of rows when batch_size changes")
    ] = True
    grow_below: Annotated[
        float, Meta(ge=0, le=1, description="share of the memory limit below which batch_size grows")
    ] = 0.5
    shrink_above: Annotated[
        float, Meta(gt=0, le=1, description="share of the memory limit above which batch_size shrinks")
    ] = 0.8
    adjust_every: Annotated[int, Meta(ge=1, le=MAX_STEPS, description="steps between adjustments of batch_size")] = 50
    replay: Annotated[str, Meta(description="the metrics.jsonl of a run whose batch sizes are repeated")] = ""
    optimizer: Annotated[Optimizer, Meta(description="one of mlx.optimizers")] = "adamw"
    optimizer_options: Annotated[dict[str, Any], Meta(description="its other options, by MLX's names")] = {}
    learning_rate: Annotated[
        Literal["auto"] | Annotated[float, Meta(ge=1e-12, le=1e6)],
        Meta(
            description="peak learning rate, after warm-up; auto: 1.5e-2 for a new model; with model.from 1e-4 for "
            "adapters, 3e-5 for all weights"
        ),
    ] = "auto"
    final_learning_rate: Annotated[
        float, Meta(ge=0, le=1e6, description="final learning rate of decaying schedules")
    ] = 0.0
    schedule: Annotated[
        Literal["cosine", "linear", "constant", "wsd"],
        Meta(description="learning rate schedule; wsd: constant, then linear decay over the last decay_steps"),
    ] = "cosine"
    warmup_steps: Annotated[
        Literal["auto"] | Annotated[int, Meta(ge=0, le=MAX_STEPS)],
        Meta(description="warm-up steps; auto: 20, at most half of num_steps"),
    ] = "auto"
    decay_steps: Annotated[
        Literal["auto"] | Annotated[int, Meta(ge=1, le=MAX_STEPS)],
        Meta(description="decay steps of wsd; auto: a fifth of num_steps"),
    ] = "auto"
    weight_decay: Annotated[
        Literal["auto"] | Annotated[float, Meta(ge=0, le=1000)],
        Meta(description="weight decay of matrices; auto: 0.1 if the optimizer has it"),
    ] = "auto"
    betas: Annotated[
        tuple[Annotated[float, Meta(ge=0, lt=1)], Annotated[float, Meta(ge=0, lt=1)]],
        Meta(description="decay rates of the optimizer's two moments, if it has them"),
    ] = DEFAULT_BETAS
    max_grad_norm: Annotated[
        float, limit(1e12, "gradients of a larger norm are scaled down to it; 0 or inf: none, nor is it measured")
    ] = 1.0
    max_bad_steps: Annotated[
        int,
        limit(
            MAX_STEPS,
            "steps in a row skipped for a loss or gradient that is not finite; then it ends; inf: it never does",
            least=1,
            unlimited=MAX_STEPS,
        ),
    ] = 10

    precision: Annotated[
        Literal["fp32", "bf16", "bf16-pure"],
        Meta(description="bf16: bf16 model with fp32 weights and moments; bf16-pure: without them"),
    ] = "fp32"
    checkpointing: Annotated[
        Literal["auto", "none", "layers", "pairs"] | Annotated[int, Meta(ge=1, le=10_000)],
        Meta(
            description="gradient checkpointing: every layer, every k-th, pairs (half the inputs are kept, and every "
            "second layer is computed once more), or auto: the fewest that fit, by trials"
        ),
    ] = "none"
    fused_loss: Annotated[
        Literal["auto"] | bool, Meta(description="whether head and loss are fused, without holding all logits")
    ] = "auto"
    kernels: Annotated[
        Literal["auto", "off", "require"],
        Meta(description="fused GPU kernels: those verified as correct and faster; none; or all, else an error"),
    ] = "auto"
    deterministic: Annotated[
        bool,
        Meta(
            description="whether gradients are added up in one order, so that runs are equal to the bit; "
            "false: MLX's attention and lookups on CUDA, which add in any order"
        ),
    ] = True
    lazy_eval_every: Annotated[
        int, Meta(ge=1, le=MAX_STEPS, description="steps between synchronizations with the device")
    ] = 4

    log_every: Annotated[int, Meta(ge=1, le=MAX_STEPS, description="steps between lines of metrics.jsonl")] = 10
    eval_every: Annotated[int, limit(MAX_STEPS, "steps between two validations; 0 or inf: first and last only")] = 100
    max_validation_rows: Annotated[int, Meta(ge=1, le=MAX_ROWS, description="validation rows used")] = 256
    patience: Annotated[int, limit(MAX_STEPS, "validations without a better one that end it; 0 or inf: none do")] = 0
    keep: Annotated[
        Literal["last", "best"], Meta(description="which weights are saved: the last, or those of the best validation")
    ] = "last"
    require_improvement: Annotated[
        bool,
        Meta(description="whether a model no better than the start fails the stage, which publishes nothing"),
    ] = False
    save_every: Annotated[int, limit(MAX_STEPS, "steps between two checkpoints; 0 or inf: only when stopped")] = 100
    keep_checkpoints: Annotated[int, Meta(ge=1, le=1000, description="checkpoints kept during the run")] = 2
    document_mask: Annotated[
        Literal["auto"] | bool,
        Meta(description="whether attention is limited to a token's own document; auto: if there are conversations"),
    ] = "auto"
    workers: Annotated[int, Meta(ge=1, le=64, description="threads that prepare batches")] = 8
    prefetch_batches: Annotated[int, Meta(ge=1, le=64, description="prefetched batches")] = 4
    method: Annotated[
        Literal["full", "lora", "dora"], Meta(description="full: all weights are trained; lora, dora: adapters")
    ] = "full"
    fuse: Annotated[
        Literal["auto", "never", "requantize", "dense"],
        Meta(
            description="how trained adapters are saved: files beside the model; added to weights that are quantized "
            "again; added to dense weights; auto: dense beside a dense model, never beside a quantized one"
        ),
    ] = "auto"
    model: Annotated[ModelConfig, Meta(description="the model's shape, or its origin")] = ModelConfig()
    lora: Annotated[LoraConfig, Meta(description="the adapters, for lora and dora")] = LoraConfig()

    def __post_init__(self) -> None:
        """Set keys that were left out to values that fit the method and the model's origin."""
        for key, value in defaults.resolved_values(self).items():
            msgspec.structs.force_setattr(self, key, value)

    def problems(self) -> Iterator[Problem]:
        """Yield settings that contradict each other."""
        yield from length.length_problems(self)
        yield from setting_checks.step_problems(self)
        yield from optimizer_problems(self)
        yield from setting_checks.method_problems(self)

    @property
    def keeps_quantized(self) -> bool:
        """Whether the artifact is quantized if the base model is."""
        return bool(self.model.from_) and self.method != "full" and self.fuse != "dense"

    def kind_made(self, artifacts: Artifacts) -> Literal["dense", "quantized", "hub", "unknown"]:
        """Return whether the artifact is dense or quantized; "hub" or "unknown" where the model to start from says."""
        return artifacts.kind_of_model(self.model.from_) if self.keeps_quantized else "dense"

    @property
    def trusts_code(self) -> bool:
        """Whether Python code of the base model, and of the artifact, may be run."""
        return self.model.trust_remote_code


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """Token files and tokenizer, the base model, and a run to replay."""

    train: Path = Path()
    validation: Path = Path()
    tokenizer: tuple[Path, ...] = ()
    base: tuple[Path, ...] = ()
    beside: tuple[Beside, ...] = ()
    replay: tuple[Path, ...] = ()

    @classmethod
    def of(cls, config: Config, artifacts: Artifacts) -> Self:
        """Take the tokens from a pretokenize stage, base model and replay from the table."""
        folder = artifacts.folder(config.input, "input")
        base, beside = model_inputs(config.model, artifacts) if config.model.from_ else ((), ())
        return cls(
            train=folder / "train.safetensors",
            validation=folder / "validation.safetensors",
            tokenizer=(folder / "tokenizer.json", folder / "tokenizer_config.json"),
            base=base,
            beside=beside,
            replay=artifacts.files((config.replay,), "replay") if config.replay else (),
        )


class Outputs(ModelFolder, frozen=True, kw_only=True):
    """A model folder and the learning curve, and the trained adapters if there are any.

    Adapters that are not fused are beside the model. A copy of fused adapters is in a separate folder, so that no
    program applies them a second time.
    """

    metrics: Path = Path(layout.METRICS)
    adapters: tuple[Path, ...] = ()

    @classmethod
    def of(cls, config: Config) -> Self:
        """Name the files of adapters, if some are trained."""
        if config.method == "full":
            return cls()
        if config.fuse == "auto":  # a model on the hub: their folder depends on whether it is quantized
            return cls()
        return cls(adapters=tuple(adapters_folder(config.fuse) / name for name in ADAPTERS))


def resolve(config: Config, artifacts: Artifacts) -> Config:
    """Return the table with `fuse` resolved by the base model; report contradictions and sizes that are too large.

    For a model on the hub it is resolved after the download.
    """
    note_other_model(config.model.from_, config.input, artifacts)
    products.note_training(config, artifacts, config.input, prefetch={"prefetch_batches": config.prefetch_batches})
    if not config.model.from_:
        products.note_weights(config.model, artifacts, config.input)
    if config.method == "full" or not config.model.from_:
        return config
    products.note_adapters(config.lora, artifacts)
    kind = artifacts.kind_of_model(config.model.from_)
    if config.fuse == "requantize" and kind == "dense":
        artifacts.note(Problem("fuse", config.fuse, f"{config.model.from_} is dense", 'Set fuse = "dense".'))
    if kind == "hub":
        return config
    return msgspec.structs.replace(config, fuse=decide_fuse(config.fuse, is_quantized=kind == "quantized"))


def begin(config: Config, device_asked_for: str) -> AbstractContextManager[Any]:
    """Start the verifier process for kernels, which takes a while to start and needs no inputs."""
    from mlxflow.training import kernel_selection

    return kernel_selection.begin_early(config.kernels, device_asked_for)


def run(*, config: Config, inputs: Inputs, outputs: Outputs, context: Context) -> "TrainReport":
    """Train, write the model folder, and measure the quality of the written model.

    Raises:
        SourceError: there are fewer rows than in one batch.
        StageError: the loss stays without a finite value, or `require_improvement` refuses the model.
        UserError: a setting does not fit the model, or no batch fits into the memory.
    """
    from mlxflow.report.stage_reports.train import TrainReport
    from mlxflow.training import build, job, model_artifact
    from mlxflow.training.figures import TrainingFigures
    from mlxflow.training.run_warnings import Ending

    compute_device.bound_graphs(recomputes=config.checkpointing != "none")
    names = setting_names(config, context.task)
    request, tokens, rows, config = table_job(config, inputs, context)
    trained = job.run_job(
        request,
        tokens,
        _run_files(config, inputs, outputs, context, names),
        outputs=outputs,
        tokenizer=inputs.tokenizer,
        context=context,
    )
    figures = TrainingFigures.of(trained.result, num_rows=rows.num_rows, keeps_best=config.keep == "best")
    # the trained model is freed by now: there is memory for the one in the files
    overrides = build.overrides_of(trained.settings, trained.kernels)
    measured = model_artifact.measure_artifact(context.folder, inputs.validation, trained.settings, overrides)
    quality = model_artifact.quality_of(figures, measured)
    lost = model_artifact.warn_of_loss(figures, quality, fuse=trained.fuse, task=context.task)
    rises = trained.result.validations_since_best
    ending = Ending(figures, quality.last_validation_perplexity, config.keep, config.patience, rises)
    judged = ending.judged(context.task, requires_improvement=config.require_improvement)
    warnings = [*([lost] if lost else []), *judged]
    terminal.say(*warnings)
    return TrainReport.of(trained, figures, quality, warnings)


def setting_names(config: Config, task: str) -> "SettingNames":
    """Return the names of the settings of a train stage, for messages."""
    from mlxflow.training.settings import SettingNames

    names = SettingNames.of_stage(task, config.input, MEMORY_LIMIT_KEY)
    return names.without("checkpointing") if config.checkpointing == "auto" else names


def table_job(config: Config, inputs: Inputs, context: Context) -> "TableJob":
    """Return the job of a table and its tokens; see `mlxflow.training.table_job`."""
    from mlxflow.training.table_job import job_of

    return job_of(config, inputs, context, setting_names(config, context.task))


def _run_files(config: Config, inputs: Inputs, outputs: Outputs, context: Context, names: "SettingNames") -> "RunFiles":
    from mlxflow.training.run import RunFiles, describe

    return RunFiles(
        train=inputs.train,
        validation=inputs.validation,
        metrics=outputs.metrics,
        checkpoints=context.unfinished,
        description=describe(msgspec.to_builtins(config), names, context, without=EXECUTION_ONLY_KEYS),
        replay=inputs.replay[0] if inputs.replay else None,
    )
