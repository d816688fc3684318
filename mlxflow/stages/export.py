"""Write a model or its adapters in the format of another program."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import msgspec
from msgspec import Meta

from mlxflow.device.compute_device import SIZE_PATTERN, parse_size, size_mistake
from mlxflow.models import gguf_architectures
from mlxflow.storage import layout
from mlxflow.storage.model_files import ADAPTERS, CONFIG, INDEX, TOKENIZER_CONFIG, adapters_folder
from mlxflow.storage.run_context import Context
from mlxflow.storage.toml_tables import Problem
from mlxflow.workflow.stage import Artifacts, Beside, model_files_of
from mlxflow.workflow.stage_references import new_architecture, trained_length

if TYPE_CHECKING:
    from mlxflow.models.gguf_writing import WrittenModel
    from mlxflow.report.stage_reports.export import ExportReport

VERSION = 1

#: A workflow file that names no stage does not build it.
ONLY_IF_WRITTEN = True

_TYPES = Literal["auto", "f32", "f16", "bf16", "q8_0", "q6_k", "q5_1", "q5_0", "q4_1", "q4_0", "mxfp4"]


_FORMATS = Literal["gguf", "mlx", "peft", "adapter-gguf"]

# The files of each format; mlx writes more, by the number of shards
_FILES: dict[str, tuple[str, ...]] = {
    "gguf": ("model.gguf", "Modelfile"),
    "mlx": (CONFIG, INDEX, "tokenizer.json", TOKENIZER_CONFIG),
    "peft": ("adapter_model.safetensors", "adapter_config.json"),
    "adapter-gguf": ("adapter.gguf",),
}


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `[export]` table, or one of `[[export]]`."""

    model: Annotated[
        str, Meta(description="the model: a stage that makes one, a model folder, a GGUF file or a hub id")
    ] = "train"
    format: Annotated[
        _FORMATS,
        Meta(
            description="gguf: for llama.cpp, LM Studio and, with a Modelfile, Ollama; mlx: a model folder in shards; "
            "peft, adapter-gguf: the trained adapters, for PEFT or llama.cpp"
        ),
    ] = "gguf"
    type: Annotated[
        _TYPES,
        Meta(
            description="of gguf: how matrices are stored; auto: quantized ones with their own codes where a type "
            "holds them, else as q8_0; dense ones in 16 bits"
        ),
    ] = "auto"
    embedding_type: Annotated[
        _TYPES, Meta(description="of gguf: how embedding and head are stored; auto: as type, but at least q8_0")
    ] = "auto"
    max_shard_size: Annotated[
        str, Meta(pattern=SIZE_PATTERN, examples=["2 GB"], description="of mlx: the largest file of weights")
    ] = "5 GB"
    base_model: Annotated[
        str, Meta(description="of peft: base_model_name_or_path; auto: what the train stage starts from")
    ] = "auto"

    def problems(self) -> Iterator[Problem]:
        """Yield a size of shards that is no number of bytes."""
        advice = 'Use export.max_shard_size = "5 GB" (the default).'
        expected = "expected a size in bytes" if self.max_shard_size.strip().endswith("%") else None
        expected = expected or size_mistake(self.max_shard_size)
        if expected is None and not parse_size(self.max_shard_size, 0):
            expected = "expected more than 0 bytes"
        if expected:
            yield Problem("max_shard_size", self.max_shard_size, expected, advice)

    @property
    def writes_adapters(self) -> bool:
        """Whether adapters are written, not a model."""
        return self.format in ("peft", "adapter-gguf")


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """A model folder.

    Attributes:
        model: its files; empty for a model on the hub.
        beside: other files of its folder.
        adapters: copies of adapters that were fused into the model.
    """

    model: tuple[Path, ...] = ()
    beside: tuple[Beside, ...] = ()
    adapters: tuple[Path, ...] = ()

    @classmethod
    def of(cls, config: Config, artifacts: Artifacts) -> Self:
        """Take the model from a stage, or from a folder."""
        if (folder := artifacts.stage_of(config.model, "model")) is None:
            return cls(model=artifacts.model(config.model, "model", trusts_code=False, needs_tokenizer=True))
        table: Any = artifacts.table(config.model)
        adapters: tuple[Path, ...] = ()
        if config.writes_adapters and getattr(table, "fuse", "auto") not in ("auto", "never"):
            adapters = tuple(folder / adapters_folder(table.fuse) / name for name in ADAPTERS)
        return cls(model=model_files_of(folder), beside=(Beside(folder),), adapters=adapters)


class Outputs(msgspec.Struct, frozen=True, kw_only=True):
    """The files of the format."""

    files: tuple[Path, ...] = ()
    report: Path = Path(layout.REPORT)

    @classmethod
    def of(cls, config: Config) -> Self:
        """Name the files of the table's format."""
        return cls(files=tuple(Path(name) for name in _FILES[config.format]))


def resolve(config: Config, artifacts: Artifacts) -> Config:
    """Return the table with `base_model` resolved; report what cannot be written, and a missing package."""
    if "gguf" in config.format:
        origin, _ = trained_length(config.model, artifacts)
        model_type = artifacts.model_type(origin) if origin else new_architecture(config.model, artifacts)
        if model_type and model_type not in gguf_architectures.MODEL_TYPES:
            expected, _, known = gguf_architectures.unknown_architecture(model_type).partition(". ")
            artifacts.note(Problem("model", config.model, expected, known))
        artifacts.require_package("gguf", "format", config.format)
    table: Any = artifacts.table(config.model)
    if config.writes_adapters and table is not None and getattr(table, "method", "") not in ("lora", "dora"):
        advice = 'Train it with method = "lora", or set format = "mlx".'
        artifacts.note(Problem("model", config.model, "has no adapters", advice))
    if config.base_model == "auto":
        base = getattr(getattr(table, "model", None), "from_", "") or config.model
        config = msgspec.structs.replace(config, base_model=base)
    return config


def run(*, config: Config, inputs: Inputs, outputs: Outputs, context: Context) -> "ExportReport":
    """Write the files of the format; those of GGUF are read back and compared with the model.

    Raises:
        ArtifactError: the model cannot be opened, or has no form in the format.
        StageError: the files that were written are not the model.
    """
    from mlxflow.quantization.dense_model import find_folder

    folder = find_folder(config.model, inputs.model, task=context.task)
    key = f'{context.task}.model = "{config.model}"'
    if config.format == "gguf":
        return _write_gguf(config, folder, outputs, context, key)
    if config.format == "mlx":
        return _write_shards(config, folder, context)
    return _write_adapters(config, folder, outputs, key)


def _write_gguf(config: Config, folder: Path, outputs: Outputs, context: Context, key: str) -> "ExportReport":
    from mlxflow.models import gguf_writing
    from mlxflow.storage.model_card import licence_of

    file, modelfile = outputs.files
    name, licence = context.name or folder.name, licence_of(folder)
    request = gguf_writing.GgufRequest(config.type, config.embedding_type, name, licence, key)
    written = gguf_writing.write(folder, file, request)
    modelfile.write_text(_modelfile(written, file.name, key), encoding="utf-8")
    return _report_of(config.format, written, list(outputs.files))


def _write_shards(config: Config, folder: Path, context: Context) -> "ExportReport":
    from mlxflow.models import sharded_folder
    from mlxflow.storage import config_json

    max_bytes = parse_size(config.max_shard_size, 0)
    parameters = sharded_folder.write(folder, context.folder, max_bytes=max_bytes, provenance=context.provenance)
    architecture = str(config_json.read(context.folder).get("model_type", ""))
    return _plain_report(config.format, architecture, sorted(context.folder.iterdir()), parameters)


def _write_adapters(config: Config, folder: Path, outputs: Outputs, key: str) -> "ExportReport":
    from mlxflow.models import adapter_export
    from mlxflow.storage import config_json

    adapters = adapter_export.read(folder, key)
    if config.format == "peft":
        weights, own = outputs.files
        adapter_export.write_peft(adapters, weights_file=weights, config_file=own, base=config.base_model)
        architecture = str(config_json.read(folder).get("model_type", ""))
    else:
        architecture = adapter_export.write_gguf(adapters, folder, outputs.files[0], key=key)
    parameters = sum(value.size for value in adapters.weights.values())
    return _plain_report(config.format, architecture, list(outputs.files), parameters)


def _plain_report(form: str, architecture: str, files: list[Path], parameters: int) -> "ExportReport":
    """Return the figures of a format that copies the tensors."""
    from mlxflow.report.stage_reports.export import ExportReport

    size = sum(file.stat().st_size for file in files)
    return ExportReport(
        format=form,
        architecture=architecture,
        type="",
        files=tuple(file.name for file in files),
        bytes=size,
        parameters=parameters,
        bits_per_weight=8 * size / parameters,
        largest_relative_error=0.0,
    )


def _modelfile(written: "WrittenModel", file: str, key: str) -> str:
    """Return the Ollama Modelfile beside a GGUF file."""
    from mlxflow.data.ollama_template import modelfile, turn_texts

    fields = written.fields
    names = fields["tokenizer.ggml.tokens"]
    roles = {
        name: names[fields[f"tokenizer.ggml.{name}_token_id"]]
        for name in ("bos", "eos", "eot", "eom", "unknown", "padding")
        if f"tokenizer.ggml.{name}_token_id" in fields
    }
    own = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    template = fields.get("tokenizer.chat_template", "")
    texts = None
    if template:
        texts = turn_texts(
            template,
            {own[name]: text for name, text in roles.items() if name in own},
            subject=f"{key}: its chat template",
            bos=roles.get("bos", "") if fields["tokenizer.ggml.add_bos_token"] else "",
        )
    stops = [roles[name] for name in ("eos", "eot", "eom") if name in roles]
    return modelfile(file, template, texts=texts, stops=stops, context_length=written.context_length)


def _report_of(form: str, written: "WrittenModel", files: list[Path]) -> "ExportReport":
    """Return the figures for the report."""
    from mlxflow.report.stage_reports.export import ExportReport, TensorFigures

    size = sum(file.stat().st_size for file in files)
    parameters = sum(math.prod(one.shape) for one in written.tensors if one.path)
    return ExportReport(
        format=form,
        architecture=written.architecture,
        type=written.file_type,
        files=tuple(file.name for file in files),
        bytes=size,
        parameters=parameters,
        bits_per_weight=8 * files[0].stat().st_size / parameters,
        requantized=tuple(one.name for one in written.tensors if one.was_quantized and not one.keeps_codes),
        largest_relative_error=max(one.relative_error for one in written.tensors),
        tensors=tuple(
            TensorFigures(
                name=one.name,
                path=one.path,
                shape=one.shape,
                type=one.type,
                keeps_codes=one.keeps_codes,
                relative_error=one.relative_error,
            )
            for one in written.tensors
        ),
    )
