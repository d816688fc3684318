"""Train a language model on the token files."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import msgspec
from msgspec import Meta

from mlxflow.device import compute_device
from mlxflow.errors import ArtifactError, WorkflowError
from mlxflow.stages.train_artifact import adapters_folder, measure_artifact, quality_of, warn_of_loss, write_model
from mlxflow.storage import layout
from mlxflow.storage.model_files import ADAPTERS
from mlxflow.system import terminal
from mlxflow.workflow import products
from mlxflow.workflow.config import MAX_LAYERS, MAX_ROWS, MAX_SIZE, MAX_STEPS, UNLIMITED, Problem, toml_value
from mlxflow.workflow.stage import Artifacts, Context, ModelFolder, derive_seed

if TYPE_CHECKING:
    from mlxflow.training.settings import AdapterShape, SettingNames, TrainingSettings

VERSION = 10

#: Keys that say how the work is done and change nothing of what comes out.
EXECUTION_ONLY_KEYS = ("workers", "prefetch_batches", "save_every", "keep_checkpoints", "lazy_eval_every")

_OPTIMIZERS = Literal["adamw", "adam", "sgd", "rmsprop", "adagrad", "adadelta", "adamax", "lion", "adafactor", "muon"]


class LoraConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[train.lora]` table: low-rank adapters, for the methods "lora" and "dora"."""

    rank: Annotated[int, Meta(ge=1, le=MAX_SIZE, description="columns of the low-rank factors")] = 8
    scale: Annotated[float, Meta(gt=0, le=1e6, description="what their product is multiplied by")] = 20.0
    dropout: Annotated[float, Meta(ge=0, lt=1, description="share of an adapter's inputs zeroed in training")] = 0.0
    num_layers: Annotated[
        int,
        Meta(
            ge=0, le=MAX_SIZE, description="the last so many blocks get adapters; 0 or inf: all", extra={UNLIMITED: 0}
        ),
    ] = 0
    keys: Annotated[
        tuple[str, ...], Meta(min_length=1, description='patterns of layers within a block, such as "self_attn.*"')
    ] = ("*",)


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[train.model]` table: the model's shape, or the model to go on from."""

    from_: Annotated[
        str, Meta(description="a model folder or a hub id to go on from; empty: a new model of the shape below")
    ] = msgspec.field(default="", name="from")
    trust_remote_code: Annotated[
        bool, Meta(description="whether Python code that the folder brings may be run; read it first")
    ] = False
    architecture: Annotated[Literal["llama"], Meta(description="the model's kind, from mlx-lm")] = "llama"
    hidden_size: Annotated[int, Meta(ge=8, le=MAX_SIZE, description="width of the residual stream")] = 128
    num_layers: Annotated[int, Meta(ge=1, le=MAX_LAYERS, description="transformer blocks")] = 2
    num_heads: Annotated[int, Meta(ge=1, le=MAX_SIZE, description="attention heads")] = 2
    num_kv_heads: Annotated[int, Meta(ge=1, le=MAX_SIZE, description="heads of keys and values")] = 2
    intermediate_size: Annotated[int, Meta(ge=8, le=MAX_SIZE, description="width inside the gated MLP")] = 256
    tie_word_embeddings: Annotated[bool, Meta(description="whether the head shares the embedding's weights")] = True
    rope_theta: Annotated[float, Meta(ge=1, le=1e12, description="base of the rotary embedding")] = 10_000.0

    def problems(self) -> Any:
        """Yield what does not divide, or a shape beside a model that has one."""
        if self.from_:
            shaped = [key for key in self.__struct_fields__ if key not in ("from_", "trust_remote_code")]
            for key in (key for key in shaped if getattr(self, key) != getattr(ModelConfig(), key)):
                expected = "is for a new model, and model.from names one that exists"
                yield Problem(key, getattr(self, key), expected, "Remove one of the two.")
            return
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
        num_weights = self.num_weights(vocab_size=0)
        if num_weights > products.MAX_WEIGHTS:
            yield Problem(
                "hidden_size",
                self.hidden_size,
                f"expected, with intermediate_size = {self.intermediate_size} and num_layers = {self.num_layers}, "
                f"at most {products.MAX_WEIGHTS:,} weights, not {num_weights:,}",
                "Lower one of the three.",
            )

    def num_weights(self, vocab_size: int) -> int:
        """Return the number of weights of a new model, without those of its norms.

        Args:
            vocab_size: ids of the tokenizer.
        """
        keys_and_values = 2 * self.hidden_size * self.num_kv_heads // self.num_heads
        layer = self.hidden_size * (2 * self.hidden_size + keys_and_values + 3 * self.intermediate_size)
        tables = 1 if self.tie_word_embeddings else 2
        return self.num_layers * layer + tables * vocab_size * self.hidden_size


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[train]` table."""

    input: Annotated[str, Meta(description="the token files: a pretokenize stage")] = "pretokenize"
    num_steps: Annotated[int, Meta(ge=1, le=MAX_STEPS, description="optimizer updates")] = 240
    batch_size: Annotated[int, Meta(ge=1, le=MAX_ROWS, description="rows in one forward pass, to begin with")] = 32
    grad_accum_steps: Annotated[
        int, Meta(ge=1, le=MAX_ROWS, description="forward passes of batch_size rows an update sums")
    ] = 1
    dynamic_batch_size: Annotated[bool, Meta(description="whether batch_size follows the memory")] = True
    max_batch_size: Annotated[
        Literal["auto"] | Annotated[int, Meta(ge=1, le=MAX_ROWS)],
        Meta(description="rows it may grow to, and it may shrink to half; auto: 64, or batch_size where that is more"),
    ] = "auto"
    constant_tokens_per_step: Annotated[
        bool, Meta(description="whether an update sums the same rows whatever the batch size")
    ] = True
    grow_below: Annotated[float, Meta(ge=0, le=1, description="share of the memory limit under which it grows")] = 0.5
    shrink_above: Annotated[float, Meta(gt=0, le=1, description="share of the limit over which it shrinks")] = 0.8
    adjust_every: Annotated[int, Meta(ge=1, le=MAX_STEPS, description="steps between two looks at the memory")] = 50
    replay: Annotated[str, Meta(description="the metrics.jsonl of a run whose batch sizes are followed")] = ""

    optimizer: Annotated[_OPTIMIZERS, Meta(description="one of mlx.optimizers")] = "adamw"
    optimizer_options: Annotated[dict[str, Any], Meta(description="its other options, by MLX's names")] = {}
    learning_rate: Annotated[float, Meta(ge=1e-12, le=1e6, description="at its highest, after the warm-up")] = 1.5e-2
    final_learning_rate: Annotated[
        float, Meta(ge=0, le=1e6, description="reached after the last step, by the schedules that fall")
    ] = 0.0
    schedule: Annotated[
        Literal["cosine", "linear", "constant", "wsd"],
        Meta(description="of the learning rate; wsd: constant, then linear over the last decay_steps"),
    ] = "cosine"
    warmup_steps: Annotated[
        Literal["auto"] | Annotated[int, Meta(ge=0, le=MAX_STEPS)],
        Meta(description="steps over which the learning rate rises; auto: 20, but at most half of num_steps"),
    ] = "auto"
    decay_steps: Annotated[
        Literal["auto"] | Annotated[int, Meta(ge=1, le=MAX_STEPS)],
        Meta(description="last steps, over which wsd falls; auto: a fifth of num_steps"),
    ] = "auto"
    weight_decay: Annotated[
        Literal["auto"] | Annotated[float, Meta(ge=0, le=1000)],
        Meta(description="of matrices; auto: 0.1 where the optimizer knows it"),
    ] = "auto"
    betas: Annotated[
        tuple[Annotated[float, Meta(ge=0, lt=1)], Annotated[float, Meta(ge=0, lt=1)]],
        Meta(description="of optimizers that have them: how slowly their two moments follow the gradient"),
    ] = (0.9, 0.95)
    max_grad_norm: Annotated[
        float,
        Meta(
            ge=0,
            le=1e12,
            description="gradients of a larger norm are scaled down to it; 0 or inf: none, nor is it measured",
            extra={UNLIMITED: 0},
        ),
    ] = 1.0
    max_bad_steps: Annotated[
        int,
        Meta(
            ge=1,
            le=MAX_STEPS,
            description="steps in a row skipped for a loss or gradient that is not finite; then it ends; "
            "inf: it never does",
            extra={UNLIMITED: MAX_STEPS},
        ),
    ] = 10

    precision: Annotated[
        Literal["fp32", "bf16", "bf16-pure"],
        Meta(description="bf16 keeps weights and moments in fp32 beside the bf16 model; bf16-pure does not"),
    ] = "fp32"
    checkpointing: Annotated[
        Literal["none", "layers"] | Annotated[int, Meta(ge=1, le=10_000)],
        Meta(description="gradient checkpointing: of every layer, of every k-th layer"),
    ] = "none"
    fused_loss: Annotated[
        Literal["auto"] | bool, Meta(description="whether head and loss are one, without the whole logits")
    ] = "auto"
    kernels: Annotated[
        Literal["auto", "off", "require"],
        Meta(description="GPU kernels: those verified correct and faster; none; or all, else an error"),
    ] = "auto"
    deterministic: Annotated[
        bool,
        Meta(
            description="whether gradients are added up in one order, so that runs are equal to the bit; "
            "false: MLX's attention and lookups on CUDA, which add in any order"
        ),
    ] = True
    lazy_eval_every: Annotated[int, Meta(ge=1, le=MAX_STEPS, description="steps between two waits for the device")] = 4

    log_every: Annotated[int, Meta(ge=1, le=MAX_STEPS, description="steps between two lines of metrics.jsonl")] = 10
    eval_every: Annotated[
        int,
        Meta(
            ge=0,
            le=MAX_STEPS,
            description="steps between two validations; 0 or inf: first and last only",
            extra={UNLIMITED: 0},
        ),
    ] = 100
    max_validation_rows: Annotated[int, Meta(ge=1, le=MAX_ROWS, description="validation rows used")] = 256
    patience: Annotated[
        int,
        Meta(
            ge=0,
            le=MAX_STEPS,
            description="validations without a better one that end it; 0 or inf: none do",
            extra={UNLIMITED: 0},
        ),
    ] = 0
    keep: Annotated[
        Literal["last", "best"], Meta(description="the weights that come out: the last, or of the best validation")
    ] = "last"
    save_every: Annotated[
        int,
        Meta(
            ge=0,
            le=MAX_STEPS,
            description="steps between two checkpoints; 0 or inf: only when stopped",
            extra={UNLIMITED: 0},
        ),
    ] = 100
    keep_checkpoints: Annotated[int, Meta(ge=1, le=1000, description="checkpoints kept while it runs")] = 2
    document_mask: Annotated[
        Literal["auto"] | bool,
        Meta(description="whether a token sees only its own document; auto: where there are conversations"),
    ] = "auto"
    workers: Annotated[int, Meta(ge=1, le=64, description="threads that gather batches")] = 8
    prefetch_batches: Annotated[int, Meta(ge=1, le=64, description="batches gathered ahead")] = 4
    method: Annotated[
        Literal["full", "lora", "dora"], Meta(description="what is trained: all weights, or adapters beside them")
    ] = "full"
    fuse: Annotated[
        Literal["auto", "never", "requantize", "dense"],
        Meta(
            description="what becomes of trained adapters: files beside the model; added to weights that are quantized "
            "again; added to dense weights; auto: dense beside a dense model, never beside a quantized one"
        ),
    ] = "auto"
    model: Annotated[ModelConfig, Meta(description="the model's shape, or where it comes from")] = ModelConfig()
    lora: Annotated[LoraConfig, Meta(description="the adapters, for lora and dora")] = LoraConfig()

    def problems(self) -> Any:
        """Yield what does not fit together."""
        yield from self._step_problems()
        yield from self._optimizer_problems()
        if self.method != "full" and not self.model.from_:
            yield Problem(
                "method",
                self.method,
                "adapters need a model beside which to lie",
                'Set train.model.from, or method = "full".',
            )
        if self.method == "full" and self.fuse != "auto":
            expected = 'method = "full" trains no adapters'
            yield Problem("fuse", self.fuse, expected, 'Remove the key, or set method = "lora".')

    def _step_problems(self) -> Iterator[Problem]:
        """Yield numbers of steps and rows that do not fit together."""
        if self.grow_below >= self.shrink_above:
            yield Problem(
                "grow_below",
                self.grow_below,
                f"expected less than shrink_above = {self.shrink_above}",
                "Change one of the two.",
            )
        if self.max_batch_size != "auto" and self.max_batch_size < self.batch_size:
            expected = f"expected at least batch_size = {self.batch_size}"
            yield Problem("max_batch_size", self.max_batch_size, expected, f"Set it to {self.batch_size} or remove it.")
        if self.warmup_steps != "auto" and self.warmup_steps >= self.num_steps:
            expected = f"expected less than num_steps = {self.num_steps}"
            yield Problem("warmup_steps", self.warmup_steps, expected, "Lower it or remove the key.")
        elif self.schedule == "wsd" and self.decay_steps != "auto":
            room = self.num_steps - self.resolved_warmup_steps
            if self.decay_steps > room:
                expected = f"expected at most num_steps - warmup_steps = {room}"
                yield Problem("decay_steps", self.decay_steps, expected, "Lower it or remove the key.")
        if self.patience and not self.eval_every:
            expected = "needs validations on the way, and eval_every = 0 makes none"
            yield Problem("patience", self.patience, expected, "Set eval_every, or remove patience.")

    def _optimizer_problems(self) -> Iterator[Problem]:
        """Yield settings of the optimizer that contradict each other, and options out of bounds."""
        if self.final_learning_rate > self.learning_rate:
            yield Problem(
                "final_learning_rate",
                self.final_learning_rate,
                f"expected at most learning_rate = {self.learning_rate}",
                "Change one of the two.",
            )
        if self.weight_decay not in ("auto", 0) and self.optimizer in _WITHOUT_DECAY:
            yield Problem(
                "weight_decay",
                self.weight_decay,
                f"the optimizer {self.optimizer!r} knows none",
                'Set weight_decay = 0, or optimizer = "adamw".',
            )
        if self.betas != (0.9, 0.95) and self.optimizer not in WITH_BETAS:
            expected = f"the optimizer {self.optimizer!r} has none"
            yield Problem("betas", self.betas, expected, 'Remove the key, or set optimizer = "adamw".')
        for name, value in self.optimizer_options.items():
            if not all(_is_option(one) for one in (value if isinstance(value, list) else [value])):
                expected = f"expected true, false, a number from -{_MAX_OPTION} to {_MAX_OPTION}, or a list of such"
                yield Problem(f"optimizer_options.{name}", value, expected, "Change it or remove the key.")

    @property
    def resolved_max_batch_size(self) -> int:
        """Rows that a batch may grow to, where `auto` is a number."""
        return max(64, self.batch_size) if self.max_batch_size == "auto" else self.max_batch_size

    @property
    def resolved_warmup_steps(self) -> int:
        """Steps over which the learning rate rises, where `auto` is a number."""
        return min(20, self.num_steps // 2) if self.warmup_steps == "auto" else self.warmup_steps

    @property
    def resolved_decay_steps(self) -> int:
        """Last steps over which the learning rate of the schedule "wsd" falls, where `auto` is a number."""
        return max(1, self.num_steps // 5) if self.decay_steps == "auto" else self.decay_steps

    @property
    def keeps_quantized(self) -> bool:
        """Whether a quantized model to go on from is quantized in the artifact, too."""
        return bool(self.model.from_) and self.method != "full" and self.fuse != "dense"

    @property
    def trusts_code(self) -> bool:
        """Whether Python code of the model to go on from, and of what is made of it, may be run."""
        return self.model.trust_remote_code


# Keys that are settings of the training as they are written
_AS_WRITTEN = (
    "num_steps",
    "batch_size",
    "grad_accum_steps",
    "dynamic_batch_size",
    "constant_tokens_per_step",
    "grow_below",
    "shrink_above",
    "adjust_every",
    "optimizer",
    "learning_rate",
    "final_learning_rate",
    "schedule",
    "max_grad_norm",
    "max_bad_steps",
    "precision",
    "deterministic",
    "lazy_eval_every",
    "log_every",
    "eval_every",
    "max_validation_rows",
    "patience",
    "keep",
    "save_every",
    "keep_checkpoints",
    "workers",
    "prefetch_batches",
)
_WITHOUT_DECAY = ("adam", "rmsprop", "adagrad", "adadelta", "adamax")
WITH_BETAS = ("adamw", "adam", "adamax", "lion")
_MAX_OPTION = 1_000_000


def _is_option(value: object) -> bool:
    """Return whether a value can be one of an optimizer's options: true, false or a number within bounds."""
    return isinstance(value, bool | int | float) and -_MAX_OPTION <= value <= _MAX_OPTION  # never true of nan


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
            base=_base_files(config.model, artifacts) if config.model.from_ else (),
            replay=artifacts.files((config.replay,), "replay") if config.replay else (),
        )


def _base_files(model: ModelConfig, artifacts: Artifacts) -> tuple[Path, ...]:
    return artifacts.model(model.from_, "model.from", trusts_code=model.trust_remote_code)


class Outputs(ModelFolder, frozen=True, kw_only=True):
    """A model folder and the learning curve, and the adapters where some were trained.

    Adapters that belong to the model lie beside it. A copy of those that were added into its weights lies in a folder
    of its own, so that nobody adds them again.
    """

    metrics: Path = Path(layout.METRICS)
    adapters: tuple[Path, ...] = ()

    @classmethod
    def of(cls, config: Config) -> Self:
        """Name the adapter's files where there are some."""
        if config.method == "full":
            return cls()
        if config.fuse == "auto":  # a model of the hub: where they lie is decided when it is known
            return cls()
        return cls(adapters=tuple(adapters_folder(config.fuse) / name for name in ADAPTERS))


def resolve(config: Config, artifacts: Artifacts) -> Config:
    """Return the table with `fuse` decided by what lies at `model.from`; note what does not fit or is too large.

    Of a model of the hub it is decided when it has been fetched: see `with_fuse`.
    """
    products.note_training(config, artifacts, config.input, prefetch={"prefetch_batches": config.prefetch_batches})
    if not config.model.from_:
        _note_weights(config, artifacts)
    if config.method == "full" or not config.model.from_:
        return config
    products.note_adapters(config.lora, artifacts)
    kind = artifacts.kind_of_model(config.model.from_)
    if config.fuse == "requantize" and kind == "dense":
        artifacts.note(Problem("fuse", config.fuse, f"{config.model.from_} is dense", 'Set fuse = "dense".'))
    return config if kind == "hub" else with_fuse(config, is_quantized=kind == "quantized")


def _note_weights(config: Config, artifacts: Artifacts) -> None:
    """Note a new model that has too many weights with the tables of a vocabulary whose size is written."""
    tokenizer = getattr(artifacts.table(config.input), "tokenizer", None)
    if tokenizer is None or tokenizer.from_:
        return
    model, key = config.model, f"{config.input}.tokenizer.vocab_size"
    num_weights = model.num_weights(tokenizer.vocab_size)
    if num_weights > products.MAX_WEIGHTS:
        expected = f"expected, with num_layers = {model.num_layers} and {key} = {tokenizer.vocab_size}, "
        expected += f"at most {products.MAX_WEIGHTS:,} weights, not {num_weights:,}"
        artifacts.note(Problem("model.hidden_size", model.hidden_size, expected, "Lower one of the three."))


def with_fuse(config: Config, *, is_quantized: bool) -> Config:
    """Return the table with "auto" of `fuse` decided."""
    if config.fuse != "auto":
        return config
    return msgspec.structs.replace(config, fuse="never" if is_quantized else "dense")


def begin(config: Config, device_asked_for: str) -> AbstractContextManager[Any]:
    """Start what takes a while and needs none of the inputs: the process that verifies kernels."""
    from mlxflow.training import kernel_selection

    return kernel_selection.begin_early(config.kernels, device_asked_for)


def run(*, config: Config, inputs: Inputs, outputs: Outputs, context: Context) -> dict[str, Any]:
    """Train, write the model folder, and measure what was written.

    Raises:
        SourceError: there are fewer rows than one batch holds.
        StageError: the loss stays without a finite value.
        UserError: a setting does not fit the model, or no batch fits into the memory.
    """
    from mlxflow.data.token_file import TokenFile
    from mlxflow.training.settings import checkpoint_every

    compute_device.bound_graphs(recomputes=checkpoint_every(config.checkpointing) > 0)
    tokens = TokenFile.open(inputs.train)
    tokens.full_rows(config.batch_size, f"{context.task}.batch_size")
    report = _make(config, inputs, outputs, context, tokens)
    # the trained model is freed by now: there is room to open the one in the files
    report |= quality_of(report, measure_artifact(config, inputs, context, masks=report["document_mask"]))
    if warning := warn_of_loss(report, context.task):
        terminal.say(warning)
    return report


def _make(config: Config, inputs: Inputs, outputs: Outputs, context: Context, tokens: Any) -> dict[str, Any]:
    """Train and write the model folder; return the report of the training."""
    from mlxflow.models import config_json, model_folder, quantized_layers, tokenizer_files
    from mlxflow.storage import model_files
    from mlxflow.training import kernel_selection
    from mlxflow.training import run as training_run

    base = _base_folder(config, inputs, context)
    request = kernel_selection.KernelRequest(
        config.kernels, context.device, context.unfinished / "kernels.json", context.published, context.begun
    )
    with kernel_selection.begin_proof(request) as ahead:
        model, model_config, adapter_config = _make_model(config, base, inputs, tokens, context)
        subject = _subject(config, model, tokens, context)
        kernels = kernel_selection.select_kernels(request, subject, tokens.rows.head(config.batch_size), ahead)
    settings = subject.settings.replace(kernels=tuple(kernels.selected))
    result = training_run.train(
        subject._replace(settings=settings),
        kernels,
        _files(config, inputs, outputs, context, subject.names),
        data_seed=derive_seed(context.seed, "train.batches"),
        memory_limit_bytes=context.memory_limit_bytes,
    )
    fuse = with_fuse(config, is_quantized=quantized_layers.is_quantized(model)).fuse
    model = write_model(
        outputs, context, model=model, config_json=model_config, adapter_config=adapter_config, fuse=fuse
    )
    tokenizer_files.copy_tokenizer(inputs.tokenizer, context.folder)
    if base is not None:
        model_files.copy(base, model_files.defaults_and_code(base), context.folder)
    config_json.write_generation(context.folder, config_json.end_of_text(model_config))
    facts = {
        **({"fuse": fuse} if adapter_config else {}),
        "parameters": model_folder.num_parameters(model),
        "document_mask": settings.masks_documents,
        "fused_loss": settings.fused_loss,
        "kernels": kernels.selected,
    }
    report = training_run.report_of(result, kernels, keeps_best=config.keep == "best")
    return facts | report | {"settings": settings.table()}


def _subject(config: Config, model: Any, tokens: Any, context: Context) -> Any:
    """Return what is trained, every choice resolved but that of kernels."""
    from mlxflow.training import build, objective, optimizers

    names = names_of(config, context.task)
    optimizers.require_known(
        config.optimizer,
        config.optimizer_options,
        reserved=("weight_decay", "betas"),
        key=names.of("optimizer_options"),
    )
    fused = objective.uses_fused_loss(
        model,
        wanted=None if config.fused_loss == "auto" else config.fused_loss,
        vocab_size=tokens.vocab_size,
        tokens=config.batch_size * tokens.context_length,
        setting=names.of("fused_loss"),
    )
    settings = settings_of(config, masks=_masks_documents(config, tokens, model, context.task), fused=fused)
    return build.Subject(model, settings, tokens.vocab_size, tokens.context_length, names)


def names_of(config: Config, task: str) -> "SettingNames":
    """Return what the settings of a training are called in the workflow, for messages."""
    from mlxflow.training.settings import SettingNames

    return SettingNames(task, f"{config.input}.context_length", "workflow.memory_limit")


def _files(config: Config, inputs: Inputs, outputs: Outputs, context: Context, names: Any) -> Any:
    from mlxflow.training import run as training_run

    about = training_run.describe(msgspec.to_builtins(config), names, without=EXECUTION_ONLY_KEYS)
    return training_run.RunFiles(
        train=inputs.train,
        validation=inputs.validation,
        metrics=outputs.metrics,
        checkpoints=context.unfinished,
        description=about
        | {
            "seed": context.seed,
            "mlx": context.provenance["mlx"],
            "inputs": context.provenance["inputs_digest"],
        },
        replay=inputs.replay[0] if inputs.replay else None,
    )


def _masks_documents(config: Config, tokens: Any, model: Any, task: str) -> bool:
    """Return whether a mask keeps the documents of a row apart.

    Raises:
        WorkflowError: `document_mask` asks for it, and the model's architecture cannot tell documents apart.
    """
    from mlxflow.ops import document_mask

    wanted = tokens.has_conversations if config.document_mask == "auto" else config.document_mask
    if not wanted or document_mask.can_mask_documents(model, tokens.vocab_size):
        return bool(wanted)
    if tokens.packs_documents:
        raise WorkflowError(
            f"{task}.document_mask = {toml_value(config.document_mask)}: this architecture counts positions through "
            f"the whole row and cannot keep the documents in it apart. Set {task}.document_mask = false, or "
            f'{config.input}.packing = "none".'
        )
    return False  # a row holds one document


def settings_of(config: Config, *, masks: bool, fused: bool) -> "TrainingSettings":
    """Return how a table trains, every choice resolved but that of kernels.

    Args:
        config: the table.
        masks: whether documents are kept apart.
        fused: whether output head and loss are computed together.
    """
    from mlxflow.training.settings import TrainingSettings, checkpoint_every

    same = {name: getattr(config, name) for name in TrainingSettings.__struct_fields__ if name in _AS_WRITTEN}
    betas = {"betas": list(config.betas)} if config.optimizer in WITH_BETAS else {}
    return TrainingSettings(
        **same,
        adapters=_adapter_shape(config) or "none",
        max_batch_size=config.resolved_max_batch_size,
        optimizer_options=betas | config.optimizer_options,
        weight_decay=0.1 if config.weight_decay == "auto" else config.weight_decay,
        warmup_steps=config.resolved_warmup_steps,
        decay_steps=config.resolved_decay_steps,
        checkpoint_every=checkpoint_every(config.checkpointing),
        fused_loss=fused,
        masks_documents=masks,
    )


def _make_model(
    config: Config, base: Path | None, inputs: Inputs, tokens: Any, context: Context
) -> tuple[Any, dict[str, Any], Any]:
    """Return the model in training mode, its `config.json`, and its adapters' where it has some."""
    import mlx.core as mx

    from mlxflow.models import adapter_files, config_json, model_folder, quantized_layers
    from mlxflow.training import adapters

    seed = derive_seed(context.seed, "train.model")
    dtype = mx.float32 if config.precision == "fp32" else mx.bfloat16
    shape = _adapter_shape(config)
    if base is not None:
        model, model_config = _base_model(config, base, inputs, tokens, context)
    else:
        model_config = shape_config(config.model, tokens.vocab_size, tokens.context_length, tokens.end_of_text)
        model_folder.require_room(model_config, context.memory_limit_bytes, f"{context.task}.model")
        model = model_folder.build(model_config, seed=seed)
    model.set_dtype(dtype)
    if not quantized_layers.is_quantized(model):
        adapter_files.fuse(model)  # adapters of an earlier training become a part of the weights
    adapter_config = None
    if shape is not None:
        if base is not None and adapter_files.layers_of(model):
            adapter_config = adapters.continue_adapters(model, shape, folder=base, task=context.task)
        else:
            adapter_config = adapters.add_adapters(model, shape, seed=seed, key=f"{context.task}.lora.keys")
        model.set_dtype(dtype)
    model.train()
    mx.eval(model.parameters())
    model_config = config_json.with_ends(model_config, tokens.end_tokens)
    return model, config_json.with_dtype(model_config, str(dtype).rpartition(".")[2]), adapter_config


def _adapter_shape(config: Config) -> "AdapterShape | None":
    """Return the adapters that a table trains; None where it trains all weights."""
    from mlxflow.training.settings import AdapterShape

    if config.method == "full":
        return None
    return AdapterShape(config.method, **msgspec.structs.asdict(config.lora))


def _base_folder(config: Config, inputs: Inputs, context: Context) -> Path | None:
    """Return the folder of the model to go on from; None for a new model."""
    from mlxflow.models import model_folder

    if not config.model.from_:
        return None
    table = f"{context.task}.model"
    if inputs.base:
        return inputs.base[0].parent
    return model_folder.fetch(config.model.from_, key=f"{table}.from", trust_key=f"{table}.trust_remote_code")


def _base_model(
    config: Config, folder: Path, inputs: Inputs, tokens: Any, context: Context
) -> tuple[Any, dict[str, Any]]:
    """Return the model to go on from and its `config.json`.

    Raises:
        ArtifactError: it is none, does not know the tokens, or does not fit `method` or `fuse`.
    """
    from mlxflow.models import config_json, model_folder, quantized_layers, tokenizer_files

    key = f"{context.task}.model.from"
    model, model_config = model_folder.load(folder)
    tokens.require_vocabulary(model_folder.vocab_size(folder), key)
    tokenizer_files.require_tokenizer(folder, inputs.tokenizer[0], key)
    positions = config_json.num_positions(model_config)
    if tokens.context_length > positions:
        raise ArtifactError(
            f"{key}: {folder} is made for {positions:,} positions, the rows have {tokens.context_length:,}. "
            f"Lower {config.input}.context_length."
        )
    if config.method == "full" and quantized_layers.is_quantized(model):
        raise ArtifactError(f'{key}: {folder} is quantized. Set {context.task}.method = "lora", or name a dense model.')
    if config.fuse == "requantize" and not quantized_layers.is_quantized(model):
        raise ArtifactError(
            f'{context.task}.fuse = "requantize": {folder} is dense. Set {context.task}.fuse = "dense".'
        )
    if config.fuse == "dense":
        quantized_layers.require_unpackable(model)
    return model, model_config


def shape_config(shape: ModelConfig, vocab_size: int, context_length: int, end_of_text: int) -> dict[str, Any]:
    """Return the `config.json` of a new model of a shape."""
    from mlxflow.models import model_folder

    return model_folder.llama_config(
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
