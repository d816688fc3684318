"""Quantize a model into mlx-lm's own form, and say what it costs."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

import msgspec
from msgspec import Meta

from mlxflow.device.compute_device import SIZE_PATTERN, parse_size, size_mistake
from mlxflow.errors import ArtifactError
from mlxflow.quantization.settings import RequestedSetting, Setting, mistakes_in
from mlxflow.stages import quantize_methods, quantize_quality, train
from mlxflow.storage import layout
from mlxflow.training.lora_config import LoraConfig
from mlxflow.workflow import products
from mlxflow.workflow.config import MAX_ROWS, MAX_STEPS, Problem, limit
from mlxflow.workflow.stage import Artifacts, Beside, Context, ModelFolder

VERSION = 7

_MODES = Literal["affine", "symmetric", "mxfp4", "mxfp8", "nvfp4"]


class LayerRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry of `layers`: what is said of the layers that a pattern matches."""

    match: Annotated[str, Meta(min_length=1, description="a pattern of module paths, such as `*.mlp.*`")]
    skip: Annotated[bool, Meta(description="whether they stay dense")] = False
    mode: Annotated[
        Literal["same", "affine", "symmetric", "mxfp4", "mxfp8", "nvfp4"],
        Meta(description="as above; same: the table's"),
    ] = "same"
    bits: Annotated[
        Literal["same", 2, 3, 4, 5, 6, 8], Meta(description="as above; same: the table's, or the mode's own")
    ] = "same"
    group_size: Annotated[
        Literal["same", 16, 32, 64, 128],
        Meta(description="as above; same: the table's, or the mode's own"),
    ] = "same"


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `[quantize]` table, or one of `[[quantize]]`."""

    input: Annotated[str, Meta(description="the dense model: a train stage")] = "train"
    model: Annotated[str, Meta(description="instead of the input, a model folder or a hub id")] = ""
    trust_remote_code: Annotated[
        bool, Meta(description="whether Python code that the folder brings may be run; read it first")
    ] = False
    data: Annotated[
        str,
        Meta(description='the token files: a pretokenize stage; auto: "pretokenize" for a trained model, else none'),
    ] = "auto"
    method: Annotated[
        Literal["rtn", "gptq", "awq", "dwq", "qat"],
        Meta(description="rtn rounds to the nearest, the others learn: mlx-lm's three, and training"),
    ] = "rtn"
    mode: Annotated[_MODES, Meta(description="how codes become weights; MLX's names, and a fixed zero point")] = (
        "affine"
    )
    bits: Annotated[
        Literal["auto", 2, 3, 4, 5, 6, 8], Meta(description="bits of a code; auto: the mode's own, 4, of mxfp8 8")
    ] = "auto"
    group_size: Annotated[
        Literal["auto", 16, 32, 64, 128],
        Meta(description="weights that share a scale; auto: the mode's own, 64, of mxfp4 and mxfp8 32, of nvfp4 16"),
    ] = "auto"
    layers: Annotated[
        tuple[LayerRule, ...], Meta(description="settings by layer; of several that match, the first holds")
    ] = ()
    dtype: Annotated[
        Literal["keep", "fp32", "fp16", "bf16"],
        Meta(description="of what is not packed, scales too; keep: what the model's config says"),
    ] = "keep"
    requantize: Annotated[bool, Meta(description="whether a model that is quantized already may be taken")] = False

    target_bits_per_weight: Annotated[
        float, limit(32, "a budget under which each layer's bits are chosen; 0 or inf: none")
    ] = 0.0
    target_size: Annotated[
        str, Meta(pattern=rf"^$|{SIZE_PATTERN}", examples=["200 MB"], description="the same as a size; empty: none")
    ] = ""
    candidate_bits: Annotated[
        tuple[Literal[2, 3, 4, 5, 6, 8], ...], Meta(min_length=1, description="bits that a budget may choose from")
    ] = (2, 3, 4, 6, 8)
    calibration_rows: Annotated[
        int, Meta(ge=1, le=MAX_ROWS, description="training rows that the learned methods look at")
    ] = 64

    num_steps: Annotated[int, Meta(ge=1, le=MAX_STEPS, description="of qat: optimizer updates")] = 36
    learning_rate: Annotated[
        Literal["auto"] | Annotated[float, Meta(ge=1e-12, le=1e6)],
        Meta(description="of qat: at its highest, after the warm-up; auto: 8e-4, less for fewer than 300 num_steps"),
    ] = "auto"
    batch_size: Annotated[int, Meta(ge=1, le=MAX_ROWS, description="of qat: rows in one forward pass")] = 32
    grad_accum_steps: Annotated[int, Meta(ge=1, le=MAX_ROWS, description="of qat: forward passes an update sums")] = 1
    distill: Annotated[
        bool, Meta(description="of qat: whether it learns the dense model's distributions instead of the text")
    ] = False
    training: Annotated[
        Literal["full", "lora", "dora"], Meta(description="of qat: what is trained: all weights, or adapters")
    ] = "full"
    checkpointing: Annotated[
        Literal["none", "layers"] | Annotated[int, Meta(ge=1, le=10_000)],
        Meta(description="of qat: gradient checkpointing, as in train"),
    ] = "none"
    kernels: Annotated[
        Literal["auto", "off", "require"], Meta(description="of qat: our own GPU kernels, as in train")
    ] = "auto"
    deterministic: Annotated[
        bool, Meta(description="of qat: whether gradients are added up in one order, as in train")
    ] = True
    lora: Annotated[LoraConfig, Meta(description="the adapters of qat, where some are trained")] = LoraConfig()

    max_validation_rows: Annotated[
        int, Meta(ge=1, le=MAX_ROWS, description="validation rows on which the cost is measured")
    ] = 256
    max_perplexity_increase: Annotated[
        float, limit(1e6, "relative; over it the stage fails and publishes nothing; 0 or inf: no gate")
    ] = 0.0
    max_kl: Annotated[
        float, limit(1e6, "mean divergence in nats; over it the stage fails likewise; 0 or inf: no gate")
    ] = 0.0

    def __post_init__(self) -> None:
        """Write out what the modes of the table and of its rules bring where the keys are left out."""
        asked = RequestedSetting(self.mode, *(None if one == "auto" else one for one in (self.bits, self.group_size)))
        own = asked.setting
        msgspec.structs.force_setattr(self, "bits", own.bits)
        msgspec.structs.force_setattr(self, "group_size", own.group_size)
        msgspec.structs.force_setattr(self, "layers", tuple(_with_own(rule, asked) for rule in self.layers))

    def problems(self) -> Any:
        """Yield bits and group sizes that the mode does not have, and what does not fit together."""
        for one in mistakes_in(self.default):
            advice = f"Set {one.key} = {one.usual}" + (' or mode = "affine".' if self.mode != "affine" else ".")
            yield Problem(one.key, one.value, one.expected, advice)
        if self.target_bits_per_weight and self.target_size:
            yield Problem(
                "target_size", self.target_size, "expected one budget, not two", "Remove target_bits_per_weight."
            )
        if (self.target_bits_per_weight or self.target_size) and self.mode not in ("affine", "symmetric"):
            yield Problem("mode", self.mode, "a budget needs a mode with several bits", 'Set mode = "affine".')
        yield from self._budget_problems()
        if self.needs_tokens and not self.token_stage:
            asking = next(iter(self.needs_tokens))
            yield Problem(
                asking, getattr(self, asking), "needs tokens, and data names none", 'Set data = "pretokenize".'
            )

    def _budget_problems(self) -> Iterator[Problem]:
        """Yield budgets that no choice of bits can keep."""
        example = 'Write such as "200 MB".'
        if self.target_size.strip().endswith("%"):
            yield Problem("target_size", self.target_size, "expected a size in bytes", example)
        elif self.target_size and (expected := size_mistake(self.target_size)):
            yield Problem("target_size", self.target_size, expected, example)
        elif self.target_size and not parse_size(self.target_size, 0):
            yield Problem("target_size", self.target_size, "expected more than nothing", example)
        least = min(self.candidate_bits)
        if 0 < self.target_bits_per_weight < least:
            expected = f"expected at least the lowest of candidate_bits = {least}"
            yield Problem("target_bits_per_weight", self.target_bits_per_weight, expected, "Change one of the two.")

    @property
    def trusts_code(self) -> bool:
        """Whether Python code of the model, and of what is made of it, may be run."""
        return self.trust_remote_code

    @property
    def has_budget(self) -> bool:
        """Whether bits are chosen under a budget."""
        return bool(self.target_bits_per_weight or self.target_size)

    @property
    def token_stage(self) -> str:
        """The pretokenize stage whose tokens are used; empty where none are."""
        if self.data == "auto":
            return "" if self.model else "pretokenize"
        return self.data

    @property
    def needs_tokens(self) -> dict[str, None]:
        """The keys that need tokens."""
        asked = {
            "method": self.method != "rtn",
            "target_bits_per_weight": bool(self.target_bits_per_weight),
            "target_size": bool(self.target_size),
            "max_perplexity_increase": bool(self.max_perplexity_increase),
            "max_kl": bool(self.max_kl),
        }
        return dict.fromkeys(key for key, is_asked in asked.items() if is_asked)

    @property
    def default(self) -> Setting:
        """The setting of layers that nothing names."""
        return RequestedSetting(self.mode, cast("int", self.bits), cast("int", self.group_size)).setting


def _with_own(rule: LayerRule, table: RequestedSetting) -> LayerRule:
    """Return a rule with what its mode brings where the mode is of another kind than the table's."""
    if rule.mode == "same":
        return rule
    own = table.by_rule(rule.mode, *(None if one == "same" else one for one in (rule.bits, rule.group_size)))
    changes = {name: value for name, value in own.items() if value is not None}
    return msgspec.structs.replace(rule, **changes)


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """A dense model folder, and tokens to measure it on.

    Attributes:
        model: its files; none where it comes from the hub.
        tokenizer: of a train stage's model.
        beside: what else goes along with it.
        tokens: training and validation rows; none where nothing is measured.
    """

    model: tuple[Path, ...] = ()
    tokenizer: tuple[Path, ...] = ()
    beside: tuple[Beside, ...] = ()
    tokens: tuple[Path, ...] = ()

    @classmethod
    def of(cls, config: Config, artifacts: Artifacts) -> Self:
        """Take the model from a train stage or a folder, tokens from a pretokenize stage."""
        tokens: tuple[Path, ...] = ()
        if config.token_stage:
            data = artifacts.folder(config.token_stage, "data")
            tokens = (data / "train.safetensors", data / "validation.safetensors")
        if config.model:
            trusts = config.trust_remote_code
            return cls(
                model=artifacts.model(config.model, "model", trusts_code=trusts, needs_tokenizer=True), tokens=tokens
            )
        folder = artifacts.folder(config.input, "input")
        return cls(
            model=(folder / "config.json", folder / "model.safetensors"),
            tokenizer=(folder / "tokenizer.json", folder / "tokenizer_config.json"),
            beside=(Beside(folder),),
            tokens=tokens,
        )


class Outputs(ModelFolder, frozen=True, kw_only=True):
    """A quantized model folder, what its tokenizer needs beside it, and the learning curve where one is drawn."""

    metrics: tuple[Path, ...] = ()

    @classmethod
    def of(cls, config: Config) -> Self:
        """Name the learning curve where there is one."""
        return cls(metrics=(Path(layout.METRICS),) if config.method == "qat" else ())


def resolve(config: Config, artifacts: Artifacts) -> Config:
    """Return the table as it is; note numbers whose product is too large, and a model that is quantized before."""
    if config.method == "qat":
        products.note_training(config, artifacts, config.token_stage, prefetch={})
        if config.training != "full":
            products.note_adapters(config.lora, artifacts)
    trained = artifacts.table(config.input)
    name = config.model
    if not name and isinstance(trained, train.Config) and trained.keeps_quantized:
        name = trained.model.from_
    if name and not config.requantize and artifacts.kind_of_model(name) == "quantized":
        artifacts.note(_already_quantized(config))
    return config


def _already_quantized(config: Config) -> Problem:
    """Return what is wrong with a table whose model is quantized before."""
    expected = "is quantized already, and what was lost does not come back"
    if config.model:
        return Problem("model", config.model, expected, "Name a dense model, or set requantize = true.")
    return Problem("input", config.input, expected, f'Set {config.input}.fuse = "dense", or requantize = true.')


def begin(config: Config, device_asked_for: str) -> AbstractContextManager[Any]:
    """Start what takes a while and needs none of the inputs: the process that verifies kernels."""
    from mlxflow.training import kernel_selection

    return kernel_selection.begin_early(config.kernels if config.method == "qat" else "off", device_asked_for)


def run(*, config: Config, inputs: Inputs, outputs: Outputs, context: Context) -> dict[str, Any]:
    """Quantize the layers of the plan, write the model folder, and measure it against the dense model.

    Raises:
        ArtifactError: the model cannot be opened, is quantized already, or has a weight that is not finite.
        StageError: it costs more than a gate allows.
        WorkflowError: the plan or the method does not fit the model.
    """
    from mlxflow.models import config_json, tokenizer_files
    from mlxflow.quantization.progress import show_layers
    from mlxflow.quantization.streaming_export import export
    from mlxflow.storage import tensor_writing

    folder = _source(config, inputs, context)
    model, model_config, stored = _load(config, folder, context)
    tokens = _open_tokens(config, inputs, folder, model_config, context)
    plan, chosen = quantize_methods.choose_plan(config, model, tokens, context)
    made = quantize_methods.make(
        config,
        inputs,
        outputs,
        context,
        folder=folder,
        model=model,
        plan=plan,
        tokens=tokens,
    )
    with show_layers(context.task, len(made.plan.layers)) as watch:
        exported = export(
            made.model,
            made.plan.layers,
            file=outputs.model,
            metadata={"format": "mlx"} | tensor_writing.provenance_metadata(context.provenance),
            packed=lambda path: made.packed.pop(path, None),
            stored=stored if config.method == "rtn" else {},
            source=str(folder),
            watch=watch,
        )
    table = made.plan.config()
    config_json.write(outputs.config, {**model_config, "quantization": table, "quantization_config": table})
    tokenizer_files.copy_companions(folder, context.folder)
    report = {"method": config.method, **_sizes(exported, made.plan, outputs)} | chosen | made.report
    if tokens is not None:
        report["quality"] = quantize_quality.measure(
            config, tokens.validation, folder, layers=made.plan.layers, context=context
        )
    return report


def _source(config: Config, inputs: Inputs, context: Context) -> Path:
    """Return the folder of the dense model."""
    from mlxflow.models import model_folder, tokenizer_files

    if inputs.model:
        return inputs.model[0].parent
    trust_key = f"{context.task}.trust_remote_code"
    folder = model_folder.fetch(config.model, key=f"{context.task}.model", trust_key=trust_key)
    tokenizer_files.require_tokenizer_trust(folder, trust_key)
    return folder


def _load(config: Config, folder: Path, context: Context) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Return the dense model, its weights still on the disk, its `config.json`, and what can be read row by row.

    Adapters that lie in the folder are added into the dense weights.

    Raises:
        ArtifactError: the model cannot be opened, or is quantized where that is not asked for.
    """
    from mlxflow.models import model_folder, quantized_layers

    model, model_config = model_folder.load(folder, lazy=True)
    if quantized_layers.is_quantized(model) and not config.requantize:
        key, value, expected, advice = _already_quantized(config)
        raise ArtifactError(f'{context.task}.{key} = "{value}": {expected}. {advice}')
    stored = {} if quantized_layers.is_quantized(model) else model_folder.stored_matrices(folder, model)
    return *model_folder.cast(*quantized_layers.made_dense(model, model_config), config.dtype), stored


def _open_tokens(
    config: Config, inputs: Inputs, folder: Path, model_config: Mapping[str, Any], context: Context
) -> Any:
    """Return training and validation tokens; None where none are named.

    Raises:
        ArtifactError: they are of another vocabulary, or longer than the model's positions.
    """
    if not inputs.tokens:
        return None
    from mlxflow.data.token_file import TokenFile
    from mlxflow.models import config_json, model_folder

    key = f"{context.task}.data"
    train_tokens, validation = (TokenFile.open(path) for path in inputs.tokens)
    train_tokens.require_vocabulary(model_folder.vocab_size(folder), key)
    positions = config_json.num_positions(model_config)
    if train_tokens.context_length > positions:
        raise ArtifactError(
            f'{key} = "{config.token_stage}": its rows have {train_tokens.context_length:,} tokens, {folder} is made '
            f"for {positions:,} positions. Lower {config.token_stage}.context_length."
        )
    return quantize_methods.Tokens(train_tokens, validation)


def _sizes(exported: Any, plan: Any, outputs: Outputs) -> dict[str, Any]:
    """Return sizes from what was written, by layer and whole."""
    file_bytes = outputs.model.stat().st_size
    default = plan.default
    return {
        "mode": default.mode,
        "bits": default.bits,
        "group_size": default.group_size,
        "parameters": exported.parameters,
        "bits_per_weight": 8 * exported.num_bytes / exported.parameters,
        "dense_bits_per_weight": 8 * exported.dense_bytes / exported.parameters,
        "model_bytes": file_bytes,
        "compression_ratio_fp32": 4 * exported.parameters / file_bytes,
        "compression_ratio_bf16": 2 * exported.parameters / file_bytes,
        "quantized_layers": list(plan.layers),
        "dense_layers": [*plan.skipped, *plan.undivided],
        "layers": [_layer_row(layer) for layer in exported.layers],
    }


def _layer_row(layer: Any) -> dict[str, Any]:
    setting = layer.setting
    return {
        "path": layer.path,
        "shape": list(layer.shape),
        "mode": setting.mode if setting else "dense",
        "bits": setting.bits if setting else 0,
        "group_size": setting.group_size if setting else 0,
        "bytes": layer.num_bytes,
        "parameters": layer.parameters,
        "bits_per_weight": 8 * layer.num_bytes / layer.parameters,
        "relative_error": layer.relative_error,
    }
