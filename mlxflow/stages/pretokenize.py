"""Tokenize the corpus once and pack it into memory-mapped token files."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, cast

import msgspec
from msgspec import Meta

from mlxflow.data.corpus_tables import Format, SourceConfig, TokenizerConfig
from mlxflow.data.named_templates import NAMED_TEMPLATES
from mlxflow.data.sources import Corpus
from mlxflow.messages import terminal
from mlxflow.storage import gguf_header, layout
from mlxflow.storage.model_files import HUB_MODEL
from mlxflow.storage.run_context import Context
from mlxflow.storage.toml_tables import Problem
from mlxflow.training import defaults
from mlxflow.workflow.stage import Artifacts, names_stage
from mlxflow.workflow.stage_references import tokenizer_origin, trained_length

if TYPE_CHECKING:
    from mlxflow.data.corpus_names import CorpusNames
    from mlxflow.data.input_files import SourceSettings
    from mlxflow.data.job import CorpusRequest
    from mlxflow.report.stage_reports.pretokenize import PretokenizeReport

VERSION = 4

#: Tokenizing runs on the CPU, also while another stage uses the device.
USES_DEVICE = False

#: Keys that do not affect the artifact.
EXECUTION_ONLY_KEYS = ("workers",)

LATER_KEYS: dict[str, object] = {"tokenizer.add_tokens": []}

Source = str | SourceConfig


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[pretokenize]` table."""

    sources: Annotated[
        tuple[Source, ...],
        Meta(
            min_length=1,
            description='files, folders, globs, "builtin:python-stdlib" or "hf:NAME"; or tables with a path',
        ),
    ] = ("builtin:python-stdlib",)
    validation_sources: Annotated[
        tuple[Source, ...], Meta(description="documents for validation; none: a share is held out")
    ] = ()
    holdout: Annotated[float, Meta(gt=0, lt=1, description="share of documents kept for validation, by content")] = 0.02
    format: Annotated[Format, Meta(description="kind of records; auto: decided for each record")] = "auto"
    text_key: Annotated[str, Meta(min_length=1, description="key of the text in a record, or column of a table")] = (
        "text"
    )
    chat_template: Annotated[
        str,
        Meta(description='"chatml", "llama3", "gemma" or a Jinja file; empty: that of the tokenizer, or ChatML if new'),
    ] = ""
    train_on: Annotated[
        Literal["completion", "last", "all"],
        Meta(description="targets in conversations: all assistant messages, the last one only, or every token"),
    ] = "completion"
    deduplicate: Annotated[bool, Meta(description="keep one of equal documents")] = True
    on_bad_record: Annotated[
        Literal["error", "skip"], Meta(description="whether an invalid record fails the stage")
    ] = "error"
    max_bad_records: Annotated[
        float, Meta(ge=0, le=1, description="largest share of skipped records; the stage fails above it")
    ] = 0.01
    context_length: Annotated[
        Literal["auto"] | Annotated[int, Meta(ge=2, le=1_048_576)],
        Meta(
            description="positions the model sees; auto: 64 for a new model, 1024 for one that training continues, at "
            "most its own"
        ),
    ] = "auto"
    packing: Annotated[
        Literal["best-fit", "concat", "none"], Meta(description="how documents are packed into rows")
    ] = "best-fit"
    on_long: Annotated[
        Literal["split", "truncate", "drop"], Meta(description="what is done with conversations longer than a row")
    ] = "split"
    workers: Annotated[int, Meta(ge=1, le=256, description="files tokenized in parallel")] = 8
    tokenizer: Annotated[TokenizerConfig, Meta(description="the tokenizer")] = TokenizerConfig()

    def problems(self) -> Iterator[Problem]:
        """Yield a `holdout` that contradicts `validation_sources`."""
        if self.validation_sources and self.holdout != Config().holdout:
            expected = "is for a corpus without documents for validation, and validation_sources names some"
            yield Problem("holdout", self.holdout, expected, "Remove one of the two.")

    @property
    def tokenizer_source(self) -> str:
        """Where the tokenizer comes from: a folder, one of the hub or a stage; empty if it is trained here."""
        return self.tokenizer.from_

    def place(self, number: int) -> str:
        """Return the place of an entry in this table, such as "sources[0]", by its number in `entries`."""
        count = len(self.sources)
        return f"sources[{number}]" if number < count else f"validation_sources[{number - count}]"

    def entries(self) -> tuple[SourceConfig, ...]:
        """Return all sources as tables with their defaults filled in, validation sources last."""
        return tuple(
            msgspec.structs.replace(
                one,
                format=one.format if one.format != "auto" else self.format,
                text_key=one.text_key or self.text_key,
            )
            for one in (
                SourceConfig(path=entry) if isinstance(entry, str) else entry
                for entry in (*self.sources, *self.validation_sources)
            )
        )


def follow(config: Config, task: str, readers: Sequence[Any], known: Any, disk: Any) -> Config:
    """Return the table with tokenizer and context length of the base model of its readers, unless it has its own.

    A model that is trained on this stage's own tokens has its tokenizer.

    Args:
        config: a `[pretokenize]` table.
        task: the stage's name.
        readers: the tables that name its tokens as their input.
        known: the tables of all stages, by reference.
        disk: queries of the disk.
    """
    models = [reader.model for reader in readers if hasattr(getattr(reader, "model", None), "from_")]
    origins = [(tokenizer_origin(model.from_, known), model) for model in models if model.from_]
    bases = [
        (name, model)
        for name, model in origins
        if known.resolved(name) != task
        and (known.table(name) is not None if names_stage(name) else _brings_a_tokenizer(name, disk))
    ]
    if config.context_length == "auto":
        length = _context_length([model.from_ for _, model in bases], known, disk)
        config = msgspec.structs.replace(config, context_length=length)
    own = config.tokenizer
    if own.from_ or own.vocab_size != TokenizerConfig().vocab_size or not bases:
        return config
    name, model = bases[0]
    followed = msgspec.structs.replace(
        own, from_=name, trust_remote_code=own.trust_remote_code or model.trust_remote_code
    )
    return msgspec.structs.replace(config, tokenizer=followed)


def _context_length(bases: Sequence[str], known: Any, disk: Any) -> int:
    """Return the default of `context_length`: a new model's, or what every model that training continues can see.

    Args:
        bases: the models that training continues: stages, folders or names of the hub.
        known: the tables of all stages, by reference.
        disk: answers what there is.
    """
    if not bases:
        return defaults.NEW_CONTEXT_LENGTH
    lengths = [defaults.PRETRAINED_CONTEXT_LENGTH]
    for name in bases:
        origin, length = trained_length(name, known)
        folder = disk.expand(origin)
        if origin and disk.is_dir(folder):
            length = disk.num_positions(folder)
        elif gguf_header.is_named(origin) and disk.is_file(folder):
            length = gguf_header.GgufHeader(*disk.gguf_header(folder)).num_positions
        lengths += [length] if isinstance(length, int) and length > 1 else []
        lengths += [defaults.NEW_CONTEXT_LENGTH] if length == "auto" else []
    return min(lengths)


def _brings_a_tokenizer(name: str, disk: Any) -> bool:
    """Return whether a model has a tokenizer; a model on the hub is assumed to have one."""
    folder = disk.expand(name)
    if gguf_header.is_named(name):
        return True
    if not disk.is_dir(folder):
        return re.fullmatch(HUB_MODEL, name) is not None
    return Path(folder).parts[:1] != (layout.ARTIFACTS,) and "tokenizer.json" in disk.tokenizer_files(folder)


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """The sources, in the order of the table, and the files of the tokenizer.

    Attributes:
        sources: files and corpora.
        owners: for each source the number of its entry.
        tokenizer: files of an existing tokenizer.
        template: the chat template, if the table names one.
    """

    sources: tuple[Path | Corpus, ...] = ()
    owners: tuple[int, ...] = ()
    tokenizer: tuple[Path, ...] = ()
    template: tuple[Path, ...] = ()

    @classmethod
    def of(cls, config: Config, artifacts: Artifacts) -> Self:
        """Find the files of the sources; a file of several sources is listed for each of them."""
        pairs = []
        for number, entry in enumerate(config.entries()):
            key = "sources" if number < len(config.sources) else "validation_sources"
            pairs += [(source, number) for source in artifacts.sources((entry.path,), key)]
        return cls(
            sources=tuple(source for source, _ in pairs),
            owners=tuple(number for _, number in pairs),
            tokenizer=_tokenizer_files(config.tokenizer, artifacts) if config.tokenizer.from_ else (),
            template=_template_files(config, artifacts),
        )


def _template_files(config: Config, artifacts: Artifacts) -> tuple[Path, ...]:
    """Return the file of the chat template; none for a template that is named, and for the tokenizer's own."""
    name = config.chat_template
    return artifacts.files((name,), "chat_template") if name and name not in NAMED_TEMPLATES else ()


def _tokenizer_files(tokenizer: TokenizerConfig, artifacts: Artifacts) -> tuple[Path, ...]:
    if folder := artifacts.stage_of(tokenizer.from_, "tokenizer.from"):
        return folder / "tokenizer.json", folder / "tokenizer_config.json"
    return artifacts.tokenizer(tokenizer.from_, "tokenizer.from", trusts_code=tokenizer.trust_remote_code)


class Outputs(msgspec.Struct, frozen=True, kw_only=True):
    """Token files, the names of their source files, and the tokenizer in Hugging Face's format."""

    tokenizer: Path = Path("tokenizer.json")
    tokenizer_config: Path = Path("tokenizer_config.json")
    train: Path = Path("train.safetensors")
    validation: Path = Path("validation.safetensors")
    files: Path = Path("files.txt")
    report: Path = Path(layout.REPORT)


def run(*, config: Config, inputs: Inputs, outputs: Outputs, context: Context) -> "PretokenizeReport":
    """Tokenize files without a shard, split the documents, and pack them into rows.

    An untrusted tokenizer or chat template runs in a process with limited time and memory.

    Raises:
        SourceError: a source cannot be used, or there is less than one row of text.
        StageError: the disk is full.
    """
    if not config.tokenizer.from_ and not inputs.template:
        return work(config, inputs, outputs, context)
    from mlxflow.data.guard import Guard
    from mlxflow.data.shard_cache import remove_unfinished

    with Guard() as process:
        try:
            report, digests = process.call(f"{__name__}:watched_work", config, inputs, outputs, context)
        finally:
            remove_unfinished(context.state / layout.SHARDS, process.end())
    context.digests.join(digests)
    return cast("PretokenizeReport", report)


def watched_work(config: Config, inputs: Inputs, outputs: Outputs, context: Context) -> tuple["PretokenizeReport", Any]:
    """Do the work of the stage in a guarded process; return its report and the digests of its inputs."""
    return work(config, inputs, outputs, context), context.digests


def work(config: Config, inputs: Inputs, outputs: Outputs, context: Context) -> "PretokenizeReport":
    """Do the work of the stage in this process; see `run`."""
    from mlxflow.data import corpus_report, job
    from mlxflow.report.stage_reports.pretokenize import PretokenizeReport, PretokenizeRun

    files = job.CorpusFiles(
        outputs.tokenizer, outputs.tokenizer_config, outputs.train, outputs.validation, outputs.files
    )
    corpus = job.run_job(_request(config, inputs, context), files, context)
    warnings = [*corpus_report.warnings(corpus.contents, corpus.counts), *corpus.endings.warnings()]
    lines = (*warnings, corpus_report.summary(corpus.contents, corpus.counts))
    terminal.say(*(f"{context.task}: {line}" for line in lines))
    return PretokenizeReport.of(
        corpus.contents,
        corpus.counts,
        corpus.endings,
        vocab_size=corpus.vocabulary.size,
        context_length=cast("int", config.context_length),
        packing=config.packing,
        warnings=warnings,
        run=PretokenizeRun.of(corpus.tokenized, corpus.engine),
    )


def _request(config: Config, inputs: Inputs, context: Context) -> "CorpusRequest":
    """Return the settings of the corpus from the table."""
    from mlxflow.data.corpus_names import CorpusNames
    from mlxflow.data.job import CorpusRequest, RowLayout
    from mlxflow.data.tokenizer_choice import TokenizerRequest

    names = CorpusNames(context.task)
    return CorpusRequest(
        inputs=inputs.sources,
        owners=inputs.owners,
        sources=[
            _source_settings(config, number, entry, names=names, root=context.root)
            for number, entry in enumerate(config.entries())
        ],
        tokenizer=TokenizerRequest(
            config.tokenizer,
            inputs.tokenizer,
            inputs.template[0] if inputs.template else None,
            config.chat_template if config.chat_template in NAMED_TEMPLATES else "",
            f"{names.of('chat_template')} = {json.dumps(config.chat_template)}",
            names=names,
            version=VERSION,
        ),
        holdout=0.0 if config.validation_sources else config.holdout,
        deduplicate=config.deduplicate,
        max_bad_records=config.max_bad_records if config.on_bad_record == "skip" else None,
        train_on=config.train_on,
        workers=config.workers,
        layout=RowLayout(cast("int", config.context_length), config.packing, config.on_long),
        names=names,
    )


def _source_settings(
    config: Config, number: int, entry: SourceConfig, *, names: "CorpusNames", root: Path
) -> "SourceSettings":
    from mlxflow.data.input_files import SourceSettings

    return SourceSettings(
        key=names.of(config.place(number)),
        path=entry.path,
        weight=entry.weight,
        format_=entry.format,
        text_key=entry.text_key,
        config=entry.config,
        split=entry.split,
        is_validation=number >= len(config.sources),
        root=root,
    )
