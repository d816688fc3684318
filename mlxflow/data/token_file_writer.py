"""Write a token file: the selected documents of shards, packed into rows in one pass of bounded memory."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from mlxflow.data.corpus_figures import SideCounts
from mlxflow.data.document_selection import DocumentSelection, tail_begin
from mlxflow.data.row_packer import Packer, RowSettings, Stored
from mlxflow.data.shard import CONVERSATION, MASKED, Shard
from mlxflow.storage.array_stream import ArrayStream

if TYPE_CHECKING:
    from numpy.typing import NDArray

Part = Literal["all", "rest", "end"]


class SideDocuments(NamedTuple):
    """The documents of one split of a corpus.

    Attributes:
        shards: in the order of the corpus.
        selection: the split of each document.
        side: TRAIN or VALIDATION.
        part: the part of each document: all of it, its beginning if its end is held out, or that end.
        held_out: the share of each document that is its end.
    """

    shards: Sequence[Shard]
    selection: DocumentSelection
    side: int
    part: Part
    held_out: float


def write_rows(
    path: Path,
    *,
    documents: SideDocuments,
    rows: RowSettings,
    dtype: "np.dtype[Any]",
    metadata: dict[str, str],
    watch: Callable[[], None],
) -> SideCounts:
    """Pack the documents of one split into rows and write them as a token file.

    Args:
        path: the file.
        documents: of the split.
        rows: settings of the packing.
        dtype: of ids.
        metadata: for the file's header.
        watch: called now and then.
    """
    # Columns in the order of the file; see TokenFile for their meaning.
    columns: dict[str, tuple[str | None, tuple[int, ...]]] = {
        "tokens": (dtype.name, (rows.capacity,)),
        "marks": (None, (rows.capacity,)),
        "document_files": (None, ()),
        "document_places": (None, ()),
        "piece_documents": (None, ()),
        "piece_begins": (None, ()),
        "row_pieces": (None, ()),
    }
    with ArrayStream(path, columns) as stream, Packer(stream, rows) as packer:
        _write_documents(stream, documents.shards, documents.selection, documents.side)
        for document in _documents(*documents):
            packer.add(document)
            watch()
        counts = packer.finish()
        stream.metadata.update(metadata)
        stream.metadata["targets"] = str(counts.targets)
        stream.metadata["has_conversations"] = "true" if counts.conversations else "false"
    return counts


def _kept(selection: DocumentSelection, side: int, shard: int) -> "NDArray[np.bool_]":
    is_kept: NDArray[np.bool_] = (selection.sides[shard] == side) & (selection.repeats[shard] > 0)
    return is_kept


def _write_documents(stream: ArrayStream, shards: Sequence[Shard], selection: DocumentSelection, side: int) -> None:
    """Write the file and the position of each document, in the order of their numbers."""
    for number, shard in enumerate(shards):
        is_kept = _kept(selection, side, number)
        count = int(is_kept.sum())
        if count:
            stream.append("document_files", np.full(count, number, np.uint32))
            stream.append("document_places", shard.documents().places[is_kept])


def _documents(
    shards: Sequence[Shard], selection: DocumentSelection, side: int, part: Part, held_out: float
) -> Iterator[Stored]:
    """Yield documents in the order of the corpus, then again those that an epoch contains twice, and so on."""
    most = max((int(repeat.max(initial=0)) for repeat in selection.repeats), default=0) if part != "end" else 1
    for showing in range(most):
        number = 0
        for index, shard in enumerate(shards):
            is_kept = _kept(selection, side, index)
            shown = is_kept & (selection.repeats[index] > showing)
            if shown.any():
                yield from _stored(shard, shown, number + np.cumsum(is_kept) - 1, part, held_out)
            number += int(is_kept.sum())


def _stored(
    shard: Shard, shown: "NDArray[np.bool_]", numbers: "NDArray[np.int64]", part: Part, held_out: float
) -> Iterator[Stored]:
    documents = shard.documents()
    lengths, flags, span_counts = documents.lengths, documents.flags, documents.span_counts
    spans = shard.read("spans")
    span_ends = np.cumsum(span_counts)
    for document, ids in _tokens(shard, lengths, shown):
        targets = None
        if int(flags[document]) & MASKED:
            targets = np.zeros(len(ids), np.bool_)
            for low, high in spans[span_ends[document] - span_counts[document] : span_ends[document]]:
                targets[low:high] = True
        if part != "all":
            cut = tail_begin(len(ids), targets, held_out)
            taken = slice(cut, None) if part == "end" else slice(cut)
            ids, targets = ids[taken], None if targets is None else targets[taken]
        if len(ids):
            yield Stored(int(numbers[document]), ids, bool(int(flags[document]) & CONVERSATION), targets)


def _tokens(
    shard: Shard, lengths: "NDArray[np.int64]", shown: "NDArray[np.bool_]"
) -> Iterator[tuple[int, "NDArray[Any]"]]:
    """Yield the tokens of the selected documents, each with its number in the shard."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    if lengths[shown].sum() * 4 < offsets[-1]:  # few documents, such as those for validation: read each alone
        for document in np.flatnonzero(shown).tolist():
            yield document, shard.read("tokens", int(offsets[document]), int(offsets[document + 1]))
        return
    for first, end, tokens in shard.token_spans(lengths):
        bounds = (offsets[first : end + 1] - offsets[first]).tolist()
        for document in (first + np.flatnonzero(shown[first:end])).tolist():
            yield document, tokens[bounds[document - first] : bounds[document - first + 1]]
