"""Tokenize the corpus once and pack it into memory-mapped token files."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import msgspec
from msgspec import Meta

from mlxflow.data.sources import HF
from mlxflow.data.split_slices import parse_slices
from mlxflow.storage import layout
from mlxflow.storage.model_files import HUB_MODEL
from mlxflow.system import terminal
from mlxflow.workflow.config import Problem
from mlxflow.workflow.stage import Artifacts, Context, Corpus, derive_seed

VERSION = 4

#: Tokenizing is the processor's work: it may go on beside a stage that has the device.
USES_DEVICE = False

#: Keys that say how the work is done and change nothing of what comes out.
EXECUTION_ONLY_KEYS = ("workers",)

Format = Literal["auto", "text", "chat", "completions"]


class SourceConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An entry of `pretokenize.sources` that is a table."""

    path: Annotated[str, Meta(description="as an entry that is text")]
    weight: Annotated[float, Meta(gt=0, le=1000, description="how often an epoch shows its documents")] = 1.0
    format: Annotated[Format, Meta(description="of its records; auto: pretokenize.format")] = "auto"
    text_key: Annotated[str, Meta(description="of a text in a record; empty: pretokenize.text_key")] = ""
    config: Annotated[str, Meta(description="of hf: the configuration; empty: the only one")] = ""
    split: Annotated[
        str,
        Meta(description='of hf: splits and slices, such as "train[:1%]"; empty: all, each on the side in its name'),
    ] = ""

    def problems(self) -> Iterator[Problem]:
        """Yield parts of a data set that cannot be, or of something that is none."""
        for key in ("config", "split"):
            if (value := getattr(self, key)) and not self.path.startswith(HF):
                yield Problem(key, value, "is for a data set, and path names none", f'Write path = "{HF}...".')
                return
        try:
            parse_slices(self.split or "all")
        except ValueError as error:
            yield Problem("split", self.split, str(error), "Change it or remove the key.")


class TokenizerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[pretokenize.tokenizer]` table."""

    from_: Annotated[
        str,
        Meta(
            description="a folder with a tokenizer.json, or a hub id; empty: that of train.model.from, else a new one"
        ),
    ] = msgspec.field(default="", name="from")
    trust_remote_code: Annotated[
        bool, Meta(description="whether Python code that the folder brings may be run; read it first")
    ] = False
    vocab_size: Annotated[
        int, Meta(ge=257, le=1_000_000, description="ids of the byte-level BPE that is trained here")
    ] = 2048
    max_training_bytes: Annotated[
        int,
        Meta(
            ge=1,
            le=10**12,
            description="of a larger corpus, a sample of this size trains the tokenizer, in 2 to 5 times that memory; "
            "in 60 times that where nearly all words differ",
        ),
    ] = 50_000_000

    def problems(self) -> Iterator[Problem]:
        """Yield a size for a tokenizer that exists."""
        if self.from_ and self.vocab_size != 2048:
            expected = "is for a tokenizer trained here, and tokenizer.from names one that exists"
            yield Problem("vocab_size", self.vocab_size, expected, "Remove one of the two.")


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
    format: Annotated[Format, Meta(description="what records hold; auto asks each of them")] = "auto"
    text_key: Annotated[str, Meta(min_length=1, description="of a text in a record, or a table's column")] = "text"
    chat_template: Annotated[str, Meta(description="a Jinja file; empty: the tokenizer's own, or ChatML")] = ""
    train_on: Annotated[
        Literal["completion", "last", "all"],
        Meta(description="of conversations: what assistants wrote, their last message alone, or every token"),
    ] = "completion"
    deduplicate: Annotated[bool, Meta(description="leave out all but one of equal documents")] = True
    on_bad_record: Annotated[
        Literal["error", "skip"], Meta(description="whether a record that cannot be used ends the stage")
    ] = "error"
    max_bad_records: Annotated[
        float, Meta(ge=0, le=1, description="share of records that may be skipped; the stage fails over it")
    ] = 0.01
    context_length: Annotated[int, Meta(ge=2, le=1_048_576, description="positions the model sees")] = 64
    packing: Annotated[Literal["best-fit", "concat", "none"], Meta(description="how documents are laid into rows")] = (
        "best-fit"
    )
    on_long: Annotated[
        Literal["split", "truncate", "drop"], Meta(description="what becomes of conversations longer than a row")
    ] = "split"
    workers: Annotated[int, Meta(ge=1, le=256, description="files tokenized at a time")] = 8
    tokenizer: Annotated[TokenizerConfig, Meta(description="the tokenizer")] = TokenizerConfig()

    def problems(self) -> Iterator[Problem]:
        """Yield a holdout beside documents for validation."""
        if self.validation_sources and self.holdout != Config().holdout:
            expected = "is for a corpus without documents for validation, and validation_sources names some"
            yield Problem("holdout", self.holdout, expected, "Remove one of the two.")

    def key(self, number: int) -> str:
        """Return the dotted key of the entry of a number in `entries`."""
        count = len(self.sources)
        return (
            f"pretokenize.sources[{number}]" if number < count else f"pretokenize.validation_sources[{number - count}]"
        )

    def entries(self) -> tuple[SourceConfig, ...]:
        """Return all sources as tables with their defaults filled in, the ones for validation last."""
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


def follow(config: Config, readers: Sequence[Any], disk: Any) -> Config:
    """Return the table with the tokenizer of the model that training goes on from, where it asks for none of its own.

    A base among the workflow's own artifacts has the tokenizer that was trained here.

    Args:
        config: a `[pretokenize]` table.
        readers: the tables that name its tokens as their input.
        disk: answers what there is.
    """
    own = config.tokenizer
    models = [reader.model for reader in readers if hasattr(getattr(reader, "model", None), "from_")]
    bases = [model for model in models if model.from_ and _brings_a_tokenizer(model.from_, disk)]
    if own.from_ or own.vocab_size != TokenizerConfig().vocab_size or not bases:
        return config
    trusts = own.trust_remote_code or bases[0].trust_remote_code
    followed = msgspec.structs.replace(own, from_=bases[0].from_, trust_remote_code=trusts)
    return msgspec.structs.replace(config, tokenizer=followed)


def _brings_a_tokenizer(name: str, disk: Any) -> bool:
    """Return whether a model of this name has a tokenizer to follow: on the hub each is taken to have one."""
    folder = disk.expand(name)
    if not disk.is_dir(folder):
        return re.fullmatch(HUB_MODEL, name) is not None
    return Path(folder).parts[:1] != (layout.ARTIFACTS,) and "tokenizer.json" in disk.tokenizer_files(folder)


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """The sources, in the order of the table, and what goes with the tokenizer.

    Attributes:
        sources: files and corpora.
        owners: for each of them the number of the entry that named it.
        tokenizer: files of a tokenizer that exists.
        template: the chat template, or nothing.
    """

    sources: tuple[Path | Corpus, ...] = ()
    owners: tuple[int, ...] = ()
    tokenizer: tuple[Path, ...] = ()
    template: tuple[Path, ...] = ()

    @classmethod
    def of(cls, config: Config, artifacts: Artifacts) -> Self:
        """Find the files that the sources name; one that several name is there for each of them."""
        pairs = []
        for number, entry in enumerate(config.entries()):
            key = "sources" if number < len(config.sources) else "validation_sources"
            pairs += [(source, number) for source in artifacts.sources((entry.path,), key)]
        return cls(
            sources=tuple(source for source, _ in pairs),
            owners=tuple(number for _, number in pairs),
            tokenizer=_tokenizer_files(config.tokenizer, artifacts) if config.tokenizer.from_ else (),
            template=artifacts.files((config.chat_template,), "chat_template") if config.chat_template else (),
        )


def _tokenizer_files(tokenizer: TokenizerConfig, artifacts: Artifacts) -> tuple[Path, ...]:
    return artifacts.tokenizer(tokenizer.from_, "tokenizer.from", trusts_code=tokenizer.trust_remote_code)


class Outputs(msgspec.Struct, frozen=True, kw_only=True):
    """Token files, the names of the files they were made of, and the tokenizer in Hugging Face's form."""

    tokenizer: Path = Path("tokenizer.json")
    tokenizer_config: Path = Path("tokenizer_config.json")
    train: Path = Path("train.safetensors")
    validation: Path = Path("validation.safetensors")
    files: Path = Path("files.txt")
    report: Path = Path(layout.REPORT)


def run(*, config: Config, inputs: Inputs, outputs: Outputs, context: Context) -> dict[str, Any]:
    """Tokenize what has no shard yet, choose the documents of each side, pack them into rows.

    A tokenizer or a chat template of others runs in a process whose time and memory are limited.

    Raises:
        SourceError: a source cannot be used, or there is not one row of text.
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
    return dict(report)


def watched_work(config: Config, inputs: Inputs, outputs: Outputs, context: Context) -> tuple[dict[str, Any], Any]:
    """Do the work of the stage in a watched process; return its report and what it noted of its inputs."""
    return work(config, inputs, outputs, context), context.digests


def work(config: Config, inputs: Inputs, outputs: Outputs, context: Context) -> dict[str, Any]:
    """Do the work of the stage in this process; see `run`."""
    from mlxflow.data import (
        corpus_report,
        document_selection,
        end_tokens,
        input_files,
        shard_builder,
        shard_cache,
        shortage,
    )
    from mlxflow.storage.locks import hold

    settings = [_source_settings(config, number, entry, context) for number, entry in enumerate(config.entries())]
    files = input_files.list_files(inputs.sources, inputs.owners, settings, digests=context.digests)
    holdout = 0.0 if config.validation_sources else config.holdout
    store = shard_cache.ShardStore(context.state / layout.SHARDS)
    waiting = f"{context.task}: waits for the shards, used by process {{holder}}"
    with hold(context.state / layout.SHARDS / layout.LOCK, waiting, wait=True, needed=True):
        vocabulary = _vocabulary(config, inputs, context, files, holdout)
        tokenized, engine = _tokenize(config, vocabulary, store, files)
        context.digests.settle(file.path for file in files if file.read is None)
        opened = shard_builder.open_shards(store, tokenized.keys)
        input_files.check(files, opened, skips=config.on_bad_record == "skip", max_share=config.max_bad_records)
        chosen = document_selection.select(
            opened,
            fixed_sides=[file.side for file in files],
            sources=[file.source for file in files],
            weights=[one.weight for one in settings],
            holdout=holdout,
            deduplicate=config.deduplicate,
            asked=[settings[file.source].is_validation for file in files],
        )
        contents = corpus_report.CorpusContents(
            settings, files, opened, chosen, document_selection.held_out_share(chosen, holdout)
        )
        shortage.require_documents(contents, "train")
        shortage.require_documents(contents, "validation")
        ends = end_tokens.endings_of(opened, vocabulary)
        counts = _write_sides(config, outputs, context, vocabulary, contents, ends)
        store.collect(context.task, tokenized.keys, context.tasks)
    _write_tokenizer(vocabulary, outputs, ends)
    outputs.files.write_text("".join(f"{file.name}\n" for file in files), encoding="utf-8")
    warnings = [*corpus_report.warnings(contents, counts), *ends.warnings()]
    lines = (*warnings, corpus_report.summary(contents, counts))
    terminal.say(*(f"{context.task}: {line}" for line in lines))
    accounts = corpus_report.accounts(contents, capacity=config.context_length + 1)
    report = _report(config, vocabulary, warnings, ends, counts)
    return report | accounts | {"run": _run_facts(tokenized, engine)}


def _report(config: Config, vocabulary: Any, warnings: list[str], ends: Any, counts: dict[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary.size,
        "context_length": config.context_length,
        "packing": config.packing,
        "warnings": warnings,
        "end_tokens": list(ends.texts),
        "added_ends": ends.added,
        "conversations_with_control_tokens": ends.with_control_tokens,
        **{side: count.report() for side, count in counts.items()},
    }


def _run_facts(tokenized: Any, engine: str) -> dict[str, Any]:
    """Return what differs between two equal runs."""
    import resource
    import sys

    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return {
        "tokenized_files": tokenized.num_tokenized,
        "kept_files": len(set(tokenized.keys)) - tokenized.num_tokenized,
        "engine": engine,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes,
    }


def _source_settings(config: Config, number: int, entry: SourceConfig, context: Context) -> Any:
    from mlxflow.data.input_files import SourceSettings

    return SourceSettings(
        key=config.key(number),
        path=entry.path,
        weight=entry.weight,
        format_=entry.format,
        text_key=entry.text_key,
        config=entry.config,
        split=entry.split,
        is_validation=number >= len(config.sources),
        root=context.root,
    )


def _tokenize(config: Config, vocabulary: Any, store: Any, files: list[Any]) -> tuple[Any, str]:
    """Make sure that every file has a shard; return their keys and the engine's name. What the engine held is free."""
    from mlxflow.data.encoder import choose_encoder
    from mlxflow.data.progress import show_progress
    from mlxflow.data.shard_builder import Tokenizing
    from mlxflow.data.watched import Work
    from mlxflow.system import heap

    with Work(vocabulary.subject, size=len(vocabulary.definition)):
        encoder = choose_encoder(vocabulary.definition, threads=config.workers)
    if encoder.name == "fastokens":  # the other one makes so many small objects that its threads would wait
        heap.share_one()
    tokenizing = Tokenizing(
        vocabulary=vocabulary,
        encoder=encoder,
        train_on=config.train_on,
        store=store,
        workers=config.workers,
    )
    with show_progress("tokenizing", sum(file.size for file in files)) as (progress, watch):
        return tokenizing.run(files, progress, watch), encoder.name


def _vocabulary(config: Config, inputs: Inputs, context: Context, files: list[Any], holdout: float) -> Any:
    """Return the tokenizer that the table asks for, trained here or opened."""
    from mlxflow.data import tokenizer, tokenizer_folder
    from mlxflow.storage import remote_code
    from mlxflow.storage.temporary_files import scratch_folder

    template = inputs.template[0].read_text(encoding="utf-8") if inputs.template else None
    name = config.tokenizer.from_
    if not name:
        return _trained(config, context, files, holdout, template)
    with remote_code.trusting_code(config.tokenizer.trust_remote_code), scratch_folder() as scratch:
        folder = inputs.tokenizer[0].parent if inputs.tokenizer else Path()
        found = {path.relative_to(folder).as_posix(): path for path in inputs.tokenizer}
        found = found or tokenizer_folder.hub_files(name)
        found = tokenizer_folder.converted(found, scratch, name)
        return tokenizer.open_vocabulary(found, template=template, name=name, template_key=_template_key(config))


def _trained(config: Config, context: Context, files: list[Any], holdout: float, template: str | None) -> Any:
    """Return a tokenizer trained on the training documents, or on a sample of them, unless it is there already."""
    from mlxflow.data import chat, tokenizer, tokenizer_sample
    from mlxflow.data.chatml import CHATML
    from mlxflow.data.long_words import MAX_WORD_LENGTH, has_long_word
    from mlxflow.data.progress import show_progress
    from mlxflow.storage.atomic_folders import write_whole
    from mlxflow.storage.digests import digest_json
    from mlxflow.storage.regular_files import read_regular
    from mlxflow.system import heap

    compiled = tokenizer.compile_template(template, _template_key(config)) if template else None
    with show_progress("reading", sum(file.size for file in files)) as (progress, watch):

        def on_read(count: int) -> None:
            progress.count(read_bytes=count)
            watch()

        sample = tokenizer_sample.sample(
            files,
            template=compiled,
            holdout=holdout,
            max_bytes=config.tokenizer.max_training_bytes,
            on_read=on_read,
        )
    template = CHATML if template is None and sample.has_conversations else template
    special = chat.markers(template) if template else []
    cut = [MAX_WORD_LENGTH] if any(map(has_long_word, sample.decoded())) else []
    key = digest_json([VERSION, config.tokenizer.vocab_size, special, [one.hex() for one in sample.digests], *cut])
    kept = context.state / layout.SHARDS / f"{key}.tokenizer.json"
    if not kept.exists():
        made = tokenizer.train_tokenizer(sample.taken(), vocab_size=config.tokenizer.vocab_size, special_tokens=special)
        write_whole(kept, made.to_str().encode())
        heap.trim()
    return tokenizer.trained_vocabulary(
        read_regular(kept).decode(),
        context_length=config.context_length,
        template=template,
        template_key=_template_key(config),
    )


def _template_key(config: Config) -> str:
    return f"pretokenize.chat_template = {json.dumps(config.chat_template)}"


def _write_sides(
    config: Config, outputs: Outputs, context: Context, vocabulary: Any, contents: Any, ends: Any
) -> dict[str, Any]:
    """Write both token files and return what became of the documents of each."""
    from mlxflow.data import document_selection, shortage, token_file_writer
    from mlxflow.data.progress import show_waiting
    from mlxflow.data.row_packer import RowSettings
    from mlxflow.storage import tensor_writing

    sides: dict[str, tuple[int, token_file_writer.Part, Path]] = {
        "train": (document_selection.TRAIN, "all", outputs.train),
        "validation": (document_selection.VALIDATION, "all", outputs.validation),
    }
    if contents.held_out:
        sides["train"] = (document_selection.TRAIN, "rest", outputs.train)
        sides["validation"] = (document_selection.TRAIN, "end", outputs.validation)
    metadata = {
        "context_length": str(config.context_length),
        "vocab_size": str(vocabulary.size),
        "end_of_text": str(vocabulary.end_of_text),
        "end_tokens": " ".join(map(str, ends.tokens)),
    }
    counts = {}
    for side, (number, part, path) in sides.items():
        with show_waiting(f"packing {side} rows") as watch:
            counts[side] = token_file_writer.write_rows(
                path,
                documents=token_file_writer.SideDocuments(
                    contents.shards, contents.selection, number, part, contents.held_out
                ),
                rows=RowSettings(
                    capacity=config.context_length + 1,
                    packing=config.packing,
                    on_long=config.on_long,
                    padding=vocabulary.end_of_text,
                    seed=derive_seed(context.seed, f"pretokenize.{side}"),
                ),
                dtype=vocabulary.dtype,
                metadata=metadata | tensor_writing.provenance_metadata(context.provenance),
                watch=watch,
            )
        shortage.require_rows(
            contents, side, counts[side], context_length=config.context_length, on_long=config.on_long
        )
    return counts


def _write_tokenizer(vocabulary: Any, outputs: Outputs, ends: Any) -> None:
    """Write the tokenizer; its end-of-sequence token is one that the model learns to end with."""
    from mlxflow.data import tokenizer_folder

    if ends.texts and vocabulary.eos_token not in ends.texts:
        vocabulary = vocabulary.ending_with(ends.texts[0])
    tokenizer_folder.save_vocabulary(vocabulary, tokenizer_file=outputs.tokenizer, config_file=outputs.tokenizer_config)
