"""Write a model in the format of another program: GGUF for llama.cpp, Ollama and LM Studio."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

import msgspec
from msgspec import Meta

from mlxflow.models import gguf_architectures
from mlxflow.storage import layout
from mlxflow.storage.run_context import Context
from mlxflow.storage.toml_tables import Problem
from mlxflow.workflow.stage import Artifacts, Beside, model_files_of
from mlxflow.workflow.stage_references import trained_length

if TYPE_CHECKING:
    from mlxflow.models.gguf_writing import WrittenModel
    from mlxflow.report.stage_reports.export import ExportReport

VERSION = 1

#: A workflow file that names no stage does not build it.
ONLY_IF_WRITTEN = True

_GGUF_FILE = "model.gguf"

_TYPES = Literal["auto", "f32", "f16", "bf16", "q8_0", "q6_k", "q5_1", "q5_0", "q4_1", "q4_0", "mxfp4"]


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `[export]` table, or one of `[[export]]`."""

    model: Annotated[str, Meta(description="the model: a train or quantize stage, a model folder or a hub id")] = (
        "train"
    )
    format: Annotated[
        Literal["gguf"], Meta(description="gguf: model.gguf for llama.cpp and LM Studio, and a Modelfile for Ollama")
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

    @property
    def trusts_code(self) -> bool:
        """Whether Python code of the model may be run; architectures with code of their own cannot be exported."""
        return False


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """A model folder.

    Attributes:
        model: its files; empty for a model on the hub.
        beside: other files of its folder.
    """

    model: tuple[Path, ...] = ()
    beside: tuple[Beside, ...] = ()

    @classmethod
    def of(cls, config: Config, artifacts: Artifacts) -> Self:
        """Take the model from a stage, or from a folder."""
        if (folder := artifacts.stage_of(config.model, "model")) is None:
            return cls(model=artifacts.model(config.model, "model", trusts_code=False, needs_tokenizer=True))
        return cls(model=model_files_of(folder), beside=(Beside(folder),))


class Outputs(msgspec.Struct, frozen=True, kw_only=True):
    """The files of the format."""

    model: Path = Path(_GGUF_FILE)
    modelfile: Path = Path("Modelfile")
    report: Path = Path(layout.REPORT)


def resolve(config: Config, artifacts: Artifacts) -> Config:
    """Return the table; report a model that cannot be written in the format, and a missing package."""
    origin, _ = trained_length(config.model, artifacts)
    model_type = artifacts.model_type(origin) if origin else ""
    if model_type and model_type not in gguf_architectures.MODEL_TYPES:
        expected, _, known = gguf_architectures.unknown_architecture(model_type).partition(". ")
        artifacts.note(Problem("model", config.model, expected, known))
    artifacts.require_package("gguf", "format", config.format)
    return config


def run(*, config: Config, inputs: Inputs, outputs: Outputs, context: Context) -> "ExportReport":
    """Write the files of the format, read them back, and compare them with the model.

    Raises:
        ArtifactError: the model cannot be opened, or has no form in the format.
        StageError: the files that were written are not the model.
    """
    from mlxflow.models import gguf_writing
    from mlxflow.quantization.dense_model import find_folder
    from mlxflow.report.model_folder import licence_of

    folder = find_folder(config.model, inputs.model, task=context.task)
    key = f'{context.task}.model = "{config.model}"'
    request = gguf_writing.GgufRequest(
        config.type, config.embedding_type, context.name or folder.name, licence_of(folder), key
    )
    written = gguf_writing.write(folder, outputs.model, request)
    outputs.modelfile.write_text(_modelfile(written, outputs.model.name, key), encoding="utf-8")
    return _report_of(config.format, written, [outputs.model, outputs.modelfile])


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
