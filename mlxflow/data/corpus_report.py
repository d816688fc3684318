"""The report of a corpus: figures of its sources, what was left out, and warnings about its splits."""

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mlxflow.data import sources
from mlxflow.data.corpus_figures import DocumentLengths, SideCounts, SourceFigures
from mlxflow.data.document_selection import DUPLICATE, TEST, TRAIN, VALIDATION, DocumentSelection
from mlxflow.data.input_files import MOST_TOLD, SourceSettings, named_side, problems_of
from mlxflow.data.shard import Shard
from mlxflow.data.shard_builder import SourceFile

if TYPE_CHECKING:
    from numpy.typing import NDArray

_NAMED = 3

# A noun, and what says more of it
_NOUN = re.compile(r"(.*?)((?: without | longer ).*|$)")


class CorpusContents(NamedTuple):
    """A corpus that was read.

    Attributes:
        settings: the entries of the sources.
        files: in the order of the corpus.
        shards: of each file.
        selection: the split of each document.
        held_out: the share of each training document that is held out because no whole document is; else 0.
    """

    settings: Sequence[SourceSettings]
    files: Sequence[SourceFile]
    shards: Sequence[Shard]
    selection: DocumentSelection
    held_out: float

    def count(self, side: int, members: Sequence[int] | None = None) -> int:
        """Return the number of documents in a split, of all files or of the files with the given numbers."""
        chosen = self.selection.sides if members is None else [self.selection.sides[i] for i in members]
        return sum(int((one == side).sum()) for one in chosen)

    def names(self, side: str) -> list[str]:
        """Return the files and data set splits whose names assign them to a split, each once."""
        files = [file for file in self.files if file.side == side and not self.settings[file.source].is_validation]
        return list(dict.fromkeys(file.name.rpartition("[")[0] if file.read else file.name for file in files))


# --- the report


def first_names(contents: CorpusContents, side: str) -> list[str]:
    """Return the first files and data set splits whose names assign them to a split.

    Args:
        contents: the corpus.
        side: "validation" or "test".
    """
    return contents.names(side)[:MOST_TOLD]


def bad_records(contents: CorpusContents) -> list[str]:
    """Return a line for each of the first unreadable records: file, position and reason."""
    pairs = zip(contents.files, contents.shards, strict=True)
    return [line for file, shard in pairs for line in problems_of(file, shard)][: 5 * MOST_TOLD]


def account(contents: CorpusContents, number: int, *, capacity: int) -> SourceFigures:
    """Return the figures of one source.

    Args:
        contents: the corpus.
        number: of the source.
        capacity: tokens per row.
    """
    entry = contents.settings[number]
    members = [i for i, file in enumerate(contents.files) if file.source == number]
    mine = [contents.shards[i] for i in members]
    source_files = (
        sources.find(entry.path, entry.root) if entry.path not in sources.BUILTINS else sources.SourceFiles([])
    )
    parts, text_bytes = [np.zeros(0, np.int64)], 0
    for shard in mine:
        documents = shard.documents()
        parts.append(documents.lengths)
        text_bytes += int(documents.sizes.sum())
    lengths = np.concatenate(parts)
    return SourceFigures(
        path=entry.path,
        config=entry.config,
        split=entry.split,
        weight=entry.weight,
        files=len(members),
        documents=len(lengths),
        train_documents=contents.count(TRAIN, members),
        validation_documents=contents.count(VALIDATION, members),
        test_documents=contents.count(TEST, members),
        duplicates=contents.count(DUPLICATE, members),
        tokens=int(lengths.sum()),
        text_bytes=text_bytes,
        bytes_per_token=round(text_bytes / max(1, int(lengths.sum())), 4),
        tokens_per_document=_quantiles(lengths),
        longer_than_a_row=int((lengths > capacity).sum()),
        blank_documents=sum(shard.blank for shard in mine),
        masked_documents=sum(shard.masked for shard in mine),
        bad_records=sum(shard.num_bad for shard in mine),
        binary_files=source_files.binary + sum(shard.is_binary for shard in mine),
        empty_files=sum(_is_empty(contents.files[i]) for i in members),
        hidden_files=source_files.hidden,
        broken_links=source_files.broken_links,
        files_beside_records=source_files.beside_records,
    )


def _is_empty(file: SourceFile) -> bool:
    return file.size == 0 and file.read is None


def _quantiles(lengths: "NDArray[np.int64]") -> DocumentLengths:
    if not len(lengths):
        return DocumentLengths()
    return DocumentLengths(*map(int, np.quantile(lengths, [0.0, 0.05, 0.5, 0.95, 1.0], method="lower")))


# --- warnings


def warnings(contents: CorpusContents, counts: dict[str, SideCounts]) -> Iterator[str]:
    """Yield warnings about the splits, one sentence each.

    Args:
        contents: the corpus.
        counts: figures of the documents of each split.
    """
    for side, use in (("test", "used only to find duplicates"), ("validation", "used for validation")):
        if names := contents.names(side):
            yield f"kept out of training, a {side} side by name: {list_some(names)} ({use})"
    for entry in contents.settings:
        if not entry.is_validation and (side := named_side(entry)) in ("test", "validation"):
            what = f"{entry.path}, split {entry.split}," if entry.split else entry.path
            yield f"{what} is trained on because {entry.key} names it, though its name says {side}"
    if contents.held_out:
        only = contents.count(TRAIN) == 1
        whose = "the only document" if only else "each document"
        end = count_of(counts["validation"].tokens, "token")
        yield f"no whole document can be held out: validation is the end of {whose}, {end}"


def summary(contents: CorpusContents, counts: dict[str, SideCounts]) -> str:
    """Return one line with the figures of both splits, of everything left out, and of conversations that were cut.

    Args:
        contents: the corpus.
        counts: figures of the documents of each split.
    """
    use = {"train": "to train on", "validation": "to validate on"}
    figures = ", ".join(
        f"{count_of(one.documents, 'document')} ({count_of(one.tokens, 'token')} in {count_of(one.rows, 'row')}) "
        f"{use[side]}"
        for side, one in counts.items()
    )
    lost = {
        "duplicate": contents.count(DUPLICATE),
        "blank document": sum(shard.blank for shard in contents.shards),
        "document without a token to learn": sum(shard.masked for shard in contents.shards),
        "row without a token to learn": sum(one.rows_without_targets for one in counts.values()),
        "bad record": sum(shard.num_bad for shard in contents.shards),
        "conversation longer than a row": sum(one.dropped for one in counts.values()),
    }
    # Among other documents, which are cut at no loss, conversations in several rows are not counted apart
    split = sum(one.cut_documents for one in counts.values() if one.conversations == one.documents)
    groups = {
        "left out": [count_of(count, noun) for noun, count in lost.items() if count],
        "cut off after one row": _some_conversations(sum(one.truncated for one in counts.values())),
        "cut into several rows": _some_conversations(split),
    }
    return "; ".join([figures, *(f"{what}: {', '.join(parts)}" for what, parts in groups.items() if parts)])


def _some_conversations(count: int) -> list[str]:
    return [count_of(count, "conversation")] if count else []


def count_of(count: int, noun: str) -> str:
    """Return a number with a noun in the singular or plural; what follows "without" or "longer" is unchanged."""
    head, rest = _NOUN.findall(noun)[0]
    return f"{count:,} {head}{'s' * (count != 1)}{rest}"


def list_some(names: Sequence[str]) -> str:
    """Return the first names of a list and the number of the others."""
    more = [f"{len(names) - _NAMED:,} more"] if len(names) > _NAMED else []
    return ", ".join([*names[:_NAMED], *more])
