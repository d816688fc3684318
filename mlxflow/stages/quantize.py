"""Quantize a model into mlx-lm's format, and measure the loss of quality."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import msgspec
from msgspec import Meta

from mlxflow.device.compute_device import SIZE_PATTERN
from mlxflow.quantization.layer_rules import LayerRule
from mlxflow.quantization.settings import RequestedSetting, Setting
from mlxflow.quantization.table_checks import follow_start, table_problems
from mlxflow.quantization.table_checks import most_ranks as most_ranks
from mlxflow.quantization.table_checks import trains_adapters as trains_adapters
from mlxflow.storage import layout
from mlxflow.storage.run_context import Context, ModelFolder
from mlxflow.storage.toml_tables import MAX_ROWS, MAX_STEPS, Problem, limit
from mlxflow.training import length
from mlxflow.training.lora_config import LoraConfig
from mlxflow.workflow import products
from mlxflow.workflow.stage import MEMORY_LIMIT_KEY, Artifacts, Beside, model_files_of, names_stage
from mlxflow.workflow.stage_references import tokens_of_model

if TYPE_CHECKING:
    from mlxflow.report.stage_reports.quantize import QuantizeReport

VERSION = 20  # a CPU trains 16-bit models in fp32

LATER_KEYS = {"num_epochs": "auto"}

_QAT_STEPS = 36

_MODES = Literal["affine", "symmetric", "mxfp4", "mxfp8", "nvfp4"]


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `[quantize]` table, or one of `[[quantize]]`."""

    input: Annotated[str, Meta(description="the dense model: a train stage")] = "train"
    model: Annotated[str, Meta(description="instead of the input: a folder, a GGUF file, a hub id or a stage")] = ""
    trust_remote_code: Annotated[bool, Meta(description="whether Python code of the folder may run; read it first")] = (
        False
    )
    data: Annotated[
        str,
        Meta(description='the token files: a pretokenize stage; auto: "pretokenize" for a trained model, else none'),
    ] = "auto"
    method: Annotated[
        Literal["rtn", "gptq", "awq", "dwq", "block", "qat"],
        Meta(
            description="rtn rounds to nearest; gptq, awq and dwq calibrate on data; block trains one block after the "
            "other on calibration rows; qat trains the model"
        ),
    ] = "rtn"
    mode: Annotated[
        _MODES, Meta(description="quantization mode: MLX's, or symmetric (affine with a fixed zero point)")
    ] = "affine"
    bits: Annotated[
        Literal["auto", 2, 3, 4, 5, 6, 8],
        Meta(description="bits of a code; auto: the mode's default, 4, or 8 for mxfp8"),
    ] = "auto"
    group_size: Annotated[
        Literal["auto", 16, 32, 64, 128],
        Meta(
            description="weights that share a scale; auto: the mode's default, 64; 32 for mxfp4 and mxfp8, 16 for nvfp4"
        ),
    ] = "auto"
    layers: Annotated[tuple[LayerRule, ...], Meta(description="settings by layer; the first match applies")] = ()
    dtype: Annotated[
        Literal["auto", "keep", "fp32", "fp16", "bf16"],
        Meta(
            description="dtype of unquantized weights, scales and biases; keep: that of the model's config; auto: as "
            "keep, but scales and biases of fp32 weights in bf16 for less than 8 bits"
        ),
    ] = "auto"
    requantize: Annotated[bool, Meta(description="whether an already quantized model is accepted")] = False

    target_bits_per_weight: Annotated[
        float, limit(32, "a budget under which each layer's bits are chosen; 0 or inf: none")
    ] = 0.0
    target_size: Annotated[
        str, Meta(pattern=rf"^$|{SIZE_PATTERN}", examples=["200 MB"], description="the budget as a size; empty: none")
    ] = ""
    candidate_bits: Annotated[
        tuple[Literal[2, 3, 4, 5, 6, 8], ...], Meta(min_length=1, description="bits that a budget may choose from")
    ] = (2, 3, 4, 6, 8)
    candidate_group_sizes: Annotated[
        tuple[Literal[32, 64, 128], ...], Meta(min_length=1, description="group sizes that a budget may choose from")
    ] = (32, 64, 128)
    calibration_rows: Annotated[int, Meta(ge=1, le=MAX_ROWS, description="training rows for calibration")] = 64

    block_steps: Annotated[
        int,
        Meta(ge=0, le=MAX_STEPS, description="of block: updates of each block, of 2,048 tokens; 0: compensation only"),
    ] = 100
    scale_steps: Annotated[
        int,
        Meta(
            ge=0,
            le=MAX_STEPS,
            description="of block: updates of all scales and biases afterwards, to the dense model's distributions; "
            "they hold the whole model in memory; 0: none",
        ),
    ] = 0

    rotations: Annotated[
        int,
        Meta(
            ge=0,
            le=64,
            description="Hadamard rotations to try, folded into the weights; the best is kept if the rounded model "
            "diverges less with it; 0: none",
        ),
    ] = 0

    num_steps: Annotated[
        Literal["auto"] | Annotated[int, Meta(ge=1, le=MAX_STEPS)],
        Meta(description="of qat: optimizer updates; auto: 36, or as many as num_epochs takes"),
    ] = "auto"
    num_epochs: Annotated[
        Literal["auto"] | Annotated[float, Meta(gt=0, le=MAX_STEPS)],
        Meta(description="of qat: passes over the training rows, instead of num_steps; auto: none"),
    ] = "auto"
    learning_rate: Annotated[
        Literal["auto"] | Annotated[float, Meta(ge=1e-12, le=1e6)],
        Meta(
            description="of qat: peak learning rate, after warm-up; auto: 8e-4, less for fewer than 300 num_steps, an "
            "eighth to distill into 8 bits"
        ),
    ] = "auto"
    batch_size: Annotated[int, Meta(ge=1, le=MAX_ROWS, description="of qat: rows in one forward pass")] = 32
    grad_accum_steps: Annotated[int, Meta(ge=1, le=MAX_ROWS, description="of qat: forward passes per update")] = 1
    distill: Annotated[
        bool,
        Meta(description="of qat: whether to distill the dense model's distributions instead of training on the text"),
    ] = False
    training: Annotated[
        Literal["full", "lora", "dora", "scales"],
        Meta(
            description="of qat: what is trained: all weights, adapters, or only the scales and biases of fixed codes"
        ),
    ] = "full"
    start: Annotated[
        str,
        Meta(
            examples=["quantize:b2"],
            description="of qat: a quantize variant whose codes and grids it starts from; empty: the dense weights",
        ),
    ] = ""
    checkpointing: Annotated[
        Literal["none", "layers", "pairs"] | Annotated[int, Meta(ge=1, le=10_000)],
        Meta(description="of qat: gradient checkpointing, as in train"),
    ] = "none"
    kernels: Annotated[Literal["auto", "off", "require"], Meta(description="of qat: GPU kernels, as in train")] = "auto"
    deterministic: Annotated[bool, Meta(description="of qat: deterministic gradients, as in train")] = True
    lora: Annotated[LoraConfig, Meta(description="the adapters of qat, with lora and dora")] = LoraConfig()

    max_validation_rows: Annotated[
        int, Meta(ge=1, le=MAX_ROWS, description="validation rows for measuring the quality loss")
    ] = 256
    max_perplexity_increase: Annotated[
        float, limit(1e6, "relative; over it the stage fails and publishes nothing; 0 or inf: no gate")
    ] = 0.0
    max_kl: Annotated[
        float, limit(1e6, "mean divergence in nats; over it the stage fails likewise; 0 or inf: no gate")
    ] = 0.0

    def __post_init__(self) -> None:
        """Set missing keys: the steps of qat, and bits and group sizes, to the defaults of the modes.

        With `start` those are the ones of the started variant, see `resolve`.
        """
        if self.num_steps == "auto" and self.num_epochs == "auto":
            msgspec.structs.force_setattr(self, "num_steps", _QAT_STEPS)
        if self.start:
            return
        requested = RequestedSetting(
            self.mode, *(None if one == "auto" else one for one in (self.bits, self.group_size))
        )
        own = requested.setting
        msgspec.structs.force_setattr(self, "bits", own.bits)
        msgspec.structs.force_setattr(self, "group_size", own.group_size)
        msgspec.structs.force_setattr(self, "layers", tuple(rule.completed(requested) for rule in self.layers))

    def problems(self) -> Iterator[Problem]:
        """Yield bits and group sizes that the mode does not support, and keys that contradict each other."""
        yield from table_problems(self)
        yield from length.length_problems(self)

    @property
    def trusts_code(self) -> bool:
        """Whether Python code of the model, and of the artifact, may be run."""
        return self.trust_remote_code

    @property
    def tokenizer_source(self) -> str:
        """Where the tokenizer comes from: the model that is quantized."""
        return self.model or self.input

    def kind_made(self, artifacts: Artifacts) -> Literal["quantized"]:
        """Return the kind of the artifact's weights."""
        return "quantized"

    @property
    def has_budget(self) -> bool:
        """Whether bits are chosen under a budget."""
        return bool(self.target_bits_per_weight or self.target_size)

    @property
    def token_stage(self) -> str:
        """The pretokenize stage whose tokens are used; empty if none are."""
        if self.data == "auto":
            return "" if self.model and not names_stage(self.model) else "pretokenize"
        return self.data

    @property
    def needs_tokens(self) -> dict[str, None]:
        """The keys that need tokens."""
        uses = {
            "method": self.method != "rtn",
            "target_bits_per_weight": bool(self.target_bits_per_weight),
            "target_size": bool(self.target_size),
            "max_perplexity_increase": bool(self.max_perplexity_increase),
            "rotations": bool(self.rotations),
            "max_kl": bool(self.max_kl),
        }
        return dict.fromkeys(key for key, is_asked in uses.items() if is_asked)

    @property
    def default(self) -> Setting:
        """The setting of layers without a rule."""
        bits, group_size = (None if one == "auto" else one for one in (self.bits, self.group_size))
        setting = RequestedSetting(self.mode, bits, group_size).setting
        return setting._replace(narrows_scales=self.dtype == "auto")


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """A dense model folder, and tokens to measure it on.

    Attributes:
        model: its files; empty for a model on the hub.
        tokenizer: of a train stage's model.
        beside: other files of its folder.
        tokens: training and validation rows; empty if nothing is measured.
        start: weights and report of the variant to start from; empty without.
    """

    model: tuple[Path, ...] = ()
    tokenizer: tuple[Path, ...] = ()
    beside: tuple[Beside, ...] = ()
    tokens: tuple[Path, ...] = ()
    start: tuple[Path, ...] = ()

    @classmethod
    def of(cls, config: Config, artifacts: Artifacts) -> Self:
        """Take the model from a train stage or a folder, tokens from a pretokenize stage."""
        start: tuple[Path, ...] = ()
        if config.start:
            begun = artifacts.folder(config.start, "start")
            start = (begun / "model.safetensors", begun / layout.REPORT)
        tokens: tuple[Path, ...] = ()
        if config.token_stage:
            data = artifacts.folder(config.token_stage, "data")
            tokens = (data / "train.safetensors", data / "validation.safetensors")
        folder = artifacts.stage_of(config.model, "model") if config.model else artifacts.folder(config.input, "input")
        if folder is None:
            trusts = config.trust_remote_code
            return cls(
                model=artifacts.model(config.model, "model", trusts_code=trusts, needs_tokenizer=True),
                tokens=tokens,
                start=start,
            )
        files = model_files_of(folder)
        return cls(model=files[:2], tokenizer=files[2:], beside=(Beside(folder),), tokens=tokens, start=start)


class Outputs(ModelFolder, frozen=True, kw_only=True):
    """A quantized model folder with its tokenizer, and the learning curve of quantization-aware training."""

    metrics: tuple[Path, ...] = ()

    @classmethod
    def of(cls, config: Config) -> Self:
        """Name the learning curve if the method trains."""
        return cls(metrics=(Path(layout.METRICS),) if config.method == "qat" else ())


def resolve(config: Config, artifacts: Artifacts) -> Config:
    """Return the table with the tokens that its model was trained on, unless it names some.

    Numbers whose product is too large, and an already quantized model, are reported.
    """
    if config.start:
        config = follow_start(config, artifacts)
    if config.data == "auto" and (stage := tokens_of_model(config, artifacts)) != config.token_stage:
        config = msgspec.structs.replace(config, data=stage)
    if config.method == "qat":
        products.note_training(config, artifacts, config.token_stage, prefetch={})
        if config.training in ("lora", "dora"):
            products.note_adapters(config.lora, artifacts)
    if not config.requantize and artifacts.kind_of_model(config.model or config.input) == "quantized":
        artifacts.note(_already_quantized(config))
    return config


def _already_quantized(config: Config) -> Problem:
    """Return the problem of a table whose model is already quantized."""
    expected = "is quantized already, and what was lost does not come back"
    if config.model:
        return Problem("model", config.model, expected, "Name a dense model, or set requantize = true.")
    return Problem("input", config.input, expected, f'Set {config.input}.fuse = "dense", or requantize = true.')


def begin(config: Config, device_asked_for: str) -> AbstractContextManager[Any]:
    """Start the verifier process for kernels, which takes a while to start and needs no inputs."""
    from mlxflow.training import kernel_selection

    return kernel_selection.begin_early(config.kernels if config.method == "qat" else "off", device_asked_for)


def run(*, config: Config, inputs: Inputs, outputs: Outputs, context: Context) -> "QuantizeReport":
    """Quantize the layers of the plan, write the model folder, and measure it against the dense model.

    Raises:
        ArtifactError: the model cannot be opened or called, is already quantized, or has a weight that is not finite.
        StageError: the loss of quality exceeds the limits of the table.
        WorkflowError: the plan or the method does not fit the model.
    """
    from mlxflow.models import trial_calls
    from mlxflow.quantization import dense_model, job, size_report, table_requests

    task = context.task
    folder = dense_model.find_folder(config.model, inputs.model, task=task)
    key, value, expected, advice = _already_quantized(config)
    refusal = "" if config.requantize else f'{task}.{key} = "{value}": {expected}. {advice}'
    dense = dense_model.open_dense(folder, dtype=config.dtype, refusal=refusal)
    tokens = dense_model.open_tokens(
        inputs.tokens, folder, dense.config_json, key=f"{task}.data", stage=config.token_stage
    )
    if tokens is not None:
        derives = config.method in ("dwq", "block", "qat") or config.has_budget
        compiles = config.method != "dwq" or config.has_budget  # mlx-lm's DWQ does not
        require = trial_calls.choose(derives=derives, compiles=compiles)
        require(dense.model, dense.config_json, str(folder / "config.json"), vocab_size=tokens.train.vocab_size)
    metrics = outputs.metrics[0] if outputs.metrics else None
    request = table_requests.request_of(config, context, tokens, start=inputs.start, memory_key=MEMORY_LIMIT_KEY)
    result = job.run_job(request, dense, tokens, outputs=outputs, metrics=metrics, context=context)
    return size_report.report_of(config.method, result, outputs.model.stat().st_size)
