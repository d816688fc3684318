"""The work of `pretokenize` for one corpus: tokenize its files, split its documents, pack rows."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from mlxflow.data import (
    document_selection,
    end_tokens,
    input_files,
    shard_builder,
    shard_cache,
    shortage,
    token_file_writer,
    tokenizer_folder,
    watched,
)
from mlxflow.data.bin_packing import Packing
from mlxflow.data.corpus_figures import SideCounts
from mlxflow.data.corpus_names import CorpusNames
from mlxflow.data.corpus_report import CorpusContents
from mlxflow.data.documents import TrainOn
from mlxflow.data.encoder import choose_encoder
from mlxflow.data.end_tokens import Endings
from mlxflow.data.input_files import SourceSettings
from mlxflow.data.progress import show_progress, show_waiting
from mlxflow.data.row_packer import OnLong, RowSettings
from mlxflow.data.shard import Shard
from mlxflow.data.shard_builder import SourceFile, Tokenized, Tokenizing
from mlxflow.data.sources import Corpus
from mlxflow.data.tokenizer import Vocabulary
from mlxflow.data.tokenizer_choice import TokenizerRequest, choose_vocabulary
from mlxflow.data.watched import Work
from mlxflow.device import heap
from mlxflow.storage import layout, tensor_writing
from mlxflow.storage.locks import hold
from mlxflow.storage.run_context import Context, derive_seed


class RowLayout(NamedTuple):
    """How documents are packed into rows.

    Attributes:
        context_length: positions the model sees, L; a row has L + 1 tokens.
        packing: the packing method.
        on_long: what to do with conversations longer than a row.
    """

    context_length: int
    packing: Packing
    on_long: OnLong


class CorpusRequest(NamedTuple):
    """The settings of a corpus.

    Attributes:
        inputs: files and corpora.
        owners: for each of them the number of its source.
        sources: their settings.
        tokenizer: the tokenizer.
        holdout: share of the documents kept for validation.
        deduplicate: keep only one of equal documents.
        max_bad_records: share of records that may be skipped; None: any bad record is an error.
        train_on: the parts of conversations that are trained on.
        workers: files tokenized at a time.
        layout: of the rows.
        names: of the settings, for messages.
    """

    inputs: Sequence[Path | Corpus]
    owners: Sequence[int]
    sources: Sequence[SourceSettings]
    tokenizer: TokenizerRequest
    holdout: float
    deduplicate: bool
    max_bad_records: float | None
    train_on: TrainOn
    workers: int
    layout: RowLayout
    names: CorpusNames


class CorpusFiles(NamedTuple):
    """The files of a corpus.

    Attributes:
        tokenizer: `tokenizer.json`.
        tokenizer_config: `tokenizer_config.json`.
        train: token file.
        validation: token file.
        names: list of the source files, one per line.
    """

    tokenizer: Path
    tokenizer_config: Path
    train: Path
    validation: Path
    names: Path


class PackedCorpus(NamedTuple):
    """The result of `run_job`.

    Attributes:
        contents: files, documents and their splits.
        counts: of the rows of "train" and "validation".
        vocabulary: the tokenizer.
        endings: tokens that end documents and turns.
        tokenized: the shards of the files.
        engine: name of the tokenizer library.
    """

    contents: CorpusContents
    counts: dict[str, SideCounts]
    vocabulary: Vocabulary
    endings: Endings
    tokenized: Tokenized
    engine: str


def run_job(request: CorpusRequest, files: CorpusFiles, context: Context) -> PackedCorpus:
    """Tokenize files without a shard, split the documents, and write both token files.

    Args:
        request: the settings.
        files: to write.
        context: of the stage.

    Raises:
        SourceError: a source cannot be used, or there is less than one row of text.
        StageError: the disk is full.
    """
    files_to_read = input_files.list_files(request.inputs, request.owners, request.sources, digests=context.digests)
    shards = context.state / layout.SHARDS
    store = shard_cache.ShardStore(shards)
    waiting = f"{context.task}: waits for the shards, used by process {{holder}}"
    with ExitStack() as held:
        with watched.waiting():
            held.enter_context(hold(shards / layout.LOCK, waiting, wait=True, needed=True))
        vocabulary = choose_vocabulary(
            request.tokenizer,
            files_to_read,
            holdout=request.holdout,
            context_length=request.layout.context_length,
            cache_folder=shards,
        )
        tokenized, engine = _tokenize(request, vocabulary, store, files_to_read)
        context.digests.settle(file.path for file in files_to_read if file.read is None)
        contents = _select(request, files_to_read, shard_builder.open_shards(store, tokenized.keys))
        endings = end_tokens.endings_of(contents.shards, vocabulary)
        counts = _write_sides(request, files, context, vocabulary, contents, endings)
        store.collect(context.task, tokenized.keys, context.tasks)
    _write_tokenizer(vocabulary, files, endings)
    files.names.write_text("".join(f"{file.name}\n" for file in files_to_read), encoding="utf-8")
    return PackedCorpus(contents, counts, vocabulary, endings, tokenized, engine)


def _tokenize(
    request: CorpusRequest, vocabulary: Vocabulary, store: shard_cache.ShardStore, files: Sequence[SourceFile]
) -> tuple[Tokenized, str]:
    """Make the missing shards; return all shards and the engine's name. Frees the engine's memory."""
    with Work(vocabulary.subject, size=len(vocabulary.definition)):
        encoder = choose_encoder(vocabulary.definition, threads=request.workers)
    if encoder.name == "fastokens":  # with the library's many small objects, threads would contend for the allocator
        heap.share_one()
    tokenizing = Tokenizing(
        vocabulary=vocabulary,
        encoder=encoder,
        train_on=request.train_on,
        store=store,
        workers=request.workers,
        names=request.names,
    )
    with show_progress("tokenizing", sum(file.size for file in files)) as (progress, watch):
        return tokenizing.run(files, progress, watch), encoder.name


def _select(request: CorpusRequest, files: Sequence[SourceFile], shards: Sequence[Shard]) -> CorpusContents:
    """Return the corpus with the split of every document.

    Raises:
        SourceError: there are bad records, or a split has no documents.
    """
    most = request.max_bad_records
    input_files.check(files, shards, skips=most is not None, max_share=most or 0.0, names=request.names)
    chosen = document_selection.select(
        shards,
        fixed_sides=[file.side for file in files],
        sources=[file.source for file in files],
        weights=[source.weight for source in request.sources],
        holdout=request.holdout,
        deduplicate=request.deduplicate,
        is_configured=[request.sources[file.source].is_validation for file in files],
    )
    held_out = document_selection.held_out_share(chosen, request.holdout)
    contents = CorpusContents(request.sources, files, shards, chosen, held_out)
    shortage.require_documents(contents, "train", request.names)
    shortage.require_documents(contents, "validation", request.names)
    return contents


def _write_sides(
    request: CorpusRequest,
    files: CorpusFiles,
    context: Context,
    vocabulary: Vocabulary,
    contents: CorpusContents,
    endings: Endings,
) -> dict[str, SideCounts]:
    """Write both token files and return the figures of each."""
    rows = request.layout
    sides: dict[str, tuple[int, token_file_writer.Part, Path]] = {
        "train": (document_selection.TRAIN, "all", files.train),
        "validation": (document_selection.VALIDATION, "all", files.validation),
    }
    if contents.held_out:
        sides["train"] = (document_selection.TRAIN, "rest", files.train)
        sides["validation"] = (document_selection.TRAIN, "end", files.validation)
    metadata = {
        "context_length": str(rows.context_length),
        "vocab_size": str(vocabulary.size),
        "end_of_text": str(vocabulary.end_of_text),
        "end_tokens": " ".join(map(str, endings.tokens)),
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
                    capacity=rows.context_length + 1,
                    packing=rows.packing,
                    on_long=rows.on_long,
                    padding=vocabulary.end_of_text,
                    seed=derive_seed(context.seed, f"pretokenize.{side}"),
                ),
                dtype=vocabulary.dtype,
                metadata=metadata | tensor_writing.provenance_metadata(context.provenance),
                watch=watch,
            )
        shortage.require_rows(
            contents, side, counts[side], request.names, context_length=rows.context_length, on_long=rows.on_long
        )
    return counts


def _write_tokenizer(vocabulary: Vocabulary, files: CorpusFiles, endings: Endings) -> None:
    """Write the tokenizer with an end-of-sequence token that the model learns."""
    if endings.texts and vocabulary.eos_token not in endings.texts:
        vocabulary = vocabulary.ending_with(endings.texts[0])
    tokenizer_folder.save_vocabulary(vocabulary, tokenizer_file=files.tokenizer, config_file=files.tokenizer_config)
