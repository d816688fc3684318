"""Errors for a corpus without documents in a split or with too few rows, with the reasons."""

from collections.abc import Iterator, Sequence
from typing import Literal

from mlxflow.data.corpus_figures import SideCounts
from mlxflow.data.corpus_names import CorpusNames
from mlxflow.data.corpus_report import CorpusContents, count_of, list_some
from mlxflow.data.document_selection import DUPLICATE, TEST, TRAIN, VALIDATION
from mlxflow.data.input_files import problems_of
from mlxflow.data.shard import Shard
from mlxflow.data.shard_builder import SourceFile
from mlxflow.messages.errors import SourceError

_ACT = {"train": "train on", "validation": "validate on"}


def require_documents(contents: CorpusContents, side: Literal["train", "validation"], names: CorpusNames) -> None:
    """Refuse a corpus without a document in a split.

    Args:
        contents: the corpus.
        side: the split.
        names: of the settings, for messages.

    Raises:
        SourceError: there is none; the message says why documents were left out.
    """
    number = TRAIN if side == "train" or contents.held_out else VALIDATION
    if contents.count(number):
        return
    facts = list(_facts(contents, side))
    key = "sources" if side == "train" else "validation_sources"
    raise SourceError(
        f"{names.of(key)}: no document is left to {_ACT[side]}: {'; '.join(facts)}. {_advise(contents, side, names)}"
    )


def _advise(contents: CorpusContents, side: str, names: CorpusNames) -> str:
    """Return the advice for a split without documents."""
    if any(shard.masked for shard in contents.shards):
        how = "Fix the chat template, which leaves the answers out, or set"
        return f'{how} {names.of("train_on")} = "all".'
    if side == "train" and (contents.names("test") or contents.names("validation")):
        return "Name the file itself, or the split of a data set, to train on it."
    if any(shard.num_bad for shard in contents.shards):
        return "Fix them."
    return "Name a file, a folder or a glob with text in it."


def require_rows(
    contents: CorpusContents, side: str, counts: SideCounts, names: CorpusNames, *, context_length: int, on_long: str
) -> None:
    """Refuse too few rows, or rows without trained tokens.

    Args:
        contents: the corpus.
        side: "train" or "validation".
        counts: figures of its documents.
        names: of the settings, for messages.
        context_length: positions that the model sees.
        on_long: treatment of conversations longer than a row.

    Raises:
        SourceError: there are too few; the message says why.
    """
    needed_tokens = context_length + 1 if side == "train" else 2
    if counts.targets and counts.tokens >= needed_tokens:
        return
    lost = counts.truncated + counts.dropped
    sources, length = names.of("sources"), names.of("context_length")
    if counts.documents and not counts.targets and lost:
        raise SourceError(
            f"{sources}: no row of the {side} documents holds a token to train on: {lost:,} of "
            f"{counts.documents:,} conversations are longer than the {context_length + 1:,} tokens of a row, and "
            f'{names.of("on_long")} = "{on_long}" leaves {"them" if counts.dropped else "their answers"} out. '
            f'Raise {length}, or set {names.of("on_long")} = "split".'
        )
    facts = [fact for fact in _facts(contents, side) if contents.count(DUPLICATE)]
    more = f" ({'; '.join(facts)})" if facts else ""
    if side == "validation":
        what = "the end of the only document is too short to be held out" if contents.held_out else ""
        raise SourceError(
            f"{sources}: {what or f'the validation documents have {counts.tokens:,} tokens, 2 are needed'}"
            f"{more}. Add text, or name documents in {names.of('validation_sources')}."
        )
    raise SourceError(
        f"{sources}: the train documents have {counts.tokens:,} tokens"
        f"{' beside the end that is held out' if contents.held_out else ''}{more}, one row of "
        f"{length} = {context_length} needs {needed_tokens:,}. Add text, or lower the context length."
    )


def _facts(contents: CorpusContents, side: str) -> Iterator[str]:
    """Yield why documents, records and files are in neither split."""
    pairs = _files_of(contents, side)
    if count := contents.count(DUPLICATE):
        yield f"{_are(count, 'document')} equal to others"
    if side == "train":
        for number, name in ((TEST, "test"), (VALIDATION, "validation")):
            if count := contents.count(number):
                where = f" ({list_some(names)})" if (names := contents.names(name)) else ""
                yield f"{_are(count, 'document')} on the {name} side{where}"
    bad = [line for file, shard in pairs for line in problems_of(file, shard)]
    if bad:
        count = sum(shard.num_bad for _, shard in pairs)
        yield f"{_are(count, 'record')} skipped, the first: {bad[0]}"
    yield from _facts_of_files(pairs)


def _facts_of_files(pairs: Sequence[tuple[SourceFile, Shard]]) -> Iterator[str]:
    """Yield the documents and files without tokens to train on."""
    if count := sum(shard.masked for _, shard in pairs):
        yield f"{_are(count, 'document')} without a token to train on"
    if count := sum(shard.blank for _, shard in pairs):
        yield f"{_are(count, 'document')} blank"
    if names := [file.name for file, shard in pairs if shard.is_binary and not problems_of(file, shard)]:
        yield f"{_are(len(names), 'file')} binary, with NUL bytes ({list_some(names)})"
    if names := [file.name for file, _ in pairs if file.size == 0 and file.read is None]:
        yield f"{_are(len(names), 'file')} empty ({list_some(names)})"


def _files_of(contents: CorpusContents, side: str) -> list[tuple[SourceFile, Shard]]:
    """Return the files, with their shards, whose documents can be in a split."""
    takes_all = side == "train" or not any(entry.is_validation for entry in contents.settings)
    pairs = zip(contents.files, contents.shards, strict=True)
    return [(file, shard) for file, shard in pairs if takes_all or contents.settings[file.source].is_validation]


def _are(count: int, noun: str) -> str:
    return f"{count_of(count, noun)} {'is' if count == 1 else 'are'}"
